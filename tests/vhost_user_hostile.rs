//! Guests and front-ends that break the rules of vhost-user-blk: they get errors, or nothing, and harm nobody else.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "common/file_device.rs"]
mod file_device;
#[path = "common/vhost_guest.rs"]
mod vhost_guest;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use file_device::{FileDevice, write_reference};
use firstread::attach::vhost_user::Memory;
use firstread::attach::vhost_user::request::{self, DESCRIPTORS_MAX, Operation, Table};
use firstread::device::Access;
use proptest::prelude::*;
use vhost_guest::{BASE, ENTRIES, Guest, INDIRECT, MEMORY, NEXT, Server, WRITE};
use vm_memory::{Bytes, GuestAddress};

const IN: u32 = 0;
const SIZE: u64 = 4 << 20;

struct Bed {
    dir: tempfile::TempDir,
    content: Vec<u8>,
    device: Arc<FileDevice>,
}

fn bed() -> Bed {
    let dir = tempfile::tempdir().unwrap();
    let path = write_reference(dir.path().join("disk"), SIZE / 4096, |_| false);
    let content = std::fs::read(&path).unwrap();
    Bed { device: FileDevice::open(&path), dir, content }
}

/// A guest of its own, which goes on reading right data whatever its neighbours do.
fn check_neighbour(guest: &mut Guest, bed: &Bed) {
    guest.request(0, 0, IN, 16, 65536);
    guest.kick(0);
    guest.answers(0, 1);
    assert!(guest.bytes(guest.data(0, 0), 65536) == bed.content[8192..8192 + 65536]);
}

/// Each chain is answered (nothing written, or an error), or ignored where even its head makes no sense; the queue goes on.
#[test]
fn crafted_chains_cost_only_themselves() {
    let bed = bed();
    let server = Server::start(bed.dir.path().join("bad.sock"), bed.device.clone());
    let other = Server::start(bed.dir.path().join("good.sock"), bed.device.clone());
    let mut neighbour = Guest::new(1);
    let _neighbour_front = neighbour.connect(&other.path);
    let mut guest = Guest::new(1);
    let _front = guest.connect(&server.path);
    let at = guest.data(0, 5);
    let end = BASE + MEMORY as u64;
    type Craft = fn(&Guest, u64, u64);
    let chains: [(&str, Craft); 16] = [
        ("no writable part", |g, at, _| g.descriptor(0, 0, at, 16, 0, 0)),
        ("only a status", |g, at, _| g.descriptor(0, 0, at, 1, WRITE, 0)),
        ("an empty status", |g, at, _| {
            g.descriptor(0, 0, at, 16, NEXT, 1);
            g.descriptor(0, 1, at, 0, WRITE, 0);
        }),
        ("a loop of one", |g, at, _| g.descriptor(0, 0, at, 16, NEXT, 0)),
        ("a loop of two", |g, at, _| {
            g.descriptor(0, 0, at, 16, NEXT, 1);
            g.descriptor(0, 1, at + 4096, 512, NEXT | WRITE, 0);
        }),
        ("next outside the table", |g, at, _| g.descriptor(0, 0, at, 16, NEXT, ENTRIES)),
        ("readable behind writable", |g, at, _| {
            g.descriptor(0, 0, at, 512, NEXT | WRITE, 1);
            g.descriptor(0, 1, at, 16, 0, 0);
        }),
        ("a header outside the memory", |g, at, _| {
            g.descriptor(0, 0, 0, 16, NEXT, 1);
            g.descriptor(0, 1, at, 513, WRITE, 0);
        }),
        ("data across the memory's end", |g, at, end| {
            g.descriptor(0, 0, at, 16, NEXT, 1);
            g.descriptor(0, 1, end - 512, 1024, NEXT | WRITE, 2);
            g.descriptor(0, 2, at + 4096, 1, WRITE, 0);
        }),
        ("data at the end of all addresses", |g, at, _| {
            g.descriptor(0, 0, at, 16, NEXT, 1);
            g.descriptor(0, 1, u64::MAX - 100, 512, NEXT | WRITE, 2);
            g.descriptor(0, 2, at + 4096, 1, WRITE, 0);
        }),
        ("4 GiB of data, again and again", |g, at, _| {
            g.descriptor(0, 0, at, 16, NEXT, 1);
            for index in 1..100 {
                g.descriptor(0, index, at, u32::MAX, NEXT | WRITE, index + 1);
            }
            g.descriptor(0, 100, at, 1, WRITE, 0);
        }),
        ("a status outside the memory", |g, at, end| {
            g.descriptor(0, 0, at, 16, NEXT, 1);
            g.descriptor(0, 1, at + 4096, 512, NEXT | WRITE, 2);
            g.descriptor(0, 2, end + 4096, 1, WRITE, 0);
        }),
        ("an indirect table in an indirect table", |g, at, _| {
            g.descriptor(0, 0, at + 4096, 32, INDIRECT, 0);
            g.put_descriptor(at + 4096, at + 4096, 32, INDIRECT, 0);
        }),
        ("an indirect table of odd length", |g, at, _| g.descriptor(0, 0, at + 4096, 33, INDIRECT, 0)),
        ("an indirect table outside the memory", |g, _, end| g.descriptor(0, 0, end, 1 << 20, INDIRECT, 0)),
        ("an indirect table as long as can be", |g, at, _| {
            for index in 0..4096 {
                g.put_descriptor(at + 4096 + index * 16, at, 16, NEXT | WRITE, index as u16 + 1);
            }
            g.descriptor(0, 0, at + 4096, 65535 * 16, INDIRECT, 0);
        }),
    ];
    for (name, craft) in chains {
        guest.header(at, IN, 0);
        craft(&guest, at, end);
        guest.offer(0, 0);
        guest.kick(0);
        let (head, written) = guest.answers(0, 1)[0];
        assert_eq!(head, 0, "{name}");
        assert!(written <= 513, "{name}: {written} bytes");
        check_neighbour(&mut neighbour, &bed);
        check_neighbour(&mut guest, &bed);
    }
    // A head outside the table can't even be answered.
    guest.offer(0, ENTRIES);
    guest.offer(0, u16::MAX);
    guest.kick(0);
    check_neighbour(&mut guest, &bed);
    // An index that says that more was offered than fits stops this queue, and nothing else.
    let index = guest.queues[0].ring().0 + 2;
    guest.memory.write_obj(guest.queues[0].available.wrapping_add(ENTRIES + 1), GuestAddress(index)).unwrap();
    guest.kick(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.take_answers(0), []);
    check_neighbour(&mut neighbour, &bed);
}

/// Queues that lie outside the memory, and messages that are none, end the front-end's connection or get an error; the
/// server stays for the next one.
#[test]
fn a_front_end_that_makes_no_sense_is_sent_away() {
    let bed = bed();
    let server = Server::start(bed.dir.path().join("v.sock"), bed.device.clone());
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..200_u32 {
        let mut stream = UnixStream::connect(&server.path).unwrap();
        let mut bytes = vec![0_u8; 12 + (round as usize % 300)];
        for byte in &mut bytes {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state as u8;
        }
        if round % 4 != 0 {
            // A message with a code, the right version and a length that is there.
            bytes[..4].copy_from_slice(&(round % 45).to_le_bytes());
            bytes[4..8].copy_from_slice(&(1 | (round & 8)).to_le_bytes());
            let len = bytes.len() as u32 - 12;
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
        }
        stream.write_all(&bytes).unwrap();
    }
    let mut guest = Guest::new(1);
    let _front = guest.connect(&server.path);
    check_neighbour(&mut guest, &bed);
}

/// Descriptors that look like something: addresses in and around the memory, small and huge lengths.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![6 => (0..0x80_u64).prop_map(|at| at * 16), 2 => 0..0x3000_u64, 1 => any::<u64>()];
    let len =
        prop_oneof![1 => Just(0_u32), 1 => Just(1), 4 => Just(16), 4 => Just(512), 1 => 0..8192_u32, 1 => any::<u32>()];
    (address, len, 0..8_u16, 0..20_u16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Whatever is in the table, a request that comes out keeps the bounds that the queue's thread relies on.
    #[test]
    fn any_table_gives_a_bounded_request_or_none(
        descriptors in prop::collection::vec(descriptor(), 16),
        kind in prop_oneof![Just(0_u32), 0..20_u32, any::<u32>()],
        sector in prop_oneof![0..SIZE / 256, any::<u64>()],
        head in 0..20_u16,
    ) {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)]).unwrap();
        for (index, (address, len, flags, next)) in descriptors.iter().enumerate() {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&next.to_le_bytes());
            memory.write_slice(&bytes, GuestAddress(0x800 + 16 * index as u64)).unwrap();
        }
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        for place in 0..0x80 {
            memory.write_slice(&header, GuestAddress(16 * place)).unwrap();
        }
        let table = Table { address: GuestAddress(0x800), len: 16 };
        if let Some(request) = request::parse(&memory, table, head, SIZE, Access::ReadOnly) {
            prop_assert_eq!(request.head, head);
            prop_assert!(head < 16);
            prop_assert!(request.segments.len() <= DESCRIPTORS_MAX);
            prop_assert!(request.segments.iter().all(|segment| segment.len > 0));
            if let Operation::Read { offset, len } = request.operation {
                prop_assert!(offset.checked_add(len).unwrap() <= SIZE);
                prop_assert_eq!(len, request.segments.iter().map(|segment| u64::from(segment.len)).sum::<u64>());
                prop_assert_eq!(len % 512, 0);
            }
        }
    }
}
