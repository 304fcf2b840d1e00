//! Oracles for the ext4 writer: images assembled from a plan, `e2fsck`, the kernel, and an independent reader.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ext4_view::Ext4;
use firstread::ext4::{BLOCK_SIZE, Inode, InodeId, Kind, Options, Plan, Time, Tree, Xattr, plan};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::nodes::{self, Compare, Content, ContentDigest, Node, Nodes};

/// An inode with unremarkable attributes.
pub fn inode(kind: Kind) -> Inode {
    let mode = match kind {
        Kind::Directory(_) => 0o755,
        Kind::Symlink(_) => 0o777,
        _ => 0o644,
    };
    Inode {
        mode,
        uid: 0,
        gid: 0,
        mtime: Time { secs: 1_700_000_000, nanos: 123_456_789 },
        xattrs: Box::default(),
        kind,
    }
}

/// An empty directory.
pub fn dir() -> Inode {
    inode(Kind::Directory(Vec::new()))
}

/// A file without holes.
pub fn file(size: u64) -> Inode {
    inode(Kind::file(size))
}

/// Extended attributes.
pub fn xattrs(list: &[(&[u8], &[u8])]) -> Box<[Xattr]> {
    list.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
}

/// Adds an inode under a name in a directory.
pub fn put(tree: &mut Tree, dir: InodeId, name: impl AsRef<[u8]>, inode: Inode) -> InodeId {
    let id = tree.add(inode).unwrap();
    tree.link(dir, name.as_ref(), id).unwrap();
    id
}

/// The content of a file's block: never zeros, never the same twice.
fn block_content(id: InodeId, number: u32) -> [u8; BLOCK_SIZE] {
    let mut block = [0; BLOCK_SIZE];
    let word = u64::from(id.0) << 32 | u64::from(number);
    for (at, bytes) in block.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&(word.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ at as u64 | 1).to_le_bytes());
    }
    block
}

/// Calls `each` with every block of data that a file has: its number and its bytes up to the end of the file.
fn each_block(id: InodeId, inode: &Inode, mut each: impl FnMut(u32, &[u8])) {
    let Kind::File { size, segments } = &inode.kind else { return };
    for segment in segments {
        for number in segment.file_block..segment.file_block + segment.blocks {
            let length = (size - u64::from(number) * BLOCK_SIZE as u64).min(BLOCK_SIZE as u64) as usize;
            each(number, &block_content(id, number)[..length]);
        }
    }
}

/// Whether an image has the files' data. Without it, content is not compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Data {
    Written,
    LeftOut,
}

/// Writes a sparse image; the result is the digest of the metadata stream.
pub fn assemble(tree: &Tree, plan: &Plan, path: &Path, data: Data) -> [u8; 32] {
    let image = File::create(path).unwrap();
    image.set_len(plan.device_bytes()).unwrap();
    let mut digest = Sha256::new();
    let mut end = 0;
    plan.write_metadata(tree, &mut |block, bytes| {
        assert!(block >= end, "block {block} comes after block {end}");
        assert!(!bytes.is_empty() && bytes.len() % BLOCK_SIZE == 0);
        end = block + (bytes.len() / BLOCK_SIZE) as u64;
        assert!(end <= u64::from(plan.metadata_blocks()));
        digest.update(block.to_le_bytes());
        digest.update(bytes);
        image.write_all_at(bytes, block * BLOCK_SIZE as u64).unwrap();
        Ok(())
    })
    .unwrap();
    for id in (0..tree.len() as u32).map(InodeId).filter(|_| data == Data::Written) {
        let Some(start) = plan.data_start(id) else { continue };
        let mut at = u64::from(start) * BLOCK_SIZE as u64;
        each_block(id, tree.get(id).unwrap(), |_, bytes| {
            image.write_all_at(bytes, at).unwrap();
            at += BLOCK_SIZE as u64;
        });
    }
    digest.finalize().into()
}

/// What a mounted image of the tree should show.
pub fn expected(tree: &Tree, data: Data) -> Nodes {
    let mut nodes = Nodes::new();
    let mut paths: HashMap<InodeId, Vec<Vec<u8>>> = HashMap::new();
    let mut subdirs: HashMap<InodeId, u64> = HashMap::new();
    let mut stack = vec![(Vec::new(), tree.root())];
    while let Some((path, id)) = stack.pop() {
        paths.entry(id).or_default().push(path.clone());
        if let Kind::Directory(entries) = &tree.get(id).unwrap().kind {
            for (name, child) in entries {
                let below = if path.is_empty() { name.to_vec() } else { [&path[..], b"/", name].concat() };
                if matches!(tree.get(*child).unwrap().kind, Kind::Directory(_)) {
                    *subdirs.entry(id).or_default() += 1;
                }
                stack.push((below, *child));
            }
        }
    }
    for (id, paths) in &paths {
        let inode = tree.get(*id).unwrap();
        let links = match &inode.kind {
            Kind::Directory(_) => match 2 + subdirs.get(id).copied().unwrap_or(0) {
                links if links > 65_000 => 1,
                links => links,
            },
            _ => paths.len() as u64,
        };
        let node = expected_node(*id, inode, links, paths.iter().min().unwrap(), data);
        for path in paths {
            nodes.insert(path.clone(), node.clone());
        }
    }
    nodes
}

fn expected_node(id: InodeId, inode: &Inode, links: u64, first_path: &[u8], data: Data) -> Node {
    let none = (0, Vec::new(), (0, 0));
    let (kind, (size, target, device)) = match &inode.kind {
        Kind::Directory(_) => (0o040_000, none),
        Kind::File { size, .. } => (0o100_000, (*size, Vec::new(), (0, 0))),
        Kind::Symlink(target) => (0o120_000, (target.len() as u64, target.to_vec(), (0, 0))),
        Kind::CharDevice { major, minor } => (0o020_000, (0, Vec::new(), (*major, *minor))),
        Kind::BlockDevice { major, minor } => (0o060_000, (0, Vec::new(), (*major, *minor))),
        Kind::Fifo => (0o010_000, none),
        Kind::Socket => (0o140_000, none),
    };
    let mut content = Content::default();
    if matches!(inode.kind, Kind::File { .. }) && data == Data::Written {
        let mut digest = ContentDigest::default();
        each_block(id, inode, |number, bytes| digest.block(number.into(), bytes));
        content = digest.finish();
    }
    let Time { secs, nanos } = inode.mtime;
    let mtime = match secs {
        ..-2_147_483_648 => (-2_147_483_648, 0),
        15_032_385_536.. => (15_032_385_535, 0),
        _ => (secs, nanos),
    };
    Node {
        mode: kind | u32::from(inode.mode),
        uid: inode.uid,
        gid: inode.gid,
        links,
        size,
        device,
        mtime,
        first_path: first_path.to_vec(),
        target,
        xattrs: inode.xattrs.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect(),
        content,
    }
}

/// Fails unless `e2fsck` finds nothing at all.
pub fn fsck(image: &Path) {
    let output = Command::new("e2fsck").arg("-fn").arg(image).output().expect("e2fsck");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "e2fsck: {}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr));
}

/// A mounted image, unmounted when dropped.
#[derive(Debug)]
pub struct Mount {
    dir: PathBuf,
}

impl Mount {
    pub fn new(image: &Path, dir: &Path, options: &str) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        let mut mount = Command::new("mount");
        let output = mount_output(mount.args(["-t", "ext4", "-o", &format!("loop,{options}")]).arg(image).arg(dir));
        assert!(output.is_ok(), "mount (as root?): {output:?}");
        Self { dir: dir.to_path_buf() }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

fn mount_output(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if mount_output(Command::new("umount").arg(&self.dir)).is_err() {
            let _ = mount_output(Command::new("umount").arg("-l").arg(&self.dir));
        }
    }
}

/// An image that has passed every check that does not write to it.
pub struct Checked {
    pub plan: Plan,
    pub image: PathBuf,
    pub directory: TempDir,
    pub expected: Nodes,
}

/// Plans, assembles and checks with `e2fsck`, the kernel, the independent reader, and a second build.
pub fn check(tree: &Tree, options: &Options) -> Checked {
    check_data(tree, options, Data::Written)
}

/// The same, with or without file data.
pub fn check_data(tree: &Tree, options: &Options, data: Data) -> Checked {
    let checked = check_by_kernel(tree, options, data);
    independent_reader(&checked, data);
    checked
}

/// The same without the independent reader.
pub fn check_by_kernel(tree: &Tree, options: &Options, data: Data) -> Checked {
    let checked = build(tree, options, data);
    fsck(&checked.image);
    let found = {
        let mount = Mount::new(&checked.image, &checked.directory.path().join("mount"), "ro,noload");
        match data {
            Data::Written => nodes::read(mount.dir()),
            Data::LeftOut => nodes::read_without_content(mount.dir()),
        }
    };
    nodes::assert_same(&checked.expected, &found, Compare::Everything);
    checked
}

/// Plans and assembles twice.
pub fn build(tree: &Tree, options: &Options, data: Data) -> Checked {
    let directory = TempDir::new().unwrap();
    let image = directory.path().join("image");
    let first = plan(tree, options).unwrap();
    let digest = assemble(tree, &first, &image, data);
    let mut second = Sha256::new();
    let again = plan(tree, options).unwrap();
    again
        .write_metadata(tree, &mut |block, bytes| {
            second.update(block.to_le_bytes());
            second.update(bytes);
            Ok(())
        })
        .unwrap();
    assert_eq!(digest, <[u8; 32]>::from(second.finalize()), "two builds differ");
    Checked { plan: first, image, directory, expected: expected(tree, data) }
}

struct ImageReader(File);

impl ext4_view::Ext4Read for ImageReader {
    fn read(&mut self, start: u64, to: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(self.0.read_exact_at(to, start)?)
    }
}

fn independent_reader(checked: &Checked, data: Data) {
    let view = Ext4::load(Box::new(ImageReader(File::open(&checked.image).unwrap()))).expect("ext4-view");
    let mut found = BTreeMap::new();
    let mut stack = vec![Vec::new()];
    while let Some(path) = stack.pop() {
        let full = [b"/", &path[..]].concat();
        let stat = view.symlink_metadata(&full[..]).expect("ext4-view: metadata");
        if stat.is_dir() {
            for entry in view.read_dir(&full[..]).expect("ext4-view: read_dir") {
                let entry = entry.expect("ext4-view: entry");
                let name = entry.file_name();
                if !matches!(name.as_ref(), b"." | b"..") {
                    stack.push(if path.is_empty() {
                        name.as_ref().to_vec()
                    } else {
                        [&path[..], b"/", name.as_ref()].concat()
                    });
                }
            }
        }
        found.insert(path, stat);
    }
    assert_eq!(found.len(), checked.expected.len(), "ext4-view sees another number of nodes");
    for (path, node) in &checked.expected {
        let name = path.escape_ascii().to_string();
        let full = [b"/", &path[..]].concat();
        let stat = found.get(path).unwrap_or_else(|| panic!("ext4-view misses {name}"));
        assert_eq!(u32::from(stat.mode()), node.mode & 0o7777, "ext4-view: mode of {name}");
        assert_eq!((stat.uid(), stat.gid()), (node.uid, node.gid), "ext4-view: owner of {name}");
        match node.mode & 0o170_000 {
            0o120_000 => {
                let target = view.read_link(&full[..]).expect("ext4-view: read_link");
                assert_eq!(target.as_ref() as &[u8], &node.target[..], "ext4-view: target of {name}");
            }
            0o100_000 => {
                assert_eq!(stat.len(), node.size, "ext4-view: size of {name}");
                // It reads files whole.
                if data == Data::Written && node.size <= 4 << 20 {
                    let bytes = view.read(&full[..]).expect("ext4-view: read");
                    let mut digest = ContentDigest::default();
                    for (number, block) in bytes.chunks(BLOCK_SIZE).enumerate() {
                        digest.block(number as u64, block);
                    }
                    assert!(digest.finish() == node.content, "ext4-view: content of {name}");
                }
            }
            _ => {}
        }
    }
}
