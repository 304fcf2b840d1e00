//! The vhost-user-blk server with a front-end of the rust-vmm crates and queues written by hand: right data, several
//! requests in flight, front-ends and servers that come back.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "common/file_device.rs"]
mod file_device;
#[path = "common/vhost_guest.rs"]
mod vhost_guest;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use file_device::{BLOCK, FileDevice, write_reference};
use vhost::VhostBackend;
use vhost_guest::{Guest, NEXT, Server, WRITE, config};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;

struct Bed {
    dir: tempfile::TempDir,
    device: Arc<FileDevice>,
    content: Vec<u8>,
}

fn bed() -> Bed {
    let dir = tempfile::tempdir().unwrap();
    let path = write_reference(dir.path().join("disk"), 2048, |block| block % 7 == 3);
    let content = std::fs::read(&path).unwrap();
    Bed { device: FileDevice::open(&path), dir, content }
}

impl Bed {
    fn serve(&self) -> Server {
        Server::start(self.dir.path().join("vhost.sock"), self.device.clone())
    }

    fn expected(&self, sector: u64, len: usize) -> &[u8] {
        &self.content[sector as usize * 512..][..len]
    }
}

#[test]
fn a_guest_reads_what_is_on_the_device() {
    let bed = bed();
    let server = bed.serve();
    let mut guest = Guest::new(3);
    let mut front = guest.connect(&server.path);
    let config = config(&mut front);
    assert_eq!(config[..8], (bed.content.len() as u64 / 512).to_le_bytes());
    assert_eq!(config[20..24], 512_u32.to_le_bytes());
    assert_eq!(config[34..36], 16_u16.to_le_bytes());
    let features = front.get_features().unwrap();
    assert_ne!(features & 1 << 5, 0, "read-only");
    assert_eq!(features & (1 << 13 | 1 << 14), 0, "neither discard nor write zeroes");

    for round in 0..40_u64 {
        let queue = (round % 3) as usize;
        for slot in 0..16_u16 {
            let sector = (round * 7919 + u64::from(slot) * 613) % 15_000;
            guest.request(queue, slot, IN, sector, 512 * (1 + (round as u32 * 5 + u32::from(slot)) % 200));
        }
        guest.kick(queue);
        for (head, written) in guest.answers(queue, 16) {
            let slot = head / 3;
            assert_eq!(guest.status(queue, slot), 0);
            let sector = (round * 7919 + u64::from(slot) * 613) % 15_000;
            let found = guest.bytes(guest.data(queue, slot), written as usize - 1);
            assert!(found == bed.expected(sector, found.len()), "round {round}, slot {slot}");
        }
        assert!(guest.queues[queue].call.read().is_ok(), "the guest is told");
    }

    guest.request(0, 0, GET_ID, 0, 20);
    guest.request(0, 1, FLUSH, 0, 0);
    guest.request(0, 2, OUT, 0, 512);
    guest.request(0, 3, DISCARD, 0, 512);
    guest.request(0, 4, 77, 0, 512);
    guest.request(0, 5, IN, bed.content.len() as u64 / 512, 512);
    guest.request(0, 6, IN, u64::MAX / 512, 1024);
    guest.request(0, 7, IN, 0, 513);
    guest.kick(0);
    guest.answers(0, 8);
    assert_eq!(guest.bytes(guest.data(0, 0), 20), b"0123456789abcdefghij");
    let status: Vec<u8> = (0..8).map(|slot| guest.status(0, slot)).collect();
    assert_eq!(status, [0, 0, 1, 1, 2, 1, 1, 1]);
}

/// Guests give a read in many small pieces, and headers and statuses wherever they like.
#[test]
fn any_layout_of_segments_is_filled() {
    let bed = bed();
    let server = bed.serve();
    let mut guest = Guest::new(1);
    let _front = guest.connect(&server.path);
    let at = guest.data(0, 0);
    guest.header(at - 4096, IN, 40);
    // The header in two parts; 40 segments of 1536 bytes with gaps, and the status behind the last one's data.
    guest.descriptor(0, 0, at - 4096, 5, NEXT, 1);
    guest.descriptor(0, 1, at - 4091, 11, NEXT, 2);
    let segments = 40_u16;
    for segment in 0..segments {
        let last = segment == segments - 1;
        let (len, flags) = if last { (1537, WRITE) } else { (1536, NEXT | WRITE) };
        guest.descriptor(0, 2 + segment, at + u64::from(segment) * 2048, len, flags, 3 + segment);
    }
    guest.offer(0, 0);
    guest.kick(0);
    assert_eq!(guest.answers(0, 1), [(0, 40 * 1536 + 1)]);
    for segment in 0..u64::from(segments) {
        let found = guest.bytes(at + segment * 2048, 1536);
        assert!(found == bed.expected(40 + segment * 3, 1536), "segment {segment}");
    }
    assert_eq!(guest.bytes(at + 39 * 2048 + 1536, 1), [0]);
}

#[test]
fn misses_wait_together_and_hits_do_not_wait_for_them() {
    let bed = bed();
    bed.device.make_remote(0..1 << 20);
    bed.device.delay_misses(Duration::from_millis(300));
    let server = bed.serve();
    let mut guest = Guest::new(1);
    let _front = guest.connect(&server.path);
    for slot in 0..8 {
        guest.request(0, slot, IN, u64::from(slot) * 64, 4096);
    }
    guest.request(0, 20, IN, 4096, 4096);
    guest.kick(0);
    assert_eq!(guest.answers(0, 1)[0].0, 60, "the hit comes first");
    guest.answers(0, 8);
    assert_eq!(bed.device.in_flight_max.load(Ordering::SeqCst), 8, "all misses were on their way at once");
    for slot in 0..8 {
        assert_eq!(guest.status(0, slot), 0);
        assert!(guest.bytes(guest.data(0, slot), 4096) == bed.expected(u64::from(slot) * 64, 4096));
    }
}

#[test]
fn a_chunk_that_is_wrong_at_its_source_is_an_error_of_one_request() {
    let bed = bed();
    bed.device.make_remote(0..BLOCK);
    bed.device.make_bad(0..BLOCK);
    let server = bed.serve();
    let mut guest = Guest::new(1);
    let _front = guest.connect(&server.path);
    guest.request(0, 0, IN, 0, 512);
    guest.request(0, 1, IN, 8, 512);
    guest.kick(0);
    guest.answers(0, 2);
    assert_eq!((guest.status(0, 0), guest.status(0, 1)), (1, 0));
}

/// The front-end stops the queue (a reboot of the guest), dies, or goes in the middle of a message: the next is served.
#[test]
fn front_ends_come_back() {
    let bed = bed();
    let server = bed.serve();
    let mut guest = Guest::new(2);
    for round in 0..4 {
        let front = guest.connect(&server.path);
        guest.request(0, 0, IN, 80, 8192);
        guest.kick(0);
        guest.answers(0, 1);
        assert!(guest.bytes(guest.data(0, 0), 8192) == bed.expected(80, 8192), "round {round}");
        match round {
            0 => drop(front),
            1 => {
                assert_eq!(front.get_vring_base(0).unwrap(), u32::from(guest.queues[0].available));
                guest.request(0, 0, IN, 0, 512);
                guest.kick(0);
                std::thread::sleep(Duration::from_millis(50));
                assert_eq!(guest.take_answers(0), [], "a queue that was stopped answers nothing");
                guest.clear(0);
            }
            _ => {
                drop(front);
                let mut half = std::os::unix::net::UnixStream::connect(&server.path).unwrap();
                std::io::Write::write_all(&mut half, &[1, 0, 0]).unwrap();
            }
        }
    }
}

/// The server dies with requests on their way; the next one, at the same path, answers them, each once.
#[test]
fn what_was_in_flight_is_answered_by_the_next_server() {
    let bed = bed();
    bed.device.make_remote(0..1 << 20);
    bed.device.delay_misses(Duration::from_secs(30));
    let server = bed.serve();
    let mut guest = Guest::new(1);
    let front = guest.connect(&server.path);
    for slot in 0..6 {
        guest.request(0, slot, IN, u64::from(slot) * 128, 4096);
        guest.request(0, 10 + slot, IN, 4096 + u64::from(slot) * 128, 4096);
    }
    guest.kick(0);
    let mut answered: Vec<u16> = guest.answers(0, 6).iter().map(|(head, _)| head / 3).collect();
    answered.sort_unstable();
    assert_eq!(answered, [10, 11, 12, 13, 14, 15]);
    drop(front);
    server.die();
    // Offered while nobody serves.
    guest.request(0, 20, IN, 8192, 4096);
    bed.device.delay_misses(Duration::from_millis(20));
    let server = bed.serve();
    let _front = guest.connect(&server.path);
    let mut answered: Vec<u16> = guest.answers(0, 7).iter().map(|(head, _)| head / 3).collect();
    answered.sort_unstable();
    assert_eq!(answered, [0, 1, 2, 3, 4, 5, 20]);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(guest.take_answers(0), [], "each is answered once");
    for slot in 0..6 {
        assert!(guest.bytes(guest.data(0, slot), 4096) == bed.expected(u64::from(slot) * 128, 4096), "slot {slot}");
    }
}
