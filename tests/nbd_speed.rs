//! The NBD server's speed on hits beside nbdkit and qemu-nbd, all over the same file, taking turns. Run by hand:
//! `cargo test --release --test nbd_speed -- --ignored --nocapture`.
#![cfg(feature = "nbd")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/file_device.rs"]
mod file_device;
#[path = "common/nbd_server.rs"]
mod nbd_server;

use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use file_device::{BLOCK, FileDevice, write_reference};
use firstread::attach::nbd::NbdOptions;
use nbd_server::{Server, run};
use tempfile::TempDir;

const MIB: u64 = 512;
const ROUNDS: usize = 3;

struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(mut command: Command, socket: &Path) -> Peer {
    let peer = Peer(command.spawn().unwrap());
    while !socket.exists() {
        std::thread::sleep(Duration::from_millis(10));
    }
    peer
}

/// Megabytes a second that nbdcopy reaches.
fn copy(uri: &str, connections: u32, request: u32) -> f64 {
    let (connections, request) = (format!("--connections={connections}"), format!("--request-size={request}"));
    let begin = Instant::now();
    for _ in 0..3 {
        run("nbdcopy", &[&connections, &request, "--no-extents", uri, "null:"]);
    }
    (3 * MIB) as f64 / begin.elapsed().as_secs_f64()
}

/// Thousands of reads a second that fio reaches.
fn fio(uri: &str, pattern: &str, size: &str, depth: u32) -> f64 {
    let report = run(
        "fio",
        &[
            "--name=t",
            "--ioengine=nbd",
            &format!("--uri={uri}"),
            &format!("--size={MIB}M"),
            &format!("--rw={pattern}"),
            &format!("--bs={size}"),
            &format!("--iodepth={depth}"),
            "--time_based",
            "--runtime=2",
            "--norandommap",
            "--output-format=json",
        ],
    );
    let report: serde_json::Value = serde_json::from_str(&report[report.find('{').unwrap()..]).unwrap();
    report["jobs"][0]["read"]["iops"].as_f64().unwrap() / 1000.0
}

#[test]
#[ignore = "takes minutes, and only an optimised build tells anything"]
fn hits_beside_others() {
    let dir = TempDir::new().unwrap();
    let file = write_reference(dir.path().join("disk"), MIB * 1024 * 1024 / BLOCK, |_| false);
    let server = Server::start(dir.path(), FileDevice::open(&file), NbdOptions::default());
    let mut peers = vec![("firstread", server.uri())];
    let mut running = Vec::new();
    for name in ["nbdkit", "qemu-nbd"] {
        let socket = dir.path().join(name);
        let mut command = Command::new(name);
        match name {
            "nbdkit" => command.args(["-f", "-r", "-U"]).arg(&socket).arg("file").arg(&file),
            _ => command.args(["-r", "-f", "raw", "-t", "-e", "16", "-k"]).arg(&socket).arg(&file),
        };
        running.push(start(command, &socket));
        peers.push((name, format!("nbd+unix:///?socket={}", socket.display())));
    }
    type Work<'a> = (&'a str, Box<dyn Fn(&str) -> f64>);
    let all: Vec<Work<'_>> = vec![
        ("nbdcopy, 4 connections, 256 KiB, MB/s", Box::new(|uri| copy(uri, 4, 256 << 10))),
        ("nbdcopy, 4 connections, 1 MiB, MB/s", Box::new(|uri| copy(uri, 4, 1 << 20))),
        ("nbdcopy, 4 connections, 32 MiB, MB/s", Box::new(|uri| copy(uri, 4, 32 << 20))),
        ("nbdcopy, 1 connection, 256 KiB, MB/s", Box::new(|uri| copy(uri, 1, 256 << 10))),
        ("fio random 4 KiB qd1, kIOPS", Box::new(|uri| fio(uri, "randread", "4k", 1))),
        ("fio random 4 KiB qd16, kIOPS", Box::new(|uri| fio(uri, "randread", "4k", 16))),
        ("fio sequential 1 MiB qd4, kIOPS", Box::new(|uri| fio(uri, "read", "1m", 4))),
    ];
    let only = std::env::var("FIRSTREAD_TEST_SPEED").unwrap_or_default();
    for (what, work) in all.iter().filter(|(what, _)| what.contains(&only)) {
        let mut figures = vec![Vec::new(); peers.len()];
        for _ in 0..ROUNDS {
            for (at, (_, uri)) in peers.iter().enumerate() {
                figures[at].push(work(uri));
            }
        }
        let medians: Vec<f64> = figures
            .iter_mut()
            .map(|values| {
                values.sort_by(f64::total_cmp);
                values[values.len() / 2]
            })
            .collect();
        print!("{what}:");
        for ((name, _), median) in peers.iter().zip(&medians) {
            print!(" {name} {median:.2} ({:.2})", medians[0] / median);
        }
        println!();
    }
}
