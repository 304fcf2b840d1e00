//! A daemon is stopped while readers of its devices wait for a source that is away: it ends at once and leaves nothing behind.
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
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use fault::Fault;
use packs::TestImage;
use program::{Node, wait_until};
use published::published;
use registry::Registry;

const CHUNK: usize = 64 << 10;

/// What readers of a device meet.
const OUTAGES: [&str; 3] = ["reset:", "stall:", "status:code=503,retry_after=20"];

struct Setup {
    proxy: Fault,
    node: Node,
    device: PathBuf,
    image: TestImage,
    _registry: Registry,
}

/// A device whose source is away, and whose readers wait for ever.
fn setup(seed: u64, outage: &str) -> Setup {
    let (registry, image) = published(seed, 8, CHUNK);
    let proxy = Fault::start(&format!("http://{}", registry.host()), &[]);
    let node = Node::new();
    let name = format!("{}/app:v1", proxy.host());
    let attached = node.json(&["attach", &name, "--on-outage", "wait", "--transport", "loop"]);
    let device = PathBuf::from(attached["device"].as_str().unwrap());
    proxy.arm(outage);
    Setup { proxy, node, device, image, _registry: registry }
}

/// Whether a loop device is attached to a file.
fn is_attached(device: &Path) -> bool {
    let name = device.file_name().unwrap().to_str().unwrap();
    Path::new(&format!("/sys/block/{name}/loop/backing_file")).exists()
}

/// Runs `stop` while two readers wait; they must end, the daemon too, and nothing of it may be left.
fn stopped_while_readers_wait(seed: u64, stop: impl Fn(&Node)) {
    for (number, outage) in OUTAGES.into_iter().enumerate() {
        let setup = setup(seed + number as u64, outage);
        let (sender, results) = channel();
        for chunk in [1, 6] {
            let (device, sender) = (File::open(&setup.device).unwrap(), sender.clone());
            std::thread::spawn(move || {
                let mut bytes = vec![0; 4096];
                sender.send(device.read_exact_at(&mut bytes, (chunk * CHUNK) as u64)).unwrap();
            });
        }
        wait_until("the source was asked", || setup.proxy.requests() > 0);
        assert_eq!(results.recv_timeout(Duration::from_millis(700)).unwrap_err(), RecvTimeoutError::Timeout);

        stop(&setup.node);
        wait_until("the daemon is gone", || setup.node.pid().is_none());
        for _ in 0..2 {
            let result =
                results.recv_timeout(Duration::from_secs(20)).expect("a reader waits for a daemon that is gone");
            assert!(result.is_err(), "{outage}");
        }
        wait_until("the device is gone", || !is_attached(&setup.device));
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(setup.node.path().to_str().unwrap()), "{mounts}");
        let log = setup.node.log();
        assert!(log.contains("INFO stopped") && !log.contains("ERROR") && !log.contains("panicked"), "{log}");
        // The next daemon serves the image as if nothing had been.
        setup.proxy.heal();
        let name = format!("{}/app:v1", setup.proxy.host());
        let again = setup.node.json(&["attach", &name]);
        let bytes = std::fs::read(again["device"].as_str().unwrap()).unwrap();
        assert!(bytes == setup.image.plain.concat(), "{outage}");
        setup.node.done(&["stop"]);
    }
}

#[test]
fn stop_refuses_while_readers_wait_and_ends_them_when_it_is_forced() {
    stopped_while_readers_wait(700, |node| {
        let refused = node.fails(1, &["stop"]);
        assert!(refused.contains("in use"), "{refused}");
        assert!(node.pid().is_some());
        node.done(&["stop", "--force"]);
    });
}

#[test]
fn sigterm_ends_a_daemon_whose_readers_wait() {
    stopped_while_readers_wait(800, |node| node.kill("-TERM"));
}
