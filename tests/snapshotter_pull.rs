//! What `firstread pull` shows, and how it waits for a snapshotter that containerd does not reach: a real containerd and registry.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/cluster.rs"]
mod cluster;
#[path = "common/program.rs"]
mod program;
#[path = "common/registry.rs"]
mod registry;
#[path = "common/snapshotter.rs"]
mod snapshotter;
#[path = "common/terminal.rs"]
mod terminal;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use cluster::Cluster;
use program::wait_until;
use serde_json::Value;
use terminal::{contains, on_a_terminal};

/// `firstread pull` of an image, with more options.
fn pull(cluster: &Cluster, name: &str, options: &[&str]) -> Command {
    let (socket, image) = (cluster.socket().display().to_string(), cluster.image(name));
    cluster.node.command(&[&["pull", "--containerd", &socket, &image], options].concat())
}

#[test]
fn a_pull_shows_what_it_resolved_fetches_and_prepares() {
    let cluster = Cluster::start(&[]);
    cluster.publish("app", 2);
    let manifest = cluster.manifest("app:1");
    let layers = manifest["layers"].as_array().unwrap();
    let shown = on_a_terminal(&pull(&cluster, "app:1", &[]));
    contains(&shown, &["\r", "is sha256:", " to fetch, ", "fetching", "preparing snapshots", "received"]);
    let counted = (1..=layers.len()).any(|done| shown.contains(&format!(" {done}/{}", layers.len())));
    assert!(counted, "{shown:?}");
    // The last that was drawn is gone when the answer comes.
    let answer = shown.rsplit('\n').find(|line| line.contains("received")).unwrap();
    assert!(!answer.contains("preparing"), "{answer:?}");

    cluster.remove_all();
    let output = pull(&cluster, "app:1", &["--json"]).output().unwrap();
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    let answer: Value = serde_json::from_str(&out).unwrap();
    let digest = answer["digest"].as_str().unwrap();
    contains(&err, &[digest, " to fetch, ", " stay in the registry"]);
    assert!(!err.contains('\r') && !err.contains('\x1b'), "{err:?}");
    let quiet = pull(&cluster, "app:1", &["--quiet"]).output().unwrap();
    assert!(quiet.status.success() && quiet.stderr.is_empty(), "{quiet:?}");
    contains(&String::from_utf8(quiet.stdout).unwrap(), &[digest, "received"]);
    let shown = on_a_terminal(&pull(&cluster, "app:1", &["--quiet"]));
    assert!(!shown.contains("fetching") && !shown.contains("preparing"), "{shown:?}");
    cluster.remove_all();
    cluster.nothing_remains();
}

/// Has containerd find nobody where the snapshotter listens.
fn without_a_snapshotter(cluster: &mut Cluster) {
    cluster.snapshotter.kill("-TERM");
    cluster.kill_containerd("-TERM");
    cluster.start_containerd();
    let refused = cluster.ctr(&["snapshot", "--snapshotter", "firstread", "prepare", "probe"]);
    assert!(!refused.status.success());
}

#[test]
fn a_snapshotter_that_comes_after_containerd_missed_it_is_waited_for() {
    let mut cluster = Cluster::start(&[]);
    cluster.publish("app", 2);
    without_a_snapshotter(&mut cluster);
    let mut child = pull(&cluster, "app:1", &["--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    let waiting = said.by_ref().map(Result::unwrap).find(|line| line.contains("waiting"));
    contains(&waiting.unwrap(), &["snapshotter.sock"]);
    // containerd goes on not to try for a while.
    cluster.snapshotter.resume(&cluster.node);
    let answer: Value = serde_json::from_reader(child.stdout.take().unwrap()).unwrap();
    assert!(child.wait().unwrap().success());
    // Said once.
    assert_eq!(said.map(Result::unwrap).filter(|line| line.contains("waiting")).count(), 0);
    let image = cluster.image("app:1");
    assert_eq!(answer["image"].as_str(), Some(image.as_str()));
    assert_eq!(cluster.run(&image, "one", "cat /name"), "app\n");
    cluster.remove_all();
    cluster.nothing_remains();
}

#[test]
fn a_snapshotter_that_does_not_come_is_an_error_with_a_next_step() {
    let mut cluster = Cluster::start(&[]);
    cluster.publish("app", 2);
    without_a_snapshotter(&mut cluster);
    let output = pull(&cluster, "app:1", &["--wait", "1"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    contains(&said, &["waiting", "after 1 s", "snapshotter.sock", "firstread doctor"]);
    assert!(!cluster.ctr_done(&["image", "ls", "-q"]).contains("app"));
    // Nobody waits for a containerd that is not there.
    cluster.kill_containerd("-TERM");
    let output = pull(&cluster, "app:1", &[]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && !said.contains("waiting"), "{said}");
    contains(&said, &["--containerd names its socket"]);
    cluster.start_containerd();
    cluster.resume_snapshotter();
    cluster.pull("app:1");
    cluster.remove_all();
    cluster.nothing_remains();
}

/// Publishes `app:fast`, whose start-up pack has what a read of `/data/1` reads; no chunk of it is local. Says what its start-up
/// pack is called and how many bytes it has.
fn with_a_startup_pack(cluster: &Cluster) -> (String, u64) {
    cluster.publish("app", 4);
    let (image, dir) = (cluster.image("app:1"), cluster.node.mount_point("mnt").display().to_string());
    let (profile, fast) = (cluster.node.path().join("profile").display().to_string(), cluster.image("app:fast"));
    cluster.node.done(&["mount", &image, &dir]);
    std::fs::read(format!("{dir}/data/1")).unwrap();
    cluster.node.done(&["profile", &dir, "-o", &profile]);
    cluster.node.done(&["umount", &dir]);
    let optimized = Command::new(env!("CARGO_BIN_EXE_firstread"))
        .args(["optimize", &image, &fast, "--profile", &profile, "--quiet"])
        .output()
        .unwrap();
    assert!(optimized.status.success(), "{}", String::from_utf8_lossy(&optimized.stderr));
    cluster.node.done(&["pool", "trim", "0"]);
    let pack = &cluster.manifest("app:fast")["layers"][0];
    assert_eq!(pack["annotations"]["containerd.io/snapshot/firstread/role"], "startup");
    (pack["digest"].as_str().unwrap().to_owned(), pack["size"].as_u64().unwrap())
}

/// The bytes of each answer about a blob since the registry's log had `from` bytes.
fn fetched(cluster: &Cluster, from: usize, digest: &str) -> Vec<u64> {
    cluster.fetched(from).into_iter().filter(|(path, _)| path.ends_with(digest)).map(|(_, bytes)| bytes).collect()
}

#[test]
fn what_a_start_reads_is_on_its_way_before_there_is_a_container() {
    let cluster = Cluster::start(&[]);
    let (pack, _) = with_a_startup_pack(&cluster);
    let from = cluster.mark();
    cluster.pull("app:fast");
    wait_until("the start-up pack is fetched", || !fetched(&cluster, from, &pack).is_empty());
    assert_eq!(cluster.node.json(&["list"]).as_array().unwrap().len(), 0);
    // The container's device asks for none of it again.
    let once = fetched(&cluster, from, &pack);
    assert_eq!(cluster.run(&cluster.image("app:fast"), "one", "cat /data/1 > /copy; cat /name"), "app\n");
    assert_eq!(fetched(&cluster, from, &pack), once);
    cluster.remove_all();
    cluster.nothing_remains();
}

#[test]
fn nothing_is_fetched_ahead_of_a_container_where_the_settings_say_so() {
    let cluster = Cluster::start(&[]);
    let (pack, bytes) = with_a_startup_pack(&cluster);
    cluster.node.done(&["stop"]);
    let mut daemon = cluster.node.command(&["daemon", "--prefetch", "none"]).stderr(Stdio::null()).spawn().unwrap();
    wait_until("the daemon runs", || {
        cluster.node.pid() == Some(daemon.id()) && cluster.node.run(&["list"]).status.success()
    });
    let from = cluster.mark();
    cluster.pull("app:fast");
    assert_eq!(cluster.run(&cluster.image("app:fast"), "one", "cat /name"), "app\n");
    let all: u64 = fetched(&cluster, from, &pack).iter().sum();
    assert!(all < bytes / 2, "{all} of {bytes} bytes");
    cluster.remove_all();
    cluster.nothing_remains();
    cluster.node.done(&["stop"]);
    daemon.wait().unwrap();
}
