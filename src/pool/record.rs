//! Records and headers, as FORMAT.md describes them.
#![deny(clippy::indexing_slicing)]

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::chunk::{CHUNK_MAX, Digest};

/// Unit of a chunk's offset in its slab, in bytes.
pub(super) const ALIGN: u64 = 4096;

/// First byte after the header's page: of the records of a journal, of the table of a slab.
pub(super) const BODY: u64 = 4096;

/// Length of a record and of a header.
pub(super) const RECORD: u64 = 64;

pub(super) const VERSION: u32 = 1;
pub(super) const JOURNAL_MAGIC: [u8; 8] = *b"FRPOOLJ\0";
pub(super) const SLAB_MAGIC: [u8; 8] = *b"FRSLAB\0\0";

const KIND_ADMIT: u32 = 1;
const KIND_DROP: u32 = 2;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawRecord {
    digest: [u8; 32],
    slab: U32,
    block: U32,
    len: U32,
    kind: U32,
    row: U32,
    reserved: [u8; 8],
    checksum: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    slab: U32,
    bytes: U64,
    records: U32,
    reserved: [u8; 32],
    checksum: U32,
}

/// What happened to a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Admit,
    Drop,
}

/// A chunk and its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub kind: Kind,
    pub digest: Digest,
    /// Number of the slab.
    pub slab: u32,
    /// Offset in the slab, in units of [`ALIGN`].
    pub block: u32,
    /// Plain length in bytes, 1 to [`CHUNK_MAX`].
    pub len: u32,
    /// Which record of the slab's table the chunk has, counted from 1; 0 if that is not known.
    pub row: u32,
}

impl Record {
    /// The record as number `number` of its journal or table.
    pub fn encode(&self, number: u64) -> [u8; RECORD as usize] {
        let mut raw = RawRecord {
            digest: *self.digest.as_bytes(),
            slab: self.slab.into(),
            block: self.block.into(),
            len: self.len.into(),
            kind: match self.kind {
                Kind::Admit => KIND_ADMIT,
                Kind::Drop => KIND_DROP,
            }
            .into(),
            row: self.row.into(),
            reserved: [0; 8],
            checksum: 0.into(),
        };
        raw.checksum = checksum(number, raw.as_bytes()).into();
        zerocopy::transmute!(raw)
    }

    /// The record number `number` from its bytes; `None` for anything but a valid record.
    pub fn decode(number: u64, bytes: &[u8]) -> Option<Self> {
        let raw = RawRecord::ref_from_bytes(bytes).ok()?;
        if raw.checksum.get() != checksum(number, bytes) || !(1..=CHUNK_MAX).contains(&raw.len.get()) {
            return None;
        }
        let kind = match raw.kind.get() {
            KIND_ADMIT => Kind::Admit,
            KIND_DROP => Kind::Drop,
            _ => return None,
        };
        let (slab, block, len) = (raw.slab.get(), raw.block.get(), raw.len.get());
        Some(Self { kind, digest: Digest::from_bytes(raw.digest), slab, block, len, row: raw.row.get() })
    }

    /// Offset in the slab in bytes.
    pub fn offset(&self) -> u64 {
        u64::from(self.block) * ALIGN
    }

    /// First byte after the chunk's place, a multiple of [`ALIGN`].
    pub fn end(&self) -> u64 {
        self.offset() + room(self.len)
    }
}

/// Bytes that a chunk of `len` plain bytes takes in a pool.
#[must_use]
pub fn room(len: u32) -> u64 {
    u64::from(len).next_multiple_of(ALIGN)
}

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub magic: [u8; 8],
    pub version: u32,
    pub slab: u32,
    pub bytes: u64,
    pub records: u32,
}

impl Header {
    pub fn encode(&self) -> [u8; RECORD as usize] {
        let mut raw = RawHeader {
            magic: self.magic,
            version: self.version.into(),
            slab: self.slab.into(),
            bytes: self.bytes.into(),
            records: self.records.into(),
            reserved: [0; 32],
            checksum: 0.into(),
        };
        raw.checksum = header_checksum(raw.as_bytes()).into();
        zerocopy::transmute!(raw)
    }

    /// `None` unless the bytes are a header with this magic. The version is the caller's to judge.
    pub fn decode(magic: [u8; 8], bytes: &[u8]) -> Option<Self> {
        let raw = RawHeader::ref_from_bytes(bytes).ok()?;
        // Only the magic and the version have a fixed place in all versions.
        let known = raw.version.get() == VERSION;
        if raw.magic != magic || (known && raw.checksum.get() != header_checksum(bytes)) {
            return None;
        }
        let (version, slab) = (raw.version.get(), raw.slab.get());
        Some(Self { magic, version, slab, bytes: raw.bytes.get(), records: raw.records.get() })
    }
}

fn header_checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes.get(..60).unwrap_or_default())
}

fn checksum(number: u64, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&number.to_le_bytes()), bytes.get(..60).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing)]

    use super::*;

    const RECORD_OF_ABC: Record =
        Record { kind: Kind::Admit, digest: Digest::from_bytes([7; 32]), slab: 3, block: 65, len: 5000, row: 4 };

    #[test]
    fn crc32c_of_the_standard_check_string() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn records_round_trip_and_belong_to_one_place() {
        let bytes = RECORD_OF_ABC.encode(9);
        assert_eq!(Record::decode(9, &bytes), Some(RECORD_OF_ABC));
        assert_eq!(Record::decode(8, &bytes), None);
        assert_eq!(RECORD_OF_ABC.end(), 65 * 4096 + 8192);
        for bit in 0..512 {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Record::decode(9, &flipped), None, "bit {bit}");
        }
        assert_eq!(Record::decode(0, &[0; 64]), None);
    }

    #[test]
    fn a_length_out_of_bounds_is_no_record() {
        for len in [0, CHUNK_MAX + 1] {
            assert_eq!(Record::decode(0, &Record { len, ..RECORD_OF_ABC }.encode(0)), None);
        }
    }

    #[test]
    fn a_header_of_another_version_is_recognized() {
        let header = Header { magic: SLAB_MAGIC, version: VERSION, slab: 3, bytes: 1 << 26, records: 64 };
        assert_eq!(Header::decode(SLAB_MAGIC, &header.encode()), Some(header));
        assert_eq!(Header::decode(JOURNAL_MAGIC, &header.encode()), None);
        let mut newer = Header { version: 9, ..header }.encode();
        newer[60] ^= 1;
        assert_eq!(Header::decode(SLAB_MAGIC, &newer).map(|header| header.version), Some(9));
        let mut torn = header.encode();
        torn[13] ^= 1;
        assert_eq!(Header::decode(SLAB_MAGIC, &torn), None);
    }
}
