//! Layers as they are stored: a tar of one file as zstd frames one after another.
//!
//! One frame with the headers of the tar, one for each chunk, one with the tar's padding and end. A client that knows
//! nothing of chunks unpacks it as any other `tar+zstd` layer.

use std::fs::File;
use std::io::{BufWriter, Write};

use crossbeam_channel::bounded;
use zstd::bulk::{Compressor, Decompressor};

use super::pipeline::Store;
use super::progress::{Event, Progress};
use crate::chunk::{CHUNK_SIZE, Digest, Hasher};
use crate::error::{Error, Result};

/// A pack's file stays below this, the most that 11 octal digits in a tar header can say.
pub(super) const PACK_MAX: u64 = (8 << 30) - 1;

const TAR_BLOCK: u64 = 512;

/// A layer that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Written {
    /// Digest of the stored bytes.
    pub digest: Digest,
    /// Length of the stored bytes.
    pub bytes: u64,
    /// Digest of the tar.
    pub diff_id: Digest,
}

/// A chunk to put into a pack: where it is in the spool, and its lengths.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    pub offset: u64,
    pub stored_len: u32,
    pub plain_len: u32,
}

/// The tar's bytes in front of a file of `len` bytes at `path`: headers of its directories and its own.
fn tar_head(path: &str, len: u64) -> Result<Vec<u8>> {
    let mut head = Vec::new();
    for (at, _) in path.match_indices('/') {
        let dir = path.get(..=at).unwrap_or_default();
        head.extend_from_slice(&tar_header(dir, b'5', 0o755, 0)?);
    }
    head.extend_from_slice(&tar_header(path, b'0', 0o644, len)?);
    Ok(head)
}

/// What follows a file of `len` bytes: padding to a block and the two blocks of zeros that end a tar.
pub(super) fn tar_tail(len: u64) -> Vec<u8> {
    vec![0; (len.wrapping_neg() % TAR_BLOCK + 2 * TAR_BLOCK) as usize]
}

pub(super) fn tar_header(path: &str, kind: u8, mode: u32, len: u64) -> Result<[u8; TAR_BLOCK as usize]> {
    let mut header = [0; TAR_BLOCK as usize];
    let mut put = |offset: usize, bytes: &[u8]| {
        header
            .get_mut(offset..offset + bytes.len())
            .map(|place| place.copy_from_slice(bytes))
            .ok_or_else(|| Error::invalid("pack", "a tar field is too long"))
    };
    if path.len() > 100 || len > PACK_MAX {
        return Err(Error::invalid("pack", format!("{path} of {len} bytes does not fit a tar header")));
    }
    put(0, path.as_bytes())?;
    put(100, format!("{mode:07o}\0").as_bytes())?;
    put(108, b"0000000\0")?;
    put(116, b"0000000\0")?;
    put(124, format!("{len:011o}\0").as_bytes())?;
    put(136, b"00000000000\0")?;
    put(148, b"        ")?;
    put(156, &[kind])?;
    put(257, b"ustar\x0000")?;
    put(329, b"0000000\0")?;
    put(337, b"0000000\0")?;
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    let sum = format!("{sum:06o}\0 ");
    if let Some(place) = header.get_mut(148..156) {
        place.copy_from_slice(sum.as_bytes());
    }
    Ok(header)
}

/// Writes a layer and hashes what it writes.
struct Out<W> {
    out: W,
    hasher: Hasher,
    bytes: u64,
}

impl<W: Write> Out<W> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        self.out
            .write_all(bytes)
            .map_err(|error| Error::io("writing a pack (to the layout, or where --temp or TMPDIR says)", error))
    }
}

fn frame(level: i32, plain: &[u8]) -> Result<Vec<u8>> {
    zstd::bulk::compress(plain, level).map_err(|error| Error::io("compressing", error))
}

/// Writes a pack at `path` in its tar to `file`; `placed` is told the offset of each item in the blob.
///
/// The plain tar's digest needs the plain bytes in the order of the pack, so chunks are inflated again: on all cores,
/// while this thread reads, writes and hashes the stored bytes.
pub(super) fn write_pack(
    file: &File,
    path: &str,
    items: &[Item],
    store: &Store,
    settings: (i32, usize),
    progress: &dyn Progress,
    mut placed: impl FnMut(usize, u64),
) -> Result<Written> {
    let (level, workers) = (settings.0, settings.1.max(1));
    let len: u64 = items.iter().map(|item| u64::from(item.plain_len)).sum();
    let (head, tail) = (tar_head(path, len)?, tar_tail(len));
    std::thread::scope(|scope| {
        // Item n is inflated by worker n mod workers, and hashed in order.
        let (mut feeds, mut results) = (Vec::new(), Vec::new());
        for _ in 0..workers {
            let (feed, stored) = bounded::<(Vec<u8>, u32)>(4);
            let (plain, result) = bounded::<Result<Vec<u8>>>(4);
            scope.spawn(move || {
                let mut decompressor = Decompressor::new();
                for (stored, plain_len) in stored {
                    let inflated = match &mut decompressor {
                        Ok(decompressor) => decompressor
                            .decompress(&stored, plain_len as usize)
                            .map_err(|error| Error::io("inflating a stored chunk", error)),
                        Err(error) => Err(Error::io("inflating", std::io::Error::from(error.kind()))),
                    };
                    if plain.send(inflated).is_err() {
                        break;
                    }
                }
            });
            feeds.push(feed);
            results.push(result);
        }
        let (tar_start, tar_end) = (&head, &tail);
        let hashing = scope.spawn(move || {
            let mut hasher = Hasher::new();
            hasher.update(tar_start);
            let mut done = 0;
            'all: loop {
                for result in &results {
                    let Ok(plain) = result.recv() else { break 'all };
                    hasher.update(&plain?);
                    done += 1;
                }
            }
            hasher.update(tar_end);
            Ok::<_, Error>((hasher.finish(), done))
        });
        let mut out = Out { out: BufWriter::with_capacity(CHUNK_SIZE as usize, file), hasher: Hasher::new(), bytes: 0 };
        out.write(&frame(level, &head)?)?;
        for (number, item) in items.iter().enumerate() {
            let mut stored = vec![0; item.stored_len as usize];
            store.read(item.offset, &mut stored)?;
            placed(number, out.bytes);
            out.write(&stored)?;
            progress.event(Event::Packed(stored.len() as u64));
            let Some(feed) = feeds.get(number % workers) else { break };
            if feed.send((stored, item.plain_len)).is_err() {
                break;
            }
        }
        out.write(&frame(level, &tail)?)?;
        out.out.flush().map_err(|error| Error::io("writing a pack", error))?;
        drop(feeds);
        let stopped = || Error::Stopping("the builder".into());
        let (diff_id, done) = hashing.join().map_err(|_| stopped())??;
        if done != items.len() {
            return Err(stopped());
        }
        Ok(Written { digest: out.hasher.finish(), bytes: out.bytes, diff_id })
    })
}

/// A layer in memory with one file, for the index.
pub(super) fn small_layer(path: &str, content: &[u8], level: i32) -> Result<(Vec<u8>, Written)> {
    let (head, tail) = (tar_head(path, content.len() as u64)?, tar_tail(content.len() as u64));
    let mut compressor = Compressor::new(level).map_err(|error| Error::io("compressing", error))?;
    let (mut blob, mut hasher) = (Vec::new(), Hasher::new());
    for part in [&head, content, &tail] {
        hasher.update(part);
        blob.extend(compressor.compress(part).map_err(|error| Error::io("compressing", error))?);
    }
    let written = Written { digest: Digest::of(&blob), bytes: blob.len() as u64, diff_id: hasher.finish() };
    Ok((blob, written))
}
