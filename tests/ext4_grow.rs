//! File systems that are grown on a larger device: e2fsck finds nothing, the kernel mounts and fills them, what was there stays.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ext4::{Data, Mount, assemble, dir, file, fsck, put};
use firstread::ext4::{BLOCK_SIZE, Growth, Obstacle, Options, Tree, grow, plan, read_names};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A file system with some files, of a size.
struct Grown {
    dir: TempDir,
}

impl Grown {
    fn new(size: Option<u64>, files: u32) -> Self {
        let mut tree = Tree::new(dir());
        let root = tree.root();
        for number in 0..files {
            put(&mut tree, root, format!("file-{number}"), file(u64::from(number % 10) * 1000));
        }
        let plan = plan(&tree, &Options { size, ..Options::default() }).unwrap();
        let grown = Self { dir: TempDir::new().unwrap() };
        assemble(&tree, &plan, &grown.image(), Data::Written);
        grown
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn plan(&self, size: u64) -> Growth {
        let image = File::open(self.image()).unwrap();
        grow(size, &mut |block, buf| {
            image.read_exact_at(buf, u64::from(block) * BLOCK_SIZE as u64).unwrap();
            Ok(())
        })
        .unwrap()
    }

    /// Grows it, after a first try that was interrupted before the superblock was written; the size that it has then.
    fn grow(&self, size: u64) -> u64 {
        let image = File::options().write(true).read(true).open(self.image()).unwrap();
        image.set_len(size).unwrap();
        let put = |block: u32, bytes: &[u8]| image.write_all_at(bytes, u64::from(block) * BLOCK_SIZE as u64).unwrap();
        let Growth::Grows(early) = self.plan(size) else { panic!("it has {size} bytes") };
        early.first.iter().for_each(|(block, bytes)| put(*block, bytes));
        let Growth::Grows(blocks) = self.plan(size) else { panic!("it has {size} bytes") };
        assert_eq!(early.superblock, blocks.superblock);
        assert!(early.first.iter().map(|(at, _)| at).eq(blocks.first.iter().map(|(at, _)| at)));
        blocks.first.iter().for_each(|(block, bytes)| put(*block, bytes));
        put(0, &blocks.superblock[..]);
        assert!(matches!(self.plan(size), Growth::Fits), "it is as large as it can be");
        self.check();
        u64::from(blocks.size) * BLOCK_SIZE as u64
    }

    fn bytes<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        File::open(self.image()).unwrap().read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn check(&self) {
        fsck(&self.image());
        let image = File::open(self.image()).unwrap();
        let read = read_names(image.metadata().unwrap().len(), &mut |block, buf| {
            image.read_exact_at(buf, u64::from(block) * BLOCK_SIZE as u64).unwrap();
            Ok(())
        });
        assert!(read.unwrap().unwrap().by_path().contains_key(&b"/file-3"[..]));
    }

    fn mount(&self) -> Mount {
        Mount::new(&self.image(), &self.dir.path().join("mnt"), "rw,noatime,noinit_itable")
    }

    /// Fills it to the last block with files in many directories, looks at them, and removes half of them.
    fn fill(&self) {
        {
            let mount = self.mount();
            let written = write_until_full(mount.dir());
            for number in (0..written).step_by(2) {
                fs::remove_file(mount.dir().join(format!("dir-{}/{number}", number % 8))).unwrap();
            }
        }
        self.check();
        let mount = self.mount();
        assert_eq!(fs::read(mount.dir().join("dir-1/1")).unwrap(), content(1));
        assert_eq!(fs::metadata(mount.dir().join("file-3")).unwrap().len(), 3000);
    }

    /// The room that `df` shows, free and all, in bytes.
    fn room(&self) -> (u64, u64) {
        let mount = self.mount();
        let found = rustix::fs::statvfs(mount.dir()).unwrap();
        (found.f_bfree * found.f_frsize, found.f_blocks * found.f_frsize)
    }
}

fn content(number: usize) -> Vec<u8> {
    number.to_le_bytes().repeat((4 << 20) / 8)
}

fn write_until_full(top: &Path) -> usize {
    (0..8).for_each(|number| fs::create_dir(top.join(format!("dir-{number}"))).unwrap());
    for number in 0.. {
        let path = top.join(format!("dir-{}/{number}", number % 8));
        if let Err(error) = fs::write(path, content(number)) {
            assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{error}");
            return number;
        }
    }
    unreachable!("it is full at some time");
}

#[test]
fn within_the_last_group_and_into_new_ones() {
    let grown = Grown::new(Some(20 * MIB), 300);
    assert_eq!(grown.grow(60 * MIB), 60 * MIB);
    let (_, before) = grown.room();
    assert_eq!(grown.grow(600 * MIB), 600 * MIB);
    let said = u64::from(u32::from_le_bytes(grown.bytes(1024 + 0xc))) * BLOCK_SIZE as u64;
    let (free, all) = grown.room();
    assert!(all > before + 500 * MIB && free > 560 * MIB, "{free} of {all}, before {before}");
    assert_eq!(said, free, "the kernel counts itself, others believe the superblock");
    grown.fill();
    // What was written stays, and there is room again.
    assert_eq!(grown.grow(700 * MIB), 700 * MIB);
    assert!(grown.room().0 > 100 * MIB);
    grown.check();
}

#[test]
fn to_where_descriptors_are_in_their_groups() {
    let grown = Grown::new(None, 20);
    // 128 groups are 16 GiB.
    for (size, groups) in [(15 * GIB, 120), (40 * GIB, 320), (41 * GIB, 328), (300 * GIB, 2400), (4096 * GIB, 32768)] {
        assert_eq!(grown.grow(size), size);
        let (free, all) = grown.room();
        assert!(all > size - groups * 2 * MIB && free > all - 32 * MIB, "{free} of {all} of {size}");
        let mount = grown.mount();
        fs::write(mount.dir().join(format!("at-{groups}")), content(7)).unwrap();
        drop(mount);
        grown.check();
    }
    // The second block of descriptors, and its copies.
    let [first, second, last] = [128u64, 129, 255].map(|group| grown.bytes::<BLOCK_SIZE>(group * 128 * MIB));
    assert!(first == second && first == last && first != [0; BLOCK_SIZE]);
    let mount = grown.mount();
    for groups in [120, 320, 328, 2400, 32768] {
        assert_eq!(fs::read(mount.dir().join(format!("at-{groups}"))).unwrap(), content(7));
    }
}

#[test]
fn all_of_a_file_system_with_descriptors_in_its_groups_can_be_used() {
    // One group's worth of bitmaps behind the first that describes itself: written from both ends by preallocation.
    let grown = Grown::new(Some(100 * MIB), 10);
    assert_eq!(grown.grow(18 * GIB), 18 * GIB);
    {
        let mount = grown.mount();
        let big = File::create(mount.dir().join("big")).unwrap();
        let (mut at, mut piece) = (0, GIB);
        while piece >= BLOCK_SIZE as u64 {
            match rustix::fs::fallocate(&big, rustix::fs::FallocateFlags::empty(), at, piece) {
                Ok(()) => at += piece,
                Err(rustix::io::Errno::NOSPC) => piece /= 2,
                Err(error) => panic!("{error}"),
            }
        }
        assert!(at > 17 * GIB + 700 * MIB, "{at}");
        // What the kernel keeps for itself (`ext4_calculate_resv_clusters`).
        assert!(rustix::fs::statvfs(mount.dir()).unwrap().f_bfree <= 4096);
    }
    grown.check();
    // And from a full one.
    assert_eq!(grown.grow(20 * GIB), 20 * GIB);
    assert!(grown.room().0 > 1900 * MIB);
    grown.check();
}

#[test]
fn a_last_group_too_small_to_be_of_use_is_left_out() {
    let grown = Grown::new(Some(20 * MIB), 10);
    let group = 128 * MIB;
    assert_eq!(grown.grow(2 * group + 40 * 4096), 2 * group);
    assert!(matches!(grown.plan(2 * group + 41 * 4096), Growth::Fits));
    assert_eq!(grown.grow(2 * group + 8 * MIB), 2 * group + 8 * MIB);
    // Not a whole number of blocks.
    assert_eq!(grown.grow(3 * group + 8 * MIB + 512), 3 * group + 8 * MIB);
}

#[test]
fn what_is_not_clean_or_not_ours_stays_as_it_is() {
    let grown = Grown::new(Some(20 * MIB), 10);
    let image = File::options().write(true).read(true).open(grown.image()).unwrap();
    let reason = |grown: &Grown| match grown.plan(GIB) {
        Growth::Stays(obstacle) => obstacle,
        other => panic!("{other:?}"),
    };
    let mut block = [0; BLOCK_SIZE];
    image.read_exact_at(&mut block, 0).unwrap();
    // The volume's name.
    image.write_all_at(b"x", 1024 + 0x78).unwrap();
    assert_eq!(reason(&grown), Obstacle::Damaged);
    image.write_all_at(&block, 0).unwrap();
    {
        let mount = grown.mount();
        fs::write(mount.dir().join("new"), "new").unwrap();
        rustix::fs::syncfs(File::open(mount.dir()).unwrap()).unwrap();
        assert_eq!(reason(&grown), Obstacle::NotClean, "mounted just now");
    }
    assert!(matches!(grown.plan(GIB), Growth::Grows(_)));
    for device in [30 * MIB, 200 * MIB] {
        let other = grown.dir.path().join("other");
        File::create(&other).unwrap().set_len(device).unwrap();
        let made = std::process::Command::new("mke2fs").args(["-q", "-t", "ext4", "-b", "4096"]).arg(&other).status();
        assert!(made.unwrap().success());
        fs::rename(&other, grown.image()).unwrap();
        assert_eq!(reason(&grown), Obstacle::Foreign);
    }
}
