//! The pool's bound on real files: limits, nearly full disks, pins, readers beside the eviction, hit rates.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/pooled.rs"]
mod pooled;
#[path = "common/random.rs"]
mod random;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::CString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use firstread::chunk::Verified;
use firstread::pool::{Admission, Amount, Lookup, Pool, PoolOptions, Ticket};
use pooled::{chunk, hit, options};
use random::Random;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

fn bounded(limit: u64) -> PoolOptions {
    PoolOptions { limit: Some(Amount::Bytes(limit)), ..options() }
}

/// As [`hit`], by the ticket if it is good, which is what is returned; otherwise it is noted.
fn hit_by_ticket(pool: &Pool, chunk: &Verified, ticket: &Ticket) -> bool {
    let skip = chunk.bytes().len() / 5;
    let mut buf = vec![0; chunk.bytes().len() - skip];
    let known = pool.read_known(ticket, skip as u32, &mut buf);
    let hit = known || pool.read_noting(chunk.digest(), skip as u32, &mut buf, ticket) == Lookup::Hit;
    assert!(!hit || buf == chunk.bytes()[skip..], "wrong bytes");
    known
}

/// Bytes that the files of a directory take on the disk.
fn on_disk(dir: &Path) -> u64 {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum()
}

/// A file system of its own, unmounted when dropped.
struct Disk(TempDir);

impl Disk {
    fn tmpfs(size: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = CString::new(format!("size={size}")).unwrap();
        mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), data.as_c_str()).expect("tests run as root");
        Self(dir)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn the_limit_holds_on_the_disk_and_over_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(1);
    let limit = 8 * MIB;
    for round in 0..3 {
        let pool = Pool::open(dir.path(), &bounded(limit)).unwrap();
        for _ in 0..200 {
            let len = 1 + random.below(300_000) as usize;
            let chunk = chunk(&mut random, len);
            assert_eq!(pool.admit(&chunk), Admission::Kept);
            assert!(hit(&pool, &chunk));
        }
        let stat = pool.stat();
        assert!(stat.bytes <= limit && stat.bytes > limit * 8 / 10, "{stat:?}");
        assert_eq!((stat.limit, stat.quarantined), (Some(limit), 0));
        assert!(stat.evicted > 100, "round {round}: {stat:?}");
        // Slabs hold the file system's own blocks for their maps, too.
        assert!(on_disk(dir.path()) <= limit + MIB / 2, "{} bytes", on_disk(dir.path()));
        let files = fs::read_dir(dir.path()).unwrap().count();
        assert!(files < 40, "{files}");
    }
    let pool = Pool::open(dir.path(), &bounded(2 * MIB)).unwrap();
    assert!(pool.trim(None) > 5 * MIB);
    assert!(pool.stat().bytes <= 2 * MIB && on_disk(dir.path()) <= 2 * MIB + MIB / 2);
    pool.trim(Some(0));
    assert_eq!(pool.stat().chunks, 0);
}

#[test]
fn a_limit_below_one_chunk_keeps_nothing_and_breaks_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::open(dir.path(), &bounded(64 << 10)).unwrap();
    let mut random = Random(2);
    let (large, small) = (chunk(&mut random, 200_000), chunk(&mut random, 4000));
    assert_eq!(pool.admit(&large), Admission::NotKept);
    assert_eq!(pool.admit(&small), Admission::Kept);
    assert!(hit(&pool, &small) && !hit(&pool, &large));
}

#[test]
fn pinned_chunks_stay() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(3);
    let pinned: Vec<_> = (0..20).map(|_| chunk(&mut random, 100_000)).collect();
    let pool = Pool::open(dir.path(), &bounded(4 * MIB)).unwrap();
    pool.pin(pinned.iter().map(Verified::digest));
    pool.pin(pinned[..1].iter().map(Verified::digest));
    for chunk in &pinned {
        pool.admit(chunk);
    }
    for _ in 0..400 {
        assert_eq!(pool.admit(&chunk(&mut random, 100_000)), Admission::Kept);
    }
    assert!(pinned.iter().all(|chunk| hit(&pool, chunk)));
    // They were moved together as their neighbours went.
    assert!(fs::read_dir(dir.path()).unwrap().count() < 24);
    pool.unpin(pinned.iter().map(Verified::digest));
    pool.trim(Some(0));
    assert_eq!(pool.stat().chunks, 1, "pinned twice");
    assert!(hit(&pool, &pinned[0]));
}

#[test]
fn a_disk_that_others_fill_gets_its_room_back() {
    let disk = Disk::tmpfs("20m");
    let options = PoolOptions { keep_free: Amount::Percent(20), slab_bytes: 2 * MIB, ..PoolOptions::default() };
    let pool = Pool::open(disk.0.path(), &options).unwrap();
    let mut random = Random(4);
    for _ in 0..200 {
        assert_eq!(pool.admit(&chunk(&mut random, 100_000)), Admission::Kept);
    }
    let free = || {
        let found = rustix::fs::statvfs(disk.0.path()).unwrap();
        found.f_bavail * found.f_frsize
    };
    assert!((4 * MIB - 300_000..5 * MIB).contains(&free()), "{}", free());
    fs::write(disk.0.path().join("somebody's"), vec![1; 3 << 20]).unwrap();
    assert!(free() < 2 * MIB);
    assert!(pool.trim(None) > 2 * MIB);
    assert!(free() >= 4 * MIB - 100_000, "{}", free());
    fs::write(disk.0.path().join("more"), vec![1; 3 << 20]).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    // Seen by an admission as well.
    assert_eq!(pool.admit(&chunk(&mut random, 100_000)), Admission::Kept);
    assert!(free() >= 4 * MIB - 100_000, "{}", free());
    drop(pool);
    let options = PoolOptions { limit: Some(Amount::Percent(30)), ..options };
    let pool = Pool::open(disk.0.path(), &options).unwrap();
    pool.trim(None);
    let stat = pool.stat();
    assert_eq!(stat.limit, Some(6 * MIB), "of the disk");
    assert!((4 * MIB..=6 * MIB).contains(&stat.bytes), "{stat:?}");
}

#[test]
fn readers_beside_the_eviction_get_right_bytes_or_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::open(dir.path(), &bounded(4 * MIB)).unwrap();
    let mut random = Random(5);
    let all: Vec<_> = (0..120).map(|_| chunk(&mut random, 70_000)).collect();
    let tickets: Vec<Ticket> = all.iter().map(|_| Ticket::default()).collect();
    let (all, tickets, pool, done) = (&all, &tickets, &pool, &AtomicBool::new(false));
    let known = &AtomicU64::new(0);
    std::thread::scope(|scope| {
        for seed in 0..3 {
            scope.spawn(move || {
                let mut random = Random(100 + seed);
                while !done.load(Ordering::Relaxed) {
                    let number = random.below(all.len() as u64) as usize;
                    let by_ticket = hit_by_ticket(pool, &all[number], &tickets[number]);
                    known.fetch_add(u64::from(by_ticket), Ordering::Relaxed);
                }
            });
        }
        let admitting: Vec<_> = (0..2)
            .map(|seed| {
                scope.spawn(move || {
                    let mut random = Random(200 + seed);
                    for _ in 0..3000 {
                        pool.admit(&all[random.below(all.len() as u64) as usize]);
                    }
                })
            })
            .collect();
        for thread in admitting {
            thread.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    let stat = pool.stat();
    assert!(stat.evicted > 1000 && stat.hits > 100, "{stat:?}");
    assert!(known.load(Ordering::Relaxed) > 100, "{known:?} hits by ticket");
    assert_eq!(stat.quarantined, 0);
}

#[test]
fn a_ticket_is_good_until_its_chunk_goes_and_counts_as_use() {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::open(dir.path(), &bounded(4 * MIB)).unwrap();
    let mut random = Random(7);
    let (hot, cold) = (chunk(&mut random, 50_000), chunk(&mut random, 50_000));
    let (hot_ticket, cold_ticket) = (Ticket::default(), Ticket::default());
    assert_eq!((pool.admit(&hot), pool.admit(&cold)), (Admission::Kept, Admission::Kept));
    for (chunk, ticket) in [(&hot, &hot_ticket), (&cold, &cold_ticket)] {
        assert!(!hit_by_ticket(&pool, chunk, ticket) && hit_by_ticket(&pool, chunk, ticket));
        assert!(!pool.read_known(ticket, 49_999, &mut [0; 2]) && !pool.read_known(ticket, u32::MAX, &mut [0; 2]));
    }
    // Several times as much as fits.
    let (mut by_ticket, mut gone) = (0, false);
    for _ in 0..200 {
        pool.admit(&chunk(&mut random, 100_000));
        by_ticket += usize::from(hit_by_ticket(&pool, &hot, &hot_ticket));
        assert!(pool.contains(hot.digest()), "evicted though it is read all the time");
        if !gone && !pool.contains(cold.digest()) {
            gone = true;
            assert!(!pool.read_known(&cold_ticket, 0, &mut [0; 10]), "it was evicted; its slab is still there");
        }
    }
    // Now and then it is moved, out of a slab that is nearly empty.
    assert!((150..200).contains(&by_ticket), "{by_ticket}");
    assert!(gone && !pool.read_known(&cold_ticket, 0, &mut [0; 10]));
    assert_eq!(pool.admit(&cold), Admission::Kept);
    assert!(!pool.read_known(&cold_ticket, 0, &mut [0; 10]), "it is in another place");
    assert!(!hit_by_ticket(&pool, &cold, &cold_ticket) && hit_by_ticket(&pool, &cold, &cold_ticket));
    let stat = pool.stat();
    // The first two reads of each chunk, those in the loop, and the last two.
    assert_eq!((stat.hits, stat.misses), (2 * 2 + 200 + 2, 0));
    drop(pool);
    let pool = Pool::open(dir.path(), &bounded(4 * MIB)).unwrap();
    let ticket = Ticket::default();
    assert!(!hit_by_ticket(&pool, &hot, &ticket) && !hit_by_ticket(&pool, &hot, &ticket), "noted after its check only");
    assert!(hit_by_ticket(&pool, &hot, &ticket));
}

/// Least recently used, exactly.
struct Lru {
    room: u64,
    used: u64,
    now: u64,
    by_time: BTreeMap<u64, usize>,
    times: HashMap<usize, u64>,
}

impl Lru {
    fn hit(&mut self, key: usize, bytes: u64) -> bool {
        self.now += 1;
        let hit = match self.times.insert(key, self.now) {
            Some(then) => self.by_time.remove(&then).is_some(),
            None => false,
        };
        self.by_time.insert(self.now, key);
        if !hit {
            self.used += bytes;
            while self.used > self.room {
                let (_, gone) = self.by_time.pop_first().unwrap();
                self.times.remove(&gone);
                self.used -= bytes;
            }
        }
        hit
    }
}

#[test]
fn hit_rates_are_close_to_those_of_lru() {
    for (count, exponent) in [(200, 0.9), (2000, 0.8), (2000, 1.1)] {
        let mut random = Random(6);
        let all: Vec<_> = (0..count).map(|_| chunk(&mut random, 4096)).collect();
        let weights: Vec<f64> = (1..=count).map(|rank| 1.0 / f64::from(rank as u32).powf(exponent)).collect();
        let sums: Vec<f64> = weights
            .iter()
            .scan(0.0, |sum, weight| {
                Some({
                    *sum += weight;
                    *sum
                })
            })
            .collect();
        let dir = tempfile::tempdir().unwrap();
        // Tables and journal count as well, and vary: the model gets what the pool's chunks had.
        let options = PoolOptions { journal_records: 512, ..bounded(count as u64 * 4096 / 2 + 128 * 1024) };
        let pool = Pool::open(dir.path(), &options).unwrap();
        let mut lru = Lru { room: 0, used: 0, now: 0, by_time: BTreeMap::new(), times: HashMap::new() };
        let (mut hits, mut lru_hits, mut kept) = (0, 0, 0);
        let reads = count * 15;
        for _ in 0..reads {
            let at = random.below(1 << 40) as f64 / (1_u64 << 40) as f64 * sums[count - 1];
            let number = sums.partition_point(|&sum| sum < at).min(count - 1);
            lru.room = lru.room.max(pool.stat().bytes);
            kept = kept.max(pool.stat().chunks);
            lru_hits += usize::from(lru.hit(number, 4096));
            if hit(&pool, &all[number]) {
                hits += 1;
            } else {
                pool.admit(&all[number]);
            }
        }
        let percent = |hits: usize| hits as f64 * 100.0 / reads as f64;
        let (ours, exact) = (percent(hits), percent(lru_hits));
        println!("{count} chunks, exponent {exponent}, {kept} kept: {ours:.1}% hits, LRU {exact:.1}%");
        assert!(kept < count as u64 * 3 / 4, "{kept}");
        assert!((ours - exact).abs() < 5.0 || ours > exact, "{ours} {exact}");
    }
}

#[test]
fn random_operations_agree_with_a_model() {
    for seed in 0..40 {
        let mut random = Random(seed);
        let all: Vec<_> = (0..60)
            .map(|_| {
                let len = 1 + random.below(120_000) as usize;
                chunk(&mut random, len)
            })
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let limit = MIB + random.below(3 * MIB);
        let options = PoolOptions { journal_records: 64, ..bounded(limit) };
        let mut pool = Pool::open(dir.path(), &options).unwrap();
        let (mut pinned, mut kept): (HashSet<usize>, HashSet<usize>) = (HashSet::new(), HashSet::new());
        for step in 0..600 {
            let number = random.below(60) as usize;
            let chunk = &all[number];
            match random.below(100) {
                0..=39 => match pool.admit(chunk) {
                    Admission::NotKept => assert!(!pool.contains(chunk.digest())),
                    _ => {
                        kept.insert(number);
                        assert!(hit(&pool, chunk), "{seed} {step}");
                    }
                },
                40..=79 => {
                    let found = hit(&pool, chunk);
                    assert!(!found || kept.contains(&number), "a chunk that was never kept");
                    assert!(found || !(pinned.contains(&number) && kept.contains(&number)), "{seed} {step}");
                    if !found {
                        kept.remove(&number);
                    }
                }
                80..=86 if pinned.len() < 6 && pinned.insert(number) => {
                    kept.retain(|&number| pool.contains(all[number].digest()));
                    pool.pin([chunk.digest()]);
                }
                87..=92 if pinned.remove(&number) => pool.unpin([chunk.digest()]),
                93..=94 => {
                    pool.trim(Some(random.below(limit)));
                }
                95 => pool.sync().unwrap(),
                96..=97 => {
                    let there: Vec<_> = all.iter().map(|chunk| pool.contains(chunk.digest())).collect();
                    let bytes = pool.stat().bytes;
                    drop(pool);
                    if random.one_in(4) {
                        fs::remove_file(dir.path().join("journal")).unwrap();
                    }
                    pool = Pool::open(dir.path(), &options).unwrap();
                    pool.pin(pinned.iter().map(|&number| all[number].digest()));
                    let now: Vec<_> = all.iter().map(|chunk| pool.contains(chunk.digest())).collect();
                    assert_eq!((now, pool.stat().bytes), (there, bytes), "{seed} {step}");
                }
                _ => {}
            }
            assert!(pool.stat().bytes <= limit);
        }
        assert_eq!(pool.stat().quarantined, 0);
    }
}
