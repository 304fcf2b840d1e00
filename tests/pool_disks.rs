//! The pool on ext4, xfs and btrfs, each on a loop device: bound, full, read-only, rotten.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/events.rs"]
mod events;
#[path = "common/pooled.rs"]
mod pooled;
#[path = "common/random.rs"]
mod random;

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use events::events;
use firstread::chunk::Verified;
use firstread::pool::{Admission, Amount, Examined, Pool, PoolOptions, Scrubbed};
use pooled::{chunks, hits, kept, options};
use random::Random;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const FILE_SYSTEMS: [&str; 3] = ["ext4", "xfs", "btrfs"];

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A file system in a file, on a loop device, unmounted when dropped.
struct Disk {
    dir: TempDir,
}

impl Disk {
    fn new(kind: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = Self { dir };
        // The least that mkfs.xfs makes; sparse.
        File::create(disk.image()).unwrap().set_len(320 * MIB).unwrap();
        let image = disk.image();
        let image = image.to_str().unwrap();
        match kind {
            "ext4" => run("mkfs.ext4", &["-q", "-F", "-m", "0", image]),
            kind => run(&format!("mkfs.{kind}"), &["-q", "-f", image]),
        }
        fs::create_dir(disk.path()).unwrap();
        disk.mount("loop");
        disk
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    fn pool(&self) -> PathBuf {
        self.path().join("pool")
    }

    fn mount(&self, options: &str) {
        run("mount", &["-o", options, self.image().to_str().unwrap(), self.path().to_str().unwrap()]);
    }

    fn remount(&self, options: &str) {
        run("mount", &["-o", &format!("remount,{options}"), self.path().to_str().unwrap()]);
    }

    fn used(&self) -> u64 {
        run("sync", &["-f", self.path().to_str().unwrap()]);
        let found = rustix::fs::statvfs(self.path()).unwrap();
        (found.f_blocks - found.f_bfree) * found.f_frsize
    }

    /// Fills it with files of 1 MiB until nothing goes; returns how many.
    fn fill(&self) -> usize {
        let dir = self.path().join("somebody's");
        fs::create_dir(&dir).unwrap();
        for number in 0.. {
            let written = File::create(dir.join(format!("{number:04}"))).and_then(|mut file| {
                file.write_all(&Random(number).bytes(MIB as usize))?;
                file.sync_all()
            });
            match written {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => return number as usize,
                Err(error) => panic!("{error}"),
            }
        }
        unreachable!()
    }

    fn free(&self, files: impl IntoIterator<Item = usize>) {
        for number in files {
            fs::remove_file(self.path().join(format!("somebody's/{number:04}"))).unwrap();
        }
        run("sync", &["-f", self.path().to_str().unwrap()]);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l", self.path().to_str().unwrap()]).status();
    }
}

fn open(dir: &Path, options: &PoolOptions) -> Pool {
    events::collect_events();
    Pool::open(dir, options).unwrap()
}

#[test]
fn evicted_chunks_leave_their_blocks_to_others() {
    for kind in FILE_SYSTEMS {
        let disk = Disk::new(kind);
        let before = disk.used();
        let limit = 24 * MIB;
        let options = PoolOptions { limit: Some(Amount::Bytes(limit)), ..options() };
        let all = chunks(1, 800, 100_000);
        let pool = open(&disk.pool(), &options);
        assert_eq!(kept(&pool, &all), all.len());
        let stat = pool.stat();
        assert!(stat.evicted > 500 && stat.bytes > limit * 8 / 10, "{kind}: {stat:?}");
        drop(pool);
        let taken = disk.used() - before;
        assert!(taken < limit + 4 * MIB, "{kind}: {taken} bytes");
        for journal in ["there", "lost"] {
            if journal == "lost" {
                fs::remove_file(disk.pool().join("journal")).unwrap();
            }
            let pool = open(&disk.pool(), &options);
            assert_eq!(hits(&pool, &all) as u64, stat.chunks, "{kind}: journal {journal}");
            assert_eq!(pool.stat().quarantined, 0);
        }
    }
}

#[test]
fn on_a_nearly_full_disk_reads_go_on_uncached_until_there_is_room() {
    for kind in FILE_SYSTEMS {
        let disk = Disk::new(kind);
        let pool = open(&disk.pool(), &options());
        let all = chunks(2, 60, 250_000);
        assert_eq!(kept(&pool, &all[..4]), 4);
        let files = disk.fill();
        disk.free(0..6);
        let mut fit = 0;
        let full = events(|| {
            fit = kept(&pool, &all[4..40]);
            assert_eq!(pool.admit(&all[39]), Admission::NotKept);
            assert_eq!(hits(&pool, &all), 4 + fit, "{kind}: all that was kept is read, the rest is a miss");
        });
        assert!(fit < 30, "{kind}: {fit} of 36 fit in 6 MiB");
        assert_eq!(full.len(), 1, "{kind}: {full:?}");
        assert!(full[0].contains("No space left") && full[0].contains("uncached"), "{full:?}");
        disk.free(6..files);
        let room = events(|| assert_eq!(kept(&pool, &all[40..]), 20, "{kind}"));
        assert_eq!(room.len(), 1, "{kind}: {room:?}");
        assert!(room[0].contains("takes chunks again"), "{room:?}");
        drop(pool);
        let pool = open(&disk.pool(), &options());
        assert_eq!((hits(&pool, &all), pool.stat().quarantined), (24 + fit, 0), "{kind}");
    }
}

#[test]
fn a_read_only_disk_is_read_and_used_again_when_it_can_be_written() {
    for kind in FILE_SYSTEMS {
        let disk = Disk::new(kind);
        let all = chunks(3, 40, 250_000);
        assert_eq!(kept(&open(&disk.pool(), &options()), &all[..10]), 10);
        disk.remount("ro");
        let pool = open(&disk.pool(), &options());
        let read_only = events(|| {
            assert_eq!((hits(&pool, &all), kept(&pool, &all[10..20])), (10, 0), "{kind}");
            assert_eq!(hits(&pool, &all), 10);
        });
        assert_eq!(read_only.len(), 1, "{kind}: {read_only:?}");
        let second = Pool::open(&disk.pool(), &options()).unwrap_err().to_string();
        assert!(second.contains(&format!("process {}", std::process::id())), "{second}");
        disk.remount("rw");
        let writable = events(|| assert_eq!(kept(&pool, &all[10..]), 30, "{kind}"));
        assert_eq!(writable.len(), 1, "{kind}: {writable:?}");
        assert!(writable[0].contains("takes chunks again"), "{writable:?}");
        assert_eq!(hits(&pool, &all), 40);
        drop(pool);
        let pool = open(&disk.pool(), &options());
        assert_eq!((hits(&pool, &all), pool.stat().quarantined), (40, 0), "{kind}: the records were written as well");
    }
}

#[test]
fn a_file_system_that_gives_up_is_read_as_long_as_it_can_be() {
    let disk = Disk::new("ext4");
    let all = chunks(4, 40, 250_000);
    let pool = open(&disk.pool(), &options());
    assert_eq!(kept(&pool, &all[..10]), 10);
    pool.sync().unwrap();
    // As after an I/O error with errors=remount-ro, with files open for writing.
    disk.remount("abort");
    let events = events(|| {
        assert_eq!(kept(&pool, &all[10..]), 0);
        assert_eq!(hits(&pool, &all), 10);
    });
    assert_eq!(events.len(), 1, "{events:?}");
    assert!(events[0].contains("uncached"), "{events:?}");
}

/// Flips a bit of `chunk` on the disk, beneath the file system and what it has cached.
fn rot(disk: &Disk, chunk: &Verified) {
    let image = File::options().read(true).write(true).open(disk.image()).unwrap();
    let (mut at, mut found) = (0, 0);
    let mut piece = vec![0; 4 << 20];
    while at < 320 * MIB {
        image.read_exact_at(&mut piece, at).unwrap();
        // ext4 has blocks of 1 KiB on disks as small as this.
        for (number, block) in piece.chunks(1024).enumerate() {
            if block == &chunk.bytes()[..1024] {
                let byte = at + number as u64 * 1024 + 100;
                image.write_all_at(&[chunk.bytes()[100] ^ 1], byte).unwrap();
                found += 1;
            }
        }
        at += piece.len() as u64;
    }
    assert_eq!(found, 1, "the chunk is on the disk");
    image.sync_all().unwrap();
}

#[test]
fn a_scrub_reads_the_disk_and_not_what_is_cached_of_it() {
    for kind in FILE_SYSTEMS {
        let disk = Disk::new(kind);
        let all = chunks(5, 20, 200_000);
        let pool = open(&disk.pool(), &options());
        assert_eq!(kept(&pool, &all), 20);
        pool.sync().unwrap();
        run("sync", &["-f", disk.path().to_str().unwrap()]);
        let sound = Scrubbed { chunks: 20, bytes: 20 * 200_000, ..Scrubbed::default() };
        assert_eq!(pool.scrub(|_| true), sound, "{kind}");
        rot(&disk, &all[7]);
        assert_eq!(hits(&pool, &all), 20, "{kind}: memory has it still");
        let found = pool.scrub(|_| true);
        // btrfs has checksums of its own: what rotted is EIO there.
        let expected = if kind == "btrfs" { (0, 1) } else { (1, 0) };
        assert_eq!((found.damaged, found.unreadable, found.chunks), (expected.0, expected.1, 19), "{kind}");
        let stat = pool.stat();
        assert_eq!(
            (stat.quarantined, stat.unreadable, pool.take_lost()),
            (expected.0, expected.1, vec![*all[7].digest()])
        );
        assert_eq!((hits(&pool, &all), pool.admit(&all[7])), (19, Admission::Kept));
        assert_eq!((hits(&pool, &all), pool.scrub(|_| true)), (20, sound), "{kind}: mended");

        rot(&disk, &all[8]);
        let examined = pool.examine_whole(all[8].digest());
        assert!(matches!(examined, Examined::Damaged | Examined::Unreadable), "{kind}: {examined:?}");
        assert!(matches!(pool.examine_whole(all[8].digest()), Examined::Gone));
    }
}

#[test]
fn what_the_disk_does_not_give_back_is_a_miss_with_one_event() {
    // btrfs answers EIO for what does not have its checksum.
    let disk = Disk::new("btrfs");
    let all = chunks(6, 20, 80_000);
    let pool = open(&disk.pool(), &options());
    assert_eq!(kept(&pool, &all), 20);
    drop(pool);
    run("umount", &[disk.path().to_str().unwrap()]);
    rot(&disk, &all[3]);
    rot(&disk, &all[4]);
    disk.mount("loop");
    let pool = open(&disk.pool(), &options());
    let events = events(|| assert_eq!(hits(&pool, &all), 18));
    assert_eq!(events.len(), 1, "{events:?}");
    assert!(events[0].contains("can't be read") && events[0].contains("Input/output error"), "{events:?}");
    assert_eq!((pool.stat().unreadable, pool.stat().quarantined), (2, 0));
    assert_eq!((kept(&pool, &all[3..5]), hits(&pool, &all)), (2, 20));
}
