//! A hostile index: an error on opening, or an index of which every range can be covered.
#![no_main]

use std::sync::Arc;

use firstread::index::Index;
use firstread::map::Map;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Ok(index) = Index::from_bytes(input.to_vec()) else { return };
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
