//! A source that lies, breaks or goes away: never wrong data, the right error within its deadline, and service resumes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/hostile.rs"]
mod hostile;
#[path = "common/packs.rs"]
mod packs;

use std::sync::Arc;
use std::time::{Duration, Instant};

use firstread::chunk::{ChunkRef, Verified};
use firstread::fetch::{FetchOptions, Fetcher, Origin, Priority};
use firstread::oci::Reference;
use firstread::pool::{Pool, PoolOptions};
use firstread::source::{Access, Purpose, Repository, Source};
use firstread::{Error, Result};
use hostile::{Answer, Hostile};
use packs::Pack;

const STALL: Duration = Duration::from_millis(400);
const ON_OUTAGE: Duration = Duration::from_secs(2);

struct Setup {
    server: Hostile,
    pack: Pack,
    origin: Arc<Origin>,
    fetcher: Arc<Fetcher>,
    _dir: tempfile::TempDir,
}

fn options() -> FetchOptions {
    let pause = (Duration::from_millis(20), Duration::from_millis(100));
    FetchOptions { on_outage: Some(ON_OUTAGE), pause, ..FetchOptions::default() }
}

async fn source(server: &Hostile) -> Arc<dyn Source> {
    let access = Access { stall: STALL, connect: STALL, ..Access::default() };
    let reference: Reference = format!("{}/app", server.host()).parse().unwrap();
    Arc::new(Repository::open(&reference, &access, Purpose::Read).await.unwrap())
}

fn blob_path(pack: &Pack) -> String {
    format!("/v2/app/blobs/{}", pack.digest())
}

async fn setup_with(options: FetchOptions, count: usize) -> Setup {
    let server = Hostile::start().await;
    let pack = Pack::new(1, count, 40_000, 512);
    server.put(&blob_path(&pack), pack.stored.clone());
    let origin = Arc::new(Origin::new(vec![pack.blob()], vec![source(&server).await]));
    let dir = tempfile::tempdir().unwrap();
    let pool = Arc::new(Pool::open(dir.path(), &PoolOptions::default()).unwrap());
    Setup { server, pack, origin, fetcher: Fetcher::new(pool, options), _dir: dir }
}

async fn setup() -> Setup {
    setup_with(options(), 8).await
}

impl Setup {
    async fn fetch(&self, chunks: &[ChunkRef]) -> Vec<Result<Arc<Verified>>> {
        self.fetcher.fetch(&self.origin, chunks, Priority::Demand).await
    }

    fn spawn(&self, chunks: Vec<ChunkRef>, priority: Priority) -> tokio::task::JoinHandle<Vec<Result<Arc<Verified>>>> {
        let (fetcher, origin) = (self.fetcher.clone(), self.origin.clone());
        tokio::spawn(async move { fetcher.fetch(&origin, &chunks, priority).await })
    }

    fn requests(&self) -> usize {
        self.server.requests().len()
    }

    fn check_all(&self, results: &[Result<Arc<Verified>>]) {
        assert_eq!(results.len(), self.pack.plain.len());
        for (result, plain) in results.iter().zip(&self.pack.plain) {
            assert_eq!(result.as_ref().unwrap().bytes(), plain);
        }
    }
}

fn redirect_loop(request: &hostile::Request) -> Answer {
    Answer::Status(307, vec![format!("Location: {}", request.path)], String::new())
}

#[tokio::test(flavor = "multi_thread")]
async fn adjacent_chunks_are_one_request_and_the_pool_has_them_afterwards() {
    let setup = setup().await;
    setup.check_all(&setup.fetch(&setup.pack.chunks).await);
    assert_eq!(setup.requests(), 1);
    let values = setup.origin.counters().snapshot();
    assert_eq!((values.chunks, values.requests, values.failed, values.waits.count), (8, 1, 0, 1));
    assert_eq!(values.bytes, setup.pack.stored.len() as u64 - 512);
    // The last chunk may still be on its way into the pool.
    for _ in 0..100 {
        setup.check_all(&setup.fetch(&setup.pack.chunks).await);
    }
    assert_eq!(setup.requests(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn gaps_are_read_over_and_far_chunks_are_not() {
    let setup = setup_with(FetchOptions { gap: 30_000, ..options() }, 8).await;
    // A chunk stores about 20 kB and a half: a gap of one is read over, a gap of two is not.
    let chunks: Vec<_> = [5, 0, 2].map(|number| setup.pack.chunks[number]).into();
    let results = setup.fetch(&chunks).await;
    assert_eq!(results[0].as_ref().unwrap().bytes(), setup.pack.plain[5]);
    assert_eq!(results[2].as_ref().unwrap().bytes(), setup.pack.plain[2]);
    assert_eq!(setup.requests(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_readers_of_one_cold_chunk_are_one_request() {
    let setup = setup().await;
    setup.server.delay(Duration::from_millis(50));
    let readers: Vec<_> = (0..64).map(|_| setup.spawn(vec![setup.pack.chunks[3]], Priority::Demand)).collect();
    for reader in readers {
        assert_eq!(reader.await.unwrap()[0].as_ref().unwrap().bytes(), setup.pack.plain[3]);
    }
    assert_eq!(setup.requests(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_asked_for_while_requests_are_in_flight_are_collected() {
    let setup = setup_with(FetchOptions { requests: 1, ..options() }, 8).await;
    setup.server.delay(Duration::from_millis(100));
    let first = setup.spawn(vec![setup.pack.chunks[0]], Priority::Demand);
    tokio::time::sleep(Duration::from_millis(30)).await;
    let others: Vec<_> =
        setup.pack.chunks[1..].iter().map(|chunk| setup.spawn(vec![*chunk], Priority::Background)).collect();
    assert!(first.await.unwrap()[0].is_ok());
    for other in others {
        assert!(other.await.unwrap()[0].is_ok());
    }
    assert_eq!(setup.requests(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_does_not_queue_behind_background_work() {
    let setup = setup_with(FetchOptions { requests: 2, request_bytes: 1, ..options() }, 8).await;
    setup.server.delay(Duration::from_millis(300));
    let background = setup.spawn(setup.pack.chunks[1..].to_vec(), Priority::Background);
    tokio::time::sleep(Duration::from_millis(20)).await;
    let started = Instant::now();
    assert!(setup.fetch(&setup.pack.chunks[..1]).await[0].is_ok());
    assert!(started.elapsed() < Duration::from_millis(480), "{:?}", started.elapsed());
    assert!(!background.is_finished());
    assert!(background.await.unwrap().iter().all(Result::is_ok));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_answer_in_the_background_is_given_up_for_a_reader() {
    // What is long, and how often the server is asked: for the long answer, for the reader's, and for the rest.
    for (background_bytes, requests) in [(1 << 20, 2), (20_000, 3)] {
        let setup = setup_with(FetchOptions { background_bytes, ..options() }, 8).await;
        setup.server.next([Answer::Slow(10_000)]);
        let background = setup.spawn(setup.pack.chunks[1..].to_vec(), Priority::Background);
        while setup.requests() == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(setup.fetch(&setup.pack.chunks[..1]).await[0].is_ok());
        assert!(background.await.unwrap().iter().all(Result::is_ok));
        let asked = setup.requests();
        assert!(if requests == 2 { asked == 2 } else { asked >= requests }, "{background_bytes}: {asked}");
        let values = setup.origin.counters().snapshot();
        assert_eq!((values.chunks, values.failed), (8, 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_that_passes_is_survived() {
    let faults = [
        Answer::Flip(700),
        Answer::Shifted(3),
        Answer::Truncated(50_000),
        Answer::Truncated(0),
        Answer::Stalled(50_000),
        Answer::Stalled(0),
        Answer::Silent,
        Answer::Reset,
        Answer::Whole,
        Answer::OtherRange,
        Answer::NoRange,
        Answer::OtherTotal,
        Answer::Endless,
        Answer::Body(b"short".to_vec()),
        Answer::Status(403, vec![], String::new()),
        Answer::Status(416, vec![], String::new()),
        Answer::Status(429, vec!["Retry-After: 0".into()], String::new()),
        Answer::Status(500, vec![], "<html>".into()),
    ];
    for fault in faults {
        let setup = setup().await;
        setup.server.next([fault.clone()]);
        let started = Instant::now();
        setup.check_all(&setup.fetch(&setup.pack.chunks).await);
        assert!(started.elapsed() < ON_OUTAGE, "{fault:?} took {:?}", started.elapsed());
        assert!(setup.requests() >= 2, "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_that_stays_is_an_error_in_time_and_the_service_resumes() {
    type Check = fn(&Error) -> bool;
    let wrong: Check = |error| matches!(error, Error::WrongBytes { .. });
    let unreachable: Check = |error| matches!(error, Error::Unreachable { .. });
    let refused: Check = |error| matches!(error, Error::Refused { .. });
    let absent: Check = |error| matches!(error, Error::NotFound { .. });
    let faults: Vec<(Answer, Check)> = vec![
        (Answer::Flip(700), wrong),
        (Answer::Shifted(3), wrong),
        (Answer::Endless, refused),
        (Answer::Truncated(100), unreachable),
        (Answer::Stalled(100), unreachable),
        (Answer::Silent, unreachable),
        (Answer::Reset, unreachable),
        (Answer::Whole, refused),
        (Answer::OtherRange, refused),
        (Answer::NoRange, refused),
        (Answer::OtherTotal, refused),
        (Answer::Body(b"short".to_vec()), refused),
        (Answer::Status(403, vec![], r#"{"errors":[{"code":"DENIED","message":"go away"}]}"#.into()), refused),
        (Answer::Status(401, vec![], String::new()), refused),
        (Answer::Status(404, vec![], String::new()), absent),
        (Answer::Status(503, vec!["Retry-After: 1".into()], String::new()), unreachable),
    ];
    let mut running = tokio::task::JoinSet::new();
    for (fault, check) in faults {
        running.spawn(async move {
            let setup = setup().await;
            setup.server.ever(Some(fault.clone()));
            let started = Instant::now();
            let results = setup.fetch(&setup.pack.chunks[..1]).await;
            let took = started.elapsed();
            let error = results[0].as_ref().expect_err("no data");
            assert!(check(error), "{fault:?} gave {error}");
            assert!(took < ON_OUTAGE * 2, "{fault:?} took {took:?}");
            assert!(error.to_string().contains(setup.server.host()), "{error}");
            setup.server.ever(None);
            // What was read ahead may be under way still, with an answer from before.
            drop(setup.fetch(&setup.pack.chunks).await);
            setup.check_all(&setup.fetch(&setup.pack.chunks).await);
        });
    }
    while let Some(result) = running.join_next().await {
        result.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_that_never_end_are_refused() {
    let setup = setup().await;
    setup.server.policy(|request| Some(redirect_loop(request)));
    let results = setup.fetch(&setup.pack.chunks[..1]).await;
    let error = results[0].as_ref().unwrap_err();
    assert!(matches!(error, Error::Refused { .. }) && error.to_string().contains("redirects"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_chunk_does_not_fail_its_neighbours() {
    let setup = setup().await;
    let mut stored = setup.pack.stored.clone();
    stored[setup.pack.chunks[3].offset as usize + 100] ^= 0x40;
    setup.server.put(&blob_path(&setup.pack), stored);
    let results = setup.fetch(&setup.pack.chunks).await;
    for (number, result) in results.iter().enumerate() {
        match result {
            Ok(chunk) => assert_eq!(chunk.bytes(), setup.pack.plain[number]),
            Err(error) => {
                assert_eq!(number, 3, "{error}");
                let text = error.to_string();
                assert!(text.contains(&setup.pack.chunks[3].digest.to_string()), "{text}");
            }
        }
    }
    assert!(results[3].is_err());
    // The run, and the corrupt chunk once more by itself.
    assert_eq!(setup.requests(), 2);
    assert_eq!(setup.origin.counters().snapshot().verify_failures, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_inflates_too_far_is_refused() {
    let setup = setup().await;
    let bomb = zstd::bulk::compress(&vec![0; 512 << 20], 19).unwrap();
    let mut stored = setup.pack.stored.clone();
    let chunk = ChunkRef { offset: stored.len() as u64, stored_len: bomb.len() as u32, ..setup.pack.chunks[0] };
    stored.extend_from_slice(&bomb);
    let blob = firstread::index::Blob { bytes: stored.len() as u64, ..setup.pack.blob() };
    setup.server.put(&blob_path(&setup.pack), stored);
    let origin = Arc::new(Origin::new(vec![blob], vec![source(&setup.server).await]));
    let results = setup.fetcher.fetch(&origin, &[chunk], Priority::Demand).await;
    let error = results[0].as_ref().unwrap_err();
    assert!(matches!(error, Error::WrongBytes { .. }) && error.to_string().contains("inflates"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_wait_while_the_source_is_away_and_go_on_when_it_is_back() {
    let setup = setup_with(FetchOptions { on_outage: None, ..options() }, 8).await;
    setup.server.ever(Some(Answer::Reset));
    let readers: Vec<_> = setup.pack.chunks.iter().map(|chunk| setup.spawn(vec![*chunk], Priority::Demand)).collect();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(readers.iter().all(|reader| !reader.is_finished()));
    let during = setup.requests();
    assert!((5..120).contains(&during), "{during} requests in a second of outage");
    setup.server.ever(None);
    for (reader, plain) in readers.into_iter().zip(&setup.pack.plain) {
        let results = tokio::time::timeout(Duration::from_secs(2), reader).await.unwrap().unwrap();
        assert_eq!(results[0].as_ref().unwrap().bytes(), plain);
    }
    let outage = setup.origin.counters().snapshot().outage_seconds;
    assert!((0.9..2.0).contains(&outage), "{outage}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_reader_of_an_outage_has_its_own_deadline() {
    let setup = setup().await;
    setup.server.ever(Some(Answer::Silent));
    for chunk in &setup.pack.chunks[..3] {
        let reader = setup.spawn(vec![*chunk], Priority::Demand);
        tokio::time::sleep(Duration::from_millis(150)).await;
        let started = Instant::now();
        assert!(setup.fetch(&[setup.pack.chunks[7]]).await[0].is_err());
        assert!(started.elapsed() < ON_OUTAGE * 2, "{:?}", started.elapsed());
        assert!(reader.await.unwrap()[0].is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_source_helps_out() {
    for fault in [Answer::Flip(100), Answer::Reset, Answer::Status(404, vec![], String::new()), Answer::Whole] {
        let bad = setup().await;
        let good = Hostile::start().await;
        good.put(&blob_path(&bad.pack), bad.pack.stored.clone());
        bad.server.ever(Some(fault.clone()));
        let sources = vec![source(&bad.server).await, source(&good).await];
        let origin = Arc::new(Origin::new(vec![bad.pack.blob()], sources));
        bad.check_all(&bad.fetcher.fetch(&origin, &bad.pack.chunks, Priority::Demand).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_everywhere_wait_for_a_source_that_is_only_away() {
    let away = setup().await;
    let wrong = Hostile::start().await;
    wrong.put(&blob_path(&away.pack), vec![0; away.pack.stored.len()]);
    away.server.ever(Some(Answer::Reset));
    let sources = vec![source(&away.server).await, source(&wrong).await];
    let origin = Arc::new(Origin::new(vec![away.pack.blob()], sources));
    let (fetcher, chunks) = (away.fetcher.clone(), away.pack.chunks.clone());
    let reader = tokio::spawn(async move { fetcher.fetch(&origin, &chunks, Priority::Demand).await });
    tokio::time::sleep(ON_OUTAGE / 2).await;
    assert!(!reader.is_finished());
    away.server.ever(None);
    away.check_all(&reader.await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_whose_sources_are_away_does_not_hold_up_another_one() {
    let away = setup_with(FetchOptions { on_outage: None, ..options() }, 8).await;
    let good = Hostile::start().await;
    good.put(&blob_path(&away.pack), away.pack.stored.clone());
    away.server.ever(Some(Answer::Silent));
    let stuck = away.spawn(away.pack.chunks.clone(), Priority::Demand);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let origin = Arc::new(Origin::new(vec![away.pack.blob()], vec![source(&good).await]));
    let fetch = away.fetcher.fetch(&origin, &away.pack.chunks, Priority::Demand);
    away.check_all(&tokio::time::timeout(Duration::from_secs(2), fetch).await.unwrap());
    assert!(!stuck.is_finished());
    stuck.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_gives_up_does_not_hold_up_the_others() {
    let setup = setup().await;
    setup.server.delay(Duration::from_millis(100));
    let chunks = setup.pack.chunks.clone();
    let impatient = setup.spawn(chunks.clone(), Priority::Demand);
    tokio::time::sleep(Duration::from_millis(20)).await;
    impatient.abort();
    setup.check_all(&setup.fetch(&chunks).await);
    assert_eq!(setup.requests(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_outside_their_blob_are_refused() {
    let setup = setup().await;
    let chunk = setup.pack.chunks[0];
    for chunk in [
        ChunkRef { blob: 1, ..chunk },
        ChunkRef { offset: u64::MAX, ..chunk },
        ChunkRef { stored_len: 0, ..chunk },
        ChunkRef { stored_len: u32::MAX, ..chunk },
        ChunkRef { plain_len: u32::MAX, ..chunk },
    ] {
        assert!(matches!(setup.fetch(&[chunk]).await[0], Err(Error::Invalid { .. })));
    }
    assert_eq!(setup.requests(), 0);
}
