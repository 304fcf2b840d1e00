//! Copies between a guest's segments and memory of ours.

use vm_memory::{Bytes, GuestAddress};

use super::memory::Memory;
use super::request::Segment;

/// A place in a list of segments.
pub struct Cursor<'a> {
    segments: &'a [Segment],
    /// Bytes of the first segment that are behind.
    within: u64,
}

impl<'a> Cursor<'a> {
    /// At byte `at` of all of them together.
    #[must_use]
    pub fn new(segments: &'a [Segment], at: u64) -> Self {
        let mut cursor = Self { segments, within: 0 };
        cursor.skip(at);
        cursor
    }

    /// What is left of the current segment.
    #[must_use]
    pub fn rest(&self) -> Option<Segment> {
        let first = self.segments.first()?;
        let within = u32::try_from(self.within).ok()?;
        Some(Segment {
            address: GuestAddress(first.address.0.checked_add(self.within)?),
            len: first.len.checked_sub(within)?,
        })
    }

    /// Goes on by `len` bytes.
    pub fn skip(&mut self, len: u64) {
        self.within += len;
        while let Some((first, rest)) = self.segments.split_first()
            && self.within >= u64::from(first.len)
        {
            self.within -= u64::from(first.len);
            self.segments = rest;
        }
    }
}

/// Fills `bytes` from the segments, from byte `at` of them on. False if they are not all in the guest's memory.
#[must_use]
pub fn gather(memory: &Memory, segments: &[Segment], at: u64, mut bytes: &mut [u8]) -> bool {
    let mut cursor = Cursor::new(segments, at);
    while !bytes.is_empty() {
        let Some(segment) = cursor.rest() else { return false };
        let (now, later) = bytes.split_at_mut(bytes.len().min(segment.len as usize));
        if memory.read_slice(now, segment.address).is_err() {
            return false;
        }
        cursor.skip(now.len() as u64);
        bytes = later;
    }
    true
}

/// Copies `bytes` to the segments, from byte `at` of them on. False if they are not all in the guest's memory.
#[must_use]
pub fn scatter(memory: &Memory, segments: &[Segment], at: u64, mut bytes: &[u8]) -> bool {
    let mut cursor = Cursor::new(segments, at);
    while !bytes.is_empty() {
        let Some(segment) = cursor.rest() else { return false };
        let (now, later) = bytes.split_at(bytes.len().min(segment.len as usize));
        if memory.write_slice(now, segment.address).is_err() {
            return false;
        }
        cursor.skip(now.len() as u64);
        bytes = later;
    }
    true
}
