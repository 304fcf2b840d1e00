//! A commit of a device that is in use: whoever writes goes on, and nothing stays frozen, whatever dies.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/built.rs"]
mod built;
#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;
#[path = "common/program.rs"]
mod program;
#[path = "common/random.rs"]
mod random;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use built::{Layout, request, run};
use program::{Node, wait_until};
use random::Random;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A node with a small image mounted, writable.
fn mounted() -> (Node, PathBuf, Layout) {
    let node = Node::new();
    let tree = node.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), Random(1).bytes(500_000)).unwrap();
    let layout = Layout(node.path().join("layout"));
    let mut request = request(&format!("dir:{}", tree.display()), &format!("oci:{}:1", layout.0.display()));
    request.size = Some(200 << 20);
    run(&request).unwrap();
    let dir = node.mount_point("mnt");
    node.done(&["mount", &format!("oci:{}:1", layout.0.display()), text(&dir), "--rw"]);
    (node, dir, layout)
}

/// Ends the writer, also when the test fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn content(number: u64) -> Vec<u8> {
    Random(number + 1).bytes(1 + (number as usize * 7919) % 60_000)
}

#[test]
fn what_was_synced_is_in_it_while_the_writer_goes_on() {
    let (node, dir, layout) = mounted();
    let (synced, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut number = 0;
            while !stop.load(Ordering::SeqCst) {
                let mut file = fs::File::create(dir.join(format!("w{number}"))).unwrap();
                file.write_all(&content(number)).unwrap();
                // Not every one is synced: the freeze writes the others.
                if number % 3 == 0 {
                    file.sync_all().unwrap();
                    synced.store(number, Ordering::SeqCst);
                }
                if number >= 20 {
                    fs::remove_file(dir.join(format!("w{}", number - 20))).unwrap();
                }
                number += 1;
            }
        });
        let ends = Ends(&stop);
        for round in 0..4 {
            let start = synced.load(Ordering::SeqCst);
            wait_until("the writer goes on", || synced.load(Ordering::SeqCst) > start + 30);
            let before = synced.load(Ordering::SeqCst);
            let tag = format!("c{round}");
            node.done(&["--quiet", "commit", "layout-1", &format!("oci:{}:{tag}", layout.0.display())]);
            let disk = node.path().join("disk");
            layout.device(&layout.top(&tag), &disk);
            ext4::fsck(&disk);
            let mount = ext4::Mount::new(&disk, &node.path().join("look"), "ro");
            let mut found = 0;
            for entry in fs::read_dir(mount.dir()).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                let Some(number) = name.strip_prefix('w').and_then(|number| number.parse::<u64>().ok()) else {
                    continue;
                };
                let bytes = fs::read(mount.dir().join(&name)).unwrap();
                // The one that is being written may be cut.
                assert!(content(number).starts_with(&bytes), "{name}");
                found += u64::from(number >= before && bytes == content(number));
            }
            assert!(found > 0, "nothing of what was synced before ({before})");
        }
        drop(ends);
        writer.join().unwrap();
    });
    let unfrozen = Command::new("fsfreeze").args(["--unfreeze", text(&dir)]).output().unwrap();
    assert!(!unfrozen.status.success(), "it was not frozen any more");
}

/// The process that holds the file system on `dir`, which says that it does.
fn hold(node: &Node, dir: &Path) -> Child {
    let records = node.run_dir().join("frozen");
    let mut command = node.command(&["hold-frozen", text(dir), text(&records)]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "frozen\n");
    child
}

/// Whether a file system is frozen: freezing it again says so.
fn is_frozen(dir: &Path) -> bool {
    let fsfreeze = |what: &str| Command::new("fsfreeze").args([what, text(dir)]).output().unwrap();
    let output = fsfreeze("--freeze");
    if output.status.success() {
        assert!(fsfreeze("--unfreeze").status.success());
        return false;
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("busy"), "{said}");
    true
}

#[test]
fn a_file_system_is_thawed_whatever_dies() {
    let (node, dir, _) = mounted();
    // Told to.
    let mut child = hold(&node, &dir);
    assert!(is_frozen(&dir));
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    assert!(!is_frozen(&dir));

    // Who wanted it is killed, and with it the whole process group, as by a terminal.
    let records = node.run_dir().join("frozen");
    let script = "import subprocess, sys, time
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
time.sleep(1000)";
    let mut parent = Command::new("python3")
        .args(["-c", script, env!("CARGO_BIN_EXE_firstread"), "hold-frozen", text(&dir), text(&records)])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("it is frozen", || {
        fs::read_dir(&records).is_ok_and(|mut found| found.next().is_some()) && is_frozen(&dir)
    });
    parent.kill().unwrap();
    parent.wait().unwrap();
    wait_until("it is thawed", || !is_frozen(&dir));

    // The holder itself is killed: the next verb thaws.
    let mut child = hold(&node, &dir);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(is_frozen(&dir));
    node.done(&["list"]);
    assert!(!is_frozen(&dir));
    assert_eq!(fs::read_dir(&records).unwrap().count(), 0);

    // The daemon is killed: a loop device is lost then, but nobody hangs.
    let mut child = hold(&node, &dir);
    node.kill("-9");
    drop(child.stdin.take());
    child.wait().unwrap();
    assert!(fs::write(dir.join("late"), "late").is_err(), "an error, no hang");
}

#[test]
fn a_commit_that_is_killed_leaves_nothing_frozen() {
    let (node, dir, layout) = mounted();
    fs::write(dir.join("written"), Random(5).bytes(100_000)).unwrap();
    let destination = format!("oci:{}:2", layout.0.display());
    // Killed at whatever point the commit has reached.
    for delay in [5, 20, 40] {
        let mut child = node.command(&["commit", text(&dir), &destination, "--quiet"]).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(delay));
        child.kill().unwrap();
        child.wait().unwrap();
        wait_until("it is thawed", || !is_frozen(&dir));
    }
    node.done(&["commit", text(&dir), &destination, "--quiet"]);
    wait_until("the snapshots are gone", || fs::read_dir(node.root().join("snapshots")).unwrap().count() == 0);
}
