//! OCI layouts: written, read, and understood by skopeo.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/packs.rs"]
mod packs;
#[path = "common/registry.rs"]
mod registry;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use firstread::chunk::Digest;
use firstread::index::{Blob, Role};
use firstread::oci::{Reference, media_type};
use firstread::source::{Access, Content, Publish, Purpose, Repository, Source};
use firstread::{Error, Result};
use futures_util::TryStreamExt;
use packs::{Lies, TestImage};

async fn open(dir: &Path, tag: Option<&str>, purpose: Purpose) -> Result<Repository> {
    let reference = Reference::Layout { dir: dir.to_owned(), tag: tag.map(str::to_owned) };
    Repository::open(&reference, &Access::default(), purpose).await
}

async fn read(repository: &Repository, blob: &Blob, offset: u64, len: u64) -> Result<Vec<u8>> {
    let pieces: Vec<_> = repository.read_at(blob, offset, len).await?.try_collect().await?;
    Ok(pieces.concat())
}

#[tokio::test]
async fn an_image_is_pushed_and_found_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    let (one, two) = (TestImage::build(1, 4, 8192, Lies::default()), TestImage::build(2, 4, 8192, Lies::default()));
    let pushed = one.push(&open(&layout, Some("one"), Purpose::Push).await.unwrap()).await;
    assert_eq!(open(&layout, None, Purpose::Read).await.unwrap().manifest().await.unwrap().digest, pushed);
    two.push(&open(&layout, Some("two"), Purpose::Push).await.unwrap()).await;

    let found = open(&layout, Some("one"), Purpose::Read).await.unwrap();
    let manifest = found.manifest().await.unwrap();
    assert_eq!(
        (manifest.digest, manifest.bytes, manifest.media_type.as_str()),
        (pushed, one.manifest.clone(), media_type::MANIFEST)
    );
    let bytes = &one.blobs[&one.pack];
    let blob = Blob { digest: one.pack, bytes: bytes.len() as u64, role: Role::Pack };
    for (offset, len) in [(0, blob.bytes), (100, 1000), (blob.bytes, 0)] {
        let expected = &bytes[offset as usize..(offset + len) as usize];
        assert_eq!(read(&found, &blob, offset, len).await.unwrap(), expected);
    }
    assert!(matches!(read(&found, &blob, blob.bytes, 1).await, Err(Error::Invalid { .. })));
    assert!(found.exists(&two.pack).await.unwrap());

    // A name is moved, not listed twice.
    two.push(&open(&layout, Some("one"), Purpose::Push).await.unwrap()).await;
    assert_eq!(found.manifest().await.unwrap().bytes, two.manifest);
    let error = open(&layout, None, Purpose::Read).await.unwrap().manifest().await.unwrap_err().to_string();
    assert!(error.contains("one") && error.contains("two"), "{error}");
    let error = open(&layout, Some("three"), Purpose::Read).await.unwrap().manifest().await.unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
}

#[tokio::test]
async fn damage_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    let image = TestImage::build(1, 4, 8192, Lies::default());
    let repository = open(&layout, None, Purpose::Push).await.unwrap();
    let manifest = image.push(&repository).await;
    let path = |digest: &Digest| layout.join("blobs/sha256").join(digest.hex());
    let blob = Blob { digest: image.pack, bytes: image.blobs[&image.pack].len() as u64, role: Role::Pack };

    std::fs::write(path(&manifest), b"{}").unwrap();
    assert!(matches!(repository.manifest().await, Err(Error::Invalid { .. })));
    std::fs::write(path(&image.pack), b"short").unwrap();
    assert!(matches!(read(&repository, &blob, 0, 3).await, Err(Error::Refused { .. })));
    std::fs::remove_file(path(&image.pack)).unwrap();
    assert!(matches!(read(&repository, &blob, 0, 3).await, Err(Error::NotFound { .. })));
    let wrong = repository.push_blob(&image.pack, 3, &Content::Bytes(b"abc".to_vec().into())).await;
    assert!(matches!(wrong, Err(Error::Invalid { .. })));
    let left: Vec<_> =
        std::fs::read_dir(layout.join("blobs/sha256")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{left:?}");
    std::fs::write(layout.join("index.json"), b"[]").unwrap();
    assert!(matches!(repository.manifest().await, Err(Error::Invalid { .. })));
}

#[tokio::test]
async fn a_draft_is_named_and_not_copied() {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    let repository = open(&layout, None, Purpose::Push).await.unwrap();
    let path = |digest: &Digest| layout.join("blobs/sha256").join(digest.hex());
    let digest = Digest::of(b"written");
    for number in 0..2 {
        let draft = Arc::new(repository.draft(dir.path()).unwrap());
        draft.write_all_at(b"written", 0).unwrap();
        let content = Content::Draft(draft.clone());
        let short = repository.push_blob(&Digest::of(b"other"), 6, &content).await;
        assert!(matches!(short, Err(Error::Invalid { .. })));
        repository.push_blob(&digest, 7, &content).await.unwrap();
        // The second one finds the blob there.
        let (draft, blob) = (draft.metadata().unwrap(), std::fs::metadata(path(&digest)).unwrap());
        assert_eq!(draft.ino() == blob.ino(), number == 0);
        let other = std::fs::metadata(layout.join("oci-layout")).unwrap();
        assert_eq!(blob.mode(), other.mode(), "who can read the layout can read the blob");
    }
    assert_eq!(std::fs::read(path(&digest)).unwrap(), b"written");

    // A file that can't be named is copied.
    let elsewhere = Arc::new(tempfile::tempfile_in("/dev/shm").unwrap());
    elsewhere.write_all_at(b"elsewhere", 0).unwrap();
    let lie = repository.push_blob(&Digest::of(b"a lie"), 9, &Content::Draft(elsewhere.clone())).await;
    assert!(matches!(lie, Err(Error::Invalid { .. })));
    let digest = Digest::of(b"elsewhere");
    repository.push_blob(&digest, 9, &Content::Draft(elsewhere)).await.unwrap();
    assert_eq!(std::fs::read(path(&digest)).unwrap(), b"elsewhere");
    assert_eq!(std::fs::read_dir(layout.join("blobs/sha256")).unwrap().count(), 2);
}

#[tokio::test]
async fn what_is_no_layout_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(open(dir.path(), None, Purpose::Read).await, Err(Error::NotFound { .. })));
    std::fs::write(dir.path().join("something"), b"precious").unwrap();
    assert!(matches!(open(dir.path(), None, Purpose::Push).await, Err(Error::Invalid { .. })));
    std::fs::write(dir.path().join("oci-layout"), br#"{"imageLayoutVersion":"2.0.0"}"#).unwrap();
    assert!(matches!(open(dir.path(), None, Purpose::Read).await, Err(Error::Unsupported(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_at_the_same_time_lose_no_image() {
    let dir = tempfile::tempdir().unwrap();
    let mut writers = tokio::task::JoinSet::new();
    open(dir.path(), None, Purpose::Push).await.unwrap();
    for number in 0..8 {
        let layout = dir.path().to_owned();
        writers.spawn(async move {
            let image = TestImage::build(number, 2, 4096, Lies::default());
            image.push(&open(&layout, Some(&format!("t{number}")), Purpose::Push).await.unwrap()).await;
        });
    }
    while let Some(writer) = writers.join_next().await {
        writer.unwrap();
    }
    for number in 0..8 {
        let repository = open(dir.path(), Some(&format!("t{number}")), Purpose::Read).await.unwrap();
        assert!(repository.manifest().await.is_ok());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn skopeo_copies_a_layout_to_a_registry_and_back_unchanged() {
    let (registry, dir) = (registry::Registry::start(), tempfile::tempdir().unwrap());
    let image = TestImage::build(1, 16, 65536, Lies::default());
    let layout = dir.path().join("layout");
    let digest = image.push(&open(&layout, Some("t"), Purpose::Push).await.unwrap()).await;
    let there = format!("docker://{}/app:t", registry.host());
    let back = dir.path().join("back");
    for (from, to) in
        [(format!("oci:{}:t", layout.display()), there.clone()), (there, format!("oci:{}:t", back.display()))]
    {
        let flags = ["--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false"];
        let output = Command::new("skopeo").args(flags).args([&from, &to]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let copied = open(&back, Some("t"), Purpose::Read).await.unwrap().manifest().await.unwrap();
    assert_eq!((copied.digest, copied.bytes), (digest, image.manifest));
}

#[tokio::test]
async fn unnamed_images_are_an_image_index_for_platforms() {
    let dir = tempfile::tempdir().unwrap();
    let repository = open(dir.path(), None, Purpose::Push).await.unwrap();
    let image = TestImage::build(1, 2, 4096, Lies::default());
    let digest = image.push(&repository).await;
    let listed = repository.push_manifest(&image.manifest, media_type::MANIFEST, Publish::Listed).await.unwrap();
    assert_eq!(listed, digest);
    let entry = |arch: &str| {
        serde_json::json!({"mediaType": media_type::MANIFEST, "digest": digest.to_string(),
        "size": image.manifest.len(), "platform": {"os": "linux", "architecture": arch}})
    };
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [entry("amd64"), entry("arm64")]});
    std::fs::write(dir.path().join("index.json"), index.to_string()).unwrap();
    let document = repository.manifest().await.unwrap();
    assert_eq!(document.media_type, media_type::INDEX);
    assert_eq!(repository.manifest_by_digest(&digest).await.unwrap().bytes, image.manifest);
}
