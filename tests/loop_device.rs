//! The loop transport with the running kernel. Needs root, /dev/fuse and /dev/loop-control.
#![cfg(feature = "loop")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/file_device.rs"]
mod file_device;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use file_device::{BLOCK, FileDevice, write_reference};
use firstread::attach::loop_device::{LoopAttachment, LoopIo, LoopOptions, attach, stale};
use firstread::chunk::Hasher;
use firstread::sys::loop_ioctl;
use firstread::{Digest, Error};
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::runtime::Runtime;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());
/// Tests that count what exists in the system run alone.
static ALONE: Mutex<()> = Mutex::new(());

const BLOCKS: u64 = 4096;

fn attach_file(path: &Path) -> (Arc<FileDevice>, LoopAttachment) {
    let device = FileDevice::open(path);
    let attachment = attach(device.clone(), LoopOptions::default(), RUNTIME.handle().clone()).unwrap();
    (device, attachment)
}

fn digest(path: &Path) -> Digest {
    let mut file = File::open(path).unwrap();
    let (mut hasher, mut buffer) = (Hasher::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => return hasher.finish(),
            n => hasher.update(&buffer[..n]),
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new("timeout").arg("60").arg(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A mount that is undone on every way out of the test.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn new(device: &Path, point: &'a Path) -> Self {
        run("mount", &["-o", "ro", device.to_str().unwrap(), point.to_str().unwrap()]);
        Self(point)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

/// An ext4 image made by mke2fs from a directory with some files.
fn ext4(dir: &Path) -> std::path::PathBuf {
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    for (name, len) in [("a/small", 100), ("a/b/large", 5 << 20), ("a/b/empty", 0)] {
        let content: Vec<u8> = (0..len).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        fs::write(tree.join(name), content).unwrap();
    }
    std::os::unix::fs::symlink("a/small", tree.join("link")).unwrap();
    let image = dir.join("image");
    run("mke2fs", &["-q", "-t", "ext4", "-b", "4096", "-d", tree.to_str().unwrap(), image.to_str().unwrap(), "32M"]);
    image
}

#[test]
fn a_mounted_file_system_is_the_one_that_was_made() {
    let _alone = ALONE.lock();
    let dir = TempDir::new().unwrap();
    let (device, attachment) = attach_file(&ext4(dir.path()));
    device.make_remote(0..32 << 20);
    let point = dir.path().join("mnt");
    fs::create_dir(&point).unwrap();
    let mounted = Mounted::new(attachment.device_path(), &point);
    run(
        "diff",
        &[
            "-r",
            "--no-dereference",
            "--exclude=lost+found",
            dir.path().join("tree").to_str().unwrap(),
            point.to_str().unwrap(),
        ],
    );
    assert!(device.misses.load(Ordering::SeqCst) > 0);
    drop(mounted);
}

#[test]
fn the_whole_device_reads_right_directly_and_through_the_page_cache() {
    let _alone = ALONE.lock();
    let dir = TempDir::new().unwrap();
    let path = write_reference(dir.path().join("disk"), BLOCKS, |block| block % 5 == 0);
    let expected = digest(&path);
    for io in [LoopIo::Direct, LoopIo::Buffered] {
        let device = FileDevice::open(&path);
        device.make_remote(100 * BLOCK..3000 * BLOCK);
        let options = LoopOptions { io, ..LoopOptions::default() };
        let mut attachment = attach(device, options, RUNTIME.handle().clone()).unwrap();
        assert_eq!(attachment.io().unwrap(), io);
        let node = attachment.device_path().to_owned();
        assert_eq!(run("blockdev", &["--getsize64", node.to_str().unwrap()]).trim(), (BLOCKS * BLOCK).to_string());
        assert_eq!(run("blockdev", &["--getro", node.to_str().unwrap()]).trim(), "1");
        let direct = format!("dd if={} bs=1M iflag=direct status=none | sha256sum", node.display());
        let sum = run("sh", &["-c", &direct]);
        assert_eq!(sum.split(' ').next(), Some(expected.hex().as_str()), "{io:?}");
        assert_eq!(digest(&node), expected, "{io:?}");
        attachment.detach().unwrap();
    }
}

#[test]
fn an_error_of_the_device_reaches_the_reader_and_passes() {
    let _alone = ALONE.lock();
    let dir = TempDir::new().unwrap();
    let path = write_reference(dir.path().join("disk"), BLOCKS, |_| false);
    let (device, attachment) = attach_file(&path);
    device.make_remote(1000 * BLOCK..1100 * BLOCK);
    device.make_bad(1050 * BLOCK..1051 * BLOCK);
    let node = File::open(attachment.device_path()).unwrap();
    let mut block = [0; BLOCK as usize];
    let error = node.read_exact_at(&mut block, 1050 * BLOCK).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
    let mut expected = [0; BLOCK as usize];
    File::open(&path).unwrap().read_exact_at(&mut expected, 2000 * BLOCK).unwrap();
    node.read_exact_at(&mut block, 2000 * BLOCK).unwrap();
    assert!(block == expected);
}

#[test]
fn direct_misses_are_fetched_side_by_side() {
    let _alone = ALONE.lock();
    let dir = TempDir::new().unwrap();
    let path = write_reference(dir.path().join("disk"), BLOCKS, |_| false);
    let (device, attachment) = attach_file(&path);
    device.make_remote(0..BLOCKS * BLOCK);
    device.delay_misses(Duration::from_millis(100));
    let node = attachment.device_path().to_str().unwrap();
    let name = format!("--filename={node}");
    run(
        "fio",
        &[
            "--name=t",
            &name,
            "--readonly",
            "--rw=randread",
            "--bs=4k",
            "--direct=1",
            "--ioengine=libaio",
            "--iodepth=16",
            "--number_ios=64",
        ],
    );
    assert!(device.in_flight_max.load(Ordering::SeqCst) >= 8, "{}", device.in_flight_max.load(Ordering::SeqCst));
}

#[test]
fn a_detach_in_use_names_who_holds_the_device_and_a_later_one_succeeds() {
    let _alone = ALONE.lock();
    let dir = TempDir::new().unwrap();
    let (_device, mut attachment) = attach_file(&ext4(dir.path()));
    let node = attachment.device_path().to_owned();
    let point = dir.path().join("mount point");
    fs::create_dir(&point).unwrap();
    let mounted = Mounted::new(&node, &point);
    let start = Instant::now();
    let Err(Error::Busy(text)) = attachment.detach() else { panic!("detached while mounted") };
    assert!(start.elapsed() < Duration::from_secs(1), "a mount does not go away by waiting");
    assert!(text.contains(&format!("mounted on {}", point.display())), "{text}");
    // Still whole.
    assert!(fs::read(point.join("a/small")).unwrap().len() == 100);
    drop(mounted);
    let mut sleeper = Command::new("sleep").arg("60").stdin(File::open(&node).unwrap()).spawn().unwrap();
    let result = attachment.detach();
    let pid = sleeper.id();
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    let Err(Error::Busy(text)) = result else { panic!("detached while open") };
    assert!(text.contains(&format!("open in sleep (pid {pid})")), "{text}");
    attachment.detach().unwrap();
    assert!(!bound(&node));
    attachment.detach().unwrap();
}

fn bound(node: &Path) -> bool {
    Path::new("/sys/block").join(node.file_name().unwrap()).join("loop").exists()
}

fn count(path: &str) -> usize {
    fs::read_dir(path).unwrap().count()
}

/// Loop devices that this process serves; others may come and go meanwhile.
fn bound_devices() -> usize {
    let own = format!("firstread:{}.", std::process::id());
    let names = fs::read_dir("/sys/block").unwrap().map(|entry| Path::new("/dev").join(entry.unwrap().file_name()));
    let loops = names.filter(|node| bound(node)).filter_map(|node| loop_ioctl::status(File::open(node).ok()?).ok());
    loops.filter(|status| status.name.starts_with(&own)).count()
}

#[test]
fn cycles_leak_no_descriptors_threads_devices_or_mounts() {
    let _alone = ALONE.lock();
    let dir = TempDir::new().unwrap();
    let path = write_reference(dir.path().join("disk"), 64, |_| false);
    // Of our kind: others may come and go meanwhile.
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap().matches(" - fuse.firstread ").count();
    let measure = || (count("/proc/self/fd"), bound_devices(), mounts());
    // The runtime's own descriptors and threads.
    drop(attach_file(&path));
    let (before, threads) = (measure(), count("/proc/self/task"));
    for at in 0..20 {
        let (_, mut attachment) = attach_file(&path);
        assert!(digest(attachment.device_path()) == digest(&path));
        if at % 2 == 0 {
            attachment.detach().unwrap();
        }
    }
    assert_eq!(measure(), before);
    std::thread::sleep(Duration::from_millis(100));
    assert!(count("/proc/self/task") <= threads + 2);
}

#[test]
fn many_devices_are_attached_at_the_same_time() {
    let _alone = ALONE.lock();
    let dir = TempDir::new().unwrap();
    let path = write_reference(dir.path().join("disk"), 64, |_| false);
    let expected = digest(&path);
    std::thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                let (_, mut attachment) = attach_file(&path);
                assert_eq!(digest(attachment.device_path()), expected);
                std::thread::sleep(Duration::from_millis(100));
                attachment.detach().unwrap();
            });
        }
    });
}

#[test]
fn read_ahead_is_set_whatever_the_last_user_left() {
    let _alone = ALONE.lock();
    let dir = TempDir::new().unwrap();
    let path = write_reference(dir.path().join("disk"), 64, |_| false);
    let (_, attachment) = attach_file(&path);
    let setting = Path::new("/sys/class/block").join(attachment.device_path().file_name().unwrap());
    let setting = setting.join("queue/read_ahead_kb");
    firstread::attach::read_ahead::set(attachment.device_path(), 1024).unwrap();
    assert_eq!(fs::read_to_string(&setting).unwrap().trim(), "1024");
    drop(attachment);
    let (_, attachment) = attach_file(&path);
    let setting = Path::new("/sys/class/block").join(attachment.device_path().file_name().unwrap());
    assert_eq!(fs::read_to_string(setting.join("queue/read_ahead_kb")).unwrap().trim(), "128");
}

/// The server in a mount namespace without the mounts of served devices; its device used outside.
#[test]
fn a_server_in_its_own_mount_namespace_serves_those_outside() {
    let _alone = ALONE.lock();
    let dir = TempDir::new().unwrap();
    let image = ext4(dir.path());
    let (point, other, served) = (dir.path().join("mnt"), dir.path().join("other"), dir.path().join("served"));
    for dir in [&point, &other, &served] {
        fs::create_dir(dir).unwrap();
    }
    run("mount", &["-t", "tmpfs", "none", other.to_str().unwrap()]);
    let unmount = Mounted(&other);
    let (_, before) = attach_file(&image);
    let mounted_before = Mounted::new(before.device_path(), &served);
    let device = FileDevice::open(&image);
    let (attachment, table) = std::thread::spawn(move || {
        firstread::sys::namespace::enter_private_mount_namespace(&[&image]).unwrap();
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        (attach(device, LoopOptions::default(), RUNTIME.handle().clone()).unwrap(), table)
    })
    .join()
    .unwrap();
    assert!(table.contains(other.to_str().unwrap()), "{table}");
    assert!(!table.contains(served.to_str().unwrap()), "{table}");
    drop(mounted_before);
    drop(before);
    assert!(table.contains(" /proc ") && table.contains(" /dev "), "{table}");
    let mounted = Mounted::new(attachment.device_path(), &point);
    assert_eq!(fs::read(point.join("a/b/large")).unwrap(), fs::read(dir.path().join("tree/a/b/large")).unwrap());
    drop(mounted);
    drop(unmount);
    let node = attachment.device_path();
    assert_eq!(bound_devices(), 1);
    assert!(!stale().iter().any(|stale| stale.path == node));
}

/// Run by the test below in a process of its own, which is killed.
#[test]
fn server_to_be_killed() {
    let Ok(image) = std::env::var("FIRSTREAD_TEST_KILLED_SERVER") else { return };
    let (_device, attachment) = attach_file(Path::new(&image));
    println!("attached {}", attachment.device_path().display());
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_killed_server_leaves_nothing_once_its_users_leave() {
    let _alone = ALONE.lock();
    let dir = TempDir::new().unwrap();
    let image = ext4(dir.path());
    let point = dir.path().join("mnt");
    fs::create_dir(&point).unwrap();
    for used in [false, true] {
        let mut server = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "server_to_be_killed", "--nocapture"])
            .env("FIRSTREAD_TEST_KILLED_SERVER", &image)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(server.stdout.take().unwrap()));
        let line = lines.find_map(|line| Some(line.unwrap().split_once("attached ")?.1.to_owned())).unwrap();
        let node = Path::new(&line);
        let mounted = used.then(|| Mounted::new(node, &point));
        server.kill().unwrap();
        server.wait().unwrap();
        if used {
            let found = stale().into_iter().find(|stale| stale.path == node).unwrap();
            assert!(found.holders[0].to_string().contains("mnt"), "{found:?}");
        }
        drop(mounted);
        for _ in 0..100 {
            if !bound(node) {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(!bound(node), "used: {used}");
    }
}
