//! Journals of file systems that were made without: what `tune2fs` makes, safe at every write, replayed as the kernel does it, and
//! taken out again.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;
#[path = "common/random.rs"]
mod random;
#[path = "common/shutdown.rs"]
mod shutdown;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ext4::{Data, Mount, assemble, dir, file, fsck, put};
use firstread::ext4::{
    Addition, BLOCK_SIZE, Growth, NewJournal, Obstacle, Options, Settled, Tree, add_journal, grow, plan, read_names,
    settle,
};
use random::Random;
use rustix::fs::{FallocateFlags, fallocate};
use shutdown::{Log, shutdown, unmount};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const BLOCK: u64 = BLOCK_SIZE as u64;
/// Of the superblock, from the start of the device.
const FEATURES: u64 = 1024 + 0x5c;
const LAST_ORPHAN: u64 = 1024 + 0xe8;

/// A file system with some files, and what is done to it.
struct Bed {
    dir: TempDir,
}

impl Bed {
    fn new(size: u64) -> Self {
        let mut tree = Tree::new(dir());
        let root = tree.root();
        for number in 0..300 {
            put(&mut tree, root, format!("file-{number}"), file(number % 10 * 1000));
        }
        let plan = plan(&tree, &Options { size: Some(size), ..Options::default() }).unwrap();
        let bed = Self { dir: TempDir::new().unwrap() };
        assemble(&tree, &plan, &bed.image(), Data::Written);
        bed
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn copy(&self, name: &str) -> PathBuf {
        let to = self.dir.path().join(name);
        copy(&self.image(), &to);
        to
    }

    fn add(&self) -> NewJournal {
        let Addition::Adds(journal) = planned(&self.image()) else { panic!("it has none") };
        write(&self.image(), &steps(&journal));
        assert!(matches!(planned(&self.image()), Addition::There));
        fsck(&self.image());
        journal
    }

    fn mount(&self) -> Mount {
        mounted(&self.image())
    }
}

fn mounted(image: &Path) -> Mount {
    Mount::new(image, &image.with_extension("mnt"), "rw,noatime")
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("--sparse=always").args([from, to]).status().unwrap().success());
}

fn reader(image: &Path) -> impl FnMut(u32, &mut [u8]) -> firstread::Result<()> {
    let image = File::open(image).unwrap();
    move |block, buf: &mut [u8]| {
        image.read_exact_at(buf, u64::from(block) * BLOCK).unwrap();
        Ok(())
    }
}

fn planned(image: &Path) -> Addition {
    add_journal(&mut reader(image)).unwrap()
}

fn settled(image: &Path) -> firstread::Result<Settled> {
    settle(fs::metadata(image).unwrap().len(), &mut reader(image))
}

/// All writes of a journal in their order.
fn steps(journal: &NewJournal) -> Vec<(u32, Vec<u8>)> {
    let all = journal.first.iter().chain(&journal.then).map(|(at, block)| (*at, block.to_vec()));
    all.chain([(0, journal.superblock.to_vec())]).collect()
}

fn write(image: &Path, blocks: &[(u32, Vec<u8>)]) {
    let image = File::options().write(true).open(image).unwrap();
    blocks.iter().for_each(|(at, bytes)| image.write_all_at(bytes, u64::from(*at) * BLOCK).unwrap());
}

/// Writes down what is read otherwise.
fn written_down(image: &Path, settled: &Settled) {
    let mut blocks = Vec::new();
    for at in settled.blocks() {
        let mut block = vec![0; BLOCK_SIZE];
        settled.read(at, &mut block, &mut reader(image)).unwrap();
        blocks.push((at, block));
    }
    write(image, &blocks);
}

fn bytes<const N: usize>(image: &Path, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    File::open(image).unwrap().read_exact_at(&mut bytes, at).unwrap();
    bytes
}

fn word(image: &Path, at: u64) -> u32 {
    u32::from_le_bytes(bytes(image, at))
}

fn dumped(image: &Path) -> String {
    let output = Command::new("dumpe2fs").arg("-h").arg(image).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn field<'a>(dump: &'a str, name: &str) -> &'a str {
    let line = dump.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {dump}"));
    line[name.len()..].trim()
}

#[test]
fn one_is_what_tune2fs_makes_but_for_its_place() {
    let bed = Bed::new(300 * MIB);
    let other = bed.copy("other");
    let made = Command::new("tune2fs").arg("-j").arg(&other).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    let journal = bed.add();
    assert_eq!(journal.bytes(), 16 * MIB);
    let table = |image: &Path| u64::from(word(image, BLOCK + 8)) * BLOCK;
    let (ours, theirs) = (bed.image(), other);
    let start = |image: &Path| word(image, table(image) + 7 * 256 + 0x28 + 12 + 8);
    assert_eq!(start(&ours), journal.place[0].start);
    let log: [[u8; BLOCK_SIZE]; 2] =
        [&ours, &theirs].map(|image: &PathBuf| bytes(image, u64::from(start(image)) * BLOCK));
    assert!(log[0] == log[1], "the journal's superblock");
    let inode = |image: &Path| {
        let mut inode: [u8; 256] = bytes(image, table(image) + 7 * 256);
        // Its place, its times, its checksum.
        for place in [0x28 + 12 + 8..0x28 + 12 + 12, 0x08..0x14, 0x90..0x98, 0x7c..0x7e, 0x82..0x84] {
            inode[place].fill(0);
        }
        inode
    };
    assert_eq!(inode(&ours), inode(&theirs));
    let superblock = |image: &Path| {
        let mut superblock: [u8; 1024] = bytes(image, 1024);
        // The same, and how much was written.
        for place in [0x10c + 12 + 8..0x10c + 12 + 12, 0x30..0x34, 0x274..0x275, 0x178..0x180, 0x3fc..0x400] {
            superblock[place].fill(0);
        }
        superblock
    };
    assert_eq!(superblock(&ours), superblock(&theirs));
}

#[test]
fn the_kernel_uses_it_and_it_has_a_size_that_suits() {
    for (size, expected) in [(6 * MIB, 0), (40 * MIB, 4), (300 * MIB, 16), (3 * GIB, 64), (18 * GIB, 64)] {
        let bed = Bed::new(size);
        if expected == 0 {
            assert!(matches!(planned(&bed.image()), Addition::NoRoom), "{size}");
            continue;
        }
        let journal = bed.add();
        assert_eq!(journal.bytes(), expected * MIB, "{size}");
        assert_eq!(journal.place.len(), 1);
        let before = dumped(&bed.image());
        assert_eq!(field(&before, "Journal inode:"), "8");
        let mount = bed.mount();
        fs::write(mount.dir().join("new"), vec![7; 9 << 20]).unwrap();
        fs::remove_file(mount.dir().join("file-1")).unwrap();
        unmount(mount);
        fsck(&bed.image());
        let after = dumped(&bed.image());
        assert!(field(&after, "Journal features:").contains("journal_checksum_v3"), "{after}");
        assert_ne!(field(&after, "Journal sequence:"), field(&before, "Journal sequence:"), "it was used");
        let mount = bed.mount();
        assert_eq!(fs::read(mount.dir().join("new")).unwrap(), vec![7; 9 << 20]);
    }
}

#[test]
fn where_free_space_is_in_pieces_it_is_in_pieces_or_smaller_or_not_there() {
    let bed = Bed::new(300 * MIB);
    {
        let mount = bed.mount();
        let big = File::create(mount.dir().join("big")).unwrap();
        let (mut end, mut piece) = (0, 64 * MIB);
        while piece >= BLOCK {
            match fallocate(&big, FallocateFlags::empty(), end, piece) {
                Ok(()) => end += piece,
                Err(_) => piece /= 2,
            }
        }
        for at in (0..end).step_by(16 << 20) {
            fallocate(&big, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, 2 * MIB).unwrap();
        }
        drop(big);
        unmount(mount);
    }
    fsck(&bed.image());
    let journal = bed.add();
    assert!(journal.place.len() > 1 && journal.bytes() < 16 * MIB, "{:?}", journal.place);
    let names = |mount: &Mount| fs::read_dir(mount.dir()).unwrap().count();
    let mount = bed.mount();
    fs::write(mount.dir().join("new"), vec![7; 1 << 20]).unwrap();
    let found = names(&mount);
    unmount(mount);
    fsck(&bed.image());
    written_down(&bed.image(), &settled(&bed.image()).unwrap());
    fsck(&bed.image());
    let mount = bed.mount();
    assert_eq!(names(&mount), found);
    let full = (0..).map(|number| fs::write(mount.dir().join(format!("full-{number}")), vec![1; 1 << 20]));
    full.take_while(Result::is_ok).count();
    unmount(mount);
    fsck(&bed.image());
    assert!(matches!(planned(&bed.image()), Addition::NoRoom));
}

#[test]
fn an_interrupted_try_is_finished_by_the_next_and_seen_by_nobody_else() {
    // The last one has descriptors in its groups, in several copies.
    for size in [20 * MIB, 300 * MIB, 20 * GIB] {
        let bed = Bed::new(size.min(300 * MIB));
        if size > 300 * MIB {
            File::options().write(true).open(bed.image()).unwrap().set_len(size).unwrap();
            let Growth::Grows(blocks) = grow(size, &mut reader(&bed.image())).unwrap() else { panic!("it grows") };
            let all = blocks.first.iter().map(|(at, bytes)| (*at, bytes.to_vec()));
            write(&bed.image(), &all.chain([(0, blocks.superblock.to_vec())]).collect::<Vec<_>>());
            fsck(&bed.image());
        }
        let before = bed.copy("before");
        let Addition::Adds(journal) = planned(&before) else { panic!("it has none") };
        let all = steps(&journal);
        let (early, late) = (journal.first.len(), journal.first.len() + journal.then.len());
        // The writes between two flushes may come in any order: all of the earlier ones, and some of these.
        let mut tries: Vec<Vec<usize>> = vec![vec![0], vec![1], (0..early).collect()];
        for mask in 1..1 << (late - early) {
            tries.push((0..early).chain((early..late).filter(|step| mask >> (step - early) & 1 == 1)).collect());
        }
        for done in tries {
            copy(&before, &bed.image());
            write(&bed.image(), &done.iter().map(|step| all[*step].clone()).collect::<Vec<_>>());
            let half = bed.copy("half");
            // What is published of it has nothing of the try.
            written_down(&half, &settled(&half).unwrap());
            fsck(&half);
            let again = bed.add();
            let repeats = journal.first == again.first && journal.then == again.then;
            // Without the inode another place would do as well.
            assert!(repeats && journal.superblock == again.superblock, "{size} {done:?}");
        }
    }
}

#[test]
fn taken_out_again_it_leaves_nothing() {
    let bed = Bed::new(3 * GIB);
    let before = bed.copy("before");
    bed.add();
    written_down(&bed.image(), &settled(&bed.image()).unwrap());
    fsck(&bed.image());
    let superblock = |image: &Path| bytes::<1024>(image, 1024);
    assert_eq!(superblock(&bed.image()), superblock(&before));
    assert_eq!(bytes::<BLOCK_SIZE>(&bed.image(), BLOCK)[..32], bytes::<BLOCK_SIZE>(&before, BLOCK)[..32]);
    let names = |image: &Path| read_names(3 * GIB, &mut reader(image)).unwrap().unwrap();
    assert_eq!(names(&bed.image()).by_path(), names(&before).by_path());
    assert_eq!(settled(&bed.image()).unwrap().blocks().count(), 0);
    assert!(matches!(planned(&bed.image()), Addition::Adds(_)));
}

/// Work that keeps the journal busy: files made, appended to, synced and removed, directories that come and go.
fn work(top: &Path, seed: u64) {
    let mut random = Random(seed);
    for round in 0..400u64 {
        let dir = top.join(format!("dir-{}", random.below(12)));
        if random.one_in(6) && dir.exists() {
            fs::remove_dir_all(&dir).unwrap();
            continue;
        }
        fs::create_dir_all(&dir).unwrap();
        let name = dir.join(format!("{}-with-a-name-of-some-length", random.below(400)));
        let len = random.below(30_000) as usize;
        fs::write(&name, random.bytes(len)).unwrap();
        // Targets of this length have a block, which is journalled; some begin like the journal's own blocks.
        let start = if random.one_in(3) { 0xc03b_3998_u32.to_be_bytes() } else { *b"just" };
        let target = [&start[..], &[b'x'; 200]].concat();
        std::os::unix::fs::symlink(OsStr::from_bytes(&target), dir.join(format!("link-{round}"))).unwrap();
        if random.one_in(3) {
            File::open(&name).unwrap().sync_all().unwrap();
        }
    }
}

/// The blocks of a journal that say what they are: their place, their kind, their transaction.
fn log(image: &Path, journal: &NewJournal) -> Vec<(u64, u32, u32)> {
    let mut found = Vec::new();
    for at in journal.place.iter().cloned().flatten().map(|block| u64::from(block) * BLOCK) {
        let [magic, kind, sequence] = [0, 4, 8].map(|place| u32::from_be_bytes(bytes(image, at + place)));
        if magic == 0xc03b_3998 {
            found.push((at, kind, sequence));
        }
    }
    found
}

/// Of the last commit block the first sector only has reached the disk.
fn tear_last_commit(image: &Path, journal: &NewJournal) {
    let commits = log(image, journal).into_iter().filter(|(_, kind, _)| *kind == 2);
    let (at, ..) = commits.max_by_key(|(_, _, sequence)| *sequence).unwrap();
    File::options().write(true).open(image).unwrap().write_all_at(&[0xaa; BLOCK_SIZE - 512], at + 512).unwrap();
}

#[test]
fn a_replay_is_what_the_kernel_makes_of_it() {
    let mut replayed = 0;
    for seed in 0..6 {
        let bed = Bed::new(if seed % 2 == 0 { 40 * MIB } else { 300 * MIB });
        let journal = bed.add();
        let mount = bed.mount();
        work(mount.dir(), seed);
        shutdown(mount.dir(), if seed < 3 { Log::Flushed } else { Log::Dropped });
        unmount(mount);
        assert!(word(&bed.image(), FEATURES + 4) & 4 != 0, "there is something to be replayed");
        if seed % 3 == 1 {
            tear_last_commit(&bed.image(), &journal);
        }
        assert!(matches!(planned(&bed.image()), Addition::There));
        assert!(matches!(grow(400 * MIB, &mut reader(&bed.image())).unwrap(), Growth::Stays(Obstacle::NotClean)));
        let ours = bed.copy("ours");
        let settled = settled(&ours).unwrap();
        replayed += settled.blocks().count();
        written_down(&ours, &settled);
        assert_eq!(word(&ours, FEATURES) & 4, 0, "it has no journal");
        let checked = ours.with_extension("checked");
        copy(&ours, &checked);
        if word(&ours, LAST_ORPHAN) != 0 {
            // What was being deleted is finished by who mounts it for writing, or by e2fsck, which needs no answers for that.
            let status = Command::new("e2fsck").arg("-fp").arg(&checked).output().unwrap().status;
            assert!(status.code().is_some_and(|code| code <= 1), "{status}");
        }
        fsck(&checked);
        let kernels = bed.mount();
        let expected = nodes::read(kernels.dir());
        unmount(kernels);
        let mount = Mount::new(&ours, &bed.dir.path().join("ours.mnt"), "ro,noload");
        nodes::assert_same(&expected, &nodes::read(mount.dir()), nodes::Compare::Everything);
        drop(mount);
        fsck(&bed.image());
    }
    assert!(replayed > 300, "{replayed} blocks");
}

#[test]
fn what_a_removed_directory_had_is_not_brought_back_over_what_has_its_blocks_now() {
    let bed = Bed::new(20 * MIB);
    let journal = bed.add();
    let mount = bed.mount();
    let synced = || rustix::fs::syncfs(File::open(mount.dir()).unwrap()).unwrap();
    // Its blocks are in the journal, and when it goes they are revoked there.
    let old = mount.dir().join("old");
    fs::create_dir(&old).unwrap();
    (0..400).for_each(|number| drop(File::create(old.join(format!("{number:0200}"))).unwrap()));
    synced();
    fs::remove_dir_all(&old).unwrap();
    synced();
    // Data take all blocks that are free; they are not in the journal.
    let full = File::create(mount.dir().join("full")).unwrap();
    let mut end = 0;
    while full.write_all_at(&[7; BLOCK_SIZE], end).is_ok() {
        end += BLOCK;
    }
    full.sync_all().unwrap();
    drop(full);
    shutdown(mount.dir(), Log::Flushed);
    unmount(mount);
    assert!(log(&bed.image(), &journal).iter().any(|(_, kind, _)| *kind == 5), "a block of the journal revokes");

    written_down(&bed.image(), &settled(&bed.image()).unwrap());
    fsck(&bed.image());
    let mount = Mount::new(&bed.image(), &bed.dir.path().join("mnt"), "ro,noload");
    let found = fs::read(mount.dir().join("full")).unwrap();
    assert_eq!(found.len() as u64, end);
    let other: Vec<_> =
        found.chunks(BLOCK_SIZE).enumerate().filter(|(_, block)| block.iter().any(|byte| *byte != 7)).collect();
    assert!(other.is_empty(), "{} blocks are not what was written", other.len());
}

#[test]
fn what_is_damaged_or_hostile_is_an_error_and_no_more() {
    let bed = Bed::new(40 * MIB);
    let journal = bed.add();
    let mount = bed.mount();
    work(mount.dir(), 7);
    shutdown(mount.dir(), Log::Flushed);
    unmount(mount);
    let place = journal.place[0].clone();
    let table = word(&bed.image(), BLOCK + 8);
    // The inode, the journal's superblock, its first blocks, the descriptors.
    let targets = [table, place.start, place.start + 1, place.start + 2, place.start + 3, 1];
    let mut random = Random(11);
    let (mut refused, mut taken) = (0, 0);
    let whole = fs::read(bed.image()).unwrap();
    for round in 0..3000 {
        let at = u64::from(targets[round % targets.len()]) * BLOCK;
        let mut harmed: Vec<(u64, u8)> = Vec::new();
        for _ in 0..1 + random.below(3) {
            let within = match round % targets.len() {
                0 => 7 * 256 + random.below(256),
                1 => random.below(0x100),
                5 => random.below(32),
                _ if round % 2 == 0 => random.below(64),
                _ => random.below(BLOCK),
            };
            harmed.push((at + within, random.next() as u8));
        }
        let mut read = |block: u32, buf: &mut [u8]| {
            let from = u64::from(block) * BLOCK;
            let range = from..from + buf.len() as u64;
            buf.copy_from_slice(&whole[range.start as usize..range.end as usize]);
            for (place, value) in harmed.iter().filter(|(place, _)| range.contains(place)) {
                buf[(place - from) as usize] = *value;
            }
            Ok(())
        };
        match settle(40 * MIB, &mut read) {
            Ok(settled) => {
                taken += 1;
                let mut block = [0; BLOCK_SIZE];
                settled.blocks().for_each(|at| settled.read(at, &mut block, &mut read).unwrap());
            }
            Err(firstread::Error::Invalid { .. }) => refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(refused > 1000 && taken > 100, "{refused} refused, {taken} taken");
}

#[test]
fn a_file_system_that_is_not_ours_or_not_clean_is_left_alone() {
    let bed = Bed::new(40 * MIB);
    let mount = bed.mount();
    fs::write(mount.dir().join("new"), "new").unwrap();
    rustix::fs::syncfs(File::open(mount.dir()).unwrap()).unwrap();
    assert!(matches!(planned(&bed.image()), Addition::Stays(Obstacle::NotClean)));
    assert_eq!(settled(&bed.image()).unwrap().blocks().count(), 0);
    unmount(mount);
    let whole = bed.copy("whole");
    // The bitmap of its only group.
    let bitmap = u64::from(word(&bed.image(), BLOCK)) * BLOCK;
    File::options().write(true).open(bed.image()).unwrap().write_all_at(&[0x55; 8], bitmap + 64).unwrap();
    assert!(add_journal(&mut reader(&bed.image())).unwrap_err().to_string().contains("wrong checksum"));
    // One with a journal that can't be taken out is published with it.
    copy(&whole, &bed.image());
    bed.add();
    File::options().write(true).open(bed.image()).unwrap().write_all_at(&[0x55; 8], bitmap + 64).unwrap();
    let left = settled(&bed.image()).unwrap();
    assert!(left.kept().unwrap().contains("wrong checksum") && left.blocks().count() == 0);
    File::create(bed.image()).unwrap().set_len(40 * MIB).unwrap();
    assert!(matches!(planned(&bed.image()), Addition::Stays(Obstacle::Foreign)));
    let made = Command::new("mke2fs").args(["-q", "-t", "ext4", "-b", "4096"]).arg(bed.image()).status();
    assert!(made.unwrap().success());
    assert!(matches!(planned(&bed.image()), Addition::Stays(Obstacle::Foreign)));
    assert_eq!(settled(&bed.image()).unwrap().blocks().count(), 0);
}
