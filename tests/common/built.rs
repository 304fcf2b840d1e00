//! Building images in tests, and reading them back without the library: from the layout on disk, by FORMAT.md.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use firstread::Result;
use firstread::build::{Progress, Report, Request, Silent, build};
use serde_json::Value;

use crate::ext4::{Mount, fsck};
use crate::nodes::{self, Nodes};

/// Builds with the defaults.
pub fn try_build(source: &str, destination: &str) -> Result<Report> {
    run(&request(source, destination))
}

pub fn request(source: &str, destination: &str) -> Request {
    Request::new(source.parse().unwrap(), destination.parse().unwrap())
}

pub fn run(request: &Request) -> Result<Report> {
    let progress: Arc<dyn Progress> = Arc::new(Silent);
    build(request, &progress)
}

/// Runs a program, which must succeed, and returns what it printed.
pub fn tool<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Vec<u8> {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Runs a shell script in `dir`.
pub fn shell(dir: &Path, script: &str) {
    let output = Command::new("bash").args(["-euc", script]).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A layout on disk.
pub struct Layout(pub PathBuf);

impl Layout {
    pub fn blob_path(&self, digest: &str) -> PathBuf {
        self.0.join("blobs/sha256").join(digest.strip_prefix("sha256:").unwrap())
    }

    pub fn json(&self, digest: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.blob_path(digest)).unwrap()).unwrap()
    }

    /// Digest of what `tag` names.
    pub fn top(&self, tag: &str) -> String {
        let index: Value = serde_json::from_slice(&std::fs::read(self.0.join("index.json")).unwrap()).unwrap();
        let found = index["manifests"]
            .as_array()
            .unwrap()
            .iter()
            .find(|entry| entry["annotations"]["org.opencontainers.image.ref.name"] == tag);
        found.unwrap_or_else(|| panic!("{tag} in {index}"))["digest"].as_str().unwrap().to_owned()
    }

    /// The plain bytes of the index of the image whose manifest has `digest`.
    pub fn index(&self, digest: &str) -> Vec<u8> {
        let manifest = self.json(digest);
        let layer = manifest["layers"].as_array().unwrap().last().unwrap().clone();
        assert_eq!(layer["annotations"]["containerd.io/snapshot/firstread/role"], "index");
        let tar = zstd::decode_all(File::open(self.blob_path(layer["digest"].as_str().unwrap())).unwrap()).unwrap();
        let mut archive = tar::Archive::new(&tar[..]);
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            if *entry.path_bytes() == b".firstread/index"[..] {
                let mut index = Vec::new();
                entry.read_to_end(&mut index).unwrap();
                return index;
            }
        }
        panic!("no index in the last layer");
    }

    /// Writes the device of the image to `path`.
    pub fn device(&self, digest: &str, path: &Path) {
        let index = self.index(digest);
        let u32_at = |at: usize| u32::from_le_bytes(index[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_le_bytes(index[at..at + 8].try_into().unwrap());
        assert_eq!(&index[..8], b"FRSTRDIX");
        let mut sections = BTreeMap::new();
        for number in 0..u32_at(28) as usize {
            let at = 64 + number * 64;
            sections.insert(u32_at(at), (u64_at(at + 8) as usize, u64_at(at + 16) as usize));
        }
        let (blobs, _) = sections[&1];
        let (chunks, chunk_bytes) = sections[&2];
        let (extents, extent_bytes) = sections[&3];
        let blob = |number: usize| {
            let digest: String = index[blobs + number * 48..][..32].iter().map(|byte| format!("{byte:02x}")).collect();
            File::open(self.0.join("blobs/sha256").join(digest)).unwrap()
        };
        let device = File::create(path).unwrap();
        device.set_len(u64_at(16)).unwrap();
        let mut uses = vec![0; chunk_bytes / 64];
        for at in (extents..extents + extent_bytes).step_by(16) {
            let (block, blocks, chunk, offset) = (u32_at(at), u32_at(at + 4), u32_at(at + 8), u32_at(at + 12));
            uses[chunk as usize] += 1;
            let record = chunks + chunk as usize * 64;
            let mut stored = vec![0; u32_at(record + 44) as usize];
            blob(u32_at(record + 40) as usize).read_exact_at(&mut stored, u64_at(record + 32)).unwrap();
            let plain = zstd::decode_all(&stored[..]).unwrap();
            assert_eq!(plain.len(), u32_at(record + 48) as usize);
            use sha2::Digest;
            assert_eq!(&sha2::Sha256::digest(&plain)[..], &index[record..record + 32]);
            let end = (offset as usize + blocks as usize * 4096).min(plain.len());
            device.write_all_at(&plain[offset as usize..end], u64::from(block) * 4096).unwrap();
        }
        // A start-up pack's chunks have extents of their own.
        let is_startup = |chunk: usize| index[blobs + u32_at(chunks + chunk * 64 + 40) as usize * 48 + 40] == 1;
        let unused = (0..uses.len()).find(|chunk| uses[*chunk] == 0 && !is_startup(*chunk));
        assert_eq!(unused, None, "a chunk is listed and not used");
    }

    /// Assembles, checks and mounts the image, and reads the tree in it.
    pub fn tree(&self, digest: &str, work: &Path) -> Nodes {
        let image = work.join("device.img");
        self.device(digest, &image);
        fsck(&image);
        let mount = Mount::new(&image, &work.join("mounted"), "ro");
        nodes::read(mount.dir())
    }
}
