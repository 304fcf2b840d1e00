//! The program `firstread-fault`: every fault as a client sees it, and the registry behind it when there is none.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/fault.rs"]
mod fault;
#[path = "common/packs.rs"]
mod packs;
#[path = "common/registry.rs"]
mod registry;

use std::time::Duration;

use fault::Fault;
use firstread::oci::Reference;
use firstread::source::{Access, Purpose, Repository, Source};
use futures_util::TryStreamExt;
use registry::Registry;
use reqwest::StatusCode;

fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::limited(5)).build().unwrap()
}

struct Dir {
    dir: tempfile::TempDir,
    content: Vec<u8>,
}

fn directory() -> Dir {
    let dir = tempfile::tempdir().unwrap();
    let content = packs::content(3, 300_000);
    std::fs::write(dir.path().join("file"), &content).unwrap();
    Dir { dir, content }
}

impl Dir {
    fn proxy(&self, arguments: &[&str]) -> Fault {
        Fault::start(self.dir.path().to_str().unwrap(), arguments)
    }
}

async fn get(proxy: &Fault, range: Option<&str>) -> reqwest::Result<(StatusCode, reqwest::header::HeaderMap, Vec<u8>)> {
    let mut request = client().get(format!("{}/file", proxy.url())).timeout(Duration::from_secs(3));
    if let Some(range) = range {
        request = request.header("range", range);
    }
    let response = request.send().await?;
    let (status, headers) = (response.status(), response.headers().clone());
    Ok((status, headers, response.bytes().await?.to_vec()))
}

#[tokio::test]
async fn a_directory_is_served_by_range() {
    let dir = directory();
    let proxy = dir.proxy(&[]);
    let (status, _, body) = get(&proxy, None).await.unwrap();
    assert_eq!((status.as_u16(), body), (200, dir.content.clone()));
    let (status, headers, body) = get(&proxy, Some("bytes=1000-199999")).await.unwrap();
    assert_eq!((status.as_u16(), &body[..]), (206, &dir.content[1000..200_000]));
    assert_eq!(headers["content-range"], "bytes 1000-199999/300000");
    assert_eq!(get(&proxy, Some("bytes=300000-")).await.unwrap().0, 416);
    for path in ["absent", "..%2f..%2fetc/passwd", "v2/x/blobs/sha256:00"] {
        let response = client().get(format!("{}/{path}", proxy.url())).send().await.unwrap();
        assert_eq!(response.status(), 404, "{path}");
    }
    let counters = proxy.counters();
    assert_eq!((counters["requests"].as_u64(), counters["ranges"].as_u64()), (Some(6), Some(2)), "{counters}");
    assert_eq!(counters["statuses"]["404"], 3);
}

#[tokio::test]
async fn every_fault_is_what_it_says() {
    let dir = directory();
    let proxy = dir.proxy(&[]);
    let range = Some("bytes=100000-199999");
    let right = &dir.content[100_000..200_000];
    // Those that end in an answer.
    for (rule, status, check) in [
        ("delay:time=10ms", 206, (|body, right| body == right) as fn(&[u8], &[u8]) -> bool),
        ("flip:at=70000", 206, |body, right| body[70_000] == right[70_000] ^ 1 && body[..70_000] == right[..70_000]),
        ("shift:by=3", 206, |body, right| body[..99_997] == right[3..] && body[99_997..] == right[..3]),
        ("whole", 200, |body, _| body.len() == 300_000),
        ("range:by=5", 206, |body, right| body[..99_995] == right[5..]),
        ("drip:rate=1M", 206, |body, right| body == right),
        ("status:code=503,retry_after=7", 503, |_, _| true),
        ("expire", 401, |_, _| true),
    ] {
        proxy.arm(&format!("{rule},count=1").replacen("whole,", "whole:", 1).replacen("expire,", "expire:", 1));
        let (found, headers, body) = get(&proxy, range).await.unwrap();
        assert_eq!(found.as_u16(), status, "{rule}");
        assert!(check(&body, right), "{rule}");
        assert_eq!(headers.get("retry-after").map(|value| value == "7"), (status == 503).then_some(true), "{rule}");
        let (_, _, body) = get(&proxy, range).await.unwrap();
        assert!(body == right, "{rule} has not healed");
    }
    // Those that end in none. A stalled answer ends when the client gives up.
    for rule in [
        "stall",
        "stall:after=1000",
        "reset",
        "reset:after=1000",
        "truncate:after=1000",
        "length:by=1",
        "loop",
        "dns",
        "tls",
    ] {
        proxy.forget_counters();
        proxy.arm(rule);
        assert!(get(&proxy, range).await.is_err(), "{rule}");
        let name = rule.split(':').next().unwrap();
        assert!(proxy.counters()["faults"][name].as_u64().unwrap() >= 1, "{rule}");
        proxy.heal();
        assert!(get(&proxy, range).await.unwrap().2 == right, "{rule} has not healed");
    }
}

#[tokio::test]
async fn a_registry_behind_it_is_pushed_to_and_read_with_tokens_that_expire() {
    let registry = Registry::start();
    let proxy = Fault::start(&format!("http://{}", registry.host()), &["--tokens", "400ms", "--user", "user:secret"]);
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.json");
    registry::write_docker_config(&config, proxy.host(), "user", "secret");
    let access = Access { docker_config: Some(config), ..Access::default() };
    let reference: Reference = format!("{}/app:v1", proxy.host()).parse().unwrap();
    let image = packs::TestImage::build(1, 4, 64 << 10, packs::Lies::default());
    let repository = Repository::open(&reference, &access, Purpose::Push).await.unwrap();
    image.push(&repository).await;
    let blob = firstread::index::Blob {
        digest: image.pack,
        bytes: image.blobs[&image.pack].len() as u64,
        role: firstread::index::Role::Pack,
    };
    for _ in 0..3 {
        let body = repository.read_at(&blob, 100, 1000).await.unwrap();
        let bytes: Vec<_> = body.try_collect::<Vec<_>>().await.unwrap().concat();
        assert!(bytes == image.blobs[&image.pack][100..1100]);
        tokio::time::sleep(Duration::from_millis(450)).await;
    }
    let counters = proxy.counters();
    assert!(counters["tokens"]["issued"].as_u64().unwrap() >= 3, "{counters}");
    assert!(counters["statuses"]["401"].as_u64().unwrap() >= 3, "{counters}");
    // The manifest is where the registry itself has it.
    let direct: Reference = format!("{}/app:v1", registry.host()).parse().unwrap();
    let direct = Repository::open(&direct, &Access::default(), Purpose::Read).await.unwrap();
    assert!(direct.manifest().await.unwrap().bytes == image.manifest);
}

#[tokio::test]
async fn an_oci_layout_behind_it_is_a_registry() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layout");
    let image = packs::TestImage::build(1, 4, 4096, packs::Lies::default());
    let layout: Reference = format!("oci:{}:v1", path.display()).parse().unwrap();
    let digest = image.push(&Repository::open(&layout, &Access::default(), Purpose::Push).await.unwrap()).await;
    let proxy = Fault::start(path.to_str().unwrap(), &[]);
    let reference: Reference = format!("{}/any/name:v1", proxy.host()).parse().unwrap();
    let repository = Repository::open(&reference, &Access::default(), Purpose::Read).await.unwrap();
    assert_eq!(repository.manifest().await.unwrap().digest, digest);
    assert_eq!(repository.manifest_by_digest(&digest).await.unwrap().bytes, image.manifest);
    let pack = &image.blobs[&image.pack];
    assert!(repository.small_blob(&image.pack, pack.len() as u64, 1 << 20).await.unwrap() == *pack);
    let absent: Reference = format!("{}/any/name:v2", proxy.host()).parse().unwrap();
    let absent = Repository::open(&absent, &Access::default(), Purpose::Read).await.unwrap();
    assert!(matches!(absent.manifest().await, Err(firstread::Error::NotFound { .. })));
}
