//! Hits in the pool beside pread(2) on the same file, taking turns in one process. One JSON object a workload on standard
//! output: reads a second, and the ratio of reads for each second that the threads were on a processor, which does not
//! depend on what else the machine does; medians of the rounds.
//!
//! Then the same for what a device adds to a hit to know what a start reads: reads of 4 KiB that are recorded and counted
//! beside reads that leave no trace. Blocks are read again and again, as hits are.
//!
//! `scripts/bench pool` runs it. `pool_hits --reads N` only reads N times from the pool, for counting instructions.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Barrier};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use firstread::Digest;
use firstread::chunk::{ChunkRef, Codec, verify};
use firstread::device::{Device, ImageDevice};
use firstread::fetch::{FetchOptions, Fetcher, Origin};
use firstread::index::{Blob, Extent, Index, IndexWriter, Role};
use firstread::map::Map;
use firstread::pool::{Lookup, Pool, PoolOptions, Ticket};

const CHUNK: u64 = 256 << 10;
const BLOCK: u64 = 4096;
/// Chunks of the pool: 256 MiB, which fit the page cache.
const CHUNKS: u64 = 1024;
const TURN: Duration = Duration::from_millis(150);
/// Turns of what is compared to a hundredth: many short ones, so that what changes on the machine changes for both.
const SHORT_TURN: Duration = Duration::from_millis(15);

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// The pool, and the slab that has its chunks, opened once more.
struct Bench {
    pool: Arc<Pool>,
    /// A disk of all the chunks in their order.
    device: Arc<ImageDevice>,
    digests: Vec<Digest>,
    /// As a device has them.
    tickets: Vec<Ticket>,
    file: File,
    /// Bytes of the file.
    len: u64,
}

impl Bench {
    fn new(dir: &std::path::Path) -> Self {
        let options = PoolOptions { slab_bytes: 1 << 30, ..PoolOptions::default() };
        let pool = Arc::new(Pool::open(dir, &options).unwrap());
        let mut random = Random(1);
        let mut digests = Vec::new();
        for _ in 0..CHUNKS {
            let bytes: Vec<u8> = (0..CHUNK / 8).flat_map(|_| random.next().to_le_bytes()).collect();
            let digest = Digest::of(&bytes);
            pool.admit(&verify(&digest, bytes).unwrap());
            digests.push(digest);
        }
        pool.sync().unwrap();
        let slabs = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        let slab: PathBuf = slabs.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
        let file = File::open(slab).unwrap();
        let len = file.metadata().unwrap().len();
        assert!(len >= CHUNKS * CHUNK, "all chunks are in one slab");
        let tickets = digests.iter().map(|_| Ticket::default()).collect();
        let device = device(&pool, &digests);
        Self { pool, device, digests, tickets, file, len }
    }

    /// As `ImageDevice::read_chunk`.
    fn hit(&self, chunk: u64, skip: u64, buf: &mut [u8]) {
        let (ticket, skip) = (&self.tickets[chunk as usize], skip as u32);
        if !self.pool.read_known(ticket, skip, buf) {
            let digest = &self.digests[chunk as usize];
            assert_eq!(self.pool.read_noting(digest, skip, buf, ticket), Lookup::Hit);
        }
    }

    /// What `threads` threads that do `work` for so long reach: operations a second, and a second of processor time.
    fn turn(
        &self,
        time: Duration,
        threads: usize,
        work: impl Fn(&Self, &mut Random, &mut [u8], &mut u64) + Sync,
    ) -> (f64, f64) {
        let (barrier, done) = (Barrier::new(threads + 1), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let running: Vec<_> = (0..threads as u64)
                .map(|seed| {
                    let (barrier, done, work) = (&barrier, &done, &work);
                    scope.spawn(move || {
                        let (mut random, mut buf, mut at) = (Random(seed), vec![0; 1 << 20], seed * CHUNKS / 8);
                        barrier.wait();
                        let began = worked();
                        let mut count = 0_u64;
                        while !done.load(Relaxed) {
                            for _ in 0..16 {
                                work(self, &mut random, &mut buf, &mut at);
                            }
                            count += 16;
                        }
                        (count, worked() - began)
                    })
                })
                .collect();
            barrier.wait();
            let started = Instant::now();
            std::thread::sleep(time);
            done.store(true, Relaxed);
            let done = running.into_iter().map(|thread| thread.join().unwrap());
            let (count, work) = done.fold((0, 0.0), |sum, (count, work)| (sum.0 + count, sum.1 + work));
            (count as f64 / started.elapsed().as_secs_f64(), count as f64 / work)
        })
    }
}

/// A device whose chunks are all in the pool; it has no source.
fn device(pool: &Arc<Pool>, digests: &[Digest]) -> Arc<ImageDevice> {
    let mut writer = IndexWriter::new();
    let blobs = vec![Blob { digest: Digest::of(b"blob"), bytes: CHUNKS * CHUNK, role: Role::Pack }];
    writer.blob(&blobs[0]);
    for (number, &digest) in digests.iter().enumerate() {
        let (len, number) = (CHUNK as u32, number as u32);
        let offset = u64::from(number) * CHUNK;
        let chunk = ChunkRef { digest, blob: 0, offset, stored_len: len, plain_len: len, codec: Codec::Plain };
        writer.chunk(&chunk);
        let blocks = (CHUNK / BLOCK) as u32;
        writer.extent(Extent { block: number * blocks, blocks, chunk: number, offset: 0 });
    }
    let index = Index::from_bytes(writer.finish(CHUNKS * CHUNK, "raw").unwrap()).unwrap();
    let fetcher = Fetcher::new(Arc::clone(pool), FetchOptions::default());
    let origin = Arc::new(Origin::new(blobs, Vec::new()));
    ImageDevice::new(Map::new(Arc::new(index)), origin, fetcher, Arc::clone(pool))
}

/// Hits are ready when they are asked for.
fn ready<T>(mut future: Pin<Box<dyn Future<Output = firstread::Result<T>> + Send + '_>>) {
    let polled = future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(polled, Poll::Ready(Ok(_))), "not a hit");
}

fn recorded(bench: &Bench, random: &mut Random, buf: &mut [u8], _: &mut u64) {
    let offset = random.below(CHUNKS * CHUNK / BLOCK) * BLOCK;
    ready(bench.device.read_at(offset, &mut buf[..BLOCK as usize]));
}

fn unrecorded(bench: &Bench, random: &mut Random, buf: &mut [u8], _: &mut u64) {
    let offset = random.below(CHUNKS * CHUNK / BLOCK) * BLOCK;
    ready(Box::pin(bench.device.inspect_at(offset, &mut buf[..BLOCK as usize])));
}

fn random_hit(bench: &Bench, random: &mut Random, buf: &mut [u8], _: &mut u64) {
    let at = random.below(CHUNKS * CHUNK / BLOCK);
    bench.hit(at / (CHUNK / BLOCK), at % (CHUNK / BLOCK) * BLOCK, &mut buf[..BLOCK as usize]);
}

fn random_pread(bench: &Bench, random: &mut Random, buf: &mut [u8], _: &mut u64) {
    let at = random.below(bench.len / BLOCK);
    bench.file.read_exact_at(&mut buf[..BLOCK as usize], at * BLOCK).unwrap();
}

/// Seconds that this thread was on a processor. What /proc says is as old as the last tick, or as the last time that the
/// thread gave its processor away.
fn worked() -> f64 {
    std::thread::yield_now();
    let times = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    times.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
}

/// 1 MiB: four chunks.
fn sequential_hit(bench: &Bench, _: &mut Random, buf: &mut [u8], at: &mut u64) {
    for part in buf.chunks_mut(CHUNK as usize) {
        bench.hit(*at % CHUNKS, 0, part);
        *at += 1;
    }
}

fn sequential_pread(bench: &Bench, _: &mut Random, buf: &mut [u8], at: &mut u64) {
    let offset = *at * CHUNK % (bench.len - buf.len() as u64);
    bench.file.read_exact_at(buf, offset / BLOCK * BLOCK).unwrap();
    *at += 4;
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1)?.parse::<u64>().ok()
    };
    let temporary = tempfile::tempdir().unwrap();
    let bench = Bench::new(temporary.path());
    if let Some(reads) = number("--reads") {
        let (mut random, mut buf) = (Random(7), vec![0; 1 << 20]);
        for _ in 0..reads {
            random_hit(&bench, &mut random, &mut buf, &mut 0);
        }
        return;
    }
    let rounds = number("--rounds").unwrap_or(15);
    for (name, threads) in [("rand4k", 1), ("rand4k", 2), ("rand4k", 8), ("read1m", 1)] {
        let (mut hits, mut preads, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            let (hit, pread) = if name == "rand4k" {
                (bench.turn(TURN, threads, random_hit), bench.turn(TURN, threads, random_pread))
            } else {
                (bench.turn(TURN, threads, sequential_hit), bench.turn(TURN, threads, sequential_pread))
            };
            hits.push(hit.0);
            preads.push(pread.0);
            ratios.push(hit.1 / pread.1);
        }
        let (hit, pread, ratio) = (median(hits), median(preads), median(ratios));
        println!(
            "{{\"name\": \"{name}\", \"threads\": {threads}, \"pool\": {hit:.0}, \"pread\": {pread:.0}, \"ratio\": {ratio:.3}}}"
        );
    }
    // Every block once: later reads of it are no first touches.
    for chunk in 0..CHUNKS {
        ready(bench.device.read_at(chunk * CHUNK, &mut vec![0; CHUNK as usize]));
    }
    for threads in [1, 2] {
        let (mut with, mut without, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..20 * rounds {
            // Who goes first gains from it, or loses.
            let (on, off) = if round % 2 == 0 {
                let on = bench.turn(SHORT_TURN, threads, recorded);
                (on, bench.turn(SHORT_TURN, threads, unrecorded))
            } else {
                let off = bench.turn(SHORT_TURN, threads, unrecorded);
                (bench.turn(SHORT_TURN, threads, recorded), off)
            };
            with.push(on.0);
            without.push(off.0);
            ratios.push(on.1 / off.1);
        }
        let (with, without, ratio) = (median(with), median(without), median(ratios));
        println!(
            "{{\"name\": \"recording\", \"threads\": {threads}, \"with\": {with:.0}, \"without\": {without:.0}, \"ratio\": {ratio:.4}}}"
        );
    }
}
