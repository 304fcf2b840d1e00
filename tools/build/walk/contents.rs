//! The contents of a file on disk: its parts that are not holes, as one stream that is read ahead.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{Advice, SeekFrom};

use crate::build::intake::LARGE;
use crate::error::{Error, Result};

/// Bytes that the kernel is asked to read ahead of what is read.
pub(super) const ADVISED: u64 = 1 << 20;

/// Asks the kernel to read a part of a file; it may refuse, and then the part is read when it is needed.
pub(super) fn advise(file: &File, offset: u64, len: u64) {
    if let Some(len) = NonZeroU64::new(len) {
        let _ = rustix::fs::fadvise(file, offset, Some(len), Advice::WillNeed);
    }
}

/// The parts of a file that are not holes, offset and length, at most `limit` of them.
pub(super) fn segments(file: &File, found: &Metadata, limit: usize) -> Result<Vec<(u64, u64)>> {
    let size = found.len();
    let sparse = size >= LARGE && found.blocks().saturating_mul(512) < size;
    match (sparse, size) {
        (_, 0) => Ok(Vec::new()),
        (true, _) => data_segments(file, size, limit),
        (false, _) => Ok(vec![(0, size)]),
    }
}

fn data_segments(file: &File, size: u64, limit: usize) -> Result<Vec<(u64, u64)>> {
    let mut segments = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start.min(size),
            Err(rustix::io::Errno::NXIO) => break,
            // A file system that does not know holes.
            Err(rustix::io::Errno::INVAL) => return Ok(vec![(0, size)]),
            Err(error) => return Err(Error::io("finding its holes", error.into())),
        };
        if start == size {
            break;
        }
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))
            .map_err(|error| Error::io("finding its holes", error.into()))?
            .min(size);
        if segments.len() >= limit {
            return Err(Error::invalid("source", format!("it has more than {limit} pieces (limit)")));
        }
        segments.push((start, end - start));
        at = end;
    }
    Ok(segments)
}

/// Parts of a file as one stream.
pub(super) struct Segments<'a> {
    file: &'a File,
    segments: &'a [(u64, u64)],
    /// Bytes of the first segment that are read already.
    taken: u64,
    /// The kernel was asked for the file up to here.
    advised: u64,
}

impl<'a> Segments<'a> {
    pub(super) const fn new(file: &'a File, segments: &'a [(u64, u64)]) -> Self {
        Self { file, segments, taken: 0, advised: ADVISED }
    }

    /// Keeps the kernel ahead of a reader that is at `at`, within a part that ends at `end`.
    fn advise(&mut self, at: u64, end: u64) {
        let wanted = at.saturating_add(ADVISED);
        if self.advised < end && self.advised < wanted {
            let from = self.advised.max(at);
            let to = wanted.saturating_add(ADVISED).min(end);
            advise(self.file, from, to.saturating_sub(from));
            self.advised = to;
        }
    }
}

impl Read for Segments<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some((&(offset, len), rest)) = self.segments.split_first() else { return Ok(0) };
        self.advise(offset + self.taken, offset + len);
        let want = buf.len().min(usize::try_from(len - self.taken).unwrap_or(usize::MAX));
        let read = self.file.read_at(buf.get_mut(..want).unwrap_or_default(), offset + self.taken)?;
        self.taken += read as u64;
        if self.taken == len {
            (self.segments, self.taken) = (rest, 0);
        }
        Ok(read)
    }
}
