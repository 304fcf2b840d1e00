//! One file of the cache.
//!
//! ```text
//! stored chunks │ entries (zstd) │ small files (zstd) │ jobs: 4 bytes each │ chunks: 72 bytes each │ footer
//! ```
//!
//! A job is the number of a chunk, or [`HOLE`]. A chunk is the digest of its plain bytes, the digest of its stored bytes, and
//! both lengths; a stored length of 0 says that an earlier image had it and it is not here. The footer has the lengths
//! of the parts and a digest of everything behind the stored chunks.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::chunk::{CHUNK_SIZE, Digest, Hasher, STORED_MAX};
use crate::error::{Error, Result};

/// The job of a piece that is all zeros.
pub(super) const HOLE: u32 = u32::MAX;

const MAGIC: &[u8; 8] = b"FRSTRDBC";
const CHUNK_BYTES: u64 = 72;
const FOOTER: usize = 8 + 32 + 7 * 8 + 32;

/// A chunk in a cache file.
#[derive(Clone, Copy, Debug)]
pub(in crate::build) struct Kept {
    pub digest: Digest,
    pub stored_digest: Digest,
    pub plain_len: u32,
    pub stored_len: u32,
    /// Where its stored bytes are in the file.
    pub offset: u64,
}

/// Lengths of the parts, in their order, and of what is compressed.
#[derive(Clone, Copy, Debug, Default)]
struct Lengths {
    frames: u64,
    entries: u64,
    small: u64,
    jobs: u64,
    chunks: u64,
    /// Plain bytes of the layer's tar.
    tar_bytes: u64,
    /// Plain bytes of its small files.
    small_bytes: u64,
}

impl Lengths {
    fn fields(&self) -> [u64; 7] {
        [self.frames, self.entries, self.small, self.jobs, self.chunks, self.tar_bytes, self.small_bytes]
    }

    /// Length of the file, if it is one.
    fn file(&self) -> Option<u64> {
        let tables = self.jobs.checked_mul(4)?.checked_add(self.chunks.checked_mul(CHUNK_BYTES)?)?;
        let parts = self.frames.checked_add(self.entries)?.checked_add(self.small)?;
        parts.checked_add(tables)?.checked_add(FOOTER as u64)
    }
}

/// An open file whose tables, entries and small files are what was written.
pub(in crate::build) struct CacheFile {
    pub path: PathBuf,
    pub file: File,
    pub jobs: Vec<u32>,
    pub chunks: Vec<Kept>,
    lengths: Lengths,
}

impl CacheFile {
    /// Opens the file at `path`, which must be the one for `key`, and checks all of it but the stored chunks.
    pub(super) fn open(path: &Path, key: &Digest) -> Result<Self> {
        let action = |error| Error::io(format!("reading {}", path.display()), error);
        let damaged = || Error::invalid("cache file", "it is damaged");
        let file = File::open(path).map_err(action)?;
        let len = file.metadata().map_err(action)?.len();
        let start = len.checked_sub(FOOTER as u64).ok_or_else(damaged)?;
        let mut footer = [0; FOOTER];
        file.read_exact_at(&mut footer, start).map_err(action)?;
        let lengths = parse(&footer, key).filter(|lengths| lengths.file() == Some(len)).ok_or_else(damaged)?;
        let mut hasher = Hasher::new();
        let mut body = Part { file: &file, at: lengths.frames, end: start };
        let mut buffer = vec![0; 256 << 10];
        loop {
            let read = body.read(&mut buffer).map_err(action)?;
            if read == 0 {
                break;
            }
            hasher.update(buffer.get(..read).unwrap_or_default());
        }
        let (fields, digest) = footer.split_at(FOOTER - 32);
        hasher.update(fields);
        if hasher.finish().as_bytes() != digest {
            return Err(damaged());
        }
        let mut tables = Vec::new();
        let tables_at = lengths.frames + lengths.entries + lengths.small;
        let read = Part { file: &file, at: tables_at, end: start }.read_to_end(&mut tables);
        read.map_err(action)?;
        let (jobs, chunks) = tables.split_at_checked(lengths.jobs as usize * 4).ok_or_else(damaged)?;
        let jobs = jobs.chunks_exact(4).map(|job| word(job, 0)).collect();
        let chunks = kept(chunks, lengths.frames).ok_or_else(damaged)?;
        Ok(Self { path: path.to_owned(), file, jobs, chunks, lengths })
    }

    /// Says that it was used now.
    pub(super) fn touch(&self) {
        // A time that can't be set makes the file older than it is.
        let _ = self.file.set_modified(SystemTime::now());
    }

    /// Plain bytes of the layer's tar.
    pub(super) const fn tar_bytes(&self) -> u64 {
        self.lengths.tar_bytes
    }

    /// Plain bytes of the layer's small files.
    pub(super) const fn small_bytes(&self) -> u64 {
        self.lengths.small_bytes
    }

    /// The entries, compressed.
    pub(super) fn entries(&self) -> impl Read {
        let at = self.lengths.frames;
        Part { file: &self.file, at, end: at + self.lengths.entries }
    }

    /// The contents of the small files, compressed.
    pub(super) fn small(&self) -> impl Read {
        let at = self.lengths.frames + self.lengths.entries;
        Part { file: &self.file, at, end: at + self.lengths.small }
    }
}

/// Reads a chunk's stored bytes into `stored`; false if they are not what was written.
pub(in crate::build) fn read_chunk(file: &File, chunk: &Kept, stored: &mut Vec<u8>) -> bool {
    stored.clear();
    stored.resize(chunk.stored_len as usize, 0);
    file.read_exact_at(stored, chunk.offset).is_ok() && Digest::of(stored) == chunk.stored_digest
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn digest(bytes: &[u8], at: usize) -> Option<Digest> {
    Some(Digest::from_bytes(bytes.get(at..at + 32)?.try_into().ok()?))
}

/// The lengths in a footer that belongs to `key`.
fn parse(footer: &[u8; FOOTER], key: &Digest) -> Option<Lengths> {
    let rest = footer.strip_prefix(MAGIC)?.strip_prefix(key.as_bytes())?;
    let mut numbers = rest.chunks_exact(8).map(|number| number.try_into().map_or(0, u64::from_le_bytes));
    let mut next = || numbers.next();
    Some(Lengths {
        frames: next()?,
        entries: next()?,
        small: next()?,
        jobs: next()?,
        chunks: next()?,
        tar_bytes: next()?,
        small_bytes: next()?,
    })
}

/// The table of chunks, whose stored bytes fill `frames` bytes.
fn kept(table: &[u8], frames: u64) -> Option<Vec<Kept>> {
    let mut offset = 0u64;
    let mut chunks = Vec::new();
    for chunk in table.chunks_exact(CHUNK_BYTES as usize) {
        let (plain_len, stored_len) = (word(chunk, 64), word(chunk, 68));
        if plain_len == 0 || plain_len > CHUNK_SIZE || stored_len > STORED_MAX {
            return None;
        }
        chunks.push(Kept {
            digest: digest(chunk, 0)?,
            stored_digest: digest(chunk, 32)?,
            plain_len,
            stored_len,
            offset,
        });
        offset += u64::from(stored_len);
    }
    (offset == frames).then_some(chunks)
}

/// A part of a file as a stream.
pub(super) struct Part<'a> {
    pub file: &'a File,
    pub at: u64,
    pub end: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = buf.len().min(usize::try_from(self.end - self.at).unwrap_or(usize::MAX));
        let read = self.file.read_at(buf.get_mut(..len).unwrap_or_default(), self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// Writes a cache file: first chunks, then the parts behind them.
pub(super) struct Writer {
    out: BufWriter<File>,
    /// Of everything behind the chunks.
    hasher: Hasher,
    lengths: Lengths,
    table: Vec<u8>,
}

impl Writer {
    pub(super) fn new(file: File) -> Self {
        let out = BufWriter::with_capacity(256 << 10, file);
        Self { out, hasher: Hasher::new(), lengths: Lengths::default(), table: Vec::new() }
    }

    /// Adds a chunk with its stored bytes; without any, it is listed only.
    pub(super) fn chunk(&mut self, digest: &Digest, plain_len: u32, stored: &[u8]) -> Result<()> {
        self.out.write_all(stored).map_err(writing)?;
        self.lengths.frames += stored.len() as u64;
        self.lengths.chunks += 1;
        self.table.extend_from_slice(digest.as_bytes());
        self.table.extend_from_slice(Digest::of(stored).as_bytes());
        self.table.extend_from_slice(&plain_len.to_le_bytes());
        self.table.extend_from_slice(&(stored.len() as u32).to_le_bytes());
        Ok(())
    }

    /// All chunks are in: adds the rest, and returns the file's length.
    pub(super) fn finish(mut self, key: &Digest, layer: Option<Parts<'_>>) -> Result<u64> {
        if let Some(Parts { entries, small, small_bytes, tar_bytes, jobs }) = layer {
            let len = entries.metadata().map_err(writing)?.len();
            self.lengths.entries = self.copy(&mut Part { file: entries, at: 0, end: len })?;
            self.lengths.small = self.copy_compressed(&mut { small })?;
            (self.lengths.small_bytes, self.lengths.tar_bytes) = (small_bytes, tar_bytes);
            self.lengths.jobs = jobs.len() as u64;
            let jobs: Vec<u8> = jobs.iter().flat_map(|job| job.to_le_bytes()).collect();
            self.put(&jobs)?;
        }
        let table = std::mem::take(&mut self.table);
        self.put(&table)?;
        let mut footer = MAGIC.to_vec();
        footer.extend_from_slice(key.as_bytes());
        self.lengths.fields().iter().for_each(|field| footer.extend_from_slice(&field.to_le_bytes()));
        self.put(&footer)?;
        let digest = std::mem::take(&mut self.hasher).finish();
        self.out.write_all(digest.as_bytes()).and_then(|()| self.out.flush()).map_err(writing)?;
        self.lengths.file().ok_or_else(|| Error::invalid("build cache", "a file is too long"))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.out.write_all(bytes).map_err(writing)
    }

    fn copy(&mut self, from: &mut impl Read) -> Result<u64> {
        let (mut buffer, mut copied) = (vec![0; 256 << 10], 0);
        loop {
            let read = from.read(&mut buffer).map_err(writing)?;
            if read == 0 {
                return Ok(copied);
            }
            self.put(buffer.get(..read).unwrap_or_default())?;
            copied += read as u64;
        }
    }

    fn copy_compressed(&mut self, from: &mut impl Read) -> Result<u64> {
        let encoder = zstd::stream::read::Encoder::new(from, super::entry::LEVEL);
        self.copy(&mut encoder.map_err(writing)?)
    }
}

fn writing(error: io::Error) -> Error {
    Error::io("writing the build cache", error)
}

/// What a layer's file has beside chunks.
pub(super) struct Parts<'a> {
    /// Compressed already.
    pub entries: &'a File,
    pub small: Part<'a>,
    pub small_bytes: u64,
    pub tar_bytes: u64,
    pub jobs: &'a [u32],
}
