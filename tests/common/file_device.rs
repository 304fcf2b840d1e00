//! A device over a file whose blocks can be made remote, slow or bad, for tests of the transports.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use firstread::chunk::Digest;
use firstread::device::{Device, DeviceFuture, Local, Residence, check_range};
use firstread::{Error, Result};
use parking_lot::Mutex;

pub const BLOCK: u64 = 4096;

/// Serves a file. A block is remote until it was read with `read_at`, if it lies in one of the remote ranges.
pub struct FileDevice {
    file: File,
    size: u64,
    remote: Mutex<Vec<Range<u64>>>,
    bad: Mutex<Vec<Range<u64>>>,
    delay: Mutex<Duration>,
    pub misses: AtomicU64,
    pub in_flight: AtomicU64,
    pub in_flight_max: AtomicU64,
}

impl FileDevice {
    pub fn open(path: &Path) -> Arc<Self> {
        let file = File::open(path).unwrap();
        let size = file.metadata().unwrap().len();
        Arc::new(Self {
            file,
            size,
            remote: Mutex::default(),
            bad: Mutex::default(),
            delay: Mutex::default(),
            misses: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            in_flight_max: AtomicU64::new(0),
        })
    }

    /// Makes a range of bytes remote.
    pub fn make_remote(&self, range: Range<u64>) {
        self.remote.lock().push(range);
    }

    /// Makes every read that touches the range fail as wrong bytes from a source do. The range must be remote as well.
    pub fn make_bad(&self, range: Range<u64>) {
        self.bad.lock().push(range);
    }

    /// How long each miss takes.
    pub fn delay_misses(&self, delay: Duration) {
        *self.delay.lock() = delay;
    }

    fn is_remote(&self, offset: u64, len: u64) -> bool {
        self.remote.lock().iter().any(|range| offset < range.end && range.start < offset + len)
    }
}

impl Device for FileDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_local(&self, offset: u64, buf: &mut [u8]) -> Result<Local> {
        check_range(self.size, offset, buf.len() as u64)?;
        if self.is_remote(offset, buf.len() as u64) {
            buf.fill(0xee);
            return Ok(Local::Missing);
        }
        self.file.read_exact_at(buf, offset).map_err(|error| Error::io("read", error))?;
        Ok(Local::Done)
    }

    fn read_at<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> DeviceFuture<'a, ()> {
        Box::pin(async move {
            check_range(self.size, offset, buf.len() as u64)?;
            self.misses.fetch_add(1, Ordering::SeqCst);
            let now = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
            self.in_flight_max.fetch_max(now, Ordering::SeqCst);
            let delay = *self.delay.lock();
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            self.in_flight.fetch_sub(1, Ordering::SeqCst);
            let end = offset + buf.len() as u64;
            if self.bad.lock().iter().any(|range| offset < range.end && range.start < end) {
                return Err(Error::WrongBytes {
                    chunk: Digest::of(b"bad"),
                    source_name: "test".to_owned(),
                    reason: "made bad".to_owned(),
                });
            }
            self.file.read_exact_at(buf, offset).map_err(|error| Error::io("read", error))?;
            let mut kept = Vec::new();
            for range in self.remote.lock().drain(..) {
                kept.extend([range.start..range.end.min(offset), range.start.max(end)..range.end]);
            }
            kept.retain(|range| range.start < range.end);
            self.remote.lock().extend(kept);
            Ok(())
        })
    }

    fn residence(&self, offset: u64, len: u64) -> Result<Vec<(u64, Residence)>> {
        check_range(self.size, offset, len)?;
        let mut runs: Vec<(u64, Residence)> = Vec::new();
        let (mut at, end) = (offset, offset + len);
        let mut block = [0; BLOCK as usize];
        while at < end {
            let next = (at / BLOCK * BLOCK + BLOCK).min(end);
            let slice = &mut block[..(next - at) as usize];
            self.file.read_exact_at(slice, at).map_err(|error| Error::io("read", error))?;
            let residence = if self.is_remote(at, next - at) {
                Residence::Remote
            } else if slice.iter().all(|byte| *byte == 0) {
                Residence::Zero
            } else {
                Residence::Local
            };
            match runs.last_mut() {
                Some(last) if last.1 == residence => last.0 += next - at,
                _ => runs.push((next - at, residence)),
            }
            at = next;
        }
        Ok(runs)
    }
}

/// A file of `blocks` blocks with data and, where `is_hole` says so, zeros. Data differs from block to block.
pub fn write_reference(path: PathBuf, blocks: u64, is_hole: impl Fn(u64) -> bool) -> PathBuf {
    let mut content = vec![0; (blocks * BLOCK) as usize];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for (number, block) in content.chunks_exact_mut(BLOCK as usize).enumerate() {
        if is_hole(number as u64) {
            continue;
        }
        for word in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
    std::fs::write(&path, content).unwrap();
    path
}
