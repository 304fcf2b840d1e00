//! Every fault of a registry, seen by who reads the files of a mount: first once, then until it heals, then past the
//! deadline. Each file is read for the first time, and all its bytes are checked.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/fault.rs"]
mod fault;
#[path = "common/program.rs"]
mod program;
#[path = "common/registry.rs"]
mod registry;

use std::fs;
use std::io::{self, Read};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use fault::{FAULTS, Fault, is_wrong};
use program::Node;
use registry::Registry;

/// One chunk.
const FILE: usize = 256 << 10;
/// One file of so many is read: what comes along with a miss is not what the next fault is to meet.
const APART: usize = 6;
struct Setup {
    node: Node,
    proxy: Fault,
    tree: PathBuf,
    _registry: Registry,
}

/// An image of files that are fetched one by one, behind the proxy.
fn setup() -> Setup {
    let (node, registry) = (Node::new(), Registry::start());
    let tree = node.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let mut random = fs::File::open("/dev/urandom").unwrap();
    for number in 0..FAULTS.len() * APART {
        let mut bytes = vec![0; FILE];
        random.read_exact(&mut bytes).unwrap();
        fs::write(tree.join(format!("{number:04}")), bytes).unwrap();
    }
    let source = format!("dir:{}", tree.display());
    node.done(&["build", &source, &format!("{}/app:v1", registry.host()), "--quiet"]);
    let proxy = Fault::start(&format!("http://{}", registry.host()), &[]);
    Setup { node, proxy, tree, _registry: registry }
}

impl Setup {
    fn mount(&self, on_outage: &str) -> PathBuf {
        let dir = self.node.mount_point("mnt");
        let reference = format!("{}/app:v1", self.proxy.host());
        let mounted = self.node.json(&["mount", &reference, dir.to_str().unwrap(), "--on-outage", on_outage]);
        // Each miss is a request of its own then, so that a fault on the first one meets the file's reader.
        let name = mounted["device"].as_str().unwrap().trim_start_matches("/dev/").to_owned();
        fs::write(format!("/sys/block/{name}/queue/read_ahead_kb"), "0").unwrap();
        dir
    }

    /// A file's bytes through the mount, which must be right whenever there are any.
    fn read(&self, dir: &std::path::Path, number: usize) -> io::Result<()> {
        let name = format!("{:04}", number * APART + APART / 2);
        let found = fs::read(dir.join(&name))?;
        assert!(found == fs::read(self.tree.join(&name)).unwrap(), "wrong bytes in file {name}");
        Ok(())
    }

    /// `fault` for requests of packs, `when`.
    fn arm(&self, fault: &str, when: &str) {
        self.proxy.arm_for("/blobs/", fault, when);
    }

    fn end(&self, dir: &std::path::Path) {
        self.node.done(&["umount", dir.to_str().unwrap()]);
    }
}

/// What is late and right is survived however often.
fn passes(fault: &str) -> bool {
    fault.starts_with("delay")
}

#[test]
fn a_fault_that_passes_is_not_seen_in_a_mount() {
    let setup = setup();
    let dir = setup.mount("wait");
    for (number, fault) in FAULTS.iter().enumerate() {
        let before = setup.proxy.struck();
        setup.arm(fault, ",count=1");
        setup.read(&dir, number).unwrap_or_else(|error| panic!("{fault}: {error}: {}", setup.node.log()));
        assert!(setup.proxy.struck() > before, "{fault} was never met");
        setup.proxy.heal();
    }
    setup.end(&dir);
}

#[test]
fn readers_of_a_mount_wait_until_a_fault_has_healed() {
    let setup = setup();
    let dir = setup.mount("wait");
    for (number, fault) in FAULTS.iter().enumerate() {
        setup.arm(fault, "");
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| setup.read(&dir, number));
            std::thread::sleep(Duration::from_millis(600));
            assert!(is_wrong(fault) || passes(fault) || !reader.is_finished(), "{fault}");
            setup.proxy.heal();
            let result = reader.join().unwrap();
            assert!(is_wrong(fault) || result.is_ok(), "{fault}: {result:?} {}", setup.node.log());
        });
        setup.read(&dir, number).unwrap_or_else(|error| panic!("{fault}: {error}: {}", setup.node.log()));
    }
    setup.end(&dir);
}

#[test]
fn a_fault_that_stays_is_an_error_of_the_file_and_the_next_read_is_right() {
    let setup = setup();
    let dir = setup.mount("1");
    for (number, fault) in FAULTS.iter().enumerate() {
        setup.arm(fault, "");
        let started = Instant::now();
        let result = setup.read(&dir, number);
        assert!(started.elapsed() < Duration::from_secs(20), "{fault}: {:?}", started.elapsed());
        match result {
            Ok(()) => assert!(passes(fault), "{fault}"),
            Err(error) => assert_eq!(error.raw_os_error(), Some(5), "{fault}"),
        }
        setup.proxy.heal();
        // What was on its way may still fail.
        if setup.read(&dir, number).is_err() {
            setup.read(&dir, number).unwrap_or_else(|error| panic!("{fault}: {error}: {}", setup.node.log()));
        }
    }
    setup.end(&dir);
}
