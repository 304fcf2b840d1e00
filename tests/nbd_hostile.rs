//! Clients that break the protocol harm nobody but themselves.
#![cfg(feature = "nbd")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/file_device.rs"]
mod file_device;
#[path = "common/nbd_raw.rs"]
mod nbd_raw;
#[path = "common/nbd_server.rs"]
mod nbd_server;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use file_device::BLOCK;
use firstread::attach::nbd::{NbdOptions, proto};
use nbd_raw::{BLOCKS, connect, enter_transmission, healthy, option, request, setup};
use proptest::prelude::*;

/// Reads until the server ends the connection; how many bytes it sent.
fn drain(stream: &mut impl Read) -> u64 {
    let mut sink = [0; 65536];
    let mut total = 0;
    loop {
        match stream.read(&mut sink) {
            Ok(0) => return total,
            Ok(n) => total += n as u64,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return total,
            Err(error) => panic!("the server neither answers nor hangs up: {error}"),
        }
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn any_bytes_end_in_an_answer_or_a_closed_connection() {
    let (_dir, _device, server) = setup(NbdOptions::default());
    let junk = || proptest::collection::vec(any::<u8>(), 0..300);
    let options = proptest::collection::vec((0u32..14, 0u32..400, junk()), 0..8);
    let requests = proptest::collection::vec((0u16..10, 0u16..32, any::<u64>(), any::<u32>()), 0..8);
    let sane = proptest::collection::vec((0u16..10, 0u16..32, 0..BLOCKS * BLOCK, 0u32..100_000), 0..8);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(300));
    runner
        .run(&(any::<bool>(), junk(), options, requests, sane), |(raw, bytes, options, requests, sane)| {
            let mut stream = if raw { connect(&server) } else { enter_transmission(&server) };
            let mut out = Vec::new();
            if raw {
                out.extend_from_slice(&[0, 0, 0, 3]);
                for (number, len, payload) in &options {
                    // Half of the lengths are true.
                    let len = if len % 2 == 0 { payload.len() as u32 } else { *len };
                    out.extend(option(*number, len, payload));
                }
            }
            for (command, flags, offset, len) in requests.iter().chain(&sane) {
                out.extend(request(*command, *flags, *offset, *len));
            }
            out.extend_from_slice(&bytes);
            // The server may have hung up on an earlier byte.
            let mut writer = stream.try_clone().unwrap();
            std::thread::spawn(move || {
                let _ = writer.write_all(&out);
                let _ = writer.shutdown(Shutdown::Write);
            });
            drain(&mut stream);
            Ok(())
        })
        .unwrap();
    healthy(&server);
}

#[test]
fn huge_lengths_cost_nothing() {
    let (_dir, _device, server) = setup(NbdOptions::default());
    let start = Instant::now();
    for number in [proto::option::GO, proto::option::EXPORT_NAME, proto::option::SET_META_CONTEXT, 99] {
        let mut stream = connect(&server);
        stream.write_all(&[0, 0, 0, 3]).unwrap();
        stream.write_all(&option(number, u32::MAX, &[])).unwrap();
        assert_eq!(drain(&mut stream), 18, "hung up after the greeting");
    }
    assert!(start.elapsed() < Duration::from_secs(5), "waits for what it will not look at");
    // Too long to look at, short enough to skip: an error, and the connection goes on.
    let mut stream = connect(&server);
    stream.write_all(&[0, 0, 0, 3]).unwrap();
    stream.write_all(&option(proto::option::GO, 100_000, &vec![0; 100_000])).unwrap();
    stream.write_all(&option(proto::option::ABORT, 0, &[])).unwrap();
    let mut answers = Vec::new();
    stream.read_to_end(&mut answers).unwrap();
    assert_eq!(answers[18 + 12..18 + 16], proto::reply::ERR_TOO_BIG.to_be_bytes());
    assert_eq!(answers[answers.len() - 8..answers.len() - 4], proto::reply::ACK.to_be_bytes());
    // A refused write of 4 GiB is read away; what comes after it is answered.
    let mut stream = enter_transmission(&server);
    stream.write_all(&request(1, 0, 0, 1 << 20)).unwrap();
    stream.write_all(&vec![0x25; 1 << 20]).unwrap();
    stream.write_all(&request(3, 0, 0, 0)).unwrap();
    let mut header = [0; 20];
    stream.read_exact(&mut header).unwrap();
    assert_eq!(header[6..8], proto::chunk_type::ERROR.to_be_bytes());
    let mut message = vec![0; u32::from_be_bytes(header[16..].try_into().unwrap()) as usize];
    stream.read_exact(&mut message).unwrap();
    assert_eq!(message[..4], 1u32.to_be_bytes(), "EPERM");
    stream.read_exact(&mut header).unwrap();
    assert_eq!(header[6..8], proto::chunk_type::NONE.to_be_bytes());
    healthy(&server);
}

#[test]
fn endless_options_end() {
    let (_dir, _device, server) = setup(NbdOptions::default());
    let mut stream = connect(&server);
    stream.write_all(&[0, 0, 0, 3]).unwrap();
    for _ in 0..1000 {
        if stream.write_all(&option(proto::option::LIST, 0, &[])).is_err() {
            break;
        }
    }
    drain(&mut stream);
    healthy(&server);
}

#[test]
fn half_open_handshakes_are_ended() {
    let options = NbdOptions { handshake: Duration::from_millis(300), ..NbdOptions::default() };
    let (_dir, _device, server) = setup(options);
    let before = descriptors();
    let mut silent: Vec<_> = (0..40).map(|_| connect(&server)).collect();
    silent[0].write_all(&[0, 0]).unwrap();
    healthy(&server);
    let start = Instant::now();
    for stream in &mut silent {
        drain(stream);
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    drop(silent);
    std::thread::sleep(Duration::from_millis(200));
    assert!(descriptors() <= before + 2, "connections leak");
}

#[test]
fn connections_are_bounded_and_come_free_again() {
    let (_dir, _device, server) = setup(NbdOptions { connections: 4, ..NbdOptions::default() });
    let full: Vec<_> = (0..4).map(|_| enter_transmission(&server)).collect();
    assert_eq!(drain(&mut connect(&server)), 0);
    drop(full);
    std::thread::sleep(Duration::from_millis(200));
    healthy(&server);
}

#[test]
fn over_tcp_as_well() {
    let (_dir, _device, server) = setup(NbdOptions::default());
    let mut stream = TcpStream::connect(server.tcp).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    drain(&mut stream);
    healthy(&server);
}
