//! A layer's entries as they are kept: fields one after another, numbers little-endian, bytes behind their length.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;

use crate::build::rootfs::{Content, Run};
use crate::build::tar::{Entry, EntryKind};
use crate::error::{Error, Result};
use crate::ext4::{Segment, Time};
use crate::source::files::unlinked;

/// Speed matters more than size here: what is kept is read at most a few times.
pub(super) const LEVEL: i32 = 1;

/// Writes down the entries of a layer while they are applied. Numbers of jobs and offsets of small files count from the
/// layer's first.
pub(in crate::build) struct Recorder {
    out: zstd::stream::write::Encoder<'static, BufWriter<File>>,
    first_job: u32,
    first_small: u64,
    record: Vec<u8>,
}

impl Recorder {
    pub(super) fn new(temp: &Path, first_job: u32, first_small: u64) -> Result<Self> {
        let file = BufWriter::with_capacity(64 << 10, unlinked(temp)?);
        let out = zstd::stream::write::Encoder::new(file, LEVEL).map_err(writing)?;
        Ok(Self { out, first_job, first_small, record: Vec::new() })
    }

    /// Takes an entry that was applied, and where its content went if it has one.
    pub(in crate::build) fn entry(&mut self, path: &[u8], entry: &Entry, content: Option<&Content>) -> Result<()> {
        let mut record = std::mem::take(&mut self.record);
        record.clear();
        self.encode(&mut record, path, entry, content);
        let written =
            self.out.write_all(&(record.len() as u64).to_le_bytes()).and_then(|()| self.out.write_all(&record));
        self.record = record;
        written.map_err(writing)
    }

    fn encode(&self, to: &mut Vec<u8>, path: &[u8], entry: &Entry, content: Option<&Content>) {
        let (kind, major, minor) = match entry.kind {
            EntryKind::File => (0, 0, 0),
            EntryKind::HardLink => (1, 0, 0),
            EntryKind::Symlink => (2, 0, 0),
            EntryKind::CharDevice { major, minor } => (3, major, minor),
            EntryKind::BlockDevice { major, minor } => (4, major, minor),
            EntryKind::Directory => (5, 0, 0),
            EntryKind::Fifo => (6, 0, 0),
        };
        to.push(kind);
        for number in [major, minor, u64::from(entry.mode), u64::from(entry.uid), u64::from(entry.gid)] {
            put(to, number);
        }
        put(to, entry.mtime.secs.cast_unsigned());
        put(to, u64::from(entry.mtime.nanos));
        bytes(to, path);
        bytes(to, &entry.link);
        put(to, entry.xattrs.len() as u64);
        for (name, value) in &entry.xattrs {
            bytes(to, name);
            bytes(to, value);
        }
        match content {
            None => to.push(0),
            Some(Content::Small { offset, bytes }) => {
                to.push(1);
                put(to, offset - self.first_small);
                put(to, u64::from(*bytes));
            }
            Some(Content::Large { bytes, runs }) => {
                to.push(2);
                put(to, *bytes);
                put(to, runs.len() as u64);
                for run in runs {
                    put(to, u64::from(run.segment.file_block));
                    put(to, u64::from(run.segment.blocks));
                    put(to, u64::from(run.job - self.first_job));
                }
            }
        }
    }

    /// The layer is read: its entries, compressed.
    pub(super) fn finish(self) -> Result<File> {
        let file = self.out.finish().map_err(writing)?;
        file.into_inner().map_err(|error| writing(error.into_error()))
    }
}

fn writing(error: io::Error) -> Error {
    Error::io("writing down a layer's entries for the build cache", error)
}

fn put(to: &mut Vec<u8>, number: u64) {
    to.extend_from_slice(&number.to_le_bytes());
}

fn bytes(to: &mut Vec<u8>, bytes: &[u8]) {
    put(to, bytes.len() as u64);
    to.extend_from_slice(bytes);
}

/// An entry, as it was recorded.
pub(super) struct Recorded {
    pub path: Vec<u8>,
    pub entry: Entry,
    pub content: Option<Content>,
}

/// Where a layer's small files and jobs begin in this build.
#[derive(Clone, Copy, Debug)]
pub(super) struct Base {
    pub first_job: u32,
    pub jobs: u32,
    pub first_small: u64,
    pub small_bytes: u64,
}

/// Reads entries back.
pub(super) struct Entries<R: Read> {
    input: BufReader<zstd::stream::read::Decoder<'static, BufReader<R>>>,
    base: Base,
    record: Vec<u8>,
}

/// No record is longer: a tar entry's extended headers and map are bounded far below it.
const RECORD_MAX: u64 = 1 << 30;

impl<R: Read> Entries<R> {
    pub(super) fn new(input: R, base: Base) -> Result<Self> {
        let decoder = zstd::stream::read::Decoder::new(input).map_err(reading)?;
        Ok(Self { input: BufReader::with_capacity(64 << 10, decoder), base, record: Vec::new() })
    }

    /// The next entry.
    pub(super) fn next(&mut self) -> Result<Option<Recorded>> {
        let mut len = [0; 8];
        match crate::build::tar::fill(&mut self.input, &mut len).map_err(reading)? {
            0 => return Ok(None),
            8 => {}
            _ => return Err(malformed()),
        }
        let len = u64::from_le_bytes(len);
        if len > RECORD_MAX {
            return Err(malformed());
        }
        self.record.clear();
        let read = (&mut self.input).take(len).read_to_end(&mut self.record).map_err(reading)?;
        if read as u64 != len {
            return Err(malformed());
        }
        let mut fields = Fields(&self.record);
        let recorded = decode(&mut fields, self.base).filter(|_| fields.0.is_empty());
        recorded.map(Some).ok_or_else(malformed)
    }
}

fn reading(error: io::Error) -> Error {
    Error::io("reading a layer's entries from the build cache", error)
}

/// Its digest was right, so this is no damage.
fn malformed() -> Error {
    Error::invalid(
        "build cache",
        "a layer's entries are malformed; build with --no-cache, or remove the cache's directory",
    )
}

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn number(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn small<T: TryFrom<u64>>(&mut self) -> Option<T> {
        T::try_from(self.number()?).ok()
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = self.small()?;
        self.take(len)
    }
}

fn decode(fields: &mut Fields<'_>, base: Base) -> Option<Recorded> {
    let kind = fields.byte()?;
    let (major, minor) = (fields.number()?, fields.number()?);
    let kind = match kind {
        0 => EntryKind::File,
        1 => EntryKind::HardLink,
        2 => EntryKind::Symlink,
        3 => EntryKind::CharDevice { major, minor },
        4 => EntryKind::BlockDevice { major, minor },
        5 => EntryKind::Directory,
        6 => EntryKind::Fifo,
        _ => return None,
    };
    let (mode, uid, gid) = (fields.small()?, fields.small()?, fields.small()?);
    let mtime = Time { secs: fields.number()?.cast_signed(), nanos: fields.small()? };
    let (path, link) = (fields.bytes()?.to_vec(), fields.bytes()?.to_vec());
    let mut xattrs = Vec::new();
    for _ in 0..fields.number()? {
        xattrs.push((fields.bytes()?.into(), fields.bytes()?.into()));
    }
    let content = content(fields, base)?;
    let entry = Entry { path: Vec::new(), link, kind, mode, uid, gid, mtime, size: 0, segments: Vec::new(), xattrs };
    Some(Recorded { path, entry, content })
}

fn content(fields: &mut Fields<'_>, base: Base) -> Option<Option<Content>> {
    match fields.byte()? {
        0 => Some(None),
        1 => {
            let (offset, bytes) = (fields.number()?, fields.small::<u32>()?);
            let end = offset.checked_add(u64::from(bytes))?;
            let offset = (end <= base.small_bytes).then_some(base.first_small + offset)?;
            Some(Some(Content::Small { offset, bytes }))
        }
        2 => {
            let bytes = fields.number()?;
            let mut runs = Vec::new();
            for _ in 0..fields.number()? {
                let segment = Segment { file_block: fields.small()?, blocks: fields.small()? };
                let job = fields.small::<u32>()?;
                let jobs = crate::build::intake::pieces(segment).count();
                segment.file_block.checked_add(segment.blocks)?;
                let end = usize::try_from(job).ok()?.checked_add(jobs)?;
                let job = (end <= base.jobs as usize).then_some(base.first_job + job)?;
                runs.push(Run { segment, job });
            }
            Some(Some(Content::Large { bytes, runs: runs.into() }))
        }
        _ => None,
    }
}
