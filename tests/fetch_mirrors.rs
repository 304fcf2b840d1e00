//! Several sources of one image: what one has wrong or is slow with comes from the next.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/hostile.rs"]
mod hostile;
#[path = "common/packs.rs"]
mod packs;

use std::sync::Arc;
use std::time::{Duration, Instant};

use firstread::fetch::{FetchOptions, Fetcher, Origin, Priority};
use firstread::oci::Reference;
use firstread::pool::{Pool, PoolOptions};
use firstread::source::{Access, Purpose, Repository, Source};
use hostile::{Answer, Hostile};
use packs::Pack;

const STALL: Duration = Duration::from_secs(20);

struct Setup {
    mirror: Hostile,
    server: Hostile,
    pack: Pack,
    origin: Arc<Origin>,
    fetcher: Arc<Fetcher>,
    _dir: tempfile::TempDir,
}

async fn setup(options: FetchOptions) -> Setup {
    let (mirror, server) = (Hostile::start().await, Hostile::start().await);
    let pack = Pack::new(1, 64, 8192, 0);
    let mut sources: Vec<Arc<dyn Source>> = Vec::new();
    for host in [&mirror, &server] {
        host.put(&format!("/v2/app/blobs/{}", pack.digest()), pack.stored.clone());
        let access = Access { stall: STALL, connect: STALL, ..Access::default() };
        let reference: Reference = format!("{}/app", host.host()).parse().unwrap();
        sources.push(Arc::new(Repository::open(&reference, &access, Purpose::Read).await.unwrap()));
    }
    let origin = Arc::new(Origin::new(vec![pack.blob()], sources));
    let dir = tempfile::tempdir().unwrap();
    let pool = Arc::new(Pool::open(dir.path(), &PoolOptions::default()).unwrap());
    Setup { mirror, server, pack, origin, fetcher: Fetcher::new(pool, options), _dir: dir }
}

impl Setup {
    /// Fetches chunk number `number`, which must come right.
    async fn fetch(&self, number: usize, priority: Priority) {
        let chunk = self.pack.chunks[number];
        let result = self.fetcher.fetch(&self.origin, &[chunk], priority).await.remove(0);
        assert_eq!(result.unwrap().bytes(), self.pack.plain[number]);
    }

    fn asked(&self) -> (usize, usize) {
        (self.mirror.requests().len(), self.server.requests().len())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_stalls_is_overtaken_and_then_left_alone() {
    for fault in [Answer::Silent, Answer::Stalled(3000)] {
        let setup = setup(FetchOptions::default()).await;
        for number in 0..20 {
            setup.fetch(number, Priority::Demand).await;
        }
        assert!(setup.asked().1 <= 4, "{:?}", setup.asked());
        setup.mirror.ever(Some(fault.clone()));
        let started = Instant::now();
        for number in 20..30 {
            setup.fetch(number, Priority::Demand).await;
        }
        // Without hedges each of them would have waited for a stall.
        assert!(started.elapsed() < STALL, "{fault:?}: {:?}", started.elapsed());
        let values = setup.origin.counters().snapshot();
        assert!((3..=9).contains(&values.hedges), "{fault:?}: {values:?}");
        let (mirror, server) = setup.asked();
        assert!(mirror < 20 + 8 && server >= 10, "{fault:?}: {mirror} and {server} requests");
        let report = setup.origin.health();
        assert!(report.sources[0].failing_since.is_some() && report.sources[1].failing_since.is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_hedged_for_whom_nobody_waits_and_a_slow_pair_is_not_asked_twice_for_ever() {
    let setup = setup(FetchOptions::default()).await;
    for number in 0..20 {
        setup.fetch(number, Priority::Demand).await;
    }
    let before = (setup.asked().1, setup.origin.counters().snapshot().hedges);
    setup.mirror.delay(Duration::from_millis(1500));
    setup.fetch(20, Priority::Background).await;
    assert_eq!((setup.asked().1, setup.origin.counters().snapshot().hedges), before);
    setup.mirror.delay(Duration::ZERO);
    // Each wait is longer than was usual: hedges stay within a tenth and a few.
    for number in 21..61 {
        let delay = Duration::from_millis(30 + 4 * (number as u64 - 20));
        setup.mirror.delay(delay);
        setup.server.delay(delay * 2);
        setup.fetch(number, Priority::Demand).await;
    }
    let hedges = setup.origin.counters().snapshot().hedges;
    assert!(hedges <= 4 + 6, "{hedges} hedges in 60 requests");
}

#[tokio::test(flavor = "multi_thread")]
async fn both_of_a_hedge_may_fail_and_the_reader_still_gets_its_chunk() {
    for (mirror, server) in [
        (Answer::Silent, Answer::Reset),
        (Answer::Stalled(100), Answer::Truncated(50)),
        (Answer::Stalled(100), Answer::Flip(50)),
        (Answer::Silent, Answer::Status(404, vec![], String::new())),
    ] {
        let options = FetchOptions { on_outage: Some(Duration::from_secs(4)), ..FetchOptions::default() };
        let setup = setup(options).await;
        for number in 0..20 {
            setup.fetch(number, Priority::Demand).await;
        }
        setup.mirror.next([mirror.clone()]);
        setup.server.next([server.clone()]);
        setup.fetch(20, Priority::Demand).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_with_wrong_bytes_is_asked_once_and_then_left_alone() {
    let setup = setup(FetchOptions::default()).await;
    setup.mirror.ever(Some(Answer::Flip(100)));
    for number in 0..20 {
        setup.fetch(number, Priority::Demand).await;
    }
    let (mirror, server) = setup.asked();
    assert!(mirror <= 3 && server == 20, "{mirror} and {server} requests");
    let report = setup.origin.health();
    let error = report.sources[0].last_error.as_ref().unwrap().to_string();
    assert!(error.contains(setup.mirror.host()) && error.matches("sha256:").count() >= 1, "{error}");
    // It is tried again, and used again when it is right.
    setup.mirror.ever(None);
    let before = setup.asked().0;
    tokio::time::sleep(Duration::from_millis(4500)).await;
    for number in 20..30 {
        setup.fetch(number, Priority::Demand).await;
    }
    assert!(setup.asked().0 >= before + 9, "{:?}", setup.asked());
    assert!(setup.origin.health().sources[0].failing_since.is_none());
}
