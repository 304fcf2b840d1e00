//! The start-up stream: asked for once, usable as it arrives, waited for by those who miss what is on its way.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/generated.rs"]
mod generated;
#[path = "common/random.rs"]
mod random;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use firstread::Error;
use firstread::chunk::ChunkRef;
use firstread::device::{Device, ImageDevice};
use firstread::fetch::{FetchOptions, Fetcher, Origin, Priority};
use firstread::index::{BLOCK, Blob, Extent, Index, IndexWriter, Role};
use firstread::map::Map;
use firstread::pool::{Pool, PoolOptions};
use firstread::source::{Body, Source, SourceFuture};
use futures_util::StreamExt;
use generated::{BytesSource, Generated};
use parking_lot::Mutex;
use tokio::sync::watch;

/// A source that lets only so many bytes of the start-up pack through, and keeps a list of what it was asked for.
struct Gate {
    inner: Arc<BytesSource>,
    /// Bytes of each request for the start-up pack that may pass.
    open: watch::Sender<u64>,
    /// Requests for the start-up pack: offset and length.
    startup: Mutex<Vec<(u64, u64)>>,
    others: AtomicU64,
    /// After so many bytes of the start-up pack a request for it breaks; 0: never.
    breaks_after: AtomicU64,
    /// Requests of any kind that fail from now on.
    failing: AtomicU64,
}

impl Source for Gate {
    fn name(&self) -> &str {
        "gate"
    }

    fn read_at<'a>(&'a self, blob: &'a Blob, offset: u64, len: u64) -> SourceFuture<'a, Body> {
        Box::pin(async move {
            if self.failing.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok() {
                return Err(Error::Unreachable { source_name: "gate".into(), reason: "closed".into() });
            }
            let body = self.inner.read_at(blob, offset, len).await?;
            if blob.role == Role::Pack {
                self.others.fetch_add(1, SeqCst);
                return Ok(body);
            }
            self.startup.lock().push((offset, len));
            let breaks_after = self.breaks_after.load(SeqCst);
            let (open, mut passed) = (self.open.subscribe(), 0u64);
            Ok(Box::pin(async_stream(body, move |bytes| {
                passed += bytes;
                let (wanted, mut open) = (passed, open.clone());
                let broken = breaks_after > 0 && passed > breaks_after;
                async move {
                    if broken {
                        return Err(Error::Unreachable { source_name: "gate".into(), reason: "broke off".into() });
                    }
                    open.wait_for(|open| *open >= wanted).await.map(drop).map_err(|_| Error::Stopping("gate".into()))
                }
            })) as Body)
        })
    }
}

/// `body`, each piece of which waits for what `pass` says of its length.
fn async_stream<F>(
    body: Body,
    pass: impl FnMut(u64) -> F + Send + 'static,
) -> impl futures_util::Stream<Item = firstread::Result<bytes::Bytes>> + Send
where
    F: Future<Output = firstread::Result<()>> + Send,
{
    futures_util::stream::unfold((body, pass), |(mut body, mut pass)| async move {
        let piece = body.next().await?;
        let passed = match &piece {
            Ok(piece) => pass(piece.len() as u64).await,
            Err(error) => Err(error.clone()),
        };
        Some((passed.and(piece), (body, pass)))
    })
}

struct Setup {
    image: Generated,
    gate: Arc<Gate>,
    pool: Arc<Pool>,
    fetcher: Arc<Fetcher>,
    origin: Arc<Origin>,
    device: Arc<ImageDevice>,
    _dir: tempfile::TempDir,
}

fn setup(seed: u64) -> Setup {
    let image = Generated::new(seed, 9000);
    assert!(image.map.index().startup_order().len() > 15);
    let gate = Arc::new(Gate {
        inner: Arc::clone(&image.source),
        open: watch::Sender::new(u64::MAX),
        startup: Mutex::default(),
        others: AtomicU64::new(0),
        breaks_after: AtomicU64::new(0),
        failing: AtomicU64::new(0),
    });
    let dir = tempfile::tempdir().unwrap();
    let pool = Arc::new(Pool::open(&dir.path().join("pool"), &PoolOptions::default()).unwrap());
    let options = FetchOptions {
        read_ahead: 0,
        pause: (Duration::from_millis(1), Duration::from_millis(5)),
        ..FetchOptions::default()
    };
    let fetcher = Fetcher::new(Arc::clone(&pool), options);
    let origin = Arc::new(Origin::new(image.blobs(), vec![Arc::clone(&gate) as Arc<dyn Source>]));
    let device = ImageDevice::new(image.map.clone(), Arc::clone(&origin), Arc::clone(&fetcher), Arc::clone(&pool));
    Setup { image, gate, pool, fetcher, origin, device, _dir: dir }
}

impl Setup {
    fn index(&self) -> &Arc<Index> {
        self.image.map.index()
    }

    fn startup(&self) -> Vec<ChunkRef> {
        self.index().startup_order().map(|number| self.index().chunk(number).unwrap()).collect()
    }

    async fn read(&self, block: u32, blocks: u32) {
        let (at, len) = ((block * BLOCK) as usize, (blocks * BLOCK) as usize);
        let mut buf = vec![0; len];
        self.device.read_at(at as u64, &mut buf).await.unwrap();
        assert!(buf == self.image.reference[at..at + len], "blocks {block} to {}", block + blocks);
    }

    async fn all_streamed(&self) {
        until(|| !self.origin.startup().0 && self.startup().iter().all(|chunk| self.pool.contains(&chunk.digest)))
            .await;
    }
}

async fn until(mut done: impl FnMut() -> bool) {
    for _ in 0..5000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("it never came true");
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_hot_comes_with_one_request_before_anybody_reads() {
    let setup = setup(1);
    setup.fetcher.start_up(&setup.origin, setup.index());
    setup.all_streamed().await;
    let (first, last) = (setup.startup()[0], *setup.startup().last().unwrap());
    let whole = (first.offset, last.offset + u64::from(last.stored_len) - first.offset);
    assert_eq!(*setup.gate.startup.lock(), [whole]);
    assert_eq!(setup.gate.others.load(SeqCst), 0);
    let counters = setup.origin.counters().snapshot();
    assert_eq!((counters.requests, counters.startup_bytes, counters.bytes), (1, whole.1, whole.1));
    for extent in setup.index().startup_extents().iter() {
        setup.read(extent.block, extent.blocks).await;
    }
    assert_eq!(setup.device.counts().misses, 0);
    let (fetches, forgotten) = setup.origin.fetches();
    assert_eq!((fetches.len(), forgotten), (setup.startup().len(), 0));
    for fetch in fetches {
        let order = [fetch.asked, fetch.requested, fetch.arrived, fetch.started, fetch.inflated, fetch.verified];
        assert!(order.is_sorted() && fetch.priority == Priority::Startup, "{fetch:?}");
    }
    // Nothing is missing now, and nothing is asked for.
    setup.fetcher.start_up(&setup.origin, setup.index());
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(setup.origin.counters().snapshot().requests, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_are_usable_as_they_arrive_and_waited_for_while_they_are_on_their_way() {
    let setup = Arc::new(setup(2));
    setup.gate.open.send_replace(0);
    setup.fetcher.start_up(&setup.origin, setup.index());
    let extents: Vec<_> = setup.index().startup_extents().iter().collect();
    // One that arrives later is missed at once, near enough to be waited for however slow it all is.
    let start = setup.startup()[0].offset;
    let near = |extent: &&Extent| {
        let offset = setup.index().chunk(extent.chunk).unwrap().offset;
        (start + 70_000..start + 120_000).contains(&offset)
    };
    let later = **extents.iter().find(near).as_ref().unwrap();
    let waiting = tokio::spawn({
        let setup = Arc::clone(&setup);
        async move { setup.read(later.block, later.blocks).await }
    });
    // What is not hot is fetched while the stream stands still.
    let cold = setup.index().extents().iter().find(|extent| {
        let hot = setup.index().startup_extents().at_or_after(extent.block);
        hot.is_none_or(|hot| hot.block >= extent.block + extent.blocks)
    });
    let cold = cold.unwrap();
    tokio::time::timeout(Duration::from_secs(10), setup.read(cold.block, cold.blocks)).await.unwrap();
    assert!(setup.gate.others.load(SeqCst) > 0 && !waiting.is_finished());
    // The first chunks are let through: a reader of the first one gets it, the other one still waits.
    let chunks = setup.startup();
    setup.gate.open.send_replace(u64::from(chunks[0].stored_len) + 30_000);
    tokio::time::timeout(Duration::from_secs(10), setup.read(extents[0].block, extents[0].blocks)).await.unwrap();
    assert!(!waiting.is_finished());
    setup.gate.open.send_replace(u64::MAX);
    waiting.await.unwrap();
    setup.all_streamed().await;
    assert_eq!(setup.gate.startup.lock().len(), 1, "what was on its way was not asked for again");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_needs_something_from_the_end_of_a_long_stream_does_not_wait_for_all_of_it() {
    let setup = Arc::new(setup(7));
    let chunks = setup.startup();
    let bytes: u64 = chunks.iter().map(|chunk| u64::from(chunk.stored_len)).sum();
    // The last one that is small enough to come twice.
    let late = chunks.iter().rposition(|chunk| u64::from(chunk.stored_len) < bytes / 8).unwrap();
    let before: u64 = chunks[..late].iter().map(|chunk| u64::from(chunk.stored_len)).sum();
    assert!(before > 2 * (128 << 10), "a stream that is long enough: {before}");
    setup.gate.open.send_replace(0);
    setup.fetcher.start_up(&setup.origin, setup.index());
    let waiting = tokio::spawn({
        let (setup, chunk) = (Arc::clone(&setup), chunks[late]);
        async move { setup.fetcher.fetch(&setup.origin, &[chunk], Priority::Demand).await }
    });
    // The stream trickles; the request that overtakes it gets as much as that.
    let mut passed = 0;
    while !waiting.is_finished() {
        passed += 10_000;
        assert!(passed + (128 << 10) < before, "it was waited for until the stream had come to it");
        setup.gate.open.send_replace(passed);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    let result = waiting.await.unwrap();
    assert_eq!(result[0].as_ref().unwrap().digest(), &chunks[late].digest);
    let own = (chunks[late].offset, u64::from(chunks[late].stored_len));
    assert!(setup.gate.startup.lock().contains(&own), "{:?}", setup.gate.startup.lock());
    setup.gate.open.send_replace(u64::MAX);
    setup.all_streamed().await;
    assert_eq!(setup.gate.startup.lock().len(), 2, "the rest came with the stream");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_local_is_left_out_by_ranges() {
    let setup = setup(3);
    let chunks = setup.startup();
    let middle = &chunks[2..chunks.len() - 2];
    for result in setup.fetcher.fetch(&setup.origin, middle, Priority::Background).await {
        result.unwrap();
    }
    until(|| middle.iter().all(|chunk| setup.pool.contains(&chunk.digest))).await;
    let before: u64 = setup.gate.startup.lock().iter().map(|(_, len)| len).sum();
    let asked = setup.gate.startup.lock().len();
    setup.fetcher.start_up(&setup.origin, setup.index());
    setup.all_streamed().await;
    let (requests, bytes) = {
        let startup = setup.gate.startup.lock();
        (startup.len() - asked, startup.iter().map(|(_, len)| len).sum::<u64>() - before)
    };
    let pack = chunks.iter().map(|chunk| u64::from(chunk.stored_len)).sum::<u64>();
    let gap: u64 = middle.iter().map(|chunk| u64::from(chunk.stored_len)).sum();
    // Long stretches are asked around, short ones read over.
    match gap > 256 << 10 {
        true => assert_eq!((requests, bytes), (2, pack - gap)),
        false => assert_eq!((requests, bytes), (1, pack)),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_goes_on_where_it_was() {
    let setup = setup(4);
    setup.gate.breaks_after.store(100_000, SeqCst);
    setup.fetcher.start_up(&setup.origin, setup.index());
    until(|| setup.gate.startup.lock().len() > 2).await;
    setup.gate.breaks_after.store(0, SeqCst);
    setup.all_streamed().await;
    let startup = setup.gate.startup.lock().clone();
    assert!(startup.windows(2).all(|pair| pair[0].0 < pair[1].0), "each goes on behind the one before: {startup:?}");
    for extent in setup.index().startup_extents().iter() {
        setup.read(extent.block, extent.blocks).await;
    }
    assert_eq!(setup.device.counts().misses, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_away_at_first_is_waited_for_by_readers() {
    let setup = Arc::new(setup(5));
    setup.gate.failing.store(20, SeqCst);
    setup.fetcher.start_up(&setup.origin, setup.index());
    let extents: Vec<_> = setup.index().startup_extents().iter().collect();
    for extent in [extents[extents.len() / 2], extents[0]] {
        tokio::time::timeout(Duration::from_secs(20), setup.read(extent.block, extent.blocks)).await.unwrap();
    }
    setup.all_streamed().await;
    assert_eq!(setup.origin.counters().snapshot().failed, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_up_order_that_makes_no_sense_costs_no_wrong_byte() {
    let setup = setup(6);
    let old = setup.index();
    // Every chunk of the image, in an order from the back, many times; some overlap others, one is another's bytes.
    let mut writer = IndexWriter::new();
    for blob in old.blobs() {
        writer.blob(&blob);
    }
    let mut numbers = Vec::new();
    for chunk in old.chunks() {
        numbers.push(writer.chunk(&chunk));
    }
    let some = old.chunk(0).unwrap();
    let overlapping = writer.chunk(&ChunkRef { offset: some.offset + 1, ..some });
    let lying = writer.chunk(&ChunkRef { digest: firstread::Digest::of(b"another"), ..old.chunk(1).unwrap() });
    for extent in old.extents().iter() {
        writer.extent(extent);
    }
    for extent in old.startup_extents().iter() {
        writer.startup_extent(extent);
    }
    for _ in 0..20_000 / numbers.len() {
        for number in numbers.iter().rev().chain([&overlapping, &lying, &lying]) {
            writer.startup_order(*number);
        }
    }
    let index = Arc::new(Index::from_bytes(writer.finish(old.device_bytes(), "raw").unwrap()).unwrap());
    setup.fetcher.start_up(&setup.origin, &index);
    let device = ImageDevice::new(
        Map::new(Arc::clone(&index)),
        Arc::clone(&setup.origin),
        Arc::clone(&setup.fetcher),
        Arc::clone(&setup.pool),
    );
    let mut buf = vec![0; setup.image.reference.len()];
    tokio::time::timeout(Duration::from_secs(60), device.read_at(0, &mut buf)).await.unwrap().unwrap();
    assert!(buf == setup.image.reference);
    until(|| !setup.origin.startup().0).await;
}
