//! On-disk structures of the index, and nothing else. FORMAT.md has the fields' meaning and bounds.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(super) const MAGIC: [u8; 8] = *b"FRSTRDIX";
pub(super) const VERSION: u32 = 1;
pub(super) const MAX_SECTIONS: u32 = 64;
/// Kinds from here on may be ignored by a reader that does not know them.
pub(super) const OPTIONAL_KIND: u32 = 1 << 31;

pub(super) const KIND_BLOBS: u32 = 1;
pub(super) const KIND_CHUNKS: u32 = 2;
pub(super) const KIND_EXTENTS: u32 = 3;
pub(super) const KIND_STARTUP_EXTENTS: u32 = 4;
pub(super) const KIND_STARTUP_ORDER: u32 = 5;

pub(super) const KIND_STARTUP_SETTINGS: u32 = OPTIONAL_KIND + 1;
pub(super) const KIND_LIKELY: u32 = OPTIONAL_KIND + 2;
pub(super) const KIND_STARTUP_READS: u32 = OPTIONAL_KIND + 3;

/// In a start-up read: the device itself, and no file on it.
pub(super) const NO_INODE: u32 = 0;

/// Largest read-ahead in KiB.
pub(super) const READ_AHEAD_MAX: u32 = 16 << 10;

pub(super) const CODEC_PLAIN: u8 = 0;
pub(super) const CODEC_ZSTD: u8 = 1;

pub(super) const ROLE_PACK: u8 = 0;
pub(super) const ROLE_STARTUP: u8 = 1;

macro_rules! record {
    ($(#[$meta:meta])* $name:ident { $($field:ident: $kind:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
        #[repr(C)]
        pub(super) struct $name { $(pub $field: $kind),* }
    };
}

record!(Header {
    magic: [u8; 8],
    version: U32,
    header_bytes: U32,
    device_bytes: U64,
    block_bytes: U32,
    sections: U32,
    file_system: [u8; 16],
    reserved: [u8; 16],
});

record!(Section { kind: U32, record_bytes: U32, offset: U64, bytes: U64, reserved: U64, digest: [u8; 32] });

record!(BlobRecord { digest: [u8; 32], bytes: U64, role: u8, reserved: [u8; 7] });

record!(ChunkRecord {
    digest: [u8; 32],
    offset: U64,
    blob: U32,
    stored_bytes: U32,
    plain_bytes: U32,
    codec: u8,
    reserved: [u8; 11],
});

record!(ExtentRecord { block: U32, blocks: U32, chunk: U32, offset: U32 });

record!(StartupReadRecord { chunk: U32, inode: U32, first: U32, blocks: U32 });

record!(LikelyRecord { chunks: U32, reserved: [u8; 12] });

record!(SettingsRecord { read_ahead_kb: U32, reserved: [u8; 12] });

const _: () = {
    assert!(size_of::<Header>() == 64);
    assert!(size_of::<Section>() == 64);
    assert!(size_of::<BlobRecord>() == 48);
    assert!(size_of::<ChunkRecord>() == 64);
    assert!(size_of::<ExtentRecord>() == 16);
    assert!(size_of::<SettingsRecord>() == 16);
    assert!(size_of::<LikelyRecord>() == 16);
    assert!(size_of::<StartupReadRecord>() == 16);
};
