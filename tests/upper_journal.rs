//! The journal of a writable device: losses of power while it is made, and while it is used.
//! Needs root, FUSE and loop devices.
#![cfg(all(feature = "loop", feature = "programs"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/crash.rs"]
mod crash;
#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/file_device.rs"]
mod file_device;
#[path = "common/nodes.rs"]
mod nodes;
#[path = "common/random.rs"]
mod random;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crash::{CrashDisk, Survivors};
use ext4::{Data, assemble, fsck, put};
use file_device::FileDevice;
use firstread::Result;
use firstread::attach::loop_device::{self, LoopAttachment, LoopOptions};
use firstread::chunk::Digest;
use firstread::daemon::journal;
use firstread::device::upper::{Durability, LowerIdentity, Upper, UpperOptions};
use firstread::device::{Device, Overlay};
use firstread::ext4::{Options, Tree, plan, settle};
use random::Random;
use tempfile::TempDir;
use tokio::runtime::Runtime;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn tool<const N: usize>(program: &str, arguments: [&str; N]) -> Vec<u8> {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "{what}: in vain");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// An image with some files and room for others.
fn lower(dir: &Path, size: u64) -> Arc<FileDevice> {
    let mut tree = Tree::new(ext4::dir());
    let root = tree.root();
    for number in 0..100 {
        put(&mut tree, root, format!("file-{number}"), ext4::file(number % 10 * 1000));
    }
    let plan = plan(&tree, &Options { size: Some(size), ..Options::default() }).unwrap();
    assemble(&tree, &plan, &dir.join("lower"), Data::Written);
    FileDevice::open(&dir.join("lower"))
}

fn overlay(disk: &CrashDisk, lower: &Arc<FileDevice>, boot: &str) -> Result<Arc<Overlay>> {
    let identity = LowerIdentity {
        contents: Digest::of(b"contents"),
        device_bytes: lower.size(),
        image: "an image".to_owned(),
        manifest: Digest::of(b"manifest"),
    };
    let options = UpperOptions { size: None, durability: Durability::Kept, boot: boot.to_owned() };
    let upper = Upper::open_on(disk.dir().as_ref(), "under test", &identity, &options)?;
    Overlay::new(Arc::clone(lower) as Arc<dyn Device>, Arc::new(upper))
}

fn bytes_of(device: &Overlay, runtime: &Runtime) -> Vec<u8> {
    let mut bytes = vec![0; device.size() as usize];
    runtime.block_on(device.read_at(0, &mut bytes)).unwrap();
    bytes
}

/// The device's bytes in a file.
fn read_out(device: &Overlay, runtime: &Runtime, to: &Path) {
    let bytes = bytes_of(device, runtime);
    let file = File::create(to).unwrap();
    file.set_len(device.size()).unwrap();
    for (number, block) in bytes.chunks(BLOCK as usize).enumerate().filter(|(_, block)| block.iter().any(|b| *b != 0)) {
        file.write_all_at(block, number as u64 * BLOCK).unwrap();
    }
}

fn dumped(device: &Path) -> String {
    String::from_utf8(tool("dumpe2fs", ["-h", text(device)])).unwrap()
}

fn has_journal(device: &Path) -> bool {
    dumped(device).lines().any(|line| line.starts_with("Filesystem features:") && line.contains("has_journal"))
}

#[test]
fn power_lost_at_any_change_while_it_is_made() {
    let dir = TempDir::new().unwrap();
    let (lower, runtime, out) = (lower(dir.path(), 20 * MIB), runtime(), dir.path().join("out"));
    let whole = {
        let disk = CrashDisk::new();
        let device = overlay(&disk, &lower, "first").unwrap();
        let before = disk.changes();
        assert_eq!(journal::add(&device, runtime.handle()).unwrap(), None);
        read_out(&device, &runtime, &out);
        (disk.changes() - before, bytes_of(&device, &runtime))
    };
    assert!(whole.0 > 8, "{} changes", whole.0);
    let mut unfinished = 0;
    for change in 1..=whole.0 {
        for survivors in [Survivors::None, Survivors::All, Survivors::Some(change), Survivors::Some(change + 1000)] {
            let disk = CrashDisk::new();
            let device = overlay(&disk, &lower, "first").unwrap();
            disk.cut_power_after(change);
            unfinished += u32::from(journal::add(&device, runtime.handle()).is_err());
            drop(device);
            let later = disk.after_crash(survivors);
            let device = overlay(&later, &lower, "second").unwrap();
            assert_eq!(journal::add(&device, runtime.handle()).unwrap(), None, "{change} {survivors:?}");
            assert!(bytes_of(&device, &runtime) == whole.1, "{change} {survivors:?}");
        }
    }
    assert!(unfinished > 20, "{unfinished}");
    fsck(&out);
    assert!(has_journal(&out));
}

/// A device that is mounted.
struct Mounted {
    dir: PathBuf,
    attachment: LoopAttachment,
}

impl Mounted {
    fn new(device: &Arc<Overlay>, dir: &Path, runtime: &Runtime) -> Self {
        let device = Arc::clone(device) as Arc<dyn Device>;
        let attachment = loop_device::attach(device, LoopOptions::default(), runtime.handle().clone()).unwrap();
        fs::create_dir_all(dir).unwrap();
        tool("mount", ["-t", "ext4", "-o", "noatime", text(attachment.device_path()), text(dir)]);
        Self { dir: dir.to_owned(), attachment }
    }

    fn end(mut self) {
        wait_until("nobody uses it", || Command::new("umount").arg(&self.dir).output().unwrap().status.success());
        // A daemon that somebody starts meanwhile has all mounts in its namespace until it ends.
        wait_until("nobody has it mounted", || self.attachment.detach().is_ok());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // After a failure.
        let _ = Command::new("umount").arg("-l").arg(&self.dir).output();
    }
}

fn content(number: u64) -> Vec<u8> {
    Random(number + 1).bytes(1 + (number as usize * 7919) % 40_000)
}

/// Writes files until something fails; the last one that was synced, and how many are older than it and removed.
fn write_until_off(dir: &Path, keep: u64) -> u64 {
    let mut synced = 0;
    for number in 1.. {
        let path = dir.join(format!("dir-{}/w{number}", number % 5));
        let written = fs::create_dir_all(path.parent().unwrap())
            .and_then(|()| fs::write(&path, content(number)))
            .and_then(|()| if number % 3 == 0 { File::open(&path)?.sync_all() } else { Ok(()) });
        if written.is_err() {
            break;
        }
        if number % 3 == 0 {
            synced = number;
        }
        if number > keep {
            let old = number - keep;
            if fs::remove_file(dir.join(format!("dir-{}/w{old}", old % 5))).is_err() {
                break;
            }
        }
        assert!(number < 100_000, "the power is never cut");
    }
    synced
}

#[test]
fn power_lost_under_a_mounted_file_system_leaves_it_whole_and_with_what_was_synced() {
    let dir = TempDir::new().unwrap();
    let (lower, runtime) = (lower(dir.path(), 40 * MIB), runtime());
    let mut replayed = 0;
    for round in 0..6u64 {
        let disk = CrashDisk::new();
        let device = overlay(&disk, &lower, "first").unwrap();
        journal::add(&device, runtime.handle()).unwrap();
        let mounted = Mounted::new(&device, &dir.path().join("mnt"), &runtime);
        disk.cut_power_after(150 + round * 170);
        let keep = 40;
        let synced = write_until_off(&mounted.dir, keep);
        wait_until("the power is off", || disk.is_off());
        mounted.end();
        drop(device);

        let later = disk.after_crash(Survivors::Some(round));
        let device = overlay(&later, &lower, "second").unwrap();
        // What would be published of it.
        let mut read = |block: u32, buf: &mut [u8]| runtime.block_on(device.read_at(u64::from(block) * BLOCK, buf));
        let settled = settle(device.size(), &mut read).unwrap();
        replayed += settled.blocks().count();
        let published = dir.path().join("published");
        read_out(&device, &runtime, &published);
        let image = File::options().write(true).open(&published).unwrap();
        for at in settled.blocks() {
            let mut block = [0; BLOCK as usize];
            settled.read(at, &mut block, &mut read).unwrap();
            image.write_all_at(&block, u64::from(at) * BLOCK).unwrap();
        }

        assert_eq!(journal::add(&device, runtime.handle()).unwrap(), None);
        let mounted = Mounted::new(&device, &dir.path().join("mnt"), &runtime);
        let other = ext4::Mount::new(&published, &dir.path().join("look"), "ro,noload");
        for top in [mounted.dir.as_path(), other.dir()] {
            // One that was to be removed may be gone or there.
            for number in (3..=synced).step_by(3).filter(|number| number + keep > synced + 3) {
                let found = fs::read(top.join(format!("dir-{}/w{number}", number % 5)));
                assert!(found.unwrap() == content(number), "round {round}: file {number} of {synced}");
            }
        }
        drop(other);
        mounted.end();
        let whole = dir.path().join("whole");
        read_out(&device, &runtime, &whole);
        fsck(&whole);
        assert!(has_journal(&whole));
    }
    assert!(replayed > 30, "{replayed}");
}
