//! The kernel, its modules, space, and the daemon.

use std::path::Path;

use super::Check;
use crate::cli::output::size;
use crate::daemon::client::Client;
use crate::daemon::config::Config;

/// Less free space than this is too little for a pool, in bytes.
const SPACE_MIN: u64 = 1 << 30;

/// All checks of the machine.
pub fn checks(config: &Config) -> Vec<Check> {
    let mut checks = vec![kernel(), privileges()];
    let systems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    checks.extend(["ext4", "overlay"].map(|name| file_system(name, &systems)));
    checks.extend(transports(Path::new("/dev"), Path::new("/sys/module")));
    checks.push(space(&config.root));
    checks.push(daemon(config));
    checks
}

fn kernel() -> Check {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Check::good("kernel", release.trim())
}

fn privileges() -> Check {
    match rustix::process::geteuid().is_root() {
        true => Check::good("privileges", "root"),
        false => Check::bad("privileges", "devices and mounts need root", "sudo firstread doctor"),
    }
}

fn file_system(name: &str, known: &str) -> Check {
    match known.lines().any(|line| line.trim_start_matches("nodev").trim() == name) {
        true => Check::good(name, "the kernel has it"),
        // A module of a file system is also loaded when something is mounted.
        false => Check::missing(name, "not loaded", format!("modprobe {name}")),
    }
}

/// What devices can be made of. One of the three is enough, the first that is there is used.
fn transports(dev: &Path, modules: &Path) -> Vec<Check> {
    let ublk = dev.join("ublk-control").exists();
    let nbd = modules.join("nbd").exists();
    let (fuse, looped) = (dev.join("fuse").exists(), dev.join("loop-control").exists());
    let one = |name: &str, there: bool, lack: &str, module: &str| match there {
        true => Check::good(name, "the kernel has it"),
        false => Check::missing(name, lack, format!("modprobe {module}")),
    };
    let mut checks = vec![
        one("ublk", ublk, "no /dev/ublk-control (Linux 6.0 or later, not in every kernel)", "ublk_drv"),
        one("nbd", nbd, "the module is not loaded", "nbd"),
        one("FUSE", fuse, "no /dev/fuse", "fuse"),
        one("loop", looped, "no /dev/loop-control", "loop"),
    ];
    checks.push(match (ublk, nbd, fuse && looped) {
        (true, _, _) => Check::good("devices", "by ublk; they outlive the daemon"),
        (_, true, _) => Check::good("devices", "by NBD; they outlive the daemon"),
        (_, _, true) => Check::missing(
            "devices",
            "by FUSE and loop: containers get I/O errors when the daemon ends",
            "modprobe ublk_drv || modprobe nbd",
        ),
        _ => Check::bad("devices", "the kernel offers none of ublk, nbd, FUSE and loop", "modprobe ublk_drv"),
    });
    checks
}

fn space(root: &Path) -> Check {
    let there = root.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    let name = "space";
    match rustix::fs::statvfs(there) {
        Ok(found) => {
            let free = found.f_bavail.saturating_mul(found.f_frsize);
            let text = format!("{} free in {}", size(free), root.display());
            match free < SPACE_MIN || (found.f_files > 0 && found.f_favail == 0) {
                true => Check::bad(name, text, "firstread pool trim"),
                false => Check::good(name, text),
            }
        }
        Err(errno) => Check::bad(name, format!("{}: {errno}", there.display()), format!("df {}", there.display())),
    }
}

fn daemon(config: &Config) -> Check {
    let name = "daemon";
    match Client::connect(&config.run) {
        Ok(Some(client)) if client.hello().program == env!("CARGO_PKG_VERSION") => {
            Check::good(name, format!("process {}, root {}", client.hello().pid, client.hello().root.display()))
        }
        Ok(Some(client)) => {
            let found = format!("it is version {}, this program {}", client.hello().program, env!("CARGO_PKG_VERSION"));
            Check::missing(name, found, "firstread daemon --replace")
        }
        Ok(None) => {
            Check::missing(name, "none runs; a verb or the snapshotter starts one", "systemctl start firstread")
        }
        Err(problem) => Check::bad(name, problem.message, problem.hint.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::cli::doctor::Health;

    #[test]
    fn one_way_to_make_devices_is_enough() {
        let dir = tempfile::tempdir().unwrap();
        let (dev, modules) = (dir.path().join("dev"), dir.path().join("module"));
        std::fs::create_dir_all(&dev).unwrap();
        let last = || transports(&dev, &modules).pop().unwrap().health;
        assert_eq!(last(), Health::Bad);
        std::fs::write(dev.join("fuse"), "").unwrap();
        assert_eq!(last(), Health::Bad);
        std::fs::write(dev.join("loop-control"), "").unwrap();
        assert_eq!(last(), Health::Missing);
        std::fs::create_dir_all(modules.join("nbd")).unwrap();
        assert_eq!(last(), Health::Good);
    }

    #[test]
    fn file_systems_are_found_by_their_whole_names() {
        let known = "nodev\toverlay\n\text4dev\n";
        assert_eq!(file_system("overlay", known).health, Health::Good);
        assert_eq!(file_system("ext4", known).mend.unwrap(), "modprobe ext4");
    }
}
