//! How much a directory takes.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// What a snapshot takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes on disk.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// What `dir` and all below it on its file system takes; a file with several names counts once. What vanishes meanwhile
/// does not count.
///
/// # Errors
/// What the system says.
pub fn of(dir: &Path) -> io::Result<Usage> {
    let mut usage = Usage::default();
    let mut linked = HashSet::new();
    let device = fs::symlink_metadata(dir)?.dev();
    let mut left = vec![dir.to_owned()];
    while let Some(path) = left.pop() {
        let metadata = match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        if metadata.dev() != device || (metadata.nlink() > 1 && !metadata.is_dir() && !linked.insert(metadata.ino())) {
            continue;
        }
        usage.inodes += 1;
        usage.bytes += metadata.blocks() * 512;
        if metadata.is_dir() {
            match fs::read_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                entries => left.extend(entries?.flatten().map(|entry| entry.path())),
            }
        }
    }
    Ok(usage)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_file_with_two_names_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), vec![1; 8192]).unwrap();
        let one = of(dir.path()).unwrap();
        assert_eq!(one.inodes, 2);
        assert!(one.bytes >= 8192);
        fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        assert_eq!(of(dir.path()).unwrap(), one);
    }
}
