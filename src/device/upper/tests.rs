#![allow(clippy::unwrap_used)]

use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::chunk::Digest;
use crate::media::{Directory, MediaDir};

fn lower(name: &str, device_bytes: u64) -> LowerIdentity {
    let (contents, manifest) = (Digest::of(name.as_bytes()), Digest::of(b"manifest"));
    LowerIdentity { contents, device_bytes, image: name.to_owned(), manifest }
}

fn options() -> UpperOptions {
    UpperOptions { size: None, durability: Durability::Kept, boot: "this".to_owned() }
}

fn write(upper: &Upper, block: u64, byte: u8) {
    let claim = upper.claims().try_take(block..block + 1).unwrap();
    upper.write(block * BLOCK_BYTES, &[byte; BLOCK as usize]).unwrap();
    upper.add(&claim, &(block..block + 1)).unwrap();
}

fn changed(upper: &Upper) -> Vec<(u64, u64)> {
    upper.changed().map(|run| (run.start, run.end)).collect()
}

fn first_byte(upper: &Upper, block: u64) -> u8 {
    let mut byte = [0];
    upper.read(block * BLOCK_BYTES, &mut byte).unwrap();
    byte[0]
}

#[test]
fn an_upper_has_one_owner_and_one_lower() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("upper");
    let image = lower("oci:/a", 64 * BLOCK_BYTES);
    let upper = Upper::open(&dir, &image, &options()).unwrap();
    assert!(matches!(Upper::open(&dir, &image, &options()), Err(Error::Busy(_))));
    assert!(matches!(discard(&dir), Err(Error::Busy(_))));
    write(&upper, 3, 7);
    drop(upper);
    let error = Upper::open(&dir, &lower("oci:/b", 64 * BLOCK_BYTES), &options()).unwrap_err().to_string();
    assert!(error.contains("belongs to oci:/a") && error.contains("not to oci:/b"), "{error}");
    assert_eq!(describe(&dir).unwrap(), Some((image.clone(), 64 * BLOCK_BYTES)));
    let upper = Upper::open(&dir, &image, &options()).unwrap();
    assert_eq!((changed(&upper), first_byte(&upper, 3)), (vec![(3, 4)], 7));
    drop(upper);
    discard(&dir).unwrap();
    assert!(!dir.exists());
    discard(&dir).unwrap();
}

#[test]
fn one_that_was_removed_is_not_made_again_by_who_only_reads_it() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, image) = (temp.path().join("upper"), lower("image", 64 * BLOCK_BYTES));
    assert!(Upper::open_existing(&dir, &image, &options()).is_err());
    assert!(!dir.exists());
    let upper = Upper::open(&dir, &image, &options()).unwrap();
    write(&upper, 3, 7);
    assert!(matches!(Upper::open_existing(&dir, &image, &options()), Err(Error::Busy(_))));
    drop(upper);
    assert_eq!(changed(&Upper::open_existing(&dir, &image, &options()).unwrap()), [(3, 4)]);
    // The directory stays when the files go: another may be in it.
    std::fs::write(dir.join("other"), "").unwrap();
    remove(&dir).unwrap();
    let error = Upper::open_existing(&dir, &image, &options()).unwrap_err().to_string();
    assert!(error.contains("there is none"), "{error}");
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
}

#[test]
fn a_copy_is_the_upper_at_a_moment_and_opens_over_the_same_lower() {
    let temp = tempfile::tempdir().unwrap();
    let image = lower("image", 4096 * BLOCK_BYTES);
    let upper = Upper::open(&temp.path().join("upper"), &image, &options()).unwrap();
    // More than a piece, and in several runs, with zeros of both kinds.
    for block in (3..400).chain(900..905) {
        write(&upper, block, (block % 250) as u8);
    }
    let claim = upper.claims().try_take(2000..2600).unwrap();
    upper.zero(&(2000..2600), Zeroing::Discard).unwrap();
    upper.add(&claim, &(2000..2600)).unwrap();
    drop(claim);
    let dir = temp.path().join("copy");
    let bytes = upper.copy_to(&dir, "this").unwrap();
    assert_eq!(bytes, (397 + 5 + 600) * BLOCK_BYTES);
    assert!(!upper.is_held());
    // What is written afterwards is the first one's alone.
    write(&upper, 3, 251);
    write(&upper, 700, 252);
    assert!(Upper::open(&dir, &lower("other", 4096 * BLOCK_BYTES), &options()).is_err());
    let copy = Upper::open(&dir, &image, &options()).unwrap();
    assert_eq!(changed(&copy), [(3, 400), (900, 905), (2000, 2600)]);
    for block in [3, 4, 250, 399, 900, 904, 2000, 2599] {
        let expected = if block < 2000 { (block % 250) as u8 } else { 0 };
        assert_eq!(first_byte(&copy, block), expected, "block {block}");
    }
    let room = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(dir.join("data")).unwrap()) * 512;
    assert!(room < 500 * BLOCK_BYTES, "zeros take no room: {room}");
    drop(copy);
    assert!(matches!(upper.copy_to(&temp.path().join("none/of/it\0"), "this"), Err(Error::Io { .. })));
    write(&upper, 5, 1);
}

#[test]
fn a_process_that_dies_loses_nothing_and_another_start_of_the_machine_only_what_was_not_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let image = lower("image", 64 * BLOCK_BYTES);
    let upper = Upper::open(dir.path(), &image, &options()).unwrap();
    write(&upper, 3, 1);
    upper.flush().unwrap();
    write(&upper, 9, 2);
    drop(upper);
    let upper = Upper::open(dir.path(), &image, &options()).unwrap();
    assert_eq!(changed(&upper), [(3, 4), (9, 10)]);
    drop(upper);
    let upper = Upper::open(dir.path(), &image, &UpperOptions { boot: "next".to_owned(), ..options() }).unwrap();
    assert_eq!(changed(&upper), [(3, 4)]);
}

#[test]
fn an_upper_grows_and_does_not_shrink() {
    let dir = tempfile::tempdir().unwrap();
    let image = lower("image", 64 * BLOCK_BYTES);
    let sized = |blocks: u64| UpperOptions { size: Some(blocks * BLOCK_BYTES - 1), ..options() };
    let refused = |blocks| Upper::open(dir.path(), &image, &sized(blocks)).unwrap_err().to_string();
    assert!(refused(63).contains("less than the image's"), "{}", refused(63));
    let upper = Upper::open(dir.path(), &image, &sized(100)).unwrap();
    assert_eq!(upper.size(), 100 * BLOCK_BYTES);
    write(&upper, 99, 1);
    drop(upper);
    assert!(refused(90).contains("can grow, not shrink"), "{}", refused(90));
    let upper = Upper::open(dir.path(), &image, &sized(10_000)).unwrap();
    write(&upper, 9_999, 2);
    drop(upper);
    let upper = Upper::open(dir.path(), &image, &options()).unwrap();
    assert_eq!((upper.size(), first_byte(&upper, 99), first_byte(&upper, 9_999)), (10_000 * BLOCK_BYTES, 1, 2));
    assert_eq!(changed(&upper), [(99, 100), (9_999, 10_000)]);
}

#[test]
fn blocks_without_a_header_are_not_thrown_away() {
    let dir = tempfile::tempdir().unwrap();
    let image = lower("image", 64 * BLOCK_BYTES);
    // Half made: nothing was ever written.
    fs::write(dir.path().join(DATA), "half").unwrap();
    let upper = Upper::open(dir.path(), &image, &options()).unwrap();
    write(&upper, 1, 1);
    upper.flush().unwrap();
    drop(upper);
    fs::remove_file(dir.path().join(header::NAME)).unwrap();
    let error = Upper::open(dir.path(), &image, &options()).unwrap_err().to_string();
    assert!(error.contains("no header"), "{error}");
}

#[test]
fn a_flush_shares_only_syncs_that_begin_after_it() {
    let flusher = Arc::new(Flusher::default());
    let syncs = Arc::new(AtomicU32::new(0));
    let (begin, begun) = std::sync::mpsc::channel();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let slow = {
        let syncs = Arc::clone(&syncs);
        move || {
            syncs.fetch_add(1, Ordering::SeqCst);
            begin.send(()).unwrap();
            wait.lock().recv().unwrap();
            Ok(())
        }
    };
    std::thread::scope(|scope| {
        let first = scope.spawn({
            let flusher = Arc::clone(&flusher);
            move || flusher.flush(slow)
        });
        begun.recv().unwrap();
        // Both come while the first runs, and share one that begins after it.
        let later: Vec<_> = (0..2)
            .map(|_| {
                let (flusher, syncs) = (Arc::clone(&flusher), Arc::clone(&syncs));
                scope.spawn(move || {
                    flusher.flush(|| {
                        syncs.fetch_add(1, Ordering::SeqCst);
                        Ok(())
                    })
                })
            })
            .collect();
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(syncs.load(Ordering::SeqCst), 1);
        go.send(()).unwrap();
        first.join().unwrap().unwrap();
        later.into_iter().for_each(|flush| flush.join().unwrap().unwrap());
        assert!(syncs.load(Ordering::SeqCst) >= 2);
    });
}

type Hook = Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>;

/// A directory whose file `data` does something when it is synced, before the sync.
struct Hooked(Directory, Hook);

struct HookedFile(Box<dyn Media>, Hook);

impl Media for HookedFile {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, buf)
    }
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write(offset, bytes)
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        let hook = self.1.lock().take();
        hook.into_iter().for_each(|hook| hook());
        self.0.sync()
    }
}

impl MediaDir for Hooked {
    fn names(&self) -> io::Result<Vec<String>> {
        self.0.names()
    }
    fn open(&self, name: &str) -> io::Result<Box<dyn Media>> {
        self.0.open(name)
    }
    fn create(&self, name: &str) -> io::Result<Box<dyn Media>> {
        let file = self.0.create(name)?;
        Ok(if name == DATA { Box::new(HookedFile(file, Arc::clone(&self.1))) } else { file })
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.remove(name)
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
    fn space(&self) -> io::Result<crate::media::Space> {
        self.0.space()
    }
}

/// A block that is written while the data are synced may not be among them: it is in the map after the next flush only.
#[test]
fn what_is_written_during_a_sync_is_not_in_its_map() {
    let dir = tempfile::tempdir().unwrap();
    let (image, hook) = (lower("image", 64 * BLOCK_BYTES), Hook::default());
    let hooked = Hooked(Directory::new(dir.path()), Arc::clone(&hook));
    let upper = Arc::new(Upper::open_on(&hooked, "it", &image, &options()).unwrap());
    write(&upper, 3, 1);
    let during = Arc::clone(&upper);
    *hook.lock() = Some(Box::new(move || write(&during, 9, 2)));
    let on_disk = || {
        let media = Directory::new(dir.path());
        let map = BlockMap::load(media.open(MAP).unwrap().as_ref(), 64, "it").unwrap();
        [3, 9].map(|block| map.run(block, block + 1).0)
    };
    upper.flush().unwrap();
    assert_eq!((on_disk(), changed(&upper)), ([true, false], vec![(3, 4), (9, 10)]));
    upper.flush().unwrap();
    assert_eq!(on_disk(), [true, true]);
}
