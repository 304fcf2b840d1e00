//! The ends of firstread's processes and of containerd, in any order, under containers that run.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/cluster.rs"]
mod cluster;
#[path = "common/program.rs"]
mod program;
#[path = "common/registry.rs"]
mod registry;
#[path = "common/snapshotter.rs"]
mod snapshotter;

use std::fs;
use std::process::{Child, Stdio};

use cluster::Cluster;
use program::wait_until;
use snapshotter::Mounted;
use tonic::Code;

fn pull(cluster: &Cluster, name: &str) -> String {
    cluster.pull(name);
    cluster.image(name)
}

/// A container that reads its image all the time and counts the rounds in a file of ours.
struct Reader {
    child: Child,
    rounds: std::path::PathBuf,
    id: String,
}

impl Reader {
    fn start(cluster: &Cluster, image: &str, id: &str) -> Self {
        let dir = cluster.node.mount_point("rounds");
        let mount = format!("type=bind,src={},dst=/rounds,options=rbind:rw", dir.display());
        let script = format!("cd /data; while :; do cat * > /dev/null && cat /name >> /rounds/{id}; done");
        let mut run = cluster.container(image, id, &script, &["--mount", &mount]);
        let child = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let reader = Self { child, rounds: dir.join(id), id: cluster.id(id) };
        wait_until("the container reads", || reader.rounds() > 0);
        reader
    }

    fn rounds(&self) -> u64 {
        fs::metadata(&self.rounds).map_or(0, |metadata| metadata.len())
    }

    /// Waits until it has read everything again, and again.
    fn goes_on(&self) {
        let before = self.rounds();
        wait_until("the container goes on", || self.rounds() > before + 12);
    }

    /// Its root file system is gone with it.
    fn end(mut self, cluster: &Cluster) {
        let _ = cluster.ctr(&["task", "kill", "-s", "KILL", &self.id]);
        let _ = self.child.wait();
        let _ = cluster.ctr(&["task", "rm", "-f", &self.id]);
        let _ = cluster.ctr(&["container", "rm", &self.id]);
    }
}

fn name_of(cluster: &Cluster, image: &str, id: &str) -> String {
    cluster.run(image, id, "cat /name")
}

#[test]
fn the_snapshotter_and_containerd_are_killed_in_any_order_and_no_reader_notices() {
    let mut cluster = Cluster::start(&[]);
    cluster.publish("app", 4);
    let image = pull(&cluster, "app:1");
    let reader = Reader::start(&cluster, &image, "reader");
    let mounted = cluster.remains().0;

    cluster.snapshotter.kill("-KILL");
    reader.goes_on();
    let refused = cluster.container(&image, "early", "cat /name", &[]).output().unwrap();
    assert!(!refused.status.success(), "a container starts without a snapshotter");
    cluster.resume_snapshotter();
    let _ = cluster.ctr(&["container", "rm", &cluster.id("early")]);
    assert_eq!(name_of(&cluster, &image, "early"), "app\n");

    cluster.kill_containerd("-KILL");
    reader.goes_on();
    cluster.start_containerd();
    assert_eq!(name_of(&cluster, &image, "one"), "app\n");

    cluster.kill_containerd("-KILL");
    cluster.snapshotter.kill("-KILL");
    cluster.start_containerd();
    reader.goes_on();
    cluster.resume_snapshotter();
    assert_eq!(name_of(&cluster, &image, "two"), "app\n");
    reader.goes_on();
    assert_eq!(cluster.remains().0, mounted);
    reader.end(&cluster);
    cluster.remove_all();
    cluster.nothing_remains();
}

#[test]
fn a_daemon_that_was_killed_is_started_again_and_new_containers_get_a_new_device() {
    let cluster = Cluster::start(&["--transport", "loop"]);
    cluster.publish("app", 2);
    let image = pull(&cluster, "app:1");
    // A loop device does not outlive its server: a container on it gets errors, and is no obstacle to others.
    let sleeper = Reader::start(&cluster, &image, "old");
    cluster.node.kill("-KILL");
    assert_eq!(name_of(&cluster, &image, "one"), "app\n");
    assert_eq!(name_of(&cluster, &image, "two"), "app\n");
    let served = |state: &str| {
        let devices = cluster.node.json(&["list"]);
        devices.as_array().unwrap().iter().filter(|device| device["state"] == state).count()
    };
    assert_eq!(served("attached"), 1);
    sleeper.end(&cluster);
    cluster.remove_all();
    cluster.nothing_remains();
}

#[test]
fn what_a_crash_left_is_found_at_the_next_start() {
    let mut cluster = Cluster::start(&[]);
    cluster.publish("app", 2);
    let image = pull(&cluster, "app:1");
    assert_eq!(name_of(&cluster, &image, "one"), "app\n");
    let (mounts, devices, _) = cluster.remains();
    assert_eq!((mounts.len(), devices), (1, 1));
    // Killed after the snapshot was taken away and before its device was: nobody else knows of it any more.
    cluster.snapshotter.kill("-KILL");
    let snapshots = cluster.node.root().join("snapshotter/default/snapshots");
    let of_index =
        fs::read_dir(&snapshots).unwrap().map(|entry| entry.unwrap().path()).find(|dir| dir.join("mnt").exists());
    let of_index = of_index.unwrap();
    fs::rename(&of_index, snapshots.parent().unwrap().join("removed").join(of_index.file_name().unwrap())).unwrap();
    cluster.resume_snapshotter();
    wait_until("the device is gone", || {
        let (mounts, devices, _) = cluster.remains();
        mounts.is_empty() && devices == 0
    });
    // containerd believes that the index is still there; what it knows and we do not is mended by a command.
    let socket = cluster.socket();
    cluster.node.done(&["pull", "--repair", "--containerd", socket.to_str().unwrap(), &image]);
    assert_eq!(name_of(&cluster, &image, "two"), "app\n");
    cluster.remove_all();
    cluster.nothing_remains();
}

#[test]
fn a_damaged_record_hurts_one_image_and_is_mended_by_a_pull() {
    let mut cluster = Cluster::start(&[]);
    cluster.publish("app", 2);
    cluster.publish("other", 2);
    let (image, other) = (pull(&cluster, "app:1"), pull(&cluster, "other:1"));
    // A container that is based on what will be damaged: it can be removed afterwards, with what it has.
    let made = cluster.id("made");
    cluster.ctr_done(&["container", "create", "--snapshotter", "firstread", &image, &made]);
    cluster.snapshotter.kill("-TERM");
    let snapshots = cluster.node.root().join("snapshotter/default/snapshots");
    let digest = cluster.manifest("app:1")["layers"].as_array().unwrap().last().unwrap()["digest"].to_string();
    let mut damaged = 0;
    for entry in fs::read_dir(&snapshots).unwrap() {
        let record = entry.unwrap().path().join("record");
        let text = fs::read_to_string(&record).unwrap();
        if text.contains(digest.trim_matches('"')) {
            fs::write(&record, &text[..text.len() / 2]).unwrap();
            damaged += 1;
        }
    }
    assert_eq!(damaged, 1);
    cluster.resume_snapshotter();
    wait_until("the other image runs", || {
        cluster.ctr(&["snapshot", "--snapshotter", "firstread", "ls"]).status.success()
    });
    assert_eq!(name_of(&cluster, &other, "one"), "other\n");
    assert!(!cluster.container(&image, "two", "cat /name", &[]).output().unwrap().status.success());
    cluster.ctr_done(&["container", "rm", &made]);
    let socket = cluster.socket();
    cluster.node.done(&["pull", "--repair", "--containerd", socket.to_str().unwrap(), &image]);
    assert_eq!(name_of(&cluster, &image, "three"), "app\n");
    // What is damaged is kept until somebody looks at it; the doctor says where. Nothing else is.
    let found = cluster.node.run(&["--json", "doctor", "--containerd-socket", socket.to_str().unwrap()]);
    let found = String::from_utf8(found.stdout).unwrap();
    assert!(found.contains("the record in") && found.contains("pull --repair"), "{found}");
    cluster.remove_all();
    wait_until("only the damaged one is left", || cluster.remains() == (Vec::new(), 0, 1));
}

#[test]
fn a_container_for_kata_gets_exactly_one_writable_ext4_device() {
    let mut cluster = Cluster::start(&[]);
    cluster.publish("app", 2);
    pull(&cluster, "app:1");
    let snaps = &cluster.snapshotter;
    let index = snaps.list(&[r#"labels."containerd.io/snapshot/firstread/role"==index"#]).unwrap().remove(0);
    let wanted = [("containerd.io/snapshot/firstread/mount", "block")];
    let mounts = snaps.prepare_labelled("default/77/kata", &index.name, &wanted).unwrap();
    // What Kata's runtime looks for: one mount, of a block device, of this form.
    let devices = cluster.node.json(&["list"]);
    let devices: Vec<_> =
        devices.as_array().unwrap().iter().filter(|device| device["read_only"] == false).cloned().collect();
    assert_eq!(devices.len(), 1, "{devices:?}");
    assert_eq!(mounts.len(), 1);
    assert_eq!(
        (mounts[0].r#type.as_str(), mounts[0].source.as_str(), mounts[0].target.as_str(), &mounts[0].options[..]),
        ("ext4", devices[0]["device"].as_str().unwrap(), "", &["rw".to_owned()][..])
    );
    assert_eq!(snaps.mounts("default/77/kata").unwrap(), mounts);
    let at = cluster.node.mount_point("kata");
    Mounted::new(&mounts, &at).run("cat name; echo mine > name; touch new");
    let usage = snaps.usage("default/77/kata").unwrap();
    assert!(usage.size > 4096, "{usage:?}");
    snapshotter::refused(snaps.commit("x", "default/77/kata"), Code::FailedPrecondition);
    // Another container has its own, and both are there after restarts of everything.
    let second = snaps.prepare_labelled("default/78/kata", &index.name, &wanted).unwrap();
    assert_ne!(second[0].source, mounts[0].source);
    assert_eq!(Mounted::new(&second, &at).read("name").as_deref(), Some("app\n"));
    cluster.snapshotter.kill("-KILL");
    cluster.node.kill("-KILL");
    cluster.resume_snapshotter();
    let snapshotter = &cluster.snapshotter;
    let again = snapshotter.mounts("default/77/kata").unwrap();
    assert_eq!(Mounted::new(&again, &at).read("name").as_deref(), Some("mine\n"));
    for key in ["default/77/kata", "default/78/kata"] {
        snapshotter.remove(key).unwrap();
    }
    let wrong = [("containerd.io/snapshot/firstread/mount", "tape")];
    snapshotter::refused(snapshotter.prepare_labelled("default/79/x", &index.name, &wrong), Code::InvalidArgument);
    snapshotter::refused(snapshotter.stat("default/79/x"), Code::NotFound);
    cluster.remove_all();
    cluster.nothing_remains();
}

#[test]
fn a_runtime_s_snapshotter_gives_block_devices_without_a_label() {
    let cluster = Cluster::start(&["--mounts", "block", "--size", "3G"]);
    cluster.publish("app", 2);
    let image = pull(&cluster, "app:1");
    // With as much room as was asked for. Before a container was removed: with its snapshot containerd collects all that it does not know.
    let parent = cluster.snapshotter.list(&["kind==committed"]).unwrap();
    let parent = parent.iter().find(|info| info.labels.values().any(|role| role == "index")).unwrap();
    let mounts = cluster.snapshotter.prepare("default/99/large", &parent.name).unwrap();
    let mounted = Mounted::new(&mounts, &cluster.node.mount_point("large"));
    let room = rustix::fs::statvfs(mounted.path("")).unwrap();
    assert!(room.f_blocks * room.f_frsize > 2_900_000_000, "{} blocks", room.f_blocks);
    drop(mounted);
    cluster.snapshotter.remove("default/99/large").unwrap();
    let printed = cluster.run(&image, "one", "echo x > /new; cat /new /name; cat /proc/mounts");
    assert!(printed.starts_with("x\napp\n/dev/"), "{printed}");
    assert!(printed.lines().nth(2).unwrap().contains(" / ext4 rw"), "{printed}");
    cluster.remove_all();
    cluster.nothing_remains();
}

#[test]
fn what_was_read_once_starts_with_the_registry_gone() {
    let mut cluster = Cluster::start(&[]);
    cluster.publish("app", 2);
    let image = pull(&cluster, "app:1");
    let read = "cat /name /data/* > /all";
    cluster.run(&image, "one", read);
    // All was read; a restart of everything needs no registry.
    cluster.registry.stop();
    cluster.snapshotter.kill("-KILL");
    cluster.node.done(&["stop", "--force"]);
    cluster.resume_snapshotter();
    cluster.run(&image, "two", read);
}
