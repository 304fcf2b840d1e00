//! The program `firstread-fault` in front of something. Ends with its value.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

/// The faults, as rules without what says when. What says that the blob is gone (404) or is slow and moves (`drip`) is
/// looked at by itself.
pub const FAULTS: [&str; 19] = [
    "delay:time=200ms",
    "stall",
    "stall:after=1000",
    "reset",
    "reset:after=1000",
    "truncate:after=1000",
    "flip:at=100",
    "shift:by=7",
    "whole",
    "range:by=3",
    "status:code=401",
    "status:code=403",
    "status:code=416",
    "status:code=429,retry_after=1",
    "status:code=500",
    "status:code=503,retry_after=1",
    "loop",
    "length:by=5",
    "dns",
];

/// Whether `fault` makes wrong bytes: those are an error at once when they stay, since they are no outage.
pub fn is_wrong(fault: &str) -> bool {
    fault.starts_with("flip") || fault.starts_with("shift")
}

pub struct Fault {
    child: Child,
    url: String,
}

impl Fault {
    /// In front of `upstream`, with further arguments.
    pub fn start(upstream: &str, arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_firstread-fault"))
            .arg(upstream)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("http"), "firstread-fault did not start");
        Self { child, url: line.trim().to_owned() }
    }

    /// `http://HOST:PORT`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// `HOST:PORT`.
    pub fn host(&self) -> &str {
        self.url.split("://").nth(1).unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Arms rules, one a line.
    pub fn arm(&self, rules: &str) {
        self.control("POST", "rules", rules);
    }

    /// Arms one of [`FAULTS`] for what is read of paths with `path` in them, as often as `when` says.
    pub fn arm_for(&self, path: &str, fault: &str, when: &str) {
        let separator = if fault.contains(':') { "," } else { ":" };
        self.arm(&format!("{fault}{separator}path={path},method=GET{when}"));
    }

    /// How many requests were met by a fault.
    pub fn struck(&self) -> u64 {
        let faults = self.counters()["faults"].clone();
        faults.as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum()
    }

    /// Forgets all rules.
    pub fn heal(&self) {
        self.control("DELETE", "rules", "");
    }

    pub fn counters(&self) -> serde_json::Value {
        serde_json::from_str(&self.control("GET", "counters", "")).unwrap()
    }

    pub fn forget_counters(&self) {
        self.control("DELETE", "counters", "");
    }

    /// How many requests there were.
    pub fn requests(&self) -> u64 {
        self.counters()["requests"].as_u64().unwrap()
    }

    /// A control request, by curl so that it needs no runtime.
    pub fn control(&self, method: &str, what: &str, body: &str) -> String {
        let output = Command::new("curl")
            .args(["-sSk", "--noproxy", "*", "--fail-with-body", "-X", method, "--data-binary", body])
            .arg(format!("{}/_fault/{what}", self.url))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{method} {what}: {text} {}", String::from_utf8_lossy(&output.stderr));
        text
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
