//! The program `firstread` with directories of its own, cleaned up however the test ends.
#![allow(dead_code)] // No test uses all of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// A node: root and run directory, and the daemon in them if one was started.
pub struct Node {
    dir: TempDir,
}

impl Node {
    pub fn new() -> Self {
        Self { dir: TempDir::new().unwrap() }
    }

    /// The directory that everything of the node is in.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn root(&self) -> PathBuf {
        self.path().join("root")
    }

    pub fn run_dir(&self) -> PathBuf {
        self.path().join("run")
    }

    /// A directory to mount on.
    pub fn mount_point(&self, name: &str) -> PathBuf {
        let dir = self.path().join(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// The program with this node's directories.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_firstread"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("FIRSTREAD_") {
                command.env_remove(name);
            }
        }
        // Tests count what readers cause; those of the background fill say so.
        command.env("FIRSTREAD_FETCH_PREFETCH", "startup");
        // The daemon inherits nothing of the test but what is set here: no pipe of its harness stays open in it.
        command.arg("--root").arg(self.root()).arg("--run").arg(self.run_dir()).args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs a verb.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs a verb that must be done; its standard output.
    pub fn done(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {stderr}\nlog: {}", self.log());
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a verb with `--json` that must be done; its answer.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(arguments);
        serde_json::from_str(&self.done(&all)).unwrap()
    }

    /// Runs a verb that must fail with `code`; its standard error.
    pub fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        stderr
    }

    /// The daemon's log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.run_dir().join("daemon.log")).unwrap_or_default()
    }

    /// The daemon's process, if it lives.
    pub fn pid(&self) -> Option<u32> {
        let pid = fs::read_to_string(self.run_dir().join("daemon.pid")).ok()?.trim().parse().ok()?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let is_it = stat.contains("(firstread)") && !stat.contains(") Z ");
        is_it.then_some(pid)
    }

    /// Kills the daemon with `signal` and waits until it is gone.
    pub fn kill(&self, signal: &str) {
        let Some(pid) = self.pid() else { return };
        assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
        wait_until("the daemon is gone", || self.pid().is_none());
    }

    /// Kilobytes of memory that the daemon has resident.
    pub fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid().unwrap())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.log());
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for point in mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)) {
            if Path::new(point).starts_with(self.path()) {
                let _ = Command::new("umount").args(["-l", point]).status();
            }
        }
        let _ = self.command(&["stop", "--force", "--quiet"]).stderr(Stdio::null()).stdout(Stdio::null()).status();
        if let Some(pid) = self.pid() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    }
}

/// Waits for something that takes a moment.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "it never came true: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Panics unless both trees have the same files with the same bytes.
pub fn same_files(expected: &Path, found: &Path) {
    for entry in fs::read_dir(expected).unwrap() {
        let path = entry.unwrap().path();
        let other = found.join(path.file_name().unwrap());
        if path.is_dir() {
            same_files(&path, &other);
        } else {
            assert!(fs::read(&path).unwrap() == fs::read(&other).unwrap(), "{} differs", other.display());
        }
    }
}
