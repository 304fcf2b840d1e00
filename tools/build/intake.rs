//! Contents on their way in: large files are cut into chunks as they stream by, small ones wait in a spool until it is
//! known which directory they end up in.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::pipeline::Pipeline;
use super::rootfs::{Content, Run};
use super::tar::fill;
use crate::chunk::CHUNK_SIZE;
use crate::error::{Error, Result};
use crate::ext4::{BLOCK_SIZE, Segment};
use crate::source::files::unlinked;

/// Files of at least this many bytes start a chunk of their own.
pub(super) const LARGE: u64 = 64 << 10;

const BLOCK: u64 = BLOCK_SIZE as u64;
/// Blocks in a chunk.
pub(super) const CHUNK_BLOCKS: u32 = CHUNK_SIZE / BLOCK_SIZE as u32;

/// Takes the contents of files.
pub(super) struct Intake {
    pub pipeline: Pipeline,
    small: io::BufWriter<File>,
    small_bytes: u64,
}

impl Intake {
    pub(super) fn new(pipeline: Pipeline, temp: &Path) -> Result<Self> {
        Ok(Self { pipeline, small: io::BufWriter::with_capacity(CHUNK_SIZE as usize, unlinked(temp)?), small_bytes: 0 })
    }

    /// Takes a file of `size` bytes, whose `segments` (offset and length, ascending, not empty, within the size) follow
    /// each other in `data`; all else is zeros.
    pub(super) fn file(&mut self, size: u64, segments: &[(u64, u64)], data: &mut impl Read) -> Result<Content> {
        if size < LARGE { self.small(size as u32, segments, data) } else { self.large(size, segments, data) }
    }

    /// Plain bytes of all small files so far.
    pub(super) const fn small_bytes(&self) -> u64 {
        self.small_bytes
    }

    /// Takes the contents of small files that follow each other in `data`: all of it, `bytes` long.
    pub(super) fn take_small(&mut self, data: &mut impl Read, bytes: u64) -> Result<()> {
        // What was written counts, so that offsets stay right after an error.
        let copied = io::copy(&mut data.take(bytes.saturating_add(1)), &mut Counted(self));
        match copied.map_err(|error| Error::io("copying small files", error))? {
            copied if copied == bytes => Ok(()),
            copied => Err(Error::invalid("small files", format!("{copied} bytes instead of {bytes}"))),
        }
    }

    /// The spool of small files, complete so far.
    pub(super) fn small_file(&mut self) -> Result<File> {
        let action = |error| Error::io("writing the spool of small files", error);
        self.small.flush().map_err(action)?;
        self.small.get_ref().try_clone().map_err(action)
    }

    fn small(&mut self, size: u32, segments: &[(u64, u64)], data: &mut impl Read) -> Result<Content> {
        let offset = self.small_bytes;
        if size > 0 {
            let mut buffer = self.pipeline.buffer()?;
            let content = buffer.get_mut(..size as usize).unwrap_or_default();
            let result = Cursor::new(segments).fill(0, content, data).and_then(|()| {
                self.small.write_all(content).map_err(|error| Error::io("writing the spool of small files", error))
            });
            self.pipeline.return_buffer(buffer);
            result?;
        }
        self.small_bytes += u64::from(size);
        Ok(Content::Small { offset, bytes: size })
    }

    fn large(&mut self, size: u64, segments: &[(u64, u64)], data: &mut impl Read) -> Result<Content> {
        let mut cursor = Cursor::new(segments);
        let mut runs = Vec::new();
        for segment in block_runs(segments)? {
            runs.push(Run { segment, job: self.pipeline.next_job() });
            for (block, blocks) in pieces(segment) {
                let mut buffer = self.pipeline.buffer()?;
                let len = blocks as usize * BLOCK_SIZE;
                let filled = cursor.fill(u64::from(block) * BLOCK, buffer.get_mut(..len).unwrap_or_default(), data);
                if let Err(error) = filled {
                    self.pipeline.return_buffer(buffer);
                    return Err(error);
                }
                self.pipeline.submit(buffer, len)?;
            }
        }
        Ok(Content::Large { bytes: size, runs: runs.into() })
    }

    /// All files are in: what is needed to read the small ones back.
    pub(super) fn finish(self) -> Result<(Pipeline, SmallFiles)> {
        let file = self
            .small
            .into_inner()
            .map_err(|error| Error::io("writing the spool of small files", error.into_error()))?;
        Ok((self.pipeline, SmallFiles(file)))
    }
}

struct Counted<'a>(&'a mut Intake);

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.0.small.write(bytes)?;
        self.0.small_bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The contents of small files.
pub(super) struct SmallFiles(File);

impl SmallFiles {
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.0.read_exact_at(buf, offset).map_err(|error| Error::io("reading the spool of small files", error))
    }
}

/// A run of blocks, cut at every multiple of a chunk's size in the file: first block and number of blocks of each piece.
pub(super) fn pieces(run: Segment) -> impl Iterator<Item = (u32, u32)> {
    let end = run.file_block.saturating_add(run.blocks);
    let mut at = run.file_block;
    std::iter::from_fn(move || {
        let next = (at / CHUNK_BLOCKS).saturating_add(1).saturating_mul(CHUNK_BLOCKS).min(end);
        let piece = (at, next.checked_sub(at).filter(|blocks| *blocks > 0)?);
        at = next;
        Some(piece)
    })
}

/// The blocks that byte ranges touch.
fn block_runs(segments: &[(u64, u64)]) -> Result<Vec<Segment>> {
    let mut runs: Vec<Segment> = Vec::new();
    for (offset, len) in segments {
        let block =
            |number: u64| u32::try_from(number).map_err(|_| Error::invalid("file", "it is larger than ext4 can hold"));
        let (first, end) = (block(offset / BLOCK)?, block((offset + len).div_ceil(BLOCK))?);
        match runs.last_mut() {
            Some(last) if first <= last.file_block + last.blocks => {
                last.blocks = last.blocks.max(end - last.file_block);
            }
            _ => runs.push(Segment { file_block: first, blocks: end - first }),
        }
    }
    Ok(runs)
}

/// Reads byte ranges that follow each other in a stream to where they belong.
struct Cursor<'a> {
    segments: &'a [(u64, u64)],
    /// Bytes of the first segment that are read already.
    taken: u64,
}

impl<'a> Cursor<'a> {
    const fn new(segments: &'a [(u64, u64)]) -> Self {
        Self { segments, taken: 0 }
    }

    /// Fills `buf`, which begins at `start` in the file, with what the segments have there, and zeros elsewhere.
    fn fill(&mut self, start: u64, buf: &mut [u8], data: &mut impl Read) -> Result<()> {
        let mut at = 0;
        while let Some((&(offset, len), rest)) = self.segments.split_first() {
            let from = (offset + self.taken - start).min(buf.len() as u64) as usize;
            let to = (offset + len - start).min(buf.len() as u64) as usize;
            if from == buf.len() {
                break;
            }
            buf.get_mut(at..from).unwrap_or_default().fill(0);
            let wanted = buf.get_mut(from..to).unwrap_or_default();
            let (read, wanted) = (fill(data, wanted), wanted.len());
            if read.map_err(|error| Error::io("reading", error))? < wanted {
                return Err(Error::invalid("file", "its data ends early"));
            }
            at = to;
            self.taken += wanted as u64;
            if self.taken == len {
                (self.segments, self.taken) = (rest, 0);
            }
        }
        buf.get_mut(at..).unwrap_or_default().fill(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn ranges_go_where_they_belong() {
        let segments = [(10, 5), (4090, 10), (9000, 1)];
        let mut data: &[u8] = b"abcdeABCDEFGHIJz";
        let mut cursor = Cursor::new(&segments);
        let mut all = Vec::new();
        for start in [0u64, 4096, 8192] {
            let mut buf = vec![7; 4096];
            cursor.fill(start, &mut buf, &mut data).unwrap();
            all.extend(buf);
        }
        let mut expected = vec![0; 12288];
        expected[10..15].copy_from_slice(b"abcde");
        expected[4090..4100].copy_from_slice(b"ABCDEFGHIJ");
        expected[9000] = b'z';
        assert!(all == expected);
        assert_eq!(block_runs(&segments).unwrap(), [Segment { file_block: 0, blocks: 3 }]);
    }

    #[test]
    fn runs_are_cut_at_chunk_borders_of_the_file() {
        let all: Vec<_> = pieces(Segment { file_block: 60, blocks: 80 }).collect();
        assert_eq!(all, [(60, 4), (64, 64), (128, 12)]);
        assert_eq!(pieces(Segment { file_block: 0, blocks: 0 }).count(), 0);
    }
}
