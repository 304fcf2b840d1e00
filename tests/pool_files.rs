//! The pool on real files: restarts, damage, other versions, other owners, disks that are full or read-only.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/crash.rs"]
mod crash;
#[path = "common/events.rs"]
mod events;
#[path = "common/pooled.rs"]
mod pooled;
#[path = "common/random.rs"]
mod random;

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Barrier};

use crash::CrashDisk;
use events::{collect_events, events};
use firstread::Error;
use firstread::chunk::Verified;
use firstread::pool::{Admission, Lookup, Pool, Run, Ticket};
use pooled::{chunk, chunks, hits, kept, options};
use random::Random;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use tempfile::TempDir;

fn open(dir: &Path) -> Pool {
    collect_events();
    Pool::open(dir, &options()).unwrap()
}

/// A directory with a closed pool that has `chunks`.
fn filled(chunks: &[Verified]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let pool = open(dir.path());
    for chunk in chunks {
        assert_eq!(pool.admit(chunk), Admission::Kept);
    }
    dir
}

fn slabs(dir: &Path) -> Vec<PathBuf> {
    let mut slabs: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    slabs.retain(|path| path.file_name().unwrap().to_str().unwrap().starts_with("slab-"));
    slabs.sort();
    slabs
}

/// Where the bytes of `chunk` are on disk.
fn find(dir: &Path, chunk: &Verified) -> (PathBuf, u64) {
    for slab in slabs(dir) {
        let bytes = fs::read(&slab).unwrap();
        if let Some(page) = bytes.chunks(4096).position(|page| page == &chunk.bytes()[..page.len()]) {
            return (slab, page as u64 * 4096);
        }
    }
    panic!("no slab has the chunk");
}

/// A tmpfs, unmounted when dropped.
struct Tmpfs(TempDir);

impl Tmpfs {
    fn new(size: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = std::ffi::CString::new(format!("size={size}")).unwrap();
        mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), data.as_c_str()).expect("tests run as root");
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn a_restart_keeps_everything() {
    let mut all = chunks(40, 40, 100_000);
    all.extend(chunks(300, 300, 9));
    let dir = filled(&all);
    assert!(slabs(dir.path()).len() > 2);
    let pool = open(dir.path());
    assert_eq!(hits(&pool, &all), all.len());
    assert_eq!(hits(&pool, &all), all.len());
    let stat = pool.stat();
    assert_eq!((stat.chunks, stat.hits, stat.misses, stat.quarantined), (340, 680, 0, 0));
    assert_eq!(stat.bytes, 40 * 102_400 + 300 * 4096);
    assert!(all.iter().all(|chunk| pool.admit(chunk) == Admission::Present && pool.contains(chunk.digest())));
    let whole = pool.read_whole(all[3].digest()).unwrap();
    assert_eq!(whole.bytes(), all[3].bytes());
    assert_eq!(pool.read(all[3].digest(), 99_999, &mut [0; 2]), Lookup::Miss, "a range outside the chunk");
    assert_eq!(pool.read(all[3].digest(), u32::MAX, &mut [0; 2]), Lookup::Miss);
}

#[test]
fn a_flipped_byte_is_found_on_the_first_reread_and_mended() {
    let all = chunks(10, 10, 100_000);
    let dir = filled(&all);
    let (slab, offset) = find(dir.path(), &all[4]);
    let slab = OpenOptions::new().write(true).open(slab).unwrap();
    slab.write_all_at(&[all[4].bytes()[77_777] ^ 1], offset + 77_777).unwrap();
    let pool = open(dir.path());
    // Another part of the chunk than the one with the flipped byte.
    assert_eq!(pool.read(all[4].digest(), 0, &mut [0; 10]), Lookup::Miss);
    assert_eq!((pool.stat().quarantined, pool.contains(all[4].digest())), (1, false));
    assert_eq!(hits(&pool, &all), 9);
    assert_eq!(pool.admit(&all[4]), Admission::Kept);
    assert_eq!(hits(&pool, &all), 10);
    drop(pool);
    let pool = open(dir.path());
    assert_eq!((hits(&pool, &all), pool.stat().quarantined), (10, 0), "the corrupt place is forgotten");
}

#[test]
fn one_of_many_readers_checks_a_chunk() {
    let all = chunks(1, 1, 1 << 20);
    let disk = CrashDisk::new();
    let open = || Pool::open_on(disk.dir(), "under test", &options()).unwrap();
    open().admit(&all[0]);
    let pool = open();
    let before = disk.bytes_read();
    let barrier = Barrier::new(16);
    let reader = || {
        barrier.wait();
        hits(&pool, &all)
    };
    let hits: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(reader)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    let (whole, part) = (1 << 20, (1 << 20) - (1 << 20) / 5);
    assert_eq!((hits, disk.bytes_read() - before), (16, whole + 15 * part));
}

#[test]
fn a_chunk_that_goes_while_it_is_read_is_a_miss() {
    let all = chunks(12, 12, 100_000);
    for path in ["by ticket", "by digest", "not checked yet"] {
        let disk = CrashDisk::new();
        let open = || Arc::new(Pool::open_on(disk.dir(), "under test", &options()).unwrap());
        let mut pool = open();
        assert_eq!(kept(&pool, &all), 12);
        if path == "not checked yet" {
            drop(pool);
            pool = open();
        }
        let (ticket, mut buf) = (Ticket::default(), vec![0; 5000]);
        if path == "by ticket" {
            assert_eq!(pool.read_noting(all[2].digest(), 7, &mut buf, &ticket), Lookup::Hit);
        }
        // The last slab stays, so that its file can still be read, and has holes.
        let evicting = Arc::clone(&pool);
        disk.before_read(move || assert!(evicting.trim(Some(0)) > 0));
        let chunk = all.last().unwrap();
        if path == "by ticket" {
            assert!(pool.contains(all[2].digest()) && !pool.read_known(&ticket, 7, &mut buf));
            assert!(!pool.contains(all[2].digest()), "it was evicted");
        } else {
            assert!(pool.contains(chunk.digest()));
            assert_eq!(pool.read(chunk.digest(), 7, &mut buf), Lookup::Miss, "{path}");
        }
        assert_eq!((pool.stat().chunks, pool.stat().quarantined), (0, 0), "{path}");
    }
}

#[test]
fn neighbours_in_a_slab_are_read_at_once_or_not_at_all() {
    let (disk, mut random) = (CrashDisk::new(), Random(23));
    let all: Vec<_> = (0..5).map(|_| chunk(&mut random, 12288)).collect();
    let pool = Arc::new(Pool::open_on(disk.dir(), "under test", &options()).unwrap());
    assert_eq!(kept(&pool, &all), 5);
    let tickets: Vec<_> = all
        .iter()
        .map(|chunk| {
            let ticket = Ticket::default();
            assert_eq!(pool.read_noting(chunk.digest(), 0, &mut [0; 1], &ticket), Lookup::Hit);
            ticket
        })
        .collect();
    let mut run = Run::default();
    assert!(run.extend(&tickets[0], 5000, 7288));
    assert!(tickets[1..4].iter().all(|ticket| run.extend(ticket, 0, 12288)));
    assert!(run.extend(&tickets[4], 0, 100));
    let mut buf = vec![0; run.len()];
    let hits = pool.stat().hits;
    assert!(pool.read_run(&run, &mut buf));
    let whole: Vec<u8> = all.iter().flat_map(|chunk| chunk.bytes()).copied().collect();
    assert!(buf == whole[5000..4 * 12288 + 100]);
    assert_eq!(pool.stat().hits - hits, 5);
    assert!(!pool.read_run(&run, &mut buf[1..]), "another length");
    let evicting = Arc::clone(&pool);
    disk.before_read(move || assert!(evicting.trim(Some(0)) > 0));
    assert!(!pool.read_run(&run, &mut buf), "its chunks went while it was read");
    assert!(!pool.contains(all[0].digest()));
}

#[test]
fn without_its_journal_a_pool_is_rebuilt() {
    let all = chunks(50, 50, 70_000);
    for damage in ["lost", "empty", "rubbish", "older", "newer", "directory"] {
        let dir = filled(&all);
        let journal = dir.path().join("journal");
        match damage {
            "lost" => fs::remove_file(&journal).unwrap(),
            "empty" => drop(File::create(&journal).unwrap()),
            "rubbish" => fs::write(&journal, Random(5).bytes(100_000)).unwrap(),
            "older" => File::options().write(true).open(&journal).unwrap().write_all_at(&[0], 8).unwrap(),
            "newer" => File::options().write(true).open(&journal).unwrap().write_all_at(&[2], 8).unwrap(),
            _ => {
                fs::remove_file(&journal).unwrap();
                fs::create_dir(&journal).unwrap();
            }
        }
        for _ in 0..2 {
            let pool = open(dir.path());
            assert_eq!((hits(&pool, &all), pool.stat().quarantined), (50, 0), "{damage}");
        }
        assert!(damage == "lost" || dir.path().join("journal.aside").exists(), "{damage}");
    }
}

#[test]
fn a_torn_tail_of_the_journal_is_cut() {
    let all = chunks(20, 20, 5000);
    let dir = filled(&all);
    let path = dir.path().join("journal");
    let journal = File::options().write(true).open(&path).unwrap();
    let len = journal.metadata().unwrap().len();
    assert_eq!(len, 4096 + 20 * 64);
    journal.set_len(len - 30).unwrap();
    journal.write_all_at(&Random(1).bytes(5000), len - 30).unwrap();
    let pool = open(dir.path());
    assert_eq!(hits(&pool, &all), 19);
    assert_eq!(path.metadata().unwrap().len(), len - 64);
    pool.admit(&all[19]);
    drop(pool);
    assert_eq!(hits(&open(dir.path()), &all), 20);
}

#[test]
fn damaged_slabs_cost_only_what_was_in_them() {
    let all = chunks(40, 40, 200_000);
    for damage in 0..7 {
        let dir = filled(&all);
        let slab = slabs(dir.path()).swap_remove(1);
        let file = File::options().write(true).open(&slab).unwrap();
        match damage {
            0 => file.set_len(1_000_000).unwrap(),
            1 => file.set_len(100).unwrap(),
            2 => file.set_len(0).unwrap(),
            3 => fs::remove_file(&slab).unwrap(),
            // Another version.
            4 => file.write_all_at(&[7], 8).unwrap(),
            5 => file.write_all_at(&[0], 8).unwrap(),
            _ => file.write_all_at(&Random(9).bytes(1_900_000), 0).unwrap(),
        }
        let pool = open(dir.path());
        let left = hits(&pool, &all);
        assert!((25..40).contains(&left), "{damage}: {left}");
        for chunk in &all {
            assert_ne!(pool.admit(chunk), Admission::NotKept);
        }
        drop(pool);
        assert_eq!(hits(&open(dir.path()), &all), 40, "{damage}");
    }
}

#[test]
fn a_slab_cut_while_it_is_read_is_a_miss() {
    let all = chunks(20, 20, 100_000);
    let dir = filled(&all);
    let pool = open(dir.path());
    assert_eq!(hits(&pool, &all), 20);
    let slab = slabs(dir.path()).swap_remove(0);
    File::options().write(true).open(slab).unwrap().set_len(500_000).unwrap();
    let events = events(|| assert!((3..15).contains(&hits(&pool, &all))));
    assert_eq!(events.len(), 1, "{events:?}");
    for chunk in &all {
        pool.admit(chunk);
    }
    assert_eq!(hits(&pool, &all), 20);
}

#[test]
fn foreign_files_are_left_alone() {
    let all = chunks(60, 60, 100_000);
    let dir = filled(&all);
    let next = slabs(dir.path()).len();
    let foreign =
        ["README", "slab-1", "slab-00000001.bak", "slab-FFFFFFFF", "slab-ffffffff", &format!("slab-{next:08x}")];
    for name in foreign {
        fs::write(dir.path().join(name), name).unwrap();
    }
    fs::create_dir(dir.path().join("slab-00000fff")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, dir.path().join("slab-00000ffe"), rustix::fs::Mode::RUSR).unwrap();
    std::os::unix::fs::symlink("/dev/zero", dir.path().join("slab-00000ffd")).unwrap();
    let pool = open(dir.path());
    assert_eq!(hits(&pool, &all), 60);
    let more = chunks(61, 61, 100_000);
    assert!(more.iter().all(|chunk| pool.admit(chunk) == Admission::Kept));
    drop(pool);
    fs::remove_file(dir.path().join("journal")).unwrap();
    let pool = open(dir.path());
    assert_eq!((hits(&pool, &all), hits(&pool, &more)), (60, 61));
    for name in foreign {
        assert_eq!(fs::read_to_string(dir.path().join(name)).unwrap(), name);
    }
}

#[test]
fn chunks_from_many_threads_are_kept_once() {
    let all = chunks(200, 200, 20_000);
    let dir = tempfile::tempdir().unwrap();
    let pool = open(dir.path());
    std::thread::scope(|scope| {
        for start in 0..4 {
            let (pool, all) = (&pool, &all);
            scope.spawn(move || {
                for number in 0..all.len() {
                    pool.admit(&all[(number + start * 3) % all.len()]);
                    hits(pool, &all[..10]);
                }
            });
        }
    });
    assert_eq!(pool.stat().chunks, 200);
    assert_eq!(hits(&pool, &all), 200);
    drop(pool);
    assert_eq!(fs::metadata(dir.path().join("journal")).unwrap().len(), 4096 + 200 * 64);
    let pool = open(dir.path());
    assert_eq!((hits(&pool, &all), pool.stat().quarantined), (200, 0));
}

/// Not a test by itself: the process that has the pool in [`a_second_owner_is_told_who_is_the_first`].
#[test]
fn hold_the_pool_for_another_test() {
    let Some(dir) = std::env::var_os("FIRSTREAD_TEST_POOL") else { return };
    let _pool = Pool::open(Path::new(&dir), &options()).unwrap();
    println!("\nready");
    let _ = std::io::stdin().read(&mut [0]);
}

#[test]
fn a_second_owner_is_told_who_is_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "hold_the_pool_for_another_test", "--nocapture"])
        .env("FIRSTREAD_TEST_POOL", dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "ready"));
    let error = Pool::open(dir.path(), &options()).unwrap_err();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(matches!(error, Error::Busy(_)));
    let text = error.to_string();
    assert!(text.contains(&format!("process {}", child.id())), "{text}");
    assert!(text.contains(dir.path().to_str().unwrap()), "{text}");
    open(dir.path());
}

#[test]
fn a_full_disk_is_one_event_and_no_error() {
    let disk = Tmpfs::new("5m");
    let all = chunks(40, 40, 250_000);
    let pool = open(disk.path());
    let mut kept = 0;
    let while_full = events(|| {
        kept = all.iter().filter(|chunk| pool.admit(chunk) == Admission::Kept).count();
        // Small chunks may fit still; that is not a recovery.
        assert_eq!(pool.admit(&chunks(1, 1, 10)[0]), Admission::Kept);
        assert_eq!(pool.admit(&all[39]), Admission::NotKept);
    });
    assert!((15..22).contains(&kept), "{kept}");
    assert_eq!(while_full.len(), 1, "{while_full:?}");
    assert!(while_full[0].contains("No space left") && while_full[0].contains("uncached"), "{while_full:?}");
    assert_eq!(hits(&pool, &all), kept);
    drop(pool);
    let reopened = open(disk.path());
    assert_eq!(hits(&reopened, &all), kept);
    mount_remount(disk.path(), MountFlags::empty(), "size=40m").unwrap();
    let afterwards = events(|| {
        for chunk in &all {
            reopened.admit(chunk);
        }
    });
    assert_eq!(afterwards, Vec::<String>::new(), "a fresh start had no trouble yet");
    assert_eq!(hits(&reopened, &all), 40);
}

#[test]
fn a_disk_with_room_again_is_used_again() {
    let disk = Tmpfs::new("6m");
    let all = chunks(40, 40, 250_000);
    let pool = open(disk.path());
    fs::write(disk.path().join("somebody's"), vec![1; 5 << 20]).unwrap();
    let events = events(|| {
        let kept = all.iter().filter(|chunk| pool.admit(chunk) == Admission::Kept).count();
        assert!(kept < 5, "{kept}");
        fs::remove_file(disk.path().join("somebody's")).unwrap();
        let kept = all[20..].iter().filter(|chunk| pool.admit(chunk) == Admission::Kept).count();
        assert!(kept > 12, "{kept}");
        assert!(hits(&pool, &all) >= kept);
    });
    let recovered: Vec<_> = events.iter().map(|line| line.contains("takes chunks again")).collect();
    assert_eq!(recovered[..2], [false, true], "{events:?}");
    assert!(recovered.len() <= 3, "{events:?}");
    // What failed in between used up no slab.
    assert!(slabs(disk.path()).len() <= 3, "{:?}", slabs(disk.path()));
}

#[test]
fn a_full_disk_does_not_keep_a_pool_from_opening() {
    let disk = Tmpfs::new("64k");
    fs::write(disk.path().join("somebody's"), vec![1; 60 << 10]).unwrap();
    let _ = fs::write(disk.path().join("more"), vec![1; 8 << 10]);
    let all = chunks(3, 3, 10_000);
    let pool = open(disk.path());
    assert!(all.iter().all(|chunk| pool.admit(chunk) == Admission::NotKept));
    fs::remove_file(disk.path().join("somebody's")).unwrap();
    assert_eq!(pool.admit(&all[0]), Admission::Kept);
    drop(pool);
    assert_eq!(hits(&open(disk.path()), &all), 1);
}

#[test]
fn a_read_only_disk_is_read() {
    let disk = Tmpfs::new("20m");
    let all = chunks(20, 20, 250_000);
    let pool = open(disk.path());
    for chunk in &all[..10] {
        pool.admit(chunk);
    }
    drop(pool);
    mount_remount(disk.path(), MountFlags::RDONLY, "").unwrap();
    let events = events(|| {
        let pool = open(disk.path());
        assert_eq!(hits(&pool, &all), 10);
        assert!(all[10..].iter().all(|chunk| pool.admit(chunk) == Admission::NotKept));
        assert_eq!(hits(&pool, &all), 10);
    });
    assert_eq!(events.len(), 1, "{events:?}");
    assert!(events[0].contains("Read-only") || events[0].contains("read-only"), "{events:?}");
}

#[test]
fn a_dead_disk_is_all_misses() {
    let disk = CrashDisk::new();
    let all = chunks(30, 30, 100_000);
    collect_events();
    let pool = Pool::open_on(disk.dir(), "under test", &options()).unwrap();
    for chunk in &all[..20] {
        pool.admit(chunk);
    }
    assert_eq!(hits(&pool, &all), 20);
    disk.cut_power_after(0);
    let events = events(|| {
        assert_eq!(hits(&pool, &all), 0);
        assert!(all.iter().all(|chunk| pool.admit(chunk) == Admission::NotKept));
        assert!(pool.sync().is_err());
    });
    // One for each slab that can't be read, one for each whose data is lost, one for writing.
    assert!(events.len() <= 5, "{events:?}");
}
