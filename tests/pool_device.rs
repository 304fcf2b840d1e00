//! The image's device over a real pool and a real fetcher, against the content that it was made from.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/generated.rs"]
mod generated;
#[path = "common/random.rs"]
mod random;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use firstread::device::{Device, ImageDevice, Local, Residence};
use firstread::fetch::{FetchOptions, Fetcher, Origin};
use firstread::map::Piece;
use firstread::pool::{Pool, PoolOptions};
use firstread::{Digest, Error};
use generated::Generated;
use proptest::prelude::*;
use tempfile::TempDir;

/// A device over a pool in `dir`, as after a start.
fn start(image: &Generated, dir: &Path) -> (Arc<ImageDevice>, Arc<Pool>) {
    let options = PoolOptions { slab_bytes: 4 << 20, ..PoolOptions::default() };
    let pool = Arc::new(Pool::open(dir, &options).unwrap());
    let fetcher = Fetcher::new(Arc::clone(&pool), FetchOptions::default());
    let origin = Arc::new(Origin::new(image.blobs(), vec![Arc::clone(&image.source) as _]));
    (ImageDevice::new(image.map.clone(), origin, fetcher, Arc::clone(&pool)), pool)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn requests(image: &Generated) -> u64 {
    image.source.requests.load(Relaxed)
}

/// Reads the whole device in pieces of `step` bytes and compares it.
async fn read_all(device: &ImageDevice, image: &Generated, step: usize) {
    for (number, expected) in image.reference.chunks(step).enumerate() {
        let mut buf = vec![0xee; expected.len()];
        device.read_at((number * step) as u64, &mut buf).await.unwrap();
        assert!(buf == expected, "wrong bytes at {}", number * step);
    }
}

/// The first piece of the device that a chunk backs: its offset, and the chunk's number.
fn first_chunk(image: &Generated) -> (u64, u32) {
    let mut at = 0;
    for piece in image.map.cover(0, image.reference.len() as u64) {
        match piece {
            Piece::Chunk { chunk, .. } => return (at, chunk),
            Piece::Zero { len } => at += len,
        }
    }
    panic!("no chunk");
}

#[derive(Debug, Clone)]
struct Range {
    offset: u64,
    len: u64,
}

fn ranges(size: u64) -> impl Strategy<Value = Vec<Range>> {
    let lens = prop_oneof![0..600_u64, 4000..9000_u64, 100_000..700_000_u64];
    let near_a_block = (0..size / 4096, 0..9_u64).prop_map(|(block, off)| (block * 4096 + off).saturating_sub(4));
    let offsets = prop_oneof![0..size, near_a_block, Just(size), size - 5000..size];
    let range = (offsets, lens).prop_map(move |(offset, len)| {
        let offset = offset.min(size);
        Range { offset, len: len.min(size - offset) }
    });
    prop::collection::vec(range, 1..40)
}

const BLOCKS: u32 = 1500;

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_range_reads_as_the_reference(seed in any::<u64>(), ranges in ranges(u64::from(BLOCKS) * 4096)) {
        let image = Generated::new(seed, BLOCKS);
        let dir = tempfile::tempdir().unwrap();
        let (device, _pool) = start(&image, dir.path());
        let mut bytes = 0;
        runtime().block_on(async {
            for Range { offset, len } in &ranges {
                let expected = &image.reference[*offset as usize..(offset + len) as usize];
                let mut buf = vec![0xee; *len as usize];
                let local = device.read_local(*offset, &mut buf).unwrap();
                prop_assert!(local == Local::Missing || buf == expected, "{}+{} local", offset, len);
                let runs = device.residence(*offset, *len).unwrap();
                prop_assert_eq!(runs.iter().map(|run| run.0).sum::<u64>(), *len);
                prop_assert!(runs.windows(2).all(|pair| pair[0].1 != pair[1].1), "{:?}", runs);
                prop_assert!(local == Local::Missing || runs.iter().all(|run| run.1 != Residence::Remote));
                buf.fill(0xdd);
                device.read_at(*offset, &mut buf).await.unwrap();
                prop_assert!(buf == expected, "{}+{} fetched", offset, len);
                bytes += len * if local == Local::Done { 3 } else { 2 };
                // What was read is local as soon as it is admitted, which the reader does not wait for.
                let mut polls = 0;
                while device.read_local(*offset, &mut buf).unwrap() == Local::Missing {
                    polls += 1;
                    prop_assert!(polls < 5000, "{}+{} is never local", offset, len);
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                prop_assert!(buf == expected, "{}+{} again", offset, len);
            }
            prop_assert_eq!(device.counts().bytes, bytes);
            Ok(())
        })?;
    }
}

#[test]
fn ranges_outside_the_device_are_refused() {
    let image = Generated::new(3, 64);
    let dir = tempfile::tempdir().unwrap();
    let (device, _pool) = start(&image, dir.path());
    let size = device.size();
    for (offset, len) in [(size, 1), (size - 1, 2), (u64::MAX, 1), (size + 1, 0)] {
        let mut buf = vec![0; len];
        assert!(matches!(device.read_local(offset, &mut buf), Err(Error::Invalid { .. })));
        assert!(matches!(runtime().block_on(device.read_at(offset, &mut buf)), Err(Error::Invalid { .. })));
        assert!(device.residence(offset, len as u64).is_err());
    }
}

#[test]
fn many_readers_of_a_cold_chunk_make_one_request() {
    let mut image = Generated::new(4, 600);
    Arc::get_mut(&mut image.source).unwrap().delay = Duration::from_millis(50);
    let dir = tempfile::tempdir().unwrap();
    let (device, _pool) = start(&image, dir.path());
    let (offset, _) = first_chunk(&image);
    runtime().block_on(async {
        let reader = |_| {
            let device = Arc::clone(&device);
            tokio::spawn(async move {
                let mut buf = vec![0; 1];
                device.read_at(offset, &mut buf).await.map(|()| buf)
            })
        };
        let readers: Vec<_> = (0..64).map(reader).collect();
        for reader in readers {
            assert_eq!(reader.await.unwrap().unwrap(), image.reference[offset as usize..][..1]);
        }
    });
    assert_eq!(requests(&image), 1);
}

#[test]
fn neighbours_come_in_few_requests() {
    let image = Generated::new(5, 900);
    let dir = tempfile::tempdir().unwrap();
    let (device, _pool) = start(&image, dir.path());
    runtime().block_on(read_all(&device, &image, 900 * 4096));
    let chunks = image.map.index().chunk_count();
    assert!(requests(&image) < u64::from(chunks) / 4, "{} requests for {chunks} chunks", requests(&image));
}

/// An image whose chunks are all in the pool in the directory; the pool is closed.
fn warm(seed: u64) -> (Generated, TempDir) {
    let image = Generated::new(seed, 2000);
    let dir = tempfile::tempdir().unwrap();
    let (device, pool) = start(&image, dir.path());
    let runtime = runtime();
    runtime.block_on(read_all(&device, &image, 300_001));
    assert!(requests(&image) > 0);
    drop((device, runtime));
    // The fetcher may still be about to let go of it.
    let pool = Arc::try_unwrap(pool);
    assert!(pool.is_ok(), "somebody still has the pool");
    (image, dir)
}

#[test]
fn a_restart_with_a_full_pool_makes_no_request() {
    let (image, dir) = warm(6);
    let before = requests(&image);
    let (device, pool) = start(&image, dir.path());
    runtime().block_on(read_all(&device, &image, 70_000));
    assert_eq!(requests(&image), before);
    assert_eq!(device.residence(0, device.size()).unwrap().iter().find(|run| run.1 == Residence::Remote), None);
    let counts = device.counts();
    assert_eq!((counts.bytes, counts.misses), (device.size(), 0));
    assert_eq!((pool.stat().misses, pool.stat().quarantined), (0, 0));
}

#[test]
fn a_byte_flipped_in_the_pool_is_fetched_again() {
    let (image, dir) = warm(7);
    let (_, chunk) = first_chunk(&image);
    let digest = image.map.index().chunk(chunk).unwrap().digest;
    flip(dir.path(), &digest, image.map.index().chunk(chunk).unwrap().plain_len);
    let before = requests(&image);
    let (device, pool) = start(&image, dir.path());
    runtime().block_on(read_all(&device, &image, 50_000));
    assert_eq!((pool.stat().quarantined, requests(&image)), (1, before + 1));
    runtime().block_on(read_all(&device, &image, 50_000));
    assert_eq!((pool.stat().quarantined, requests(&image)), (1, before + 1));
}

/// Flips a byte of the chunk in the slabs below `dir`.
fn flip(dir: &Path, digest: &Digest, len: u32) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        for at in (0..bytes.len().saturating_sub(len as usize - 1)).step_by(4096) {
            if Digest::of(&bytes[at..at + len as usize]) == *digest {
                let file = std::fs::File::options().write(true).open(path).unwrap();
                let at = at + len as usize / 2;
                return file.write_all_at(&[bytes[at] ^ 0x40], at as u64).unwrap();
            }
        }
    }
    panic!("the pool does not have the chunk");
}

#[test]
fn images_share_their_chunks() {
    let (image, dir) = warm(8);
    let before = requests(&image);
    // Another image with the same chunks and sources that have nothing.
    let (_, pool) = start(&image, dir.path());
    let fetcher = Fetcher::new(Arc::clone(&pool), FetchOptions::default());
    let origin = Arc::new(Origin::new(image.blobs(), Vec::new()));
    let device = ImageDevice::new(image.map.clone(), origin, fetcher, pool);
    runtime().block_on(read_all(&device, &image, 1 << 20));
    assert_eq!(requests(&image), before);
}
