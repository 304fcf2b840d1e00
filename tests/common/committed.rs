//! Uppers that are written without a device, and commits of them: in the library alone.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use firstread::Result;
use firstread::build::{CommitRequest, Progress, Report, Silent, commit};
use firstread::device::upper::{Durability, LowerIdentity, Upper, UpperOptions};
use firstread::index::Index;

use crate::built::Layout;

pub const BLOCK: usize = 4096;
const BOOT: &str = "this";

/// An image in a layout, and the bytes of its device.
pub struct Generation {
    pub layout: PathBuf,
    pub tag: String,
    pub digest: String,
    pub bytes: Vec<u8>,
}

impl Generation {
    /// The image `tag` of the layout, read by the test's own reader.
    pub fn open(layout: &Path, tag: &str, work: &Path) -> Self {
        let (reader, disk) = (Layout(layout.to_owned()), work.join("generation.img"));
        let digest = reader.top(tag);
        reader.device(&digest, &disk);
        let bytes = fs::read(&disk).unwrap();
        fs::remove_file(&disk).unwrap();
        Self { layout: layout.to_owned(), tag: tag.to_owned(), digest, bytes }
    }

    pub fn index(&self) -> Index {
        Index::from_bytes(Layout(self.layout.clone()).index(&self.digest)).unwrap()
    }

    /// An upper over it in `dir` with these blocks; `None` is a block that was discarded.
    pub fn write(&self, dir: &Path, blocks: &[(u64, Option<Vec<u8>>)]) {
        let _ = fs::remove_dir_all(dir);
        let index = self.index();
        let lower = LowerIdentity {
            contents: index.device_digest(),
            device_bytes: index.device_bytes(),
            image: format!("oci:{}:{}", self.layout.display(), self.tag),
            manifest: self.digest.parse().unwrap(),
        };
        let options = UpperOptions { size: None, durability: Durability::Kept, boot: BOOT.to_owned() };
        let upper = Upper::open(dir, &lower, &options).unwrap();
        for (block, bytes) in blocks {
            let claim = upper.claims().try_take(*block..block + 1).unwrap();
            match bytes {
                Some(bytes) => upper.write(block * BLOCK as u64, bytes).unwrap(),
                None => upper.zero(&(*block..block + 1), firstread::device::Zeroing::Discard).unwrap(),
            }
            upper.add(&claim, &(*block..block + 1)).unwrap();
        }
        upper.close().unwrap();
    }

    /// What its device has under such an upper.
    pub fn with(&self, blocks: &[(u64, Option<Vec<u8>>)]) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for (block, content) in blocks {
            let place = &mut bytes[*block as usize * BLOCK..][..BLOCK];
            match content {
                Some(content) => place.copy_from_slice(content),
                None => place.fill(0),
            }
        }
        bytes
    }

    /// Commits such an upper as `tag` of the same layout.
    pub fn commit(&self, dir: &Path, tag: &str) -> Result<Report> {
        self.commit_with(dir, tag, &[])
    }

    /// Commits such an upper, with changes of the config.
    pub fn commit_with(&self, dir: &Path, tag: &str, changes: &[&str]) -> Result<Report> {
        let destination = format!("oci:{}:{tag}", self.layout.display()).parse().unwrap();
        let changes = changes.iter().map(|change| change.parse().unwrap()).collect();
        let request =
            CommitRequest { boot: BOOT.to_owned(), changes, ..CommitRequest::new(dir.to_owned(), destination) };
        let progress: Arc<dyn Progress> = Arc::new(Silent);
        commit(&request, &progress)
    }
}

/// Writes the blocks in which `after` differs from `before`.
pub fn difference(before: &[u8], after: &[u8]) -> Vec<(u64, Option<Vec<u8>>)> {
    let pairs = before.chunks(BLOCK).zip(after.chunks(BLOCK));
    let changed = pairs.enumerate().filter(|(_, (before, after))| before != after);
    changed.map(|(block, (_, after))| (block as u64, Some(after.to_vec()))).collect()
}
