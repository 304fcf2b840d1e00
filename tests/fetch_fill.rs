//! Images without a start-up pack are fetched whole behind their readers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/generated.rs"]
mod generated;
#[path = "common/image.rs"]
mod image;
#[path = "common/program.rs"]
mod program;
#[path = "common/random.rs"]
mod random;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use firstread::device::{Device, ImageDevice};
use firstread::fetch::{FetchOptions, Fetcher, Origin, Prefetch};
use firstread::index::{Blob, Index};
use firstread::map::Map;
use firstread::pool::{Pool, PoolOptions};
use firstread::source::{Body, Source, SourceFuture};
use futures_util::StreamExt;
use generated::{BytesSource, Generated};
use parking_lot::Mutex;
use program::{Node, same_files, wait_until};

/// A link of so many bytes a second that all requests share, with a delay before each answer.
struct Link {
    inner: Arc<BytesSource>,
    rate: f64,
    delay: Duration,
    /// When the link is free again.
    free: Mutex<tokio::time::Instant>,
    /// Bytes of each request in the order in which they were sent.
    requests: Mutex<Vec<u64>>,
}

impl Source for Link {
    fn name(&self) -> &str {
        "link"
    }

    fn read_at<'a>(&'a self, blob: &'a Blob, offset: u64, len: u64) -> SourceFuture<'a, Body> {
        Box::pin(async move {
            self.requests.lock().push(len);
            tokio::time::sleep(self.delay).await;
            // The whole answer takes its time on the link, behind those before it.
            let arrived = {
                let mut free = self.free.lock();
                *free = (*free).max(tokio::time::Instant::now()) + Duration::from_secs_f64(len as f64 / self.rate);
                *free
            };
            let body = self.inner.read_at(blob, offset, len).await?;
            Ok(Box::pin(
                futures_util::stream::once(tokio::time::sleep_until(arrived))
                    .flat_map(move |()| futures_util::stream::empty())
                    .chain(body),
            ) as Body)
        })
    }
}

struct Setup {
    image: Generated,
    link: Arc<Link>,
    pool: Arc<Pool>,
    device: Option<Arc<ImageDevice>>,
    index: Arc<Index>,
    _dir: tempfile::TempDir,
}

fn setup(seed: u64, rate: f64) -> Setup {
    let image = Generated::new(seed, 4000);
    let index = image.without_startup(0);
    let link = Arc::new(Link {
        inner: Arc::clone(&image.source),
        rate,
        delay: Duration::from_millis(20),
        free: Mutex::new(tokio::time::Instant::now()),
        requests: Mutex::default(),
    });
    let dir = tempfile::tempdir().unwrap();
    let pool = Arc::new(Pool::open(&dir.path().join("pool"), &PoolOptions::default()).unwrap());
    let fetcher = Fetcher::new(Arc::clone(&pool), FetchOptions { read_ahead: 0, ..FetchOptions::default() });
    let origin = Arc::new(Origin::new(image.blobs(), vec![Arc::clone(&link) as Arc<dyn Source>]));
    let device = ImageDevice::new(Map::new(Arc::clone(&index)), origin, fetcher, Arc::clone(&pool));
    Setup { image, link, pool, device: Some(device), index, _dir: dir }
}

impl Setup {
    fn local(&self) -> usize {
        self.index.chunks().filter(|chunk| self.pool.contains(&chunk.digest)).count()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_comes_without_a_reader_and_only_once() {
    let setup = setup(1, 1e9);
    let device = setup.device.as_ref().unwrap();
    device.prefetch(Prefetch::Startup);
    device.prefetch(Prefetch::None);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(setup.link.requests.lock().len(), 0);
    device.prefetch(Prefetch::All);
    let chunks = setup.index.chunks().len();
    for _ in 0..1000 {
        if setup.local() == chunks {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(setup.local(), chunks);
    let mut buf = vec![0; setup.image.reference.len()];
    device.read_at(0, &mut buf).await.unwrap();
    assert!(buf == setup.image.reference);
    assert_eq!(device.counts().misses, 0);
    let distinct: std::collections::HashMap<_, u64> =
        setup.index.chunks().map(|chunk| (chunk.digest, u64::from(chunk.stored_len))).collect();
    assert_eq!(device.origin().counters().snapshot().bytes, distinct.values().sum::<u64>(), "nothing came twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_slow_link_it_waits_while_readers_miss_and_ends_with_the_device() {
    let mut setup = setup(2, 500_000.0);
    let device = setup.device.take().unwrap();
    device.prefetch(Prefetch::All);
    // The first pieces show that the link is slow.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let before = device.origin().counters().snapshot();
    let extents: Vec<_> = setup.index.extents().iter().collect();
    let mut missed = 0u64;
    for extent in extents.iter().rev() {
        let chunk = setup.index.chunk(extent.chunk).unwrap();
        if setup.pool.contains(&chunk.digest) || missed > 8 {
            continue;
        }
        let mut buf = vec![0; 4096];
        device.read_at(u64::from(extent.block) * 4096, &mut buf).await.unwrap();
        missed += 1;
    }
    assert!(missed > 4);
    let after = device.origin().counters().snapshot();
    let (demand, all) = (missed, after.chunks - before.chunks);
    assert!(all <= demand + 3, "{all} chunks came while readers missed {demand}");
    drop(device);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let asked = setup.link.requests.lock().len();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(setup.link.requests.lock().len(), asked, "nobody needs the rest");
    assert!(setup.local() < setup.index.chunks().len());
    assert!(setup.image.source.requests.load(Relaxed) > 0);
}

#[test]
fn a_mounted_image_becomes_local_by_itself() {
    let node = Node::new();
    let image = image::make(node.path(), "app", 24);
    let dir = node.mount_point("mnt");
    let mut command = node.command(&["mount", &image.reference(), dir.to_str().unwrap()]);
    command.env("FIRSTREAD_FETCH_PREFETCH", "all");
    assert!(command.output().unwrap().status.success());
    wait_until("all of it is local", || {
        let status = node.json(&["status", dir.to_str().unwrap()]);
        status["chunks"]["local"] == status["chunks"]["total"]
    });
    let status = node.json(&["status", dir.to_str().unwrap()]);
    same_files(&image.tree, &dir);
    let after = node.json(&["status", dir.to_str().unwrap()]);
    assert_eq!(after["requests"], status["requests"], "nothing had to be asked for");
}
