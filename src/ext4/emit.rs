//! The way out: blocks in ascending order, handed on in runs.

use super::layout::{BLOCK_SIZE, Block};
use crate::error::{Error, Result};

/// How much is collected before it is handed on.
const RUN: usize = 64 * BLOCK_SIZE;

/// Collects neighbouring blocks for a sink.
pub struct Emitter<'a> {
    sink: &'a mut dyn FnMut(u64, &[u8]) -> Result<()>,
    start: u64,
    next: u64,
    run: Vec<u8>,
}

impl<'a> Emitter<'a> {
    /// Nothing emitted yet.
    pub fn new(sink: &'a mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Self {
        Self { sink, start: 0, next: 0, run: Vec::with_capacity(RUN) }
    }

    /// The next block, which must lie behind all before it.
    pub fn put(&mut self, number: u32, block: &Block) -> Result<()> {
        let number = u64::from(number);
        if number < self.next {
            return Err(Error::invalid("file system", format!("block {number} was planned twice")));
        }
        if number != self.next || self.run.len() >= RUN {
            self.flush()?;
        }
        if self.run.is_empty() {
            self.start = number;
        }
        self.run.extend_from_slice(block);
        self.next = number + 1;
        Ok(())
    }

    /// Hands on what was collected.
    pub fn flush(&mut self) -> Result<()> {
        if !self.run.is_empty() {
            (self.sink)(self.start, &self.run)?;
            self.run.clear();
        }
        Ok(())
    }
}
