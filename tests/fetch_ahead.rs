//! How many requests a reader costs, and how many bytes that it did not ask for.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/packs.rs"]
mod packs;

use std::sync::Arc;

use firstread::fetch::{CounterValues, FetchOptions, Fetcher, Image, Priority, open_image};
use firstread::oci::{Platform, Reference};
use firstread::pool::{Pool, PoolOptions};
use firstread::source::{Access, Purpose, Repository};
use packs::{Lies, TestImage};

struct Setup {
    image: Image,
    pool: Arc<Pool>,
    fetcher: Arc<Fetcher>,
    _dir: tempfile::TempDir,
}

async fn setup(count: usize, len: usize) -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let reference: Reference = format!("oci:{}", dir.path().join("layout").display()).parse().unwrap();
    let access = Access::default();
    let repository = Repository::open(&reference, &access, Purpose::Push).await.unwrap();
    TestImage::build(3, count, len, Lies::default()).push(&repository).await;
    let platform: Platform = "linux/amd64".parse().unwrap();
    let image = open_image(&reference, &access, &platform, &dir.path().join("cache")).await.unwrap();
    let pool = Arc::new(Pool::open(&dir.path().join("pool"), &PoolOptions::default()).unwrap());
    let fetcher = Fetcher::new(pool.clone(), FetchOptions::default());
    Setup { image, pool, fetcher, _dir: dir }
}

impl Setup {
    /// Reads a chunk as a device does: from the pool, else from the origin.
    async fn read(&self, number: u32) {
        let chunk = self.image.index.chunk(number).unwrap();
        if !self.pool.contains(&chunk.digest) {
            let results = self.fetcher.fetch(&self.image.origin, &[chunk], Priority::Demand).await;
            assert_eq!(results[0].as_ref().unwrap().digest(), &chunk.digest);
        }
    }

    /// The counters when everything that was asked for has come.
    async fn counters(&self) -> CounterValues {
        let counters = || self.image.origin.counters().snapshot();
        let mut last = counters();
        loop {
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            let now = counters();
            if now == last {
                return now;
            }
            last = now;
        }
    }

    fn stored(&self) -> u64 {
        self.image.index.chunks().map(|chunk| u64::from(chunk.stored_len)).sum()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_in_order_costs_few_requests_and_no_byte_too_many() {
    let setup = setup(1000, 65536).await;
    for number in 0..1000 {
        setup.read(number).await;
    }
    let counters = setup.counters().await;
    assert!(counters.requests < 100, "{counters:?}");
    assert_eq!((counters.bytes, counters.chunks), (setup.stored(), 1000), "nothing comes twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_readers_at_a_time_are_told_apart() {
    let setup = setup(1000, 65536).await;
    for number in 0..500 {
        setup.read(number).await;
        setup.read(500 + number).await;
    }
    let counters = setup.counters().await;
    assert!(counters.requests < 200, "{counters:?}");
    assert_eq!(counters.bytes, setup.stored());
}

#[tokio::test(flavor = "multi_thread")]
async fn random_reads_and_short_runs_fetch_little_else() {
    let setup = setup(2000, 65536).await;
    let mut wanted = std::collections::BTreeSet::new();
    let mut random = 12345u64;
    for _ in 0..200 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (at, run) = ((random >> 33) as u32 % 1990, (random >> 20) as u32 % 4 + 1);
        for number in at..at + run {
            wanted.insert(number);
            setup.read(number).await;
        }
    }
    let needed: u64 = wanted.iter().map(|&at| u64::from(setup.image.index.chunk(at).unwrap().stored_len)).sum();
    let counters = setup.counters().await;
    // A quarter of the image is read, so that there is always something local nearby: neighbours weigh at most three quarters
    // of what was missed, and some of them are read later.
    let allowed = needed + needed / 2 + (512 << 10);
    assert!(counters.bytes <= allowed, "{} bytes for {needed}", counters.bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn small_neighbours_come_along() {
    let setup = setup(90, 4096).await;
    for number in (0..90).rev() {
        setup.read(number).await;
    }
    let counters = setup.counters().await;
    assert!(counters.requests * 3 < counters.chunks, "{counters:?}");
    assert_eq!(counters.bytes, setup.stored());
}
