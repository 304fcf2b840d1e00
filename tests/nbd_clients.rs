//! The NBD server seen by the clients that people use.
#![cfg(feature = "nbd")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/file_device.rs"]
mod file_device;
#[path = "common/nbd_server.rs"]
mod nbd_server;

use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use file_device::{BLOCK, FileDevice, write_reference};
use firstread::attach::nbd::{NbdListener, NbdOptions};
use nbd_server::{Server, libnbd, run};
use tempfile::TempDir;

const BLOCKS: u64 = 4096;

/// 16 MiB with holes of several sizes, the largest longer than a piece of a reply.
fn hole(block: u64) -> bool {
    block % 97 == 3 || (500..700).contains(&block) || (4000..BLOCKS).contains(&block)
}

fn setup() -> (TempDir, std::sync::Arc<FileDevice>, Server) {
    let dir = TempDir::new().unwrap();
    let device = FileDevice::open(&write_reference(dir.path().join("disk"), BLOCKS, hole));
    let server = Server::start(dir.path(), device.clone(), NbdOptions::default());
    (dir, device, server)
}

#[test]
fn nbdinfo_sees_a_read_only_disk_with_all_features() {
    let (_dir, _device, server) = setup();
    let info: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--json", &server.uri()])).unwrap();
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    for (key, value) in [
        ("is_read_only", true),
        ("can_multi_conn", true),
        ("can_df", true),
        ("can_cache", true),
        ("can_flush", true),
        ("can_trim", false),
        ("can_zero", false),
    ] {
        assert_eq!(export[key], value, "{key}: {info}");
    }
    assert_eq!(export["export-size"], BLOCKS * BLOCK);
    assert_eq!(export["description"], "a test disk");
    assert_eq!(export["block_size_minimum"], 1);
    assert_eq!(export["block_size_maximum"], 32 << 20);
    assert_eq!(export["contexts"].as_array().unwrap().len(), 2, "{info}");
    let list: serde_json::Value =
        serde_json::from_str(&run("nbdinfo", &["--list", "--json", &format!("nbd://{}", server.tcp)])).unwrap();
    assert_eq!(list["exports"][0]["export-name"], "disk");
}

#[test]
fn nbdinfo_maps_holes_and_what_is_remote() {
    let (_dir, device, server) = setup();
    device.make_remote(100 * BLOCK..200 * BLOCK);
    let map: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--map", "--json", &server.uri()])).unwrap();
    let mut at = 0;
    for run in map.as_array().unwrap() {
        let (offset, length) = (run["offset"].as_u64().unwrap(), run["length"].as_u64().unwrap());
        assert_eq!(offset, at);
        at += length;
        let expected = hole(offset / BLOCK) && !(100..200).contains(&(offset / BLOCK));
        assert_eq!(run["type"] == 3, expected, "{run}");
    }
    assert_eq!(at, BLOCKS * BLOCK);
    let local = run("nbdinfo", &["--map=firstread:local", "--json", &server.uri()]);
    let local: serde_json::Value = serde_json::from_str(&local).unwrap();
    let runs: Vec<_> =
        local.as_array().unwrap().iter().map(|run| (run["length"].as_u64().unwrap() / BLOCK, &run["type"])).collect();
    assert_eq!(runs, [(100, &0.into()), (100, &1.into()), (BLOCKS - 200, &0.into())], "{local}");
}

#[test]
fn nbdcopy_copies_the_disk_whatever_the_request_size() {
    let (dir, device, server) = setup();
    device.make_remote(0..BLOCKS * BLOCK / 2);
    device.delay_misses(Duration::from_millis(2));
    let reference = std::fs::read(dir.path().join("disk")).unwrap();
    for (size, extents) in [("262144", "--no-extents"), ("33554432", "--no-extents"), ("65536", "--allocated")] {
        let copy = dir.path().join("copy");
        let _ = std::fs::remove_file(&copy);
        let request = format!("--request-size={size}");
        run("nbdcopy", &["--connections=4", extents, &request, &server.uri(), copy.to_str().unwrap()]);
        assert!(std::fs::read(&copy).unwrap() == reference, "{size} {extents}");
    }
    assert!(device.misses.load(Ordering::SeqCst) > 0);
}

#[test]
fn qemu_img_agrees() {
    let (dir, _device, server) = setup();
    let source = format!("nbd+unix:///disk?socket={}", server.path.display());
    let (reference, copy) = (dir.path().join("disk"), dir.path().join("copy"));
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &source, reference.to_str().unwrap()]);
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &source, copy.to_str().unwrap()]);
    assert!(std::fs::read(copy).unwrap() == std::fs::read(reference).unwrap());
}

#[test]
fn fio_reads_with_many_requests_in_flight() {
    let (_dir, device, server) = setup();
    device.make_remote(0..BLOCKS * BLOCK / 4);
    let uri = format!("--uri={}", server.uri());
    let size = format!("--size={}", BLOCKS * BLOCK);
    let report = run(
        "fio",
        &[
            "--name=t",
            "--ioengine=nbd",
            &uri,
            &size,
            "--rw=randread",
            "--bs=4k",
            "--iodepth=16",
            "--output-format=json",
        ],
    );
    let report: serde_json::Value = serde_json::from_str(&report[report.find('{').unwrap()..]).unwrap();
    assert_eq!(report["jobs"][0]["error"], 0);
    assert_eq!(report["jobs"][0]["read"]["io_bytes"], BLOCKS * BLOCK);
}

/// The crate `nbd` is an independent client of the old kind: EXPORT_NAME, simple replies.
#[test]
fn an_old_client_reads_with_simple_replies() {
    use std::io::{Read, Seek, SeekFrom};
    let (dir, device, server) = setup();
    device.make_remote(64 * BLOCK..80 * BLOCK);
    let reference = std::fs::read(dir.path().join("disk")).unwrap();
    let mut tcp = std::net::TcpStream::connect(server.tcp).unwrap();
    tcp.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let export = nbd::client::handshake(&mut tcp, b"disk").unwrap();
    assert_eq!(export.size, BLOCKS * BLOCK);
    let mut client = nbd::client::NbdClient::new(&mut tcp, &export);
    for (offset, len) in [(1, 511), (63 * BLOCK + 7, 3 * 4096), (0, reference.len()), (reference.len() as u64 - 1, 1)] {
        let mut found = vec![0; len];
        client.seek(SeekFrom::Start(offset)).unwrap();
        client.read_exact(&mut found).unwrap();
        assert!(found == reference[offset as usize..offset as usize + len], "{len} bytes from {offset}");
    }
}

#[test]
fn libnbd_reads_with_and_without_structured_replies() {
    let (dir, device, server) = setup();
    device.make_remote(10 * BLOCK..20 * BLOCK);
    device.make_remote(1000 * BLOCK..2000 * BLOCK);
    let script = format!(
        r#"
reference = open({:?}, "rb").read()
def check(h):
    for offset, length in [(0, 1), (4095, 2), (9 * 4096 - 5, 12 * 4096), (499 * 4096, 210 * 4096), (0, 1 << 20),
                           (900 * 4096, 1200 * 4096), (0, len(reference)), (len(reference) - 100, 100)]:
        for flags in ([0, nbd.CMD_FLAG_DF] if h.can_df() else [0]):
            chunks = []
            found = h.pread_structured(length, offset, lambda buf, off, status, err: chunks.append((len(buf), status)), flags)
            assert found == reference[offset:offset + length], (offset, length, flags)
            if flags: assert len(chunks) == 1, chunks
            holes = [c for c in chunks if c[1] == nbd.READ_HOLE]
            if h.get_structured_replies_negotiated() and (offset, flags) == (499 * 4096, 0): assert holes, chunks
h.connect_uri(uri)
assert h.get_structured_replies_negotiated()
check(h)
old = nbd.NBD()
old.set_request_structured_replies(False)
old.connect_uri(uri)
assert not old.can_df()
check(old)
old.shutdown()
h.shutdown()
"#,
        dir.path().join("disk").display().to_string()
    );
    libnbd(&server, &script);
}

#[test]
fn errors_are_answered_and_the_connection_goes_on() {
    let (_dir, device, server) = setup();
    device.make_remote(100 * BLOCK..120 * BLOCK);
    device.make_bad(110 * BLOCK..111 * BLOCK);
    let script = r#"
def expect(number, call):
    try: call()
    except nbd.Error as e: assert e.errnum == number, e
    else: raise Exception("no error")
for structured in (True, False):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    if structured:
        h.add_meta_context("base:allocation")
    h.set_strict_mode(0)
    h.connect_uri(uri)
    size = h.get_size()
    expect(errno.EIO, lambda: h.pread(4096, 110 * 4096))
    expect(errno.EIO, lambda: h.pread(400 * 4096, 0))
    expect(errno.EINVAL, lambda: h.pread(4096, size))
    expect(errno.EINVAL, lambda: h.pread(4096, size - 1))
    expect(errno.EINVAL, lambda: h.pread(4096, (1 << 64) - 4096))
    expect(errno.EINVAL, lambda: h.pread((32 << 20) + 1, 0))
    expect(errno.EPERM, lambda: h.pwrite(b"x" * 100000, 0))
    expect(errno.EPERM, lambda: h.trim(4096, 0))
    expect(errno.EPERM, lambda: h.zero(4096, 0))
    h.flush()
    expect(errno.EIO, lambda: h.cache(size, 0))
    h.cache(100 * 4096, 0)
    if structured:
        expect(errno.EINVAL, lambda: h.block_status(4096, size, lambda *a: 0))
        seen = []
        h.block_status(size, 0, lambda ctx, off, entries, err: seen.append(entries), nbd.CMD_FLAG_REQ_ONE)
        assert seen == [[3 * 4096, 0]], seen
    assert len(h.pread(4096, 0)) == 4096
    h.shutdown()
"#;
    libnbd(&server, script);
}

#[test]
fn a_slow_miss_does_not_hold_up_hits_nor_other_misses() {
    let (_dir, device, server) = setup();
    device.make_remote(2000 * BLOCK..3000 * BLOCK);
    device.delay_misses(Duration::from_millis(400));
    let script = r#"
import time
h.connect_uri(uri)
start = time.time()
slow = [h.aio_pread(nbd.Buffer(4096), (2000 + 10 * i) * 4096) for i in range(40)]
h.pread(4096, 0)
assert time.time() - start < 0.3, "a hit waited for a miss"
while slow:
    h.poll(-1)
    slow = [c for c in slow if not h.aio_command_completed(c)]
assert time.time() - start < 3, "misses wait for each other"
"#;
    libnbd(&server, script);
    assert_eq!(device.in_flight_max.load(Ordering::SeqCst), 40);
}

#[test]
fn tls_is_declined_and_requests_before_a_disconnect_are_answered() {
    let (_dir, device, server) = setup();
    device.make_remote(0..BLOCK);
    device.delay_misses(Duration::from_millis(100));
    let script = r#"
h.set_tls(nbd.TLS_ALLOW)
h.connect_uri(uri)
assert not h.get_tls_negotiated()
h.set_strict_mode(0)
buf = nbd.Buffer(4096)
seen = []
h.aio_pread(buf, 0, lambda err: seen.append(err.value) or 1)
h.shutdown()
assert seen == [0], seen
strict = nbd.NBD()
strict.set_tls(nbd.TLS_REQUIRE)
try: strict.connect_uri(uri.replace("nbd+unix", "nbds+unix"))
except nbd.Error: pass
else: raise Exception("connected")
"#;
    libnbd(&server, script);
}

#[test]
fn misses_in_flight_are_bounded() {
    let (_dir, device, server) = setup();
    device.make_remote(0..BLOCKS * BLOCK);
    device.delay_misses(Duration::from_millis(30));
    let script = r#"
h.connect_uri(uri)
waiting = [h.aio_pread(nbd.Buffer(4096), i * 8192) for i in range(1000)]
while waiting:
    h.poll(-1)
    waiting = [c for c in waiting if not h.aio_command_completed(c)]
"#;
    libnbd(&server, script);
    assert_eq!(device.in_flight_max.load(Ordering::SeqCst), 64);
}

#[test]
fn a_socket_is_private_replaced_only_when_dead_and_removed_on_stop() {
    let (dir, _device, mut server) = setup();
    let mode = std::fs::metadata(&server.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _guard = runtime.enter();
    assert!(matches!(NbdListener::unix(&server.path), Err(firstread::Error::Busy(_))));
    run("nbdinfo", &["--size", &server.uri()]);
    server.stop();
    assert!(!server.path.exists());
    // What a killed server leaves.
    drop(std::os::unix::net::UnixListener::bind(&server.path).unwrap());
    assert!(server.path.exists());
    drop(NbdListener::unix(&server.path).unwrap());
    assert!(!server.path.exists());
    std::fs::write(&server.path, "precious").unwrap();
    assert!(matches!(NbdListener::unix(&server.path), Err(firstread::Error::Invalid { .. })));
    assert_eq!(std::fs::read(&server.path).unwrap(), b"precious");
    let long = dir.path().join("x".repeat(120));
    assert!(matches!(NbdListener::unix(&long), Err(firstread::Error::Invalid { .. })));
}
