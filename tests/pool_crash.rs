//! Power loss: the pool is stopped at every change it makes to its files, and opened on everything a disk may then
//! show.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/crash.rs"]
mod crash;
#[path = "common/random.rs"]
mod random;

use crash::{CrashDisk, Survivors};
use firstread::chunk::{Verified, verify};
use firstread::media::MediaDir;
use firstread::pool::{Admission, Amount, Lookup, Pool, PoolOptions};
use firstread::{Digest, Result};
use random::Random;

fn open(disk: &CrashDisk) -> Result<Pool> {
    Pool::open_on(disk.dir(), "under test", &PoolOptions { slab_bytes: 2 << 20, ..PoolOptions::default() })
}

fn chunks() -> Vec<Verified> {
    let mut random = Random(1);
    let sizes = [1, 511, 4096, 4097, 20_000, 65_536, 262_144, 1 << 20];
    (0..24)
        .map(|number| {
            let bytes = random.bytes(sizes[number % sizes.len()]);
            verify(&Digest::of(&bytes), bytes).unwrap()
        })
        .collect()
}

/// A life of a pool: filled, synced half-way, reopened, its journal lost, filled on. Returns how many chunks were
/// durable when the power was cut.
fn live(disk: &CrashDisk, chunks: &[Verified]) -> usize {
    let mut durable = 0;
    let (first, rest) = chunks.split_at(chunks.len() / 3);
    let (second, third) = rest.split_at(rest.len() / 2);
    let pool = open(disk).unwrap();
    admit_all(&pool, first);
    if pool.sync().is_ok() && !disk.is_off() {
        durable = first.len();
    }
    admit_all(&pool, second);
    drop(pool);
    let Ok(pool) = open(disk) else { return durable };
    assert!(disk.is_off() || first.iter().all(|chunk| read_right(&pool, chunk)));
    admit_all(&pool, &third[..2]);
    drop(pool);
    let _ = disk.remove("journal");
    let Ok(pool) = open(disk) else { return durable };
    admit_all(&pool, third);
    if pool.sync().is_ok() && !disk.is_off() {
        durable = chunks.len();
    }
    durable
}

fn admit_all(pool: &Pool, chunks: &[Verified]) {
    for chunk in chunks {
        pool.admit(chunk);
    }
}

/// True for the right bytes, false for a miss.
fn read_right(pool: &Pool, chunk: &Verified) -> bool {
    let bytes = chunk.bytes();
    let skip = bytes.len() / 3;
    let mut buf = vec![0; bytes.len() - skip];
    match pool.read(chunk.digest(), skip as u32, &mut buf) {
        Lookup::Hit => {
            assert!(buf == bytes[skip..], "wrong bytes");
            true
        }
        Lookup::Miss => false,
    }
}

fn check(disk: &CrashDisk, chunks: &[Verified], durable: usize) {
    let pool = open(disk).expect("a pool always opens");
    for (number, chunk) in chunks.iter().enumerate() {
        let hit = read_right(&pool, chunk);
        assert!(hit || number >= durable, "chunk {number} was synced and is gone");
    }
    admit_all(&pool, chunks);
    assert!(chunks.iter().all(|chunk| read_right(&pool, chunk)), "admitted and gone");
    drop(pool);
    let pool = open(disk).expect("a pool always opens");
    assert!(chunks.iter().all(|chunk| read_right(&pool, chunk)), "gone after a clean restart");
}

#[test]
fn a_crash_at_any_change_costs_no_more_than_misses() {
    let chunks = chunks();
    let disk = CrashDisk::new();
    assert_eq!(live(&disk, &chunks), chunks.len());
    let changes = disk.changes();
    assert!(changes > 3 * chunks.len() as u64, "{changes}");
    for last in 1..=changes {
        let disk = CrashDisk::new();
        disk.cut_power_after(last);
        let durable = live(&disk, &chunks);
        check(&disk.after_crash(Survivors::None), &chunks, durable);
        check(&disk.after_crash(Survivors::All), &chunks, durable);
        for seed in 0..4 {
            check(&disk.after_crash(Survivors::Some(last * 100 + seed)), &chunks, durable);
        }
    }
}

/// A life of a small pool: everything is evicted several times, slabs are emptied and removed, the journal is
/// rewritten. Two chunks are pinned and synced; returns whether the power held that long.
fn live_bounded(disk: &CrashDisk, chunks: &[Verified]) -> bool {
    let Ok(pool) = open_bounded(disk) else { return false };
    pool.pin(chunks[..2].iter().map(Verified::digest));
    admit_all(&pool, &chunks[..2]);
    let durable = pool.sync().is_ok() && !disk.is_off();
    for chunk in &chunks[2..] {
        pool.admit(chunk);
        read_right(&pool, &chunks[2]);
    }
    drop(pool);
    let Ok(pool) = open_bounded(disk) else { return durable };
    pool.pin(chunks[..2].iter().map(Verified::digest));
    admit_all(&pool, &chunks[2..40]);
    let stat = pool.stat();
    assert!(disk.is_off() || (stat.evicted > 20 && read_right(&pool, &chunks[0])), "{stat:?}");
    durable
}

fn open_bounded(disk: &CrashDisk) -> Result<Pool> {
    let options = PoolOptions {
        limit: Some(Amount::Bytes(1 << 20)),
        slab_bytes: 2 << 20,
        journal_records: 20,
        ..PoolOptions::default()
    };
    Pool::open_on(disk.dir(), "under test", &options)
}

#[test]
fn a_crash_while_chunks_are_evicted_and_the_journal_is_rewritten() {
    let mut random = Random(2);
    let chunk = |number: u64| {
        let bytes = random.bytes(if number < 2 { 5000 } else { 60_000 + 3000 * number as usize % 50_000 });
        verify(&Digest::of(&bytes), bytes).unwrap()
    };
    let chunks: Vec<_> = (0..60).map(chunk).collect();
    let disk = CrashDisk::new();
    assert!(live_bounded(&disk, &chunks));
    let names = disk.names().unwrap();
    assert!(!names.contains(&"slab-00000000".to_owned()), "the first slab was emptied: {names:?}");
    let changes = disk.changes();
    for last in 1..=changes {
        let disk = CrashDisk::new();
        disk.cut_power_after(last);
        let durable = live_bounded(&disk, &chunks);
        let seeds = (0..1).map(|seed| Survivors::Some(last * 100 + seed));
        for survivors in [Survivors::All].into_iter().chain(seeds) {
            let disk = disk.after_crash(survivors);
            let pool = open_bounded(&disk).expect("a pool always opens");
            pool.pin(chunks[..2].iter().map(Verified::digest));
            let there = chunks.iter().filter(|chunk| read_right(&pool, chunk)).count();
            assert!(there <= chunks.len());
            assert!(!durable || read_right(&pool, &chunks[0]) && read_right(&pool, &chunks[1]), "{last} {survivors:?}");
            for chunk in &chunks[30..] {
                assert_ne!(pool.admit(chunk), Admission::NotKept, "{last} {survivors:?}");
                assert!(read_right(&pool, chunk), "admitted and gone");
            }
            assert!(pool.stat().bytes <= 1 << 20);
        }
    }
}

/// A record of the journal may survive a crash that the data, and the slab's length and table, do not. Once the pool gave
/// such a place to another chunk: after one more start the first one's record named it, its bytes did not match, and
/// the hole that was made for it took the other's.
#[test]
fn a_place_that_a_lost_chunk_had_is_not_given_to_another() {
    let mut random = Random(3);
    let chunks: Vec<_> = (0..16)
        .map(|number| {
            let bytes = random.bytes(3000 + number * 500);
            verify(&Digest::of(&bytes), bytes).unwrap()
        })
        .collect();
    let (lost, later) = chunks.split_at(8);
    let mut partly = 0;
    for seed in 0..200 {
        let disk = CrashDisk::new();
        let pool = open(&disk).unwrap();
        pool.sync().unwrap();
        admit_all(&pool, lost);
        let disk = disk.after_crash(Survivors::Some(seed));
        let pool = open(&disk).expect("a pool always opens");
        admit_all(&pool, later);
        pool.sync().unwrap();
        drop(pool);
        let pool = open(&disk).expect("a pool always opens");
        assert!(later.iter().all(|chunk| read_right(&pool, chunk)), "{seed}");
        let there = lost.iter().filter(|chunk| read_right(&pool, chunk)).count();
        partly += usize::from((1..lost.len()).contains(&there));
        assert!(later.iter().all(|chunk| read_right(&pool, chunk)), "{seed}: gone with a chunk that was lost before");
    }
    assert!(partly > 20, "{partly}");
}
