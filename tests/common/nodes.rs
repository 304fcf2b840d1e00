//! Directory trees compared node by node: everything that `lstat`, `readlink`, `getxattr` and `read` show.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;
use sha2::{Digest, Sha256};

const BLOCK: u64 = 4096;

/// Everything about one path.
#[derive(Clone, PartialEq, Eq)]
pub struct Node {
    /// Type and permissions (`st_mode`).
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub links: u64,
    /// 0 for what is neither a file nor a symbolic link.
    pub size: u64,
    pub device: (u32, u32),
    pub mtime: (i64, u32),
    /// The first of all paths, in byte order, that name the same inode.
    pub first_path: Vec<u8>,
    pub target: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Of a file's content: holes and zeros are the same.
    pub content: Content,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mode {:o} uid {} gid {} links {} size {}", self.mode, self.uid, self.gid, self.links, self.size)?;
        write!(f, " device {:?} mtime {:?} first {}", self.device, self.mtime, self.first_path.escape_ascii())?;
        write!(f, " target {} content {:02x?} xattrs", self.target.escape_ascii(), &self.content.0[..4])?;
        for (name, value) in &self.xattrs {
            write!(f, " {}={}", name.escape_ascii(), value.escape_ascii())?;
        }
        Ok(())
    }
}

/// A digest of the blocks that are not all zeros.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Content([u8; 32]);

/// Makes a [`Content`].
#[derive(Default)]
pub struct ContentDigest(Sha256);

impl ContentDigest {
    /// The next block, in ascending order; the last one may be short.
    pub fn block(&mut self, number: u64, bytes: &[u8]) {
        if bytes.iter().any(|byte| *byte != 0) {
            self.0.update(number.to_le_bytes());
            self.0.update(bytes);
        }
    }

    pub fn finish(self) -> Content {
        Content(self.0.finalize().into())
    }
}

/// By path below the top, which is empty for the top itself.
pub type Nodes = BTreeMap<Vec<u8>, Node>;

/// Reads a directory tree.
pub fn read(top: &Path) -> Nodes {
    read_nodes(top, content)
}

/// Reads a directory tree, but no file's content.
pub fn read_without_content(top: &Path) -> Nodes {
    read_nodes(top, |_| Content::default())
}

fn read_nodes(top: &Path, content: impl Fn(&Path) -> Content) -> Nodes {
    let mut nodes = Nodes::new();
    let mut inodes: HashMap<(u64, u64), Vec<Vec<u8>>> = HashMap::new();
    let mut stack = vec![Vec::new()];
    while let Some(path) = stack.pop() {
        let full = join(top, &path);
        let stat = fs::symlink_metadata(&full).unwrap_or_else(|error| panic!("{}: {error}", full.display()));
        let kind = stat.file_type();
        if kind.is_dir() {
            for entry in fs::read_dir(&full).unwrap_or_else(|error| panic!("{}: {error}", full.display())) {
                let name = entry.expect("read_dir").file_name().into_vec();
                stack.push(if path.is_empty() { name } else { [&path[..], b"/", &name].concat() });
            }
        }
        inodes.entry((stat.dev(), stat.ino())).or_default().push(path.clone());
        let target =
            if kind.is_symlink() { fs::read_link(&full).unwrap().into_os_string().into_vec() } else { Vec::new() };
        let node = Node {
            mode: stat.mode(),
            uid: stat.uid(),
            gid: stat.gid(),
            links: stat.nlink(),
            size: if kind.is_file() || kind.is_symlink() { stat.size() } else { 0 },
            device: (rustix::fs::major(stat.rdev()), rustix::fs::minor(stat.rdev())),
            mtime: (stat.mtime(), u32::try_from(stat.mtime_nsec()).unwrap()),
            first_path: Vec::new(),
            target,
            xattrs: xattrs(&full),
            content: if kind.is_file() { content(&full) } else { Content::default() },
        };
        assert!(nodes.insert(path.clone(), node).is_none(), "{} is listed twice", path.escape_ascii());
    }
    for paths in inodes.values() {
        let first = paths.iter().min().unwrap();
        for path in paths {
            nodes.get_mut(path).unwrap().first_path.clone_from(first);
        }
    }
    nodes
}

fn join(top: &Path, path: &[u8]) -> PathBuf {
    if path.is_empty() { top.to_path_buf() } else { top.join(OsStr::from_bytes(path)) }
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65536];
    let length =
        rustix::fs::llistxattr(path, &mut names[..]).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    names.truncate(length);
    let names = names.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0; 65536];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..])
            .unwrap_or_else(|error| panic!("{}: {}: {error}", path.display(), name.escape_ascii()));
        value.truncate(length);
        value
    };
    names.map(|name| (name.to_vec(), value(name))).collect()
}

fn content(path: &Path) -> Content {
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let size = file.metadata().unwrap().len();
    let mut digest = ContentDigest::default();
    let mut at = 0;
    while at < size {
        // Blocks are read whole even where the file system tells data in other units.
        let Ok(start) = rustix::fs::seek(&file, SeekFrom::Data(at)) else { break };
        let end = rustix::fs::seek(&file, SeekFrom::Hole(start)).unwrap().next_multiple_of(BLOCK).min(size);
        at = (start / BLOCK * BLOCK).max(at);
        let mut buffer = vec![0; 256 << 10];
        while at < end {
            let length = (end - at).min(buffer.len() as u64) as usize;
            read_exact(&file, &mut buffer[..length], at)
                .unwrap_or_else(|error| panic!("{} at {at}: {error}", path.display()));
            for (number, block) in (at / BLOCK..).zip(buffer[..length].chunks(BLOCK as usize)) {
                digest.block(number, block);
            }
            at += length as u64;
        }
    }
    digest.finish()
}

fn read_exact(file: &File, buffer: &mut [u8], at: u64) -> io::Result<()> {
    file.read_exact_at(buffer, at)
}

/// What is compared; a field not named is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    Everything,
    /// All but the links of directories, which some file systems do not count, and the top itself.
    AcrossFileSystems,
}

/// Fails with a list of the differences.
pub fn assert_same(expected: &Nodes, found: &Nodes, compare: Compare) {
    let mut differences = Vec::new();
    for path in expected.keys().chain(found.keys().filter(|path| !expected.contains_key(*path))) {
        let name = path.escape_ascii();
        match (expected.get(path), found.get(path)) {
            (Some(expected), Some(found)) => {
                let mut expected = expected.clone();
                if compare == Compare::AcrossFileSystems {
                    if path.is_empty() {
                        continue;
                    }
                    if expected.mode & 0o170_000 == 0o040_000 {
                        expected.links = found.links;
                    }
                }
                if expected != *found {
                    differences.push(format!("/{name}\n  expected {expected:?}\n  found    {found:?}"));
                }
            }
            (Some(_), None) => differences.push(format!("/{name} is missing")),
            (None, _) => differences.push(format!("/{name} should not be there")),
        }
    }
    let count = differences.len();
    differences.truncate(10);
    assert!(count == 0, "{count} of {} nodes differ:\n{}", expected.len(), differences.join("\n"));
}
