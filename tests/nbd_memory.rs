//! What clients can make the server hold. Alone in its process, since it measures the process's memory.
#![cfg(feature = "nbd")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/file_device.rs"]
mod file_device;
#[path = "common/nbd_raw.rs"]
mod nbd_raw;
#[path = "common/nbd_server.rs"]
mod nbd_server;

use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::Duration;

use file_device::BLOCK;
use firstread::attach::nbd::NbdOptions;
use firstread::attach::nbd::serve::MISS_BYTES_MAX;
use nbd_raw::{BLOCKS, enter_transmission, healthy, request, setup};
use nbd_server::libnbd;

/// Clients that ask for gigabytes and read nothing: the server's memory stays, others are served.
#[test]
fn a_client_that_does_not_read_stops_only_itself() {
    const CLIENTS: u64 = 8;
    let (_dir, device, server) = setup(NbdOptions::default());
    device.make_remote(BLOCKS / 2 * BLOCK..BLOCKS * BLOCK);
    device.delay_misses(Duration::from_secs(2));
    let resident = || -> u64 {
        let status = std::fs::read_to_string("/proc/self/statm").unwrap();
        status.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    };
    let before = resident();
    let len = (BLOCKS / 2 * BLOCK) as u32;
    let mut lazy: Vec<_> = (0..CLIENTS).map(|_| enter_transmission(&server)).collect();
    for (number, stream) in lazy.iter_mut().enumerate() {
        // Half of them ask for what is local, half for what isn't.
        let requests = vec![request(0, 0, number as u64 % 2 * u64::from(len), len); 200];
        stream.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
        let _ = stream.write_all(&requests.concat());
    }
    std::thread::sleep(Duration::from_millis(300));
    healthy(&server);
    libnbd(&server, "h.connect_uri(uri)\nassert len(h.pread(1 << 20, 4096)) == 1 << 20\n");
    let allowed = CLIENTS / 2 * u64::from(MISS_BYTES_MAX / len);
    assert_eq!(device.in_flight_max.load(Ordering::SeqCst), allowed);
    std::thread::sleep(Duration::from_secs(3));
    let grown = resident().saturating_sub(before);
    assert!(grown < CLIENTS / 2 * (34 << 20) + (16 << 20), "{grown} bytes");
}
