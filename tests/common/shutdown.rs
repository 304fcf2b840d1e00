//! A file system that stops at once, as at a loss of power (`EXT4_IOC_SHUTDOWN` of the kernel's `fs/ext4/ext4.h`), or that is
//! unmounted for sure.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::ext4::Mount;

/// What becomes of what the journal has in memory only.
#[derive(Clone, Copy)]
pub enum Log {
    /// It is written to the journal, and nowhere else.
    Flushed,
    /// It is lost.
    Dropped,
}

/// Stops the ext4 that is mounted on `dir`. It is still to be unmounted.
pub fn shutdown(dir: &Path, log: Log) {
    let flags = match log {
        Log::Flushed => 1,
        Log::Dropped => 2,
    };
    let code = "import fcntl, os, struct, sys; \
                fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587D, struct.pack('I', int(sys.argv[2])))";
    let stopped = Command::new("python3").args(["-c", code]).arg(dir).arg(flags.to_string()).output().unwrap();
    assert!(stopped.status.success(), "{}", String::from_utf8_lossy(&stopped.stderr));
}

/// Unmounts, and waits until nobody has it: a daemon that is started meanwhile takes all mounts into its namespace, and only gives up those
/// of its own devices before it ends.
pub fn unmount(mount: Mount) {
    let output = Command::new("findmnt").args(["-n", "-o", "SOURCE"]).arg(mount.dir()).output().unwrap();
    let source = String::from_utf8(output.stdout).unwrap();
    let name = source.trim().strip_prefix("/dev/").unwrap_or_else(|| panic!("{source:?} is no device"));
    let alive = Path::new("/sys/fs/ext4").join(name);
    assert!(alive.exists(), "{}", alive.display());
    drop(mount);
    let deadline = Instant::now() + Duration::from_secs(60);
    while alive.exists() {
        assert!(Instant::now() < deadline, "{name} is still mounted in another mount namespace");
        std::thread::sleep(Duration::from_millis(20));
    }
}
