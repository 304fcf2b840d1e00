//! A hostile index: an error on opening, or an index of which every range can be covered.
#![no_main]

use std::sync::Arc;

use firstread::chunk::Digest;
use firstread::index::{BLOCK, Index, Place};
use firstread::map::Map;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Ok(index) = Index::from_bytes(plausible(input)) else { return };
    for read in index.startup_reads() {
        assert!(index.chunk(read.chunk).is_some() && read.blocks > 0);
        let end = (u64::from(read.first) + u64::from(read.blocks)) * u64::from(BLOCK);
        assert!(end <= if read.place == Place::Device { index.device_bytes() } else { 1 << 44 });
    }
    let map = Map::new(Arc::new(index));
    for (offset, len) in [(0, 1 << 20), (4095, 2), (1 << 30, 1 << 20), (u64::MAX - 10, 100)] {
        let mut at = 0;
        for piece in map.cover(offset, len).take(100_000) {
            assert!(!piece.is_empty());
            at += piece.len();
            assert!(at <= len);
        }
    }
});

/// The input with the magic, the version and the digests of the sections that it should have (FORMAT.md): a fuzzer
/// never guesses them, and everything behind them would stay unseen.
fn plausible(input: &[u8]) -> Vec<u8> {
    let mut index = input.to_vec();
    if index.len() < 64 {
        return index;
    }
    index[..12].copy_from_slice(b"FRSTRDIX\x01\0\0\0");
    let sections = usize::from(index[28] % 9);
    index[28..32].copy_from_slice(&[sections as u8, 0, 0, 0]);
    index[12..16].copy_from_slice(&(64 + 64 * sections as u32).to_le_bytes());
    for number in 0..sections {
        let at = 64 + 64 * number;
        let Some(section) = index.get(at..at + 64) else { break };
        let word = |at: usize| u64::from_le_bytes(section[at..at + 8].try_into().unwrap()) as usize;
        let range = word(8)..word(8).saturating_add(word(16));
        if let Some(content) = index.get(range) {
            let digest = Digest::of(content);
            index[at + 32..at + 64].copy_from_slice(digest.as_bytes());
        }
    }
    index
}
