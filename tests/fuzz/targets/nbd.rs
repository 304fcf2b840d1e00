//! A hostile NBD client: whatever it sends, the server ends or waits for more, and answers nothing that it must not.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use firstread::Result;
use firstread::attach::nbd::proto::{self, option};
use firstread::attach::nbd::{Export, Exports, NbdOptions, serve_stream};
use firstread::device::{Device, DeviceFuture, Local, Residence, check_range};
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const SIZE: u64 = 1 << 20;

/// Every other 64 KiB is remote.
struct Disk;

fn is_remote(offset: u64, len: u64) -> bool {
    len > 0 && (offset >> 16..=(offset + len - 1) >> 16).any(|block| block % 2 == 1)
}

impl Device for Disk {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_local(&self, offset: u64, buf: &mut [u8]) -> Result<Local> {
        check_range(SIZE, offset, buf.len() as u64)?;
        buf.fill((offset >> 12) as u8);
        Ok(if is_remote(offset, buf.len() as u64) { Local::Missing } else { Local::Done })
    }

    fn read_at<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> DeviceFuture<'a, ()> {
        Box::pin(async move {
            check_range(SIZE, offset, buf.len() as u64)?;
            buf.fill((offset >> 12) as u8);
            Ok(())
        })
    }

    fn residence(&self, offset: u64, len: u64) -> Result<Vec<(u64, Residence)>> {
        check_range(SIZE, offset, len)?;
        Ok(vec![(len, if is_remote(offset, len) { Residence::Remote } else { Residence::Local })])
    }
}

fuzz_target!(|input: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut exports = Exports::new();
        let export = Export { name: "disk".to_owned(), description: "a disk".to_owned(), device: Arc::new(Disk) };
        exports.add(export).unwrap();
        let (mut client, server) = tokio::io::duplex(1 << 16);
        let options = NbdOptions { handshake: Duration::from_secs(2), ..NbdOptions::default() };
        let bytes = plausible(input);
        let talk = async {
            let (mut replies, mut requests) = tokio::io::split(&mut client);
            let write = async {
                // It fails when the server has left.
                let _ = requests.write_all(&bytes).await;
                let _ = requests.shutdown().await;
            };
            let read = async { tokio::io::copy(&mut (&mut replies).take(1 << 30), &mut tokio::io::sink()).await };
            let _ = tokio::join!(write, read);
        };
        let (_, ()) = tokio::join!(serve_stream(server, exports, options), talk);
    });
});

/// The input as a conversation. Its first byte says how much of it is well-formed: magic numbers and lengths are never
/// guessed, and everything behind them would stay unseen.
fn plausible(input: &[u8]) -> Vec<u8> {
    let Some((mode, mut rest)) = input.split_first() else { return Vec::new() };
    if mode & 1 != 0 {
        return rest.to_vec();
    }
    let mut bytes = vec![0, 0, 0, 1 | mode >> 1 & 2];
    let mut push = |number: u32, payload: &[u8]| {
        bytes.extend_from_slice(&proto::OPTION_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&number.to_be_bytes());
        bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        bytes.extend_from_slice(payload);
    };
    // Options: a number, a length and so many bytes each, until one of number 0.
    while let [number, len, tail @ ..] = rest {
        let (payload, tail) = tail.split_at(tail.len().min(usize::from(*len)));
        rest = tail;
        if *number == 0 {
            break;
        }
        push(u32::from(*number), payload);
    }
    if mode & 2 != 0 {
        push(option::STRUCTURED_REPLY, b"");
        push(option::SET_META_CONTEXT, b"\0\0\0\x04disk\0\0\0\x02\0\0\0\x0fbase:allocation\0\0\0\x0ffirstread:local");
    }
    push(option::GO, b"\0\0\0\x04disk\0\0");
    // Requests: flags, command, offset and length in 8 bytes each.
    for request in rest.chunks_exact(8) {
        bytes.extend_from_slice(&proto::REQUEST_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&u16::from(request[0]).to_be_bytes());
        bytes.extend_from_slice(&u16::from(request[1]).to_be_bytes());
        bytes.extend_from_slice(&[7; 8]);
        let offset = u64::from(u16::from_be_bytes([request[2], request[3]])) << (request[4] & 31);
        bytes.extend_from_slice(&offset.to_be_bytes());
        let len = u32::from(u16::from_be_bytes([request[5], request[6]])) << (request[7] & 15);
        bytes.extend_from_slice(&len.to_be_bytes());
    }
    bytes
}
