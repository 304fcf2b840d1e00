//! Requests of a guest: a chain of descriptors read into what is to be done. Nothing of it is believed.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::disk::{Access, SECTOR};
use super::memory::Memory;

/// Descriptors of one request, however it is made up: twice what guests are told to keep to.
pub const DESCRIPTORS_MAX: usize = 256;

/// Bytes of the header: type, reserved, sector.
const HEADER: usize = 16;

/// A range of a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its first byte.
    pub address: GuestAddress,
    /// Bytes.
    pub len: u32,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill the segments from the device.
    Read {
        /// First byte on the device.
        offset: u64,
        /// Bytes, as many as the segments have; inside the device.
        len: u64,
    },
    /// Tell the serial number.
    GetId,
    /// Make what was written durable.
    Flush,
    /// Nothing but to answer this status.
    Refuse(u8),
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The chain's first descriptor, by which the guest knows it.
    pub head: u16,
    /// What to do.
    pub operation: Operation,
    /// Where data goes.
    pub segments: Vec<Segment>,
    /// Where the status goes.
    pub status: GuestAddress,
}

/// The place and size of a descriptor table.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// Its first byte.
    pub address: GuestAddress,
    /// Descriptors in it.
    pub len: u16,
}

/// Walks the chain that starts at `head`: its readable and its writable segments.
///
/// `None` for a chain that breaks a rule of virtio 1.2, 2.7: a descriptor outside its table or the memory, a table in a
/// table, a loop, a readable segment behind a writable one; and for one of more than [`DESCRIPTORS_MAX`].
fn walk(memory: &Memory, mut table: Table, head: u16) -> Option<(Vec<Segment>, Vec<Segment>)> {
    let (mut readable, mut writable): (Vec<Segment>, Vec<Segment>) = (Vec::new(), Vec::new());
    let (mut next, mut nested) = (head, false);
    for _ in 0..=DESCRIPTORS_MAX {
        if next >= table.len {
            return None;
        }
        let place = table.address.0.checked_add(u64::from(next) * size_of::<Descriptor>() as u64)?;
        let descriptor: Descriptor = memory.read_obj(GuestAddress(place)).ok()?;
        if descriptor.refers_to_indirect_table() {
            let len = descriptor.len() as usize;
            if nested || descriptor.has_next() || len == 0 || !len.is_multiple_of(size_of::<Descriptor>()) {
                return None;
            }
            table = Table { address: descriptor.addr(), len: u16::try_from(len / size_of::<Descriptor>()).ok()? };
            (next, nested) = (0, true);
            continue;
        }
        let segment = Segment { address: descriptor.addr(), len: descriptor.len() };
        segment.address.0.checked_add(u64::from(segment.len))?;
        if descriptor.is_write_only() {
            join(&mut writable, segment);
        } else if writable.is_empty() {
            join(&mut readable, segment);
        } else {
            return None;
        }
        if !descriptor.has_next() {
            return Some((readable, writable));
        }
        next = descriptor.next();
    }
    None
}

/// Adds a segment; one that continues the last makes it longer.
fn join(segments: &mut Vec<Segment>, segment: Segment) {
    if segment.len == 0 {
        return;
    }
    if let Some(last) = segments.last_mut()
        && last.address.0.checked_add(u64::from(last.len)) == Some(segment.address.0)
        && let Some(len) = last.len.checked_add(segment.len)
    {
        last.len = len;
    } else {
        segments.push(segment);
    }
}

/// The first bytes of `segments`.
fn header(memory: &Memory, segments: &[Segment]) -> Option<[u8; HEADER]> {
    let (mut header, mut filled) = ([0; HEADER], 0);
    for segment in segments {
        let len = (HEADER - filled).min(segment.len as usize);
        memory.read_slice(&mut header[filled..filled + len], segment.address).ok()?;
        filled += len;
    }
    (filled == HEADER).then_some(header)
}

/// Reads the request whose chain starts at `head`. `None` if there is not even a place to answer to.
#[must_use]
pub fn parse(memory: &Memory, table: Table, head: u16, size: u64, access: Access) -> Option<Request> {
    let (readable, mut segments) = walk(memory, table, head)?;
    // The status is the last byte that may be written, wherever the segments' borders are.
    let last = segments.last_mut()?;
    last.len -= 1;
    let status = GuestAddress(last.address.0 + u64::from(last.len));
    if last.len == 0 {
        segments.pop();
    }
    let operation = match header(memory, &readable) {
        Some(header) => operation(&header, &segments, size, access),
        None => Operation::Refuse(VIRTIO_BLK_S_IOERR as u8),
    };
    Some(Request { head, operation, segments, status })
}

fn operation(header: &[u8; HEADER], segments: &[Segment], size: u64, access: Access) -> Operation {
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = *header;
    let len: u64 = segments.iter().map(|segment| u64::from(segment.len)).sum();
    let refused = Operation::Refuse(VIRTIO_BLK_S_IOERR as u8);
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => match u64::from_le_bytes(sector).checked_mul(SECTOR) {
            Some(offset) if len.is_multiple_of(SECTOR) && offset.checked_add(len).is_some_and(|end| end <= size) => {
                Operation::Read { offset, len }
            }
            _ => refused,
        },
        VIRTIO_BLK_T_GET_ID if len >= u64::from(VIRTIO_BLK_ID_BYTES) => Operation::GetId,
        VIRTIO_BLK_T_GET_ID => refused,
        VIRTIO_BLK_T_FLUSH => Operation::Flush,
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => match access {
            Access::ReadOnly => refused,
        },
        _ => Operation::Refuse(VIRTIO_BLK_S_UNSUPP as u8),
    }
}
