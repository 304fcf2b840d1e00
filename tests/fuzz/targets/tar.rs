//! A hostile stack of layers through the flattener and the file system's planner: an error or a result, soon.
#![no_main]

use firstread::build::{Limits, flatten};
use libfuzzer_sys::fuzz_target;

// The input is cut into up to four layers at the first bytes, so that whiteouts and links across layers are reached.
fuzz_target!(|input: &[u8]| {
    let Some((cuts, mut rest)) = input.split_at_checked(3) else { return };
    let mut layers = Vec::new();
    // A fuzzer never guesses a checksum: whatever looks like a header gets the right one.
    let mut fixed = rest.to_vec();
    for header in fixed.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    rest = &fixed;
    for cut in cuts {
        let (layer, later) = rest.split_at(rest.len() * usize::from(*cut) / 256 / 512 * 512);
        layers.push(layer.to_vec());
        rest = later;
    }
    layers.push(rest.to_vec());
    let limits = Limits {
        plain_bytes: 16 << 20,
        file_bytes: 64 << 20,
        entries: 1000,
        name_bytes: 1 << 20,
        header_bytes: 64 << 10,
        segments: 100,
        depth: 50,
        layers: 4,
    };
    let _ = flatten(layers, &limits);
});
