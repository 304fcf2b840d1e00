//! The file system's metadata area as chunks: windows of a chunk's size, aligned on the device, without their zeros.

use super::intake::CHUNK_BLOCKS;
use super::pipeline::Pipeline;
use crate::chunk::{CHUNK_SIZE, is_zero};
use crate::error::{Error, Result};
use crate::ext4::BLOCK_SIZE;

/// Runs of at least this many zero blocks become holes; shorter ones cost less in a chunk than an extent does.
const HOLE_BLOCKS: usize = 8;

/// Device blocks that a part of a chunk backs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeviceExtent {
    pub block: u32,
    pub blocks: u32,
    pub job: u32,
    /// First byte in the chunk.
    pub offset: u32,
}

/// Takes metadata in ascending order.
pub(super) struct Windows<'a> {
    pipeline: &'a mut Pipeline,
    extents: Vec<DeviceExtent>,
    current: Option<(u32, Vec<u8>)>,
}

impl<'a> Windows<'a> {
    pub(super) const fn new(pipeline: &'a mut Pipeline) -> Self {
        Self { pipeline, extents: Vec::new(), current: None }
    }

    /// Takes whole blocks from `block` on; never goes back to an earlier window.
    pub(super) fn write(&mut self, block: u64, mut bytes: &[u8]) -> Result<()> {
        let mut block = u32::try_from(block).map_err(|_| Error::invalid("metadata", "beyond the device"))?;
        while !bytes.is_empty() {
            let window = block / CHUNK_BLOCKS;
            let within = (block % CHUNK_BLOCKS) as usize * BLOCK_SIZE;
            let len = bytes.len().min(CHUNK_SIZE as usize - within);
            let (now, later) = bytes.split_at(len);
            if self.current.as_ref().is_some_and(|(current, _)| *current != window) {
                self.close()?;
            }
            let (_, buffer) = match &mut self.current {
                Some(current) => current,
                empty => {
                    let mut buffer = self.pipeline.buffer()?;
                    buffer.fill(0);
                    empty.insert((window, buffer))
                }
            };
            buffer.get_mut(within..within + len).unwrap_or_default().copy_from_slice(now);
            bytes = later;
            block = block.saturating_add((len / BLOCK_SIZE) as u32);
        }
        Ok(())
    }

    /// The extents of everything that was taken.
    pub(super) fn finish(mut self) -> Result<Vec<DeviceExtent>> {
        self.close()?;
        Ok(self.extents)
    }

    fn close(&mut self) -> Result<()> {
        let Some((window, mut buffer)) = self.current.take() else { return Ok(()) };
        let job = self.pipeline.next_job();
        let mut used = 0;
        for (first, blocks) in occupied(&buffer) {
            let (start, len) = (first * BLOCK_SIZE, blocks * BLOCK_SIZE);
            buffer.copy_within(start..start + len, used);
            let block = window * CHUNK_BLOCKS + first as u32;
            self.extents.push(DeviceExtent { block, blocks: blocks as u32, job, offset: used as u32 });
            used += len;
        }
        if used == 0 {
            self.pipeline.return_buffer(buffer);
            return Ok(());
        }
        self.pipeline.submit(buffer, used).map(drop)
    }
}

/// Runs of blocks that are not zero, first block and length; short zero runs between them are taken along.
pub(super) fn occupied(window: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (number, block) in window.chunks(BLOCK_SIZE).enumerate() {
        if is_zero(block) {
            continue;
        }
        match runs.last_mut() {
            Some((first, blocks)) if number - (*first + *blocks) < HOLE_BLOCKS => *blocks = number + 1 - *first,
            _ => runs.push((number, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_zero_runs_are_left_out() {
        let mut window = vec![0; 30 * BLOCK_SIZE];
        for block in [1, 3, 12, 29] {
            window[block * BLOCK_SIZE + 5] = 1;
        }
        assert_eq!(occupied(&window), [(1, 3), (12, 1), (29, 1)]);
        assert_eq!(occupied(&vec![0; 4 * BLOCK_SIZE]), []);
    }
}
