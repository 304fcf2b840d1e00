//! The index as a hostile file: whatever the bytes, opening ends with an error or with lookups that are all in bounds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Write;
use std::sync::Arc;

use firstread::chunk::{ChunkRef, Codec, Digest};
use firstread::error::Error;
use firstread::index::{BLOCK, Blob, Extent, Index, IndexWriter, Place, Role, StartupRead};
use firstread::map::{Map, Piece};
use proptest::prelude::*;

/// What the start of [`sample`] reads.
const READS: [StartupRead; 2] = [
    StartupRead { chunk: 7, place: Place::File { inode: 12 }, first: 10, blocks: 5 },
    StartupRead { chunk: 3, place: Place::Device, first: 9, blocks: 2 },
];

/// A small valid index with every section but the likely chunks.
fn sample() -> Vec<u8> {
    let mut writer = IndexWriter::new();
    let pack = writer.blob(&Blob { digest: Digest::of(b"pack"), bytes: 1 << 20, role: Role::Pack });
    let startup = writer.blob(&Blob { digest: Digest::of(b"start"), bytes: 1 << 16, role: Role::Startup });
    for number in 0..8u32 {
        let (blob, codec) = if number % 2 == 0 { (pack, Codec::Zstd) } else { (startup, Codec::Plain) };
        let digest = Digest::of(&number.to_le_bytes());
        writer.chunk(&ChunkRef { digest, blob, offset: 512, stored_len: 8192, plain_len: 8192, codec });
        writer.extent(Extent { block: number * 3, blocks: 2, chunk: number, offset: 0 });
    }
    writer.startup_extent(Extent { block: 3, blocks: 1, chunk: 7, offset: 4096 });
    writer.startup_order(7);
    READS.into_iter().for_each(|read| writer.startup_read(read));
    writer.startup_read_ahead_kb(16);
    writer.finish(1 << 20, "ext4").unwrap()
}

/// Section digests are recomputed, so that damage behind them reaches the checks of records.
fn with_right_digests(mut bytes: Vec<u8>) -> Vec<u8> {
    for section in 0..7 {
        let entry = 64 + 64 * section;
        let field = |at: usize| {
            usize::try_from(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap_or(usize::MAX)
        };
        let (start, len) = (field(entry + 8), field(entry + 16));
        let Some(content) = start.checked_add(len).and_then(|end| bytes.get(start..end)) else { continue };
        let digest = *Digest::of(content).as_bytes();
        bytes[entry + 32..entry + 64].copy_from_slice(&digest);
    }
    bytes
}

/// Every lookup that a device could make stays in bounds.
fn walk(index: Index) {
    let size = index.device_bytes();
    let blobs: Vec<Blob> = index.blobs().collect();
    let map = Map::new(Arc::new(index));
    let mut at = 0;
    for piece in map.cover(0, size.min(16 << 20)) {
        if let Piece::Chunk { chunk, skip, len } = piece {
            let chunk = map.index().chunk(chunk).expect("an extent names a chunk that exists");
            assert!(skip.checked_add(len).unwrap() <= chunk.plain_len);
            assert!(chunk.offset + u64::from(chunk.stored_len) <= blobs[chunk.blob as usize].bytes);
        }
        assert!(!piece.is_empty());
        at += piece.len();
    }
    assert_eq!(at, size.min(16 << 20));
    for read in map.index().startup_reads() {
        assert!(map.index().chunk(read.chunk).is_some() && read.blocks > 0, "{read:?}");
        let end = (u64::from(read.first) + u64::from(read.blocks)) * u64::from(BLOCK);
        assert!(end <= if read.place == Place::Device { size } else { 1 << 44 }, "{read:?}");
    }
}

#[test]
fn start_up_reads_may_reach_to_the_end() {
    let reads = 64 * 8 + 2 * 48 + 8 * 64 + 8 * 16 + 16 + 4;
    for (at, new) in [(reads + 8, [251, 255, 255, 255]), (reads + 16 + 8, [254, 0, 0, 0])] {
        let mut bytes = sample();
        bytes[at..at + 4].copy_from_slice(&new);
        walk(Index::from_bytes(with_right_digests(bytes)).unwrap());
    }
}

#[test]
fn a_valid_index_round_trips() {
    let index = Index::from_bytes(sample()).unwrap();
    assert_eq!((index.device_bytes(), index.file_system(), index.chunk_count()), (1 << 20, "ext4", 8));
    assert_eq!(index.blobs().map(|blob| blob.role).collect::<Vec<_>>(), [Role::Pack, Role::Startup]);
    assert_eq!(index.extents().iter().len(), 8);
    assert_eq!(index.startup_order().collect::<Vec<_>>(), [7]);
    assert_eq!(index.startup_reads().collect::<Vec<_>>(), READS);
    assert_eq!(index.startup_read_ahead_kb(), Some(16));
    walk(index);
}

#[test]
fn a_file_is_opened_only_with_its_digest() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&sample()).unwrap();
    let digest = Digest::of(&sample());
    assert_eq!(*Index::open(file.path(), &digest).unwrap().digest(), digest);
    let error = Index::open(file.path(), &Digest::of(b"another")).unwrap_err().to_string();
    assert!(error.contains(&digest.to_string()) && error.contains(file.path().to_str().unwrap()), "{error}");
}

#[test]
fn another_version_asks_for_another_program() {
    let mut bytes = sample();
    bytes[8] = 2;
    assert!(matches!(Index::from_bytes(bytes), Err(Error::Unsupported(text)) if text.contains("version 2")));
}

#[test]
fn a_section_must_have_its_digest() {
    let mut bytes = sample();
    *bytes.last_mut().unwrap() ^= 1;
    assert!(Index::from_bytes(bytes).unwrap_err().to_string().contains("does not have its digest"));
}

/// (what is damaged, offset in the sample, new bytes, what the error says)
#[test]
fn every_bound_is_checked() {
    let sections = 64 * 8;
    let (blobs, chunks) = (sections, sections + 2 * 48);
    let extents = chunks + 8 * 64;
    let startup = extents + 8 * 16;
    let reads = startup + 16 + 4;
    let settings = reads + 2 * 16;
    let max = u64::MAX.to_le_bytes();
    let cases: &[(&str, usize, &[u8], &str)] = &[
        ("device of no bytes", 16, &[0; 8], "the device has 0 bytes"),
        ("device of no whole block", 16, &[1, 16], "the device has"),
        ("device above the limit", 16, &max, "the device has"),
        ("block size", 24, &[0, 2], "header"),
        ("section behind the end", 64 + 8, &max, "outside the file"),
        ("section over the header", 64 + 8, &[0; 8], "outside the file"),
        ("section of half a record", 64 + 16, &[47], "whole records"),
        ("record size", 64 + 4, &[1], "whole records"),
        ("section twice", 64 * 2, &[1, 0, 0, 0, 48], "whole records"),
        ("unknown kind", 64, &[99], "unknown kind 99"),
        ("blob's role", blobs + 40, &[7], "unknown role"),
        ("chunk behind its blob", chunks + 32, &max, "chunk 0 is out of bounds"),
        ("chunk in no blob", chunks + 40, &[9], "does not exist"),
        ("chunk of no stored bytes", chunks + 44, &[0; 4], "chunk 0 is out of bounds"),
        ("chunk of no plain bytes", chunks + 48, &[0; 4], "chunk 0 is out of bounds"),
        ("chunk above the limit", chunks + 48, &[1, 0, 16, 0], "chunk 0 is out of bounds"),
        ("unknown codec", chunks + 52, &[9], "chunk 0 is out of bounds"),
        ("plain chunk of two lengths", chunks + 64 + 44, &[1], "chunk 1 is out of bounds"),
        ("extents that overlap", extents + 16, &[1], "extent 1 is out of order"),
        ("extent of no blocks", extents + 4, &[0; 4], "extent 0 is out of order"),
        ("extent behind the device", extents + 7 * 16, &[255, 0], "extent 7 is out of order"),
        ("extent in no chunk", extents + 8, &[99], "outside its chunk"),
        ("extent behind its chunk", extents + 12, &[1, 16], "outside its chunk"),
        ("start-up extent behind its chunk", startup + 12, &[0, 32], "outside its chunk"),
        ("start-up order", startup + 16, &[200], "start-up order"),
        ("start-up read in no chunk", reads, &[8], "start-up read 0 is out of bounds"),
        ("start-up read of no blocks", reads + 12, &[0; 4], "start-up read 0 is out of bounds"),
        ("start-up read behind the largest file", reads + 8, &[252, 255, 255, 255], "start-up read 0 is out of bounds"),
        ("start-up read without end", reads + 8, &[255; 8], "start-up read 0 is out of bounds"),
        ("start-up read behind the device", reads + 16 + 8, &[255, 0], "start-up read 1 is out of bounds"),
        ("a file's blocks as the device's", reads + 4, &[0, 0, 0, 0, 0, 1], "start-up read 0 is out of bounds"),
        ("read-ahead", settings, &[1, 64], "start-up settings"),
        ("two start-up settings", 64 * 7 + 16, &[4], "whole records"),
    ];
    for (what, at, new, expected) in cases {
        let mut bytes = sample();
        bytes[*at..*at + new.len()].copy_from_slice(new);
        match Index::from_bytes(with_right_digests(bytes)) {
            Ok(_) => panic!("{what}: accepted"),
            Err(error) => assert!(error.to_string().contains(expected), "{what}: {error}"),
        }
    }
}

proptest! {
    #[test]
    fn damaged_bytes_are_an_error_or_in_bounds(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<prop::sample::Index>(), keep in any::<bool>()) {
        let mut bytes = sample();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if !keep {
            bytes.truncate(cut.index(bytes.len()));
        }
        let bytes = if bytes.len() > 64 * 8 { with_right_digests(bytes) } else { bytes };
        if let Ok(index) = Index::from_bytes(bytes) {
            walk(index);
        }
    }

    #[test]
    fn lookups_agree_with_a_linear_search(block in 0u32..300) {
        let index = Index::from_bytes(sample()).unwrap();
        let expected = index.extents().iter().find(|extent| extent.block + extent.blocks > block);
        prop_assert_eq!(index.extents().at_or_after(block), expected);
    }
}
