//! A client that writes whatever bytes it likes, and the server it writes them to.
#![allow(dead_code)] // No test uses all of it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use firstread::attach::nbd::{NbdOptions, proto};
use tempfile::TempDir;

use super::file_device::{BLOCK, FileDevice, write_reference};
use super::nbd_server::{Server, run};

pub const BLOCKS: u64 = 2048;

pub fn setup(options: NbdOptions) -> (TempDir, Arc<FileDevice>, Server) {
    let dir = TempDir::new().unwrap();
    let device = FileDevice::open(&write_reference(dir.path().join("disk"), BLOCKS, |block| block % 7 == 0));
    let server = Server::start(dir.path(), device.clone(), options);
    (dir, device, server)
}

pub fn connect(server: &Server) -> UnixStream {
    let stream = UnixStream::connect(&server.path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

pub fn option(number: u32, len: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = proto::OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

pub fn request(command: u16, flags: u16, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = proto::REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&7u64.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes
}

/// Greets, chooses the export, and reads away the answers.
pub fn enter_transmission(server: &Server) -> UnixStream {
    let mut stream = connect(server);
    stream.write_all(&[0, 0, 0, 3]).unwrap();
    stream.write_all(&option(proto::option::STRUCTURED_REPLY, 0, &[])).unwrap();
    stream.write_all(&option(proto::option::GO, 10, b"\0\0\0\x04disk\0\0")).unwrap();
    // Greeting, ACK, two INFO (12 and 14 bytes), ACK.
    let mut answers = [0; 18 + 20 + 32 + 34 + 20];
    stream.read_exact(&mut answers).unwrap();
    stream
}

pub fn healthy(server: &Server) {
    assert_eq!(run("nbdinfo", &["--size", &server.uri()]).trim(), (BLOCKS * BLOCK).to_string());
}
