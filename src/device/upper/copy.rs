//! A copy of an upper as it is at one moment, while its device goes on.

use std::ops::Range;
use std::path::Path;

use super::{BLOCK_BYTES, Durability, Upper, UpperOptions};
use crate::chunk::is_zero;
use crate::error::{Error, Result};
use crate::index::BLOCK;

/// Bytes that are copied at a time.
const PIECE: u64 = 1 << 20;

impl Upper {
    /// Makes an upper in the directory `dir` with everything that is in this one at a moment: all that was answered
    /// before, flushed or not. It is of this start of the machine, `boot`, and not durable. Writes to this one wait
    /// until all is copied. Blocks; returns how many bytes are in it.
    ///
    /// # Errors
    /// What the system says; what is in `dir` then is for the caller to remove.
    pub fn copy_to(&self, dir: &Path, boot: &str) -> Result<u64> {
        let options = UpperOptions { size: Some(self.size), durability: Durability::Private, boot: boot.to_owned() };
        let copy = Self::open(dir, &self.lower, &options)?;
        let mut buffer = vec![0; PIECE as usize];
        let mut bytes = 0;
        let _closed = self.gate.close();
        for run in self.changed() {
            self.copy_run(&copy, &run, &mut buffer)?;
            let claim = copy.claims.try_take(run.clone()).ok_or_else(|| Error::Busy("a new upper".to_owned()))?;
            copy.add(&claim, &run)?;
            bytes += (run.end - run.start) * BLOCK_BYTES;
        }
        Ok(bytes)
    }

    /// Zeros are left out: they are holes of the new file.
    fn copy_run(&self, copy: &Self, run: &Range<u64>, buffer: &mut [u8]) -> Result<()> {
        let (mut at, end) = (run.start * BLOCK_BYTES, run.end * BLOCK_BYTES);
        while at < end {
            let piece = buffer.get_mut(..(end - at).min(PIECE) as usize).unwrap_or_default();
            self.read(at, piece)?;
            let mut rest: &[u8] = piece;
            while !rest.is_empty() {
                let zeros = rest.chunks(BLOCK as usize).take_while(|block| is_zero(block)).count();
                let (_, data) = rest.split_at((zeros * BLOCK as usize).min(rest.len()));
                let blocks = data.chunks(BLOCK as usize).take_while(|block| !is_zero(block)).count();
                let (data, later) = data.split_at((blocks * BLOCK as usize).min(data.len()));
                at += zeros as u64 * BLOCK_BYTES;
                if !data.is_empty() {
                    copy.write(at, data)?;
                }
                at += data.len() as u64;
                rest = later;
            }
        }
        Ok(())
    }
}
