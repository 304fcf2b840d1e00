//! Holding a file system frozen while its device is copied.
//!
//! A frozen file system stays frozen when whoever froze it dies, and everybody who writes to it hangs. So a process of its
//! own does it, in a session of its own, which thaws as soon as its standard input ends: when it is told to, and when the
//! process that wanted it is killed. The daemon never freezes: a process that waits for its own device can't be killed, and
//! the next daemon could not take over.
//!
//! Should that process be killed as well, its record in the run directory tells the next verb what to thaw: a file that
//! names the file system, locked for as long as its holder lives.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use clap::Args;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::Outcome;
use crate::attach::holders;
use crate::daemon::control::{Kind, Problem};
use crate::sys::freeze;

/// What the holder says when the file system stands still.
const FROZEN: &str = "frozen";
/// What it says of a file system that can't be frozen: everything was written, and it goes on.
const SYNCED: &str = "synced";

/// The arguments of the process that holds a file system.
#[derive(Debug, Args)]
pub struct Hold {
    /// A path into the file system
    path: PathBuf,
    /// Directory of the records of what is frozen
    records: PathBuf,
}

/// The directory of the records in the run directory.
fn records(run: &Path) -> PathBuf {
    run.join("frozen")
}

/// Thaws what was left frozen by holders that were killed.
pub fn thaw_abandoned(run: &Path) {
    let Ok(found) = fs::read_dir(records(run)) else { return };
    for record in found.flatten().map(|entry| entry.path()) {
        let Ok(file) = File::open(&record) else { continue };
        // Its holder has it for as long as it lives.
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let path = fs::read(&record).map(OsString::from_vec).unwrap_or_default();
        match File::open(&path).and_then(|inside| freeze::thaw(&inside)) {
            Ok(()) => tracing::warn!("{} was left frozen, and is thawed", Path::new(&path).display()),
            // It was thawed, or is not there any more.
            Err(error) => tracing::debug!("{}: {error}", Path::new(&path).display()),
        }
        // One that stays is looked at again.
        let _ = fs::remove_file(&record);
    }
}

/// The record of a holder, removed when this is dropped.
struct Record(PathBuf, #[allow(dead_code)] File);

impl Record {
    /// Written, and locked, before anything is frozen.
    fn new(dir: &Path, path: &Path) -> std::io::Result<Self> {
        fs::create_dir_all(dir)?;
        let name = dir.join(std::process::id().to_string());
        let mut file = File::create(&name)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        file.write_all(path.as_os_str().as_bytes())?;
        Ok(Self(name, file))
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        // One that stays is found to be of nothing frozen.
        let _ = fs::remove_file(&self.0);
    }
}

/// A frozen file system; thawed when this is dropped.
pub struct Frozen(Child);

impl Drop for Frozen {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // What could not be thawed was complained about there.
        let _ = self.0.wait();
    }
}

/// Makes the file system on the block device `device` stand still. `None` when nobody here has mounted it, or it can't be
/// frozen: then what was written so far is on the device. `run` is the run directory.
///
/// # Errors
/// What the system says.
pub fn hold(device: &Path, run: &Path) -> Outcome<Option<Frozen>> {
    let failed = |reason: &dyn std::fmt::Display| {
        Problem::new(Kind::Failed, format!("freezing the file system on {}: {reason}", device.display()))
    };
    let Some(way) = holders::way_in(device) else {
        let synced = File::open(device).and_then(|file| file.sync_all());
        return synced.map(|()| None).map_err(|error| failed(&error));
    };
    let program = std::env::current_exe().map_err(|error| failed(&error))?;
    let mut command = Command::new(program);
    command
        .arg("hold-frozen")
        .arg(&way)
        .arg(records(run))
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = command.spawn().map_err(|error| failed(&error))?;
    let mut line = String::new();
    let said = match child.stdout.take() {
        Some(stdout) => BufReader::new(stdout).read_line(&mut line),
        None => Ok(0),
    };
    let frozen = Frozen(child);
    said.map_err(|error| failed(&error))?;
    match line.trim_end() {
        FROZEN => Ok(Some(frozen)),
        SYNCED => Ok(None),
        _ => Err(failed(&format!("{} could not be frozen", way.display())).hint("freezing needs root (CAP_SYS_ADMIN)")),
    }
}

impl Hold {
    /// Freezes, waits for the end of standard input, and thaws.
    ///
    /// # Errors
    /// What the system says.
    pub fn run(&self) -> Outcome {
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            let way = self.path.display();
            Problem::new(Kind::Failed, format!("{what} {way}: {error}"))
                .hint(format!("`fsfreeze --unfreeze {way}` thaws a file system that was left frozen"))
        };
        // Away from the terminal: what ends the verb must not end this one first. It fails for who is away already.
        let _ = rustix::process::setsid();
        let file = File::open(&self.path).map_err(|error| failed("opening", &error))?;
        let record =
            Record::new(&self.records, &self.path).map_err(|error| failed("noting that it freezes", &error))?;
        let thaws = match freeze::freeze(&file) {
            Ok(()) => true,
            Err(error) if is(&error, Errno::BUSY) => false,
            Err(error) if is(&error, Errno::OPNOTSUPP) => {
                rustix::fs::syncfs(&file).map_err(|errno| failed("syncing", &errno))?;
                return say(SYNCED).map_err(|error| failed("freezing", &error));
            }
            Err(error) => return Err(failed("freezing", &error)),
        };
        let told = say(FROZEN);
        let mut rest = Vec::new();
        if told.is_ok() {
            // Nothing is ever sent: this is the wait.
            let _ = std::io::stdin().take(1).read_to_end(&mut rest);
        }
        if thaws {
            freeze::thaw(&file).map_err(|error| failed("thawing", &error))?;
        }
        drop(record);
        told.map_err(|error| failed("freezing", &error))
    }
}

fn is(error: &std::io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

fn say(word: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{word}")?;
    out.flush()
}
