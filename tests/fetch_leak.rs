//! Ten thousand faults, and nothing is left of them: no task, no file descriptor, no memory.
//!
//! A process of its own, since it looks at the whole process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/hostile.rs"]
mod hostile;
#[path = "common/packs.rs"]
mod packs;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use firstread::fetch::{FetchOptions, Fetcher, Origin, Priority};
use firstread::oci::Reference;
use firstread::pool::{Pool, PoolOptions};
use firstread::source::{Access, Purpose, Repository, Source};
use hostile::{Answer, Hostile};
use packs::Pack;

const FAULTS: usize = 10_000;
const CHUNKS: usize = 400;

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn tasks() -> usize {
    tokio::runtime::Handle::current().metrics().num_alive_tasks()
}

/// The fault for request number `number`: three of four are struck.
fn fault(number: usize) -> Option<Answer> {
    let faults = [
        Answer::Reset,
        Answer::Truncated(10),
        Answer::Flip(5),
        Answer::Whole,
        Answer::OtherRange,
        Answer::Status(500, vec![], String::new()),
        Answer::Status(429, vec![], String::new()),
        Answer::Status(403, vec![], String::new()),
        Answer::Status(307, vec!["Location: /nowhere".into()], String::new()),
        Answer::Body(b"short".to_vec()),
    ];
    (!number.is_multiple_of(4)).then(|| faults[number / 4 % faults.len()].clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_faults_leave_nothing_behind() {
    let server = Hostile::start().await;
    let pack = Pack::new(1, CHUNKS, 4096, 0);
    server.put(&format!("/v2/app/blobs/{}", pack.digest()), pack.stored.clone());
    let struck = Arc::new(AtomicUsize::new(0));
    let (requests, counted) = (AtomicUsize::new(0), struck.clone());
    server.policy(move |_| {
        let fault = fault(requests.fetch_add(1, Ordering::Relaxed));
        counted.fetch_add(usize::from(fault.is_some()), Ordering::Relaxed);
        fault
    });
    let brief = (Duration::from_micros(100), Duration::from_millis(1));
    let options = FetchOptions {
        on_outage: None,
        pause: brief,
        leave_alone: brief,
        gap: 0,
        request_bytes: 1,
        ..FetchOptions::default()
    };
    let access = Access { stall: Duration::from_secs(20), ..Access::default() };
    let reference: Reference = format!("{}/app", server.host()).parse().unwrap();
    let mut before = None;
    while struck.load(Ordering::Relaxed) < FAULTS {
        // A pool and a fetcher of its own for each round: everything is a miss again, and all of it must end.
        let dir = tempfile::tempdir().unwrap();
        let pool = Arc::new(Pool::open(dir.path(), &PoolOptions::default()).unwrap());
        let fetcher = Fetcher::new(pool, options);
        let source: Arc<dyn Source> = Arc::new(Repository::open(&reference, &access, Purpose::Read).await.unwrap());
        let origin = Arc::new(Origin::new(vec![pack.blob()], vec![source]));
        let results = fetcher.fetch(&origin, &pack.chunks, Priority::Demand).await;
        for (result, plain) in results.iter().zip(&pack.plain) {
            match result {
                Ok(chunk) => assert_eq!(chunk.bytes(), plain),
                // Two flips of one chunk.
                Err(error) => assert!(
                    matches!(error, firstread::Error::WrongBytes { .. } | firstread::Error::NotFound { .. }),
                    "{error}"
                ),
            }
        }
        let right = results.iter().filter(|result| result.is_ok()).count();
        assert!(right > CHUNKS / 2, "only {right} chunks came");
        drop((results, origin, fetcher));
        if before.is_none() && struck.load(Ordering::Relaxed) > FAULTS / 5 {
            settle().await;
            before = Some((tasks(), descriptors(), resident_kib()));
        }
    }
    settle().await;
    let (before, after) = (before.unwrap(), (tasks(), descriptors(), resident_kib()));
    println!("tasks, descriptors, KiB: {before:?} after a fifth, {after:?} after all");
    assert!(after.0 <= before.0 + 8, "tasks: {before:?} {after:?}");
    assert!(after.1 <= before.1 + 8, "descriptors: {before:?} {after:?}");
    // The server of the test remembers its requests, some hundred bytes each.
    assert!(after.2 <= before.2 + (24 << 10), "memory: {before:?} {after:?}");
}

/// Waits for what ends on its own: connections that are closed, chunks on their way into the pool.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(500)).await;
}
