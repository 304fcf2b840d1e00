//! Writable devices behind the NBD and vhost-user-blk servers and under a loop device, over an image of which a part is remote.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/file_device.rs"]
mod file_device;
#[path = "common/nbd_server.rs"]
mod nbd_server;
#[path = "common/vhost_guest.rs"]
mod vhost_guest;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use file_device::{BLOCK, FileDevice, write_reference};
use firstread::Error;
use firstread::attach::loop_device::{self, LoopOptions};
use firstread::attach::nbd::NbdOptions;
use firstread::chunk::Digest;
use firstread::device::upper::{Durability, LowerIdentity, Upper, UpperOptions};
use firstread::device::{Device, Local, Overlay, Zeroing};
use nbd_server::{libnbd, run};
use tempfile::TempDir;
use vhost_guest::{Guest, NEXT, WRITE, config};

const BLOCKS: u64 = 4096;
const SIZE: u64 = BLOCKS * BLOCK;

/// A lower of 16 MiB whose second half is remote, and an upper in `dir`.
fn overlay(dir: &Path, upper: &Path) -> (Arc<FileDevice>, Arc<Overlay>) {
    let lower = FileDevice::open(&write_reference(dir.join("disk"), BLOCKS, |block| block % 97 == 3));
    lower.make_remote(SIZE / 2..SIZE);
    let overlay = reopen(&lower, upper);
    (lower, overlay)
}

fn reopen(lower: &Arc<FileDevice>, upper: &Path) -> Arc<Overlay> {
    let identity = LowerIdentity {
        contents: Digest::of(b"contents"),
        device_bytes: SIZE,
        image: "an image".to_owned(),
        manifest: Digest::of(b"manifest"),
    };
    let options = UpperOptions { size: None, durability: Durability::Kept, boot: "this".to_owned() };
    let deadline = Instant::now() + Duration::from_secs(5);
    let upper = loop {
        match Upper::open(upper, &identity, &options) {
            // A client that another test starts just now has its lock until it is executed.
            Err(Error::Busy(_)) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            opened => break opened.unwrap(),
        }
    };
    Overlay::new(Arc::clone(lower) as Arc<dyn Device>, Arc::new(upper)).unwrap()
}

/// Writes and verifies; engine first, since its own options may follow.
fn fio(engine: &str, arguments: &[&str]) {
    let first = ["--name=verify", engine];
    let last = ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--size=16M", "--output-format=terse"];
    let arguments: Vec<&str> = first.iter().chain(arguments).chain(&last).copied().collect();
    run("fio", &arguments);
}

#[test]
fn nbd_clients_write_what_they_read_back() {
    let dir = TempDir::new().unwrap();
    let (lower, device) = overlay(dir.path(), &dir.path().join("upper"));
    let server = nbd_server::Server::start(dir.path(), device.clone(), NbdOptions::default());
    let info: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--json", &server.uri()])).unwrap();
    for (key, value) in
        [("is_read_only", false), ("can_trim", true), ("can_zero", true), ("can_fua", true), ("can_flush", true)]
    {
        assert_eq!(info["exports"][0][key], value, "{key}: {info}");
    }
    // Whole blocks, also of what is remote: nothing is fetched.
    libnbd(
        &server,
        "h.connect_uri(uri)
data = bytes(range(256)) * 4096
h.pwrite(data, 8 << 20)
h.pwrite(data, 15 << 20, nbd.CMD_FLAG_FUA)
assert h.pread(len(data), 15 << 20) == data
",
    );
    assert_eq!(lower.misses.load(Ordering::SeqCst), 0);
    libnbd(
        &server,
        "h.set_strict_mode(0)   # what is wrong is for the server to find
h.connect_uri(uri)
before = h.pread(8192, 12 << 20)
h.pwrite(b'x' * 700, (12 << 20) + 3900)
assert h.pread(8192, 12 << 20) == before[:3900] + b'x' * 700 + before[4600:]
h.pwrite(b'y' * (3 << 20), (10 << 20) + 100)   # larger than a piece, with edges that are remote
assert h.pread(3 << 20, (10 << 20) + 100) == b'y' * (3 << 20)
h.zero(10000, (10 << 20) + 100)
assert h.pread(10001, (10 << 20) + 100) == bytes(10000) + b'y'
h.zero(8192, 4096, nbd.CMD_FLAG_NO_HOLE)
h.trim(1 << 20, 1 << 20)
assert h.pread(1 << 20, 1 << 20) == bytes(1 << 20)
h.flush()
for call in (lambda: h.pwrite(b'z' * 512, 16 << 20), lambda: h.zero(4096, (16 << 20) - 512), lambda: h.trim(4096, 1 << 40)):
    try:
        call()
        sys.exit('outside of the device')
    except nbd.Error as error:
        assert error.errnum == errno.EINVAL, error
assert h.pread(8192, 4096) == bytes(8192)
",
    );
    let uri = format!("--uri={}", server.uri());
    let options = ["--rw=randwrite", "--bsrange=512-64k", "--iodepth=32", "--fsync=100", "--randseed=7"];
    fio("--ioengine=nbd", &[[uri.as_str()].as_slice(), &options].concat());
    let copy = dir.path().join("copy");
    run("nbdcopy", &[&server.uri(), copy.to_str().unwrap()]);
    drop(server);
    // What was written is there for the next one.
    let copy = std::fs::read(copy).unwrap();
    // The server's tasks may let go of it later.
    device.upper().close().unwrap();
    assert!(device.write_local(0, &[1]).is_err(), "closed");
    let device = reopen(&lower, &dir.path().join("upper"));
    let mut found = vec![0; SIZE as usize];
    runtime().block_on(device.read_at(0, &mut found)).unwrap();
    assert!(found == copy);
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Offers a request whose data the guest sends: header, data, status.
fn send(guest: &mut Guest, slot: u16, kind: u32, sector: u64, data: &[u8]) {
    use vm_memory::{Bytes, GuestAddress};
    let (first, at) = (3 * slot, guest.data(0, slot));
    guest.header(at - 4096, kind, sector);
    guest.memory.write_obj(0xff_u8, GuestAddress(at - 1)).unwrap();
    guest.memory.write_slice(data, GuestAddress(at)).unwrap();
    guest.descriptor(0, first, at - 4096, 16, NEXT, first + 1);
    guest.descriptor(0, first + 1, at, data.len() as u32, NEXT, first + 2);
    guest.descriptor(0, first + 2, at - 1, 1, WRITE, 0);
    guest.offer(0, first);
    guest.kick(0);
    assert_eq!(guest.answers(0, 1), [(first, 1)], "only the status is the guest's to read");
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [sector.to_le_bytes().as_slice(), &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn a_guest_writes_what_the_device_then_has() {
    let dir = TempDir::new().unwrap();
    let (lower, device) = overlay(dir.path(), &dir.path().join("upper"));
    let server = vhost_guest::Server::start(dir.path().join("vhost.sock"), device.clone());
    let mut guest = Guest::new(1);
    let mut front = guest.connect(&server.path);
    let config = config(&mut front);
    assert_eq!((config[36..40].to_vec(), config[40], config[56]), ((1_u32 << 21).to_le_bytes().to_vec(), 1, 1));
    let mut expected = vec![0; SIZE as usize];
    runtime().block_on(lower.read_at(0, &mut expected)).unwrap();
    lower.make_remote(SIZE / 2..SIZE);

    // In each half, whole blocks and parts of them.
    for (slot, (sector, len)) in
        [(0, 8192), (9, 512), (1003, 300 << 10), (20_000, 65_536), (20_203, 300 << 10), (32_767, 512)]
            .into_iter()
            .enumerate()
    {
        // The last bytes of a slot's room are the next one's, which comes later.
        let data: Vec<u8> = (0..len).map(|at| (at / 1000 + slot) as u8).collect();
        send(&mut guest, slot as u16, OUT, sector, &data);
        assert_eq!(guest.status(0, slot as u16), 0);
        expected[sector as usize * 512..][..len].copy_from_slice(&data);
    }
    send(&mut guest, 6, WRITE_ZEROES, 0, &range(24_003, 30, 1));
    send(&mut guest, 7, WRITE_ZEROES, 0, &range(100, 8, 0));
    send(&mut guest, 8, DISCARD, 0, &range(200, 24, 0));
    assert_eq!([6, 7, 8].map(|slot| guest.status(0, slot)), [0; 3]);
    for (sector, sectors) in [(24_003, 30), (100, 8), (200, 24)] {
        expected[sector * 512..][..sectors * 512].fill(0);
    }
    guest.request(0, 9, FLUSH, 0, 0);
    guest.kick(0);
    guest.answers(0, 1);
    assert_eq!(guest.status(0, 9), 0);
    // Outside of the device, more than a range, an unknown flag, a discard with the flag of zeros.
    let io_error = [
        (OUT, 32_768, vec![1; 512]),
        (OUT, 5, vec![1; 511]),
        (DISCARD, 0, range(32_760, 16, 0)),
        (DISCARD, 0, [range(0, 1, 0), range(0, 1, 0)].concat()),
    ];
    for (slot, (kind, sector, data)) in io_error.into_iter().enumerate() {
        send(&mut guest, 10 + slot as u16, kind, sector, &data);
        assert_eq!(guest.status(0, 10 + slot as u16), 1);
    }
    for (slot, (kind, flags)) in [(WRITE_ZEROES, 2), (DISCARD, 1)].into_iter().enumerate() {
        send(&mut guest, 20 + slot as u16, kind, 0, &range(0, 8, flags));
        assert_eq!(guest.status(0, 20 + slot as u16), 2);
    }
    let mut found = vec![0; SIZE as usize];
    runtime().block_on(device.read_at(0, &mut found)).unwrap();
    let differs = found.iter().zip(&expected).position(|(found, expected)| found != expected);
    assert_eq!(differs, None);
}

/// A mount, gone when dropped: a test that fails halfway leaves none.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn new(device: &str, options: &str, dir: &'a Path) -> Self {
        run("mount", &["-o", options, device, dir.to_str().unwrap()]);
        Self(dir)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let plain = Command::new("umount").arg(self.0).status();
        if !plain.is_ok_and(|status| status.success()) {
            let _ = Command::new("umount").arg("-l").arg(self.0).status();
        }
    }
}

#[test]
fn a_loop_device_is_written_verified_and_checked() {
    let dir = TempDir::new().unwrap();
    let (_lower, device) = overlay(dir.path(), &dir.path().join("upper"));
    let runtime = runtime();
    let attached = loop_device::attach(device.clone(), LoopOptions::default(), runtime.handle().clone());
    let mut attachment = attached.unwrap();
    let path = attachment.device_path().to_str().unwrap().to_owned();
    let name = format!("--filename={path}");
    let options = ["--direct=1", "--rw=randwrite", "--bsrange=512-64k", "--iodepth=16", "--fsync=50"];
    fio("--ioengine=libaio", &[[name.as_str()].as_slice(), &options].concat());
    // The page cache of the device is another way to it.
    run("mkfs.ext4", &["-q", "-F", &path]);
    let mnt = dir.path().join("mnt");
    std::fs::create_dir(&mnt).unwrap();
    let mounted = Mounted::new(&path, "rw", &mnt);
    let written: Vec<u8> = (0..3_000_000_u32).map(|number| (number % 251) as u8).collect();
    std::fs::write(mnt.join("file"), &written).unwrap();
    std::fs::write(mnt.join("removed"), &written).unwrap();
    run("sync", &["-f", mnt.to_str().unwrap()]);
    let room = || {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(dir.path().join("upper/data")).unwrap().blocks() * 512
    };
    let before = room();
    std::fs::remove_file(mnt.join("removed")).unwrap();
    run("sync", &["-f", mnt.to_str().unwrap()]);
    run("fstrim", &[mnt.to_str().unwrap()]);
    assert!(room() + 2_900_000 < before, "{before} bytes before the trim, {} after it", room());
    drop(mounted);
    run("e2fsck", &["-fn", &path]);
    let mounted = Mounted::new(&path, "ro", &mnt);
    let found = std::fs::read(mnt.join("file")).unwrap();
    drop(mounted);
    assert!(found == written);
    attachment.detach().unwrap();
}

/// A file system of 4 MiB, gone when dropped.
struct Small(TempDir);

impl Small {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        run("mount", &["-t", "tmpfs", "-o", "size=4m", "none", dir.path().to_str().unwrap()]);
        Self(dir)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l", self.0.path().to_str().unwrap()]).status();
    }
}

#[test]
fn a_full_disk_fails_the_write_and_nothing_else() {
    let (dir, small) = (TempDir::new().unwrap(), Small::new());
    let upper = small.0.path().join("upper");
    let (lower, device) = overlay(dir.path(), &upper);
    let runtime = runtime();
    let mut expected = vec![0; SIZE as usize];
    runtime.block_on(lower.read_at(0, &mut expected)).unwrap();
    let (mut written, mut refused) = (Vec::new(), 0);
    for block in (0..BLOCKS).step_by(2) {
        let data = vec![block as u8 | 1; BLOCK as usize];
        match device.write_local(block * BLOCK, &data) {
            Ok(done) => {
                assert_eq!(done, Local::Done);
                expected[(block * BLOCK) as usize..][..BLOCK as usize].copy_from_slice(&data);
                written.push(block);
            }
            Err(error) => {
                assert_eq!(error.errno(), 28, "{error}");
                refused += 1;
            }
        }
    }
    assert!(written.len() > 500 && refused > 500, "{} written, {refused} refused", written.len());
    let read = |device: &Overlay| {
        let mut found = vec![0; SIZE as usize];
        runtime.block_on(device.read_at(0, &mut found)).unwrap();
        found
    };
    assert!(read(&device) == expected, "what was refused is as it was");
    // Room is made by what needs it no more; then everything goes on.
    let (first, last) = (written[0], written[100]);
    runtime.block_on(device.zero(first * BLOCK, (last - first) * BLOCK, Zeroing::Discard)).unwrap();
    expected[(first * BLOCK) as usize..(last * BLOCK) as usize].fill(0);
    let block = BLOCKS - 1;
    let data = vec![0xab; BLOCK as usize];
    assert_eq!(device.write_local(block * BLOCK, &data).unwrap(), Local::Done);
    expected[(block * BLOCK) as usize..].copy_from_slice(&data);
    runtime.block_on(device.flush()).unwrap();
    device.upper().close().unwrap();
    assert!(read(&reopen(&lower, &upper)) == expected);
}
