//! Opening an image: from a reference to a valid local index, whatever the registry holds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/packs.rs"]
mod packs;
#[path = "common/registry.rs"]
mod registry;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use firstread::chunk::Digest;
use firstread::fetch::{FetchOptions, Fetcher, Image, Priority, open_image};
use firstread::oci::{Platform, Reference, media_type};
use firstread::pool::{Pool, PoolOptions};
use firstread::source::{Access, Content, Publish, Purpose, Repository};
use firstread::{Error, Result};
use packs::{Lies, TestImage};
use registry::Registry;

fn access() -> Access {
    let patience = Duration::from_secs(2);
    Access { stall: patience, connect: patience, ..Access::default() }
}

async fn push(name: &str, image: &TestImage) -> Digest {
    let reference: Reference = name.parse().unwrap();
    image.push(&Repository::open(&reference, &access(), Purpose::Push).await.unwrap()).await
}

async fn open(name: &str, cache: &Path) -> Result<Image> {
    open_image(&name.parse().unwrap(), &access(), &"linux/amd64".parse::<Platform>().unwrap(), cache).await
}

async fn check_content(image: &Image, expected: &TestImage) {
    let dir = tempfile::tempdir().unwrap();
    let pool = Arc::new(Pool::open(dir.path(), &PoolOptions::default()).unwrap());
    let chunks: Vec<_> = image.index.chunks().collect();
    let before = image.origin.counters().snapshot().requests;
    assert_eq!(chunks, expected.chunks);
    let fetcher = Fetcher::new(pool, FetchOptions::default());
    let results = fetcher.fetch(&image.origin, &chunks, Priority::Demand).await;
    for (result, plain) in results.iter().zip(&expected.plain) {
        assert_eq!(result.as_ref().unwrap().bytes(), plain);
    }
    assert_eq!(image.origin.counters().snapshot().requests, before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_opened_from_a_registry_and_again_from_what_is_local() {
    let (mut registry, dir) = (Registry::start(), tempfile::tempdir().unwrap());
    let name = format!("{}/team/app:v1", registry.host());
    let expected = TestImage::build(1, 16, 65536, Lies::default());
    let digest = push(&name, &expected).await;
    let image = open(&name, dir.path()).await.unwrap();
    assert_eq!((image.manifest_digest, image.index.device_bytes()), (digest, 16 * 65536));
    assert_eq!((image.config.env(), image.config.cmd()), (&["A=b".to_owned()][..], &["sh".to_owned()][..]));
    assert_eq!((image.config.user(), image.config.working_dir()), (None, Some("/srv")));
    check_content(&image, &expected).await;

    // The second time nothing is read but the manifest; with a digest, nothing at all.
    let requests = || registry.settled_log().lines().filter(|line| line.contains("\"GET /v2/")).count();
    let before = requests();
    open(&name, dir.path()).await.unwrap();
    assert_eq!(requests(), before + 1);
    let pinned = format!("{}/team/app@{digest}", registry.host());
    open(&pinned, dir.path()).await.unwrap();
    assert_eq!(requests(), before + 1);

    // With the registry gone, a tag is what it was.
    registry.stop();
    assert_eq!(open(&name, dir.path()).await.unwrap().manifest_digest, digest);
    let other = format!("{}/team/app:v2", registry.host());
    assert!(matches!(open(&other, dir.path()).await, Err(Error::Unreachable { .. })));
    registry.resume();
    check_content(&image, &expected).await;

    // A damaged local index is fetched again.
    let path = dir.path().join(format!("{}.index", Digest::of(&expected.index).hex()));
    std::fs::write(&path, b"damaged").unwrap();
    assert!(open(&name, dir.path()).await.is_ok());
    assert_eq!(std::fs::read(&path).unwrap(), expected.index);
    assert!(std::fs::read_dir(dir.path()).unwrap().all(|e| !e.unwrap().file_name().to_string_lossy().starts_with('.')));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_lost_a_bit_is_found_out() {
    let (registry, dir) = (Registry::start(), tempfile::tempdir().unwrap());
    let name = format!("{}/app:v1", registry.host());
    let image = TestImage::build(1, 64, 65536, Lies::default());
    push(&name, &image).await;
    let path = registry.blob_path(&image.index_layer.hex());
    let whole = std::fs::read(&path).unwrap();
    for at in [3, whole.len() / 2, whole.len() - 3] {
        let mut damaged = whole.clone();
        damaged[at] ^= 4;
        std::fs::write(&path, &damaged).unwrap();
        let error = open(&name, dir.path()).await.err().unwrap();
        assert!(matches!(error, Error::WrongBytes { .. }), "byte {at}: {error}");
    }
    std::fs::write(&path, &whole[..100]).unwrap();
    let error = open(&name, dir.path()).await.err().unwrap();
    assert!(matches!(error, Error::Refused { .. } | Error::Unreachable { .. }), "{error}");
    std::fs::write(&path, &whole).unwrap();
    open(&name, dir.path()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_contradict_themselves_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let lies = [
        (Lies { index_bytes: 1, ..Lies::default() }, "as annotated"),
        (Lies { index_bytes: 1 << 40, ..Lies::default() }, "are read"),
        (Lies { index_bytes: -100, ..Lies::default() }, "as annotated"),
        (Lies { foreign_blob: true, ..Lies::default() }, "no pack of it"),
        (Lies { other_index: true, ..Lies::default() }, "the index hashes to"),
        (Lies { no_annotations: true, ..Lies::default() }, "convert it with `firstread build`"),
        (Lies { path: Some("etc/passwd"), ..Lies::default() }, "index layer"),
    ];
    for (number, (lies, wanted)) in lies.into_iter().enumerate() {
        let name = format!("oci:{}", dir.path().join(number.to_string()).display());
        push(&name, &TestImage::build(1, 16, 65536, lies)).await;
        let error = open(&name, &dir.path().join("cache")).await.err().unwrap().to_string();
        assert!(error.contains(wanted), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_image_for_the_platform_is_picked() {
    let (registry, dir) = (Registry::start(), tempfile::tempdir().unwrap());
    let name = format!("{}/app:v1", registry.host());
    let reference: Reference = name.parse().unwrap();
    let repository = Repository::open(&reference, &access(), Purpose::Push).await.unwrap();
    let mut entries = Vec::new();
    let mut digests = Vec::new();
    for (seed, architecture) in [(1, "arm64"), (2, "amd64")] {
        let image = TestImage::build(seed, 4, 4096, Lies::default());
        for (digest, bytes) in &image.blobs {
            let content = Content::Bytes(bytes.clone().into());
            repository.push_blob(digest, bytes.len() as u64, &content).await.unwrap();
        }
        let digest = repository.push_manifest(&image.manifest, media_type::MANIFEST, Publish::Listed).await.unwrap();
        entries.push(serde_json::json!({"mediaType": media_type::MANIFEST, "digest": digest.to_string(),
            "size": image.manifest.len(), "platform": {"os": "linux", "architecture": architecture}}));
        digests.push(digest);
    }
    let index = serde_json::json!({"schemaVersion": 2, "mediaType": media_type::INDEX, "manifests": entries});
    let bytes = serde_json::to_vec(&index).unwrap();
    repository.push_manifest(&bytes, media_type::INDEX, Publish::Named).await.unwrap();
    assert_eq!(open(&name, dir.path()).await.unwrap().manifest_digest, digests[1]);
    let s390: Platform = "linux/s390x".parse().unwrap();
    let error = open_image(&reference, &access(), &s390, dir.path()).await.err().unwrap().to_string();
    assert!(error.contains("linux/amd64"), "{error}");
}

/// A registry of one image that keeps the configuration back until the index has been asked for.
fn reluctant(image: TestImage) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let shared = Arc::new((image, Mutex::new(false), Condvar::new()));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || answer(stream.unwrap(), &shared));
        }
    });
    host
}

fn answer(stream: TcpStream, (image, asked, came): &(TestImage, Mutex<bool>, Condvar)) {
    let lines = BufReader::new(&stream).lines().map(|line| line.unwrap()).take_while(|line| !line.is_empty());
    let request: Vec<String> = lines.collect();
    let path = request[0].split(' ').nth(1).unwrap();
    let kind = if path.contains("/manifests/") { media_type::MANIFEST } else { "application/octet-stream" };
    let content = if path.contains("/manifests/") {
        image.manifest.clone()
    } else {
        let digest: Digest = path.rsplit('/').next().unwrap().parse().unwrap();
        if digest == image.index_layer {
            *asked.lock().unwrap() = true;
            came.notify_all();
        } else {
            let patience = Duration::from_secs(10);
            let (asked, _) = came.wait_timeout_while(asked.lock().unwrap(), patience, |asked| !*asked).unwrap();
            assert!(*asked, "the index was not asked for");
        }
        image.blobs[&digest].clone()
    };
    let ranged = request.iter().any(|line| line.to_lowercase().starts_with("range:"));
    let len = content.len();
    let range = format!("Content-Range: bytes 0-{}/{len}\r\n", len - 1);
    let (status, range) = if ranged { ("206 Partial Content", range.as_str()) } else { ("200 OK", "") };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len}\r\n{range}Connection: close\r\n\r\n"
    );
    (&stream).write_all(&[head.as_bytes(), &content].concat()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_configuration_and_the_index_of_a_new_image_are_asked_for_together() {
    let dir = tempfile::tempdir().unwrap();
    let image = TestImage::build(1, 16, 65536, Lies::default());
    let manifest = Digest::of(&image.manifest);
    let reference = format!("{}/app:v1", reluctant(image)).parse().unwrap();
    let access = Access { stall: Duration::from_secs(30), ..access() };
    let opened = open_image(&reference, &access, &"linux/amd64".parse().unwrap(), dir.path()).await.unwrap();
    assert_eq!(opened.manifest_digest, manifest);
}
