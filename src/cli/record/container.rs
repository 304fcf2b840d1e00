//! The container that a recording runs the image's program in.
//!
//! Two processes of this program stand between the verb and the image's program. The outer one makes the namespaces and
//! mounts the device there, where nobody else sees it; the inner one is process 1 of them, makes the image its root, gives
//! up what a container has no right to, and becomes the program. The outer one ends it as soon as its own standard input is
//! closed, so that whatever ends the verb ends all; with the last of them the mounts and namespaces go.
//!
//! The program sees what runc gives one by default, except that there is no network but loopback, no device of the image is
//! usable, and set-user-id programs gain nothing. There is no seccomp filter.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use clap::{Args, ValueEnum};
use rustix::fs::{CWD, FileType, Mode, OFlags, makedev};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Pid, PidfdFlags, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets};
use serde::{Deserialize, Serialize};

use super::loopback;
use super::user::{User, look_up};
use crate::cli::Outcome;
use crate::daemon::control::{Attached, Kind, Problem};
use crate::daemon::mounts;
use crate::sys::namespace;

/// Longest job in bytes.
const JOB_MAX: u64 = 16 << 20;
/// What a program in a container may do, as docker and runc have it; without MKNOD, which needs a list of devices.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::AUDIT_WRITE);
/// Files of proc that nobody in a container sees, and directories of it that nobody there writes.
const MASKED: [&str; 8] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/sched_debug",
    "/proc/scsi",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is to be run, and on what.
#[derive(Debug, Serialize, Deserialize)]
pub struct Job {
    /// The device, with ext4 on it.
    pub device: Attached,
    /// A directory that is covered by what the container writes, in its own mount namespace.
    pub room: PathBuf,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// `USER[:GROUP]` of the image.
    pub user: Option<String>,
    /// Working directory.
    pub dir: Option<String>,
}

/// What the container's processes tell the verb, a line of JSON each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// The program could not be started.
    Failed(String),
    /// The program ended.
    Ended {
        /// Its status, if it exited.
        code: Option<i32>,
        /// The signal that ended it otherwise.
        signal: Option<i32>,
    },
}

/// The hidden verb of both processes.
#[derive(Debug, Args)]
pub struct Inside {
    stage: Stage,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Stage {
    Outer,
    Inner,
}

type Step<T = ()> = Result<T, String>;

/// Starts a container; its standard input is open until it shall end, its output comes on standard error, and reports on
/// standard output.
///
/// # Errors
/// A process that can't be started.
pub fn start(job: &Job) -> Outcome<Child> {
    spawn(Stage::Outer, job, Stdio::piped())
        .map_err(|error| Problem::new(Kind::Failed, format!("starting the container: {error}")))
}

fn spawn(stage: Stage, job: &Job, stdout: Stdio) -> io::Result<Child> {
    let name = match stage {
        Stage::Outer => "outer",
        Stage::Inner => "inner",
    };
    let mut command = Command::new("/proc/self/exe");
    command.args(["record-inside", name]).stdin(Stdio::piped()).stdout(stdout);
    match stage {
        Stage::Outer => command.stderr(Stdio::piped()),
        Stage::Inner => command.stderr(Stdio::inherit()),
    };
    let mut child = command.spawn()?;
    let mut line = serde_json::to_vec(job)?;
    line.push(b'\n');
    match &mut child.stdin {
        Some(stdin) => stdin.write_all(&line)?,
        None => return Err(io::Error::other("no standard input")),
    }
    Ok(child)
}

impl Inside {
    /// Runs the process: the inner one becomes the program.
    pub fn run(&self) -> Outcome {
        let mut reports = io::stdout();
        let outcome = match self.stage {
            Stage::Outer => outer(&mut reports),
            Stage::Inner => inner(),
        };
        if let Err(message) = outcome {
            report(&mut reports, &Report::Failed(message));
        }
        Ok(())
    }
}

fn report(mut to: impl Write, report: &Report) {
    // Nobody is left to tell when the verb is gone.
    if let Ok(line) = serde_json::to_string(report) {
        let _ = writeln!(to, "{line}").and_then(|()| to.flush());
    }
}

/// The job on standard input, of which nothing behind its line is taken.
fn job() -> Step<Job> {
    let mut line = Vec::new();
    let read = BufReader::with_capacity(1 << 16, io::stdin().lock().take(JOB_MAX)).read_until(b'\n', &mut line);
    read.map_err(|error| error.to_string())
        .and_then(|_| serde_json::from_slice(&line).map_err(|error| error.to_string()))
        .map_err(|error| format!("reading what to record: {error}"))
}

fn step<T>(what: &str, result: Result<T, impl std::fmt::Display>) -> Step<T> {
    result.map_err(|error| format!("{what}: {error}"))
}

// --- the outer process -----------------------------------------------------------------------------------------------

fn outer(reports: impl Write) -> Step {
    let job = job()?;
    // A terminal's Ctrl-C is for the verb.
    step("starting a session", rustix::process::setsid())?;
    step("the container", namespace::enter_container_namespaces())?;
    let flags = MountFlags::NODEV | MountFlags::NOSUID;
    step("mounting a tmpfs", rustix::mount::mount("firstread-record", &job.room, "tmpfs", flags, Some(c"mode=0755")))?;
    // Relative names: no character of the directory's name means anything to overlayfs.
    step("entering the container's directory", rustix::process::chdir(&job.room))?;
    for name in ["lower", "upper", "work", "root", "upper/etc"] {
        step("preparing the container", fs::DirBuilder::new().mode(0o755).create(name))?;
    }
    step("preparing the container", fs::write("upper/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"))?;
    mounts::mount(&job.device, &job.room.join("lower")).map_err(|problem| problem.message)?;
    let outcome = overlay_and_run(&job, reports);
    for name in ["root", "lower"] {
        // Gone with the namespace otherwise.
        let _ = rustix::mount::unmount(name, UnmountFlags::NOFOLLOW);
    }
    outcome
}

fn overlay_and_run(job: &Job, reports: impl Write) -> Step {
    let options = c"lowerdir=lower,upperdir=upper,workdir=work";
    let flags = MountFlags::NODEV;
    step("mounting an overlay", rustix::mount::mount("firstread-record", "root", "overlay", flags, Some(options)))?;
    step("the loopback interface", loopback::up())?;
    let mut child = step("starting the container", spawn(Stage::Inner, job, Stdio::inherit()))?;
    let status = step("waiting for the program", wait_or_end(&mut child))?;
    report(reports, &Report::Ended { code: status.code(), signal: status.signal() });
    Ok(())
}

/// Waits for the child; ends it when standard input is closed.
fn wait_or_end(child: &mut Child) -> io::Result<std::process::ExitStatus> {
    use rustix::event::{PollFd, PollFlags, poll};
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(|| io::Error::other("no process"))?;
    let ended = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let stdin = io::stdin();
    loop {
        let mut fds = [PollFd::new(&ended, PollFlags::IN), PollFd::new(&stdin, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    // Whichever it was: one that has ended can't be killed again.
    child.kill()?;
    child.wait()
}

// --- the inner process -----------------------------------------------------------------------------------------------

fn inner() -> Step {
    step("the container", rustix::process::set_parent_process_death_signal(Some(Signal::KILL)))?;
    let job = job()?;
    // The program's output is this process's standard error; reports end when it starts.
    let reports = step("the container", rustix::io::fcntl_dupfd_cloexec(io::stdout(), 3))?;
    let outcome = become_program(&job);
    report(File::from(reports), &Report::Failed(outcome));
    Ok(())
}

/// Returns only what went wrong.
fn become_program(job: &Job) -> String {
    match prepare(job) {
        Ok(mut command) => format!("starting {:?}: {}", job.command.first().map_or("", String::as_str), command.exec()),
        Err(message) => message,
    }
}

fn prepare(job: &Job) -> Step<Command> {
    step("the container", namespace::enter_mount_namespace())?;
    step("entering the image", change_root("root"))?;
    system_mounts()?;
    step("the host name", rustix::system::sethostname(b"firstread"))?;
    let null = step("opening /dev/null", rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()))?;
    step("standard input", rustix::stdio::dup2_stdin(&null))?;
    step("standard output", rustix::stdio::dup2_stdout(io::stderr()))?;
    let user = look_up(job.user.as_deref())?;
    let dir = job.dir.as_deref().unwrap_or("/");
    if !Path::new(dir).exists() {
        step(dir, fs::DirBuilder::new().recursive(true).mode(0o755).create(dir))?;
    }
    let mut command =
        Command::new(job.command.first().ok_or("the image says nothing of what to run; write it behind --")?);
    command.args(job.command.iter().skip(1)).env_clear().env("PATH", PATH).env("HOME", &user.home);
    command.envs(job.env.iter().filter_map(|entry| entry.split_once('=')).filter(|(name, _)| !name.is_empty()));
    give_up_rights(&user)?;
    step(&format!("the working directory {dir:?}"), rustix::process::chdir(dir))?;
    Ok(command)
}

/// Makes `root` the root directory, and forgets everything else of the mount namespace.
fn change_root(root: &str) -> rustix::io::Result<()> {
    rustix::process::chdir(root)?;
    rustix::process::pivot_root(".", ".")?;
    // The old root lies over the new one now.
    rustix::mount::mount_change(".", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")
}

/// What is a mount in every container. Paths are the image's from here on: links in them lead nowhere else.
fn system_mounts() -> Step {
    let base = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_at("proc", "/proc", base | MountFlags::NODEV, c"")?;
    mount_at("sysfs", "/sys", base | MountFlags::NODEV | MountFlags::RDONLY, c"")?;
    mount_at("tmpfs", "/dev", MountFlags::NOSUID | MountFlags::NOEXEC, c"mode=0755,size=64k")?;
    for (path, major, minor) in [
        ("/dev/null", 1, 3),
        ("/dev/zero", 1, 5),
        ("/dev/full", 1, 7),
        ("/dev/random", 1, 8),
        ("/dev/urandom", 1, 9),
        ("/dev/tty", 5, 0),
    ] {
        let mode = Mode::from_raw_mode(0o666);
        step(path, rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, mode, makedev(major, minor)))?;
        step(path, rustix::fs::chmod(path, mode))?;
    }
    for (link, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
    ] {
        step("a link in /dev", symlink(target, Path::new("/dev").join(link)))?;
    }
    mount_at("devpts", "/dev/pts", base, c"newinstance,ptmxmode=0666,mode=0620")?;
    mount_at("tmpfs", "/dev/shm", base | MountFlags::NODEV, c"mode=1777")?;
    for path in READ_ONLY.into_iter().filter(|path| Path::new(path).exists()) {
        step(path, rustix::mount::mount_bind(path, path))?;
        let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NODEV | base;
        step(path, rustix::mount::mount_remount(path, flags, c""))?;
    }
    for path in MASKED.into_iter().map(Path::new) {
        let Ok(found) = fs::metadata(path) else { continue };
        let masked = if found.is_dir() {
            rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::RDONLY, Some(c"size=0"))
        } else {
            rustix::mount::mount_bind("/dev/null", path)
        };
        step("hiding a part of /proc", masked)?;
    }
    Ok(())
}

fn mount_at(kind: &str, path: &str, flags: MountFlags, data: &std::ffi::CStr) -> Step {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => return Err(format!("the image's {path} is no directory")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            step(path, fs::DirBuilder::new().mode(0o755).create(path))?;
        }
        Err(error) => return Err(format!("{path}: {error}")),
    }
    step(&format!("mounting {path}"), rustix::mount::mount(kind, path, kind, flags, Some(data)))
}

/// Becomes the user, with the rights of a container's program at most.
fn give_up_rights(user: &User) -> Step {
    use rustix::thread::{Gid, Uid};
    step("privileges", rustix::thread::set_no_new_privs(true))?;
    let all = CapabilitySet::all();
    for (_, capability) in all.iter_names().filter(|(_, one)| !CAPABILITIES.contains(*one)) {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // This kernel does not know it.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(errno) => return Err(format!("capabilities: {errno}")),
        }
    }
    let groups: Vec<Gid> = user.groups.iter().map(|group| Gid::from_raw(*group)).collect();
    step("groups", rustix::thread::set_thread_groups(&groups))?;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    step("the group", rustix::thread::set_thread_res_gid(gid, gid, gid))?;
    step("the user", rustix::thread::set_thread_res_uid(uid, uid, uid))?;
    if user.uid == 0 {
        let sets =
            CapabilitySets { effective: CAPABILITIES, permitted: CAPABILITIES, inheritable: CapabilitySet::empty() };
        step("capabilities", rustix::thread::set_capabilities(None, sets))?;
    }
    // A change of user ends the wish to end with the parent.
    step("the container", rustix::process::set_parent_process_death_signal(Some(Signal::KILL)))
}
