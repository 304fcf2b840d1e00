//! A soak: two mirrors, of which one or the other has a fault all the time, and a reader whose pool is smaller than its
//! image. One of them is always well, so no read fails. `SOAK_SECONDS` says how long (20).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/fault.rs"]
mod fault;
#[path = "common/packs.rs"]
mod packs;
#[path = "common/program.rs"]
mod program;
#[path = "common/published.rs"]
mod published;
#[path = "common/registry.rs"]
mod registry;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use fault::Fault;
use program::Node;
use published::published;

const CHUNK: usize = 64 << 10;
const CHUNKS: usize = 64;

/// Faults of blobs; what differs from request to request is drawn by the proxy (`chance`).
const FAULTS: [&str; 17] = [
    "delay:time=300ms",
    "stall:after=1000",
    "stall:chance=50",
    "reset:after=1000",
    "truncate:after=1000",
    "flip:at=100",
    "shift:by=7",
    "whole:chance=80",
    "range:by=3",
    "status:code=401",
    "status:code=403",
    "status:code=404",
    "status:code=429,retry_after=1",
    "status:code=503,retry_after=1",
    "loop:chance=80",
    "length:by=5",
    "dns:chance=80",
];

/// Numbers that only look random, the same in each run (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

/// Ends the trouble however the reader ends.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Has one mirror or the other fail until `over`; returns how many faults were met.
fn make_trouble(mirrors: &[Fault; 2], blob: &str, over: &AtomicBool) -> u64 {
    let mut random = Random(7);
    while !over.load(Relaxed) {
        let sick = random.below(2);
        // The other one first, so that there is always one that is well.
        mirrors[1 - sick].heal();
        mirrors[sick].heal();
        mirrors[sick].arm(&format!("{},path={blob},method=GET", FAULTS[random.below(FAULTS.len())]));
        std::thread::sleep(Duration::from_millis(200 + random.below(600) as u64));
    }
    let met = |mirror: &Fault| {
        mirror.counters()["faults"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum::<u64>()
    };
    mirrors.iter().map(met).sum()
}

#[test]
fn no_read_fails_while_one_of_two_mirrors_is_well() {
    let seconds = std::env::var("SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(20);
    let (registry, image) = published(1, CHUNKS, CHUNK);
    let upstream = format!("http://{}", registry.host());
    let mirrors = [Fault::start(&upstream, &[]), Fault::start(&upstream, &[])];
    let node = Node::new();
    let hosts = node.path().join("certs.d").join(mirrors[0].host());
    std::fs::create_dir_all(&hosts).unwrap();
    let text = format!("server = \"{}\"\n[host.\"{}\"]\n", mirrors[0].url(), mirrors[1].url());
    std::fs::write(hosts.join("hosts.toml"), text).unwrap();

    let name = format!("{}/app:v1", mirrors[0].host());
    let hosts_dir = node.path().join("certs.d");
    let arguments = ["--json", "attach", &name, "--hosts-dir", hosts_dir.to_str().unwrap()];
    let output = node.command(&arguments).env("FIRSTREAD_POOL_LIMIT", "1M").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let attached: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let path = attached["device"].as_str().unwrap();
    let device = File::open(path).unwrap();

    let over = AtomicBool::new(false);
    let (reads, longest, met) = std::thread::scope(|scope| {
        let ending = Ending(&over);
        let trouble = scope.spawn(|| make_trouble(&mirrors, &image.pack.to_string(), &over));
        let (mut random, mut reads, mut longest) = (Random(11), 0, Duration::ZERO);
        let end = Instant::now() + Duration::from_secs(seconds);
        while Instant::now() < end {
            // What the kernel has cached is no read of ours.
            assert!(Command::new("blockdev").args(["--flushbufs", path]).status().unwrap().success());
            for _ in 0..CHUNKS {
                let number = random.below(CHUNKS);
                let mut bytes = vec![0; CHUNK];
                let started = Instant::now();
                let read = device.read_exact_at(&mut bytes, (number * CHUNK) as u64);
                longest = longest.max(started.elapsed());
                assert!(read.is_ok(), "read {reads}, chunk {number}: {read:?}: {}", node.log());
                assert!(bytes == image.plain[number], "wrong bytes in chunk {number}");
                reads += 1;
            }
        }
        drop(ending);
        (reads, longest, trouble.join().unwrap())
    });
    println!("{reads} reads in {seconds} s, none failed, the longest took {longest:?}; {met} faults were met");
    assert!(met >= seconds, "only {met} faults were met: {}", node.log());
    let status = node.json(&["status", attached["id"].as_str().unwrap()]);
    let status = status.as_array().map_or(status.clone(), |all| all[0].clone());
    assert_eq!(status["chunks"]["failed"], 0, "{status}");
    drop(device);
    node.done(&["detach", path]);
}
