//! What is fetched beside readers, and what stands back for them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/generated.rs"]
mod generated;
#[path = "common/random.rs"]
mod random;

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use firstread::chunk::ChunkRef;
use firstread::device::ImageDevice;
use firstread::fetch::{FetchOptions, Fetched, Fetcher, Origin, Prefetch, Priority};
use firstread::index::{Blob, Index};
use firstread::map::Map;
use firstread::pool::{Pool, PoolOptions};
use firstread::source::{Body, Source, SourceFuture};
use generated::{BytesSource, Generated};
use parking_lot::Mutex;
use tokio::sync::watch;

/// Chunks that a start probably reads, of an image that has such.
const LIKELY: u32 = 40;

/// A source whose answers take `delay` to begin, and those to requests from some offset on until it is released.
struct Held {
    inner: Arc<BytesSource>,
    delay: Duration,
    /// Requests for what begins here or behind are held; [`u64::MAX`]: none.
    from: watch::Sender<u64>,
    /// Where the requests began, in the order in which they were sent.
    requests: Mutex<Vec<u64>>,
}

impl Source for Held {
    fn name(&self) -> &str {
        "held"
    }

    fn read_at<'a>(&'a self, blob: &'a Blob, offset: u64, len: u64) -> SourceFuture<'a, Body> {
        Box::pin(async move {
            self.requests.lock().push(offset);
            // The sender is this source's.
            drop(self.from.subscribe().wait_for(|from| offset < *from).await);
            tokio::time::sleep(self.delay).await;
            self.inner.read_at(blob, offset, len).await
        })
    }
}

struct Setup {
    source: Arc<Held>,
    pool: Arc<Pool>,
    index: Arc<Index>,
    fetcher: Arc<Fetcher>,
    origin: Arc<Origin>,
    _dir: tempfile::TempDir,
}

/// An image without a start-up pack; a start of it probably reads the first `likely` chunks.
fn setup(seed: u64, delay: Duration, likely: u32) -> Setup {
    let image = Generated::new(seed, 4000);
    let source = Arc::new(Held {
        inner: Arc::clone(&image.source),
        delay,
        from: watch::Sender::new(u64::MAX),
        requests: Mutex::default(),
    });
    let dir = tempfile::tempdir().unwrap();
    let pool = Arc::new(Pool::open(&dir.path().join("pool"), &PoolOptions::default()).unwrap());
    let fetcher = Fetcher::new(Arc::clone(&pool), FetchOptions { read_ahead: 0, ..FetchOptions::default() });
    let origin = Arc::new(Origin::new(image.blobs(), vec![Arc::clone(&source) as Arc<dyn Source>]));
    Setup { source, pool, index: image.without_startup(likely), fetcher, origin, _dir: dir }
}

impl Setup {
    /// The chunks of the pack of files, as they lie in it.
    fn chunks(&self) -> Vec<ChunkRef> {
        let mut chunks: Vec<_> = self.index.chunks().filter(|chunk| chunk.blob == 0).collect();
        chunks.sort_by_key(|chunk| chunk.offset);
        chunks
    }

    async fn read(&self, chunk: ChunkRef) {
        self.fetcher.fetch(&self.origin, &[chunk], Priority::Demand).await.remove(0).unwrap();
    }

    /// What answers take is learned by the first ones: of large chunks, far enough before the last chunk that it does not
    /// belong to what lies behind them. How many fetches that were.
    async fn learn(&self) -> usize {
        let chunks = self.chunks();
        let far = chunks.last().unwrap().offset - (2 << 20);
        let large = |chunk: &&ChunkRef| chunk.stored_len > 50_000 && chunk.offset < far;
        for chunk in chunks.iter().rev().filter(large).take(8) {
            self.read(*chunk).await;
        }
        until(|| self.origin.fetches().0.len() == 8).await;
        8
    }

    /// The fetches but the first `seen`: blob and offset, and the priority.
    fn fetched(&self, seen: usize) -> Vec<((u32, u64), Priority)> {
        let (fetches, _) = self.origin.fetches();
        let place = |Fetched { chunk, priority, .. }: &Fetched| ((chunk.blob, chunk.offset), *priority);
        fetches.iter().skip(seen).map(place).collect()
    }

    fn device(&self) -> Arc<ImageDevice> {
        let map = Map::new(Arc::clone(&self.index));
        ImageDevice::new(map, Arc::clone(&self.origin), Arc::clone(&self.fetcher), Arc::clone(&self.pool))
    }
}

/// Lets a fetch that can't be done yet ask for what it wants.
async fn begin<T>(mut fetch: Pin<&mut impl Future<Output = T>>) {
    let pending = std::future::poll_fn(|context| Poll::Ready(fetch.as_mut().poll(context).is_pending())).await;
    assert!(pending, "it is done");
}

async fn until(mut done: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it never came true");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stands_back_for_readers_takes_no_place_of_theirs() {
    let setup = setup(1, Duration::ZERO, 0);
    // Far enough from one another for requests of their own.
    let mut end = 0;
    let far = |chunk: &ChunkRef| {
        let far = chunk.offset > end + (64 << 10);
        if far {
            end = chunk.offset + u64::from(chunk.stored_len);
        }
        far
    };
    let chunks: Vec<_> = setup.chunks().into_iter().filter(far).take(8).collect();
    setup.source.from.send_replace(0);
    let mut fetches: Vec<_> = chunks
        .iter()
        .enumerate()
        .map(|(number, chunk)| {
            let priority = if (1..=4).contains(&number) { Priority::Background } else { Priority::Demand };
            Box::pin(setup.fetcher.fetch(&setup.origin, std::slice::from_ref(chunk), priority))
        })
        .collect();
    begin(fetches[0].as_mut()).await;
    until(|| setup.source.requests.lock().len() == 1).await;
    // Four in the background, which a reader keeps at the gate; then three more readers.
    for fetch in &mut fetches[1..] {
        begin(fetch.as_mut()).await;
    }
    let asked = |number: usize| setup.source.requests.lock().contains(&chunks[number].offset);
    until(|| (5..8).all(asked)).await;
    setup.source.from.send_replace(u64::MAX);
    for fetch in fetches {
        fetch.await.remove(0).unwrap();
    }
}

/// A link that stands idle while a reader waits for an answer to begin is used meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn where_answers_are_waited_for_everything_comes_beside_a_reader() {
    let setup = setup(2, Duration::from_millis(30), 0);
    let seen = setup.learn().await;
    let last = *setup.chunks().last().unwrap();
    setup.source.from.send_replace(last.offset);
    let mut reader = pin!(setup.read(last));
    begin(reader.as_mut()).await;
    let device = setup.device();
    device.prefetch(Prefetch::All);
    let local = |chunk: &ChunkRef| chunk.digest == last.digest || setup.pool.contains(&chunk.digest);
    until(|| setup.index.chunks().filter(|chunk| chunk.blob == 0).all(|chunk| local(&chunk))).await;
    let fetched = setup.fetched(seen);
    assert!(fetched.iter().all(|(_, priority)| *priority == Priority::ReadAhead), "{fetched:?}");
    setup.source.from.send_replace(u64::MAX);
    reader.await;
}

/// Where answers begin at once, readers keep the link busy by themselves: only what they will probably wait for next comes
/// beside them.
#[tokio::test(flavor = "multi_thread")]
async fn where_answers_begin_at_once_only_what_is_likely_comes_beside_a_reader() {
    let setup = setup(3, Duration::ZERO, LIKELY);
    let seen = setup.learn().await;
    let last = *setup.chunks().last().unwrap();
    let end = setup.index.chunk(LIKELY).map(|chunk| (chunk.blob, chunk.offset)).unwrap();
    setup.source.from.send_replace(last.offset);
    let mut reader = pin!(setup.read(last));
    begin(reader.as_mut()).await;
    let device = setup.device();
    device.prefetch(Prefetch::All);
    // The rest insists on one request, in the end.
    let is_rest = |(place, _): &((u32, u64), Priority)| *place >= end;
    until(|| setup.fetched(seen).iter().any(is_rest)).await;
    let (rest, likely): (Vec<_>, Vec<_>) = setup.fetched(seen).into_iter().partition(is_rest);
    assert_eq!(likely.len(), LIKELY as usize);
    assert!(likely.iter().all(|(_, priority)| *priority == Priority::ReadAhead), "{likely:?}");
    assert!(rest.iter().all(|(_, priority)| *priority == Priority::Background), "{rest:?}");
    setup.source.from.send_replace(u64::MAX);
    reader.await;
}
