//! The failure contract: every fault of a registry, on the first request, in the middle, until it heals and for ever, seen
//! by a reader of an attached device that checks every byte.
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
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use fault::{FAULTS, Fault, is_wrong};
use packs::TestImage;
use program::Node;
use published::published;
use registry::Registry;

/// Large, so that each is a request of its own: a bit that is flipped in an answer is the chunk's that was read.
const CHUNK: usize = 256 << 10;
const CHUNKS: usize = 8;

struct Setup {
    proxy: Fault,
    node: Node,
    image: TestImage,
    _registry: Registry,
}

/// An image that no other case has, so that its chunks are nowhere yet.
fn setup(seed: u64) -> Setup {
    let (registry, image) = published(seed, CHUNKS, CHUNK);
    let proxy = Fault::start(&format!("http://{}", registry.host()), &[]);
    Setup { proxy, node: Node::new(), image, _registry: registry }
}

impl Setup {
    /// Attaches the image with its own data pool cold.
    fn attach(&self, on_outage: &str) -> File {
        let reference = format!("{}/app:v1", self.proxy.host());
        let attached = self.node.json(&["attach", &reference, "--on-outage", on_outage]);
        let device = attached["device"].as_str().unwrap();
        let name = Path::new(device).file_name().unwrap().to_str().unwrap();
        std::fs::write(format!("/sys/block/{name}/queue/read_ahead_kb"), "0").unwrap();
        File::open(device).unwrap()
    }

    /// Reads chunk number `number` and checks it.
    fn read(&self, device: &File, number: usize) -> io::Result<()> {
        let mut bytes = vec![0; CHUNK];
        device.read_exact_at(&mut bytes, (number * CHUNK) as u64)?;
        assert!(bytes == self.image.plain[number], "wrong bytes in chunk {number}");
        Ok(())
    }

    fn read_all(&self, device: &File) {
        for number in 0..CHUNKS {
            self.read(device, number).unwrap_or_else(|error| panic!("chunk {number}: {error}: {}", self.node.log()));
        }
    }

    /// `fault` for requests of the pack alone, with what says when.
    fn arm(&self, fault: &str, when: &str) {
        self.proxy.arm_for(&self.image.pack.to_string(), fault, when);
    }
}

/// Runs `case` for all faults, a few at a time: each has a registry, a proxy and a daemon.
fn for_all(seed: u64, case: impl Fn(&Setup, &str) + Sync) {
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(fault) = FAULTS.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                    let setup = setup(seed + fault.len() as u64);
                    case(&setup, fault);
                    let log = setup.node.log();
                    let told = |text: &str| log.lines().filter(|line| line.contains(text)).count();
                    // Each case is one outage, or two.
                    assert!(told("no source can be reached") <= 2, "{fault} is told of again and again: {log}");
                    assert!(log.lines().count() < 30, "{fault}: {log}");
                }
            });
        }
    });
}

#[test]
fn a_fault_on_the_first_request_or_in_the_middle_is_survived() {
    for_all(100, |setup, fault| {
        setup.arm(fault, ",count=1");
        setup.arm(fault, ",skip=1,count=1");
        let device = setup.attach("8");
        setup.read_all(&device);
        assert!(setup.proxy.struck() >= 1, "{fault} was never met");
    });
}

#[test]
fn a_reader_waits_until_a_fault_has_healed_and_then_goes_on_alone() {
    for_all(200, |setup, fault| {
        let device = setup.attach("wait");
        setup.read(&device, 0).unwrap();
        setup.arm(fault, "");
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| setup.read(&device, 7));
            std::thread::sleep(Duration::from_millis(800));
            let wrong = is_wrong(fault);
            assert!(wrong || fault.starts_with("delay") || !reader.is_finished(), "{fault}");
            setup.proxy.heal();
            let result = reader.join().unwrap();
            assert!(wrong || result.is_ok(), "{fault}: {result:?} {}", setup.node.log());
        });
        setup.read_all(&device);
    });
}

#[test]
fn a_fault_that_stays_is_an_error_within_the_deadline_and_service_resumes() {
    for_all(300, |setup, fault| {
        let device = setup.attach("2");
        setup.arm(fault, "");
        for number in [0, 5] {
            let started = Instant::now();
            let result = setup.read(&device, number);
            let took = started.elapsed();
            assert!(took < Duration::from_secs(2 + 8), "{fault}: {took:?}");
            if !fault.starts_with("delay") {
                assert_eq!(result.unwrap_err().raw_os_error(), Some(5), "{fault}");
            }
        }
        setup.proxy.heal();
        setup.read_all(&device);
    });
}

#[test]
fn what_is_gone_is_an_error_at_once_and_what_drips_is_waited_for() {
    let setup = setup(400);
    let device = setup.attach("wait");
    setup.arm("status:code=404", "");
    assert!(setup.read(&device, 0).is_err());
    setup.proxy.heal();
    setup.arm("drip:rate=64K", "");
    setup.read(&device, 0).unwrap();
    setup.proxy.heal();
    setup.arm("tls:", ",count=3");
    setup.read_all(&device);
}
