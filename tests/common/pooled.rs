//! Chunks for a pool, and what it makes of them.
// Every test program uses its own part of this.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use firstread::Digest;
use firstread::chunk::{Verified, verify};
use firstread::pool::{Admission, Lookup, Pool, PoolOptions};

use crate::random::Random;

/// Slabs as small as they get.
pub fn options() -> PoolOptions {
    PoolOptions { slab_bytes: 2 << 20, ..PoolOptions::default() }
}

/// A chunk of random bytes.
pub fn chunk(random: &mut Random, len: usize) -> Verified {
    let bytes = random.bytes(len);
    verify(&Digest::of(&bytes), bytes).unwrap()
}

pub fn chunks(seed: u64, count: usize, len: usize) -> Vec<Verified> {
    let mut random = Random(seed);
    (0..count).map(|_| chunk(&mut random, len)).collect()
}

/// Whether the chunk is a hit; panics on a wrong byte.
pub fn hit(pool: &Pool, chunk: &Verified) -> bool {
    let skip = chunk.bytes().len() / 5;
    let mut buf = vec![0; chunk.bytes().len() - skip];
    let lookup = pool.read(chunk.digest(), skip as u32, &mut buf);
    assert!(lookup == Lookup::Miss || buf == chunk.bytes()[skip..], "wrong bytes");
    lookup == Lookup::Hit
}

/// How many of `chunks` are hits; panics on a wrong byte.
pub fn hits(pool: &Pool, chunks: &[Verified]) -> usize {
    chunks.iter().filter(|chunk| hit(pool, chunk)).count()
}

/// How many of `chunks` the pool took.
pub fn kept(pool: &Pool, chunks: &[Verified]) -> usize {
    chunks.iter().filter(|chunk| pool.admit(chunk) == Admission::Kept).count()
}
