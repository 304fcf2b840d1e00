//! Requests of a guest: a chain of descriptors read into what is to be done. Nothing of it is believed.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::disk::{DISCARD_SECTORS, SECTOR};
use super::memory::Memory;
use crate::device::{Access, Zeroing};

/// Descriptors of one request, however it is made up: twice what guests are told to keep to.
pub const DESCRIPTORS_MAX: usize = 256;

/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`.
const UNMAP: u32 = 1;

/// Bytes of the header: type, reserved, sector; and of a range to discard.
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
    /// Write the segments to the device.
    Write {
        /// First byte on the device.
        offset: u64,
        /// Bytes, as many as the segments have; inside the device.
        len: u64,
    },
    /// Make a range zeros.
    Zero {
        /// First byte on the device.
        offset: u64,
        /// Bytes; inside the device.
        len: u64,
        /// How.
        how: Zeroing,
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
    /// Where data goes, or where a write's are.
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
    let Some(header) = header(memory, &readable) else {
        return Some(Request { head, operation: refused(), segments, status });
    };
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let kind = u32::from_le_bytes([t0, t1, t2, t3]);
    let sent = behind_header(&readable);
    let operation = match kind {
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if access == Access::ReadOnly => refused(),
        VIRTIO_BLK_T_IN => match range(u64::from_le_bytes(sector), bytes(&segments), size) {
            Some((offset, len)) => Operation::Read { offset, len },
            None => refused(),
        },
        VIRTIO_BLK_T_OUT => match range(u64::from_le_bytes(sector), bytes(&sent), size) {
            Some((offset, len)) => Operation::Write { offset, len },
            None => refused(),
        },
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => zeroing(memory, &sent, kind, size),
        VIRTIO_BLK_T_GET_ID if bytes(&segments) >= u64::from(VIRTIO_BLK_ID_BYTES) => Operation::GetId,
        VIRTIO_BLK_T_GET_ID => refused(),
        VIRTIO_BLK_T_FLUSH => Operation::Flush,
        _ => Operation::Refuse(VIRTIO_BLK_S_UNSUPP as u8),
    };
    let segments = if matches!(operation, Operation::Write { .. }) { sent } else { segments };
    Some(Request { head, operation, segments, status })
}

fn refused() -> Operation {
    Operation::Refuse(VIRTIO_BLK_S_IOERR as u8)
}

fn bytes(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

/// The range of `len` bytes from a sector, if it is one of whole sectors inside the device.
fn range(sector: u64, len: u64, size: u64) -> Option<(u64, u64)> {
    let offset = sector.checked_mul(SECTOR)?;
    let inside = len.is_multiple_of(SECTOR) && offset.checked_add(len).is_some_and(|end| end <= size);
    inside.then_some((offset, len))
}

/// What is behind the first [`HEADER`] bytes of the readable segments.
fn behind_header(readable: &[Segment]) -> Vec<Segment> {
    let mut skip = HEADER as u32;
    let rest = |segment: &Segment| {
        let skipped = skip.min(segment.len);
        skip -= skipped;
        let address = GuestAddress(segment.address.0 + u64::from(skipped));
        Some(Segment { address, len: segment.len - skipped }).filter(|segment| segment.len > 0)
    };
    readable.iter().filter_map(rest).collect()
}

/// The range of a request to discard or to zero (`struct virtio_blk_discard_write_zeroes`): guests were told to name one.
fn zeroing(memory: &Memory, sent: &[Segment], kind: u32, size: u64) -> Operation {
    if bytes(sent) != HEADER as u64 {
        return refused();
    }
    let Some([sector @ .., n0, n1, n2, n3, f0, f1, f2, f3]) = header(memory, sent) else { return refused() };
    let (sectors, flags) = (u32::from_le_bytes([n0, n1, n2, n3]), u32::from_le_bytes([f0, f1, f2, f3]));
    let how = match (kind, flags) {
        (VIRTIO_BLK_T_DISCARD, 0) => Zeroing::Discard,
        (VIRTIO_BLK_T_WRITE_ZEROES, 0) => Zeroing::Allocated,
        (VIRTIO_BLK_T_WRITE_ZEROES, UNMAP) => Zeroing::Hole,
        // "MUST set the status byte to VIRTIO_BLK_S_UNSUPP" for flags that it does not know, and to unmap a discard.
        _ => return Operation::Refuse(VIRTIO_BLK_S_UNSUPP as u8),
    };
    match range(u64::from_le_bytes(sector), u64::from(sectors) * SECTOR, size) {
        Some((offset, len)) if sectors <= DISCARD_SECTORS => Operation::Zero { offset, len, how },
        _ => refused(),
    }
}
