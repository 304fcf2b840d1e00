//! Unpacking the index layer: a stream of zstd frames holding a tar with one file, checked on every level.
#![deny(clippy::indexing_slicing)]

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::mpsc;

use crate::chunk::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::oci::{IndexLayer, annotation};
use crate::source::files::{Unpublished, blocking};
use crate::source::{Repository, Source};

/// Size of a tar header and unit of its padding (POSIX.1-2017, pax, "ustar Interchange Format").
const BLOCK: usize = 512;
/// Most entries before the index: its directory, and some that may be added one day.
const MAX_ENTRIES: u32 = 16;
/// Most plain bytes of an entry before the index, and behind the index.
const MAX_OTHER: u64 = 1 << 20;

/// Fetches the index layer and publishes the plain index at `path`.
///
/// # Errors
/// As of [`Source::read_at`]; [`Error::WrongBytes`] when the layer or the index does not have its digest; otherwise
/// [`Error::Invalid`].
pub(super) async fn unpack_index(repository: &Repository, layer: &IndexLayer, path: &Path) -> Result<()> {
    let mut body = repository.blob(&layer.digest, layer.bytes).await?;
    let (sender, receiver) = mpsc::channel(4);
    let unpacking = blocking({
        let (layer, path, name) = (layer.clone(), path.to_owned(), repository.name().to_owned());
        move || unpack(receiver, &layer, path, &name)
    });
    // Moves the sender in, so that the reader sees the end.
    let feeding = async move {
        while let Some(piece) = body.next().await {
            let failed = piece.is_err();
            // A reader that has gone away has its own error to tell.
            if sender.send(piece).await.is_err() || failed {
                break;
            }
        }
    };
    tokio::join!(feeding, unpacking).1
}

fn unpack(pieces: mpsc::Receiver<Result<Bytes>>, layer: &IndexLayer, path: PathBuf, name: &str) -> Result<()> {
    let mut stored = Stored { pieces, piece: Bytes::new(), hasher: Hasher::new(), failure: None };
    let result = unpack_tar(&mut stored, layer, &path);
    if let Some(failure) = stored.failure.take() {
        return Err(failure);
    }
    // Whatever the layer's content looks like: if it is not the layer, that is what to say.
    let wrong = |chunk, reason| Error::WrongBytes { chunk, source_name: name.to_owned(), reason };
    io::copy(&mut stored, &mut io::sink()).map_err(|error| invalid(error.to_string()))?;
    let found = stored.hasher.finish();
    if found != layer.digest {
        return Err(wrong(layer.digest, format!("the index layer's bytes hash to {found}")));
    }
    let (file, found) = result?;
    if found != layer.index_digest {
        return Err(invalid(format!("the index hashes to {found}, not to {} as annotated", layer.index_digest)));
    }
    // Whoever reads it checks it.
    file.place(&path)
}

/// Writes the index to a file without a name; returns it with its digest.
fn unpack_tar(stored: &mut Stored, layer: &IndexLayer, path: &Path) -> Result<(Unpublished, Digest)> {
    let failed = |error: io::Error| invalid(error.to_string());
    let mut plain = zstd::stream::read::Decoder::new(stored).map_err(failed)?;
    let mut entries = 0;
    loop {
        let mut header = [0; BLOCK];
        plain.read_exact(&mut header).map_err(failed)?;
        let entry = Entry::parse(&header)?;
        if entry.is_file && entry.path == annotation::INDEX_PATH {
            if entry.bytes != layer.index_bytes {
                let reason = format!("the index has {} bytes, not {} as annotated", entry.bytes, layer.index_bytes);
                return Err(invalid(reason));
            }
            break;
        }
        entries += 1;
        if entries > MAX_ENTRIES || entry.bytes > MAX_OTHER {
            return Err(invalid(format!("the layer has other things in it than {}", annotation::INDEX_PATH)));
        }
        let skipped = entry.bytes.next_multiple_of(BLOCK as u64);
        if io::copy(&mut plain.by_ref().take(skipped), &mut io::sink()).map_err(failed)? != skipped {
            return Err(invalid("the tar ends inside an entry"));
        }
    }
    let mut file = Unpublished::create(path.parent().unwrap_or(Path::new(".")))?;
    let mut hasher = Hasher::new();
    let mut left = layer.index_bytes;
    let mut buffer = vec![0; 256 << 10];
    while left > 0 {
        let read = plain.by_ref().take(left).read(&mut buffer).map_err(failed)?;
        let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else {
            return Err(invalid("the tar ends inside the index"));
        };
        hasher.update(bytes);
        file.write(bytes)?;
        left -= read as u64;
    }
    if io::copy(&mut plain.take(MAX_OTHER + 1), &mut io::sink()).map_err(failed)? > MAX_OTHER {
        return Err(invalid("the layer goes on behind the index"));
    }
    Ok((file, hasher.finish()))
}

/// The stored bytes as they arrive, hashed.
struct Stored {
    pieces: mpsc::Receiver<Result<Bytes>>,
    piece: Bytes,
    hasher: Hasher,
    /// Why the source broke off.
    failure: Option<Error>,
}

impl Read for Stored {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.pieces.blocking_recv() {
                Some(Ok(piece)) => self.piece = piece,
                Some(Err(error)) => {
                    let text = error.to_string();
                    self.failure = Some(error);
                    return Err(io::Error::other(text));
                }
                None => return Ok(0),
            }
        }
        let taken = self.piece.split_to(self.piece.len().min(buffer.len()));
        self.hasher.update(&taken);
        if let Some(target) = buffer.get_mut(..taken.len()) {
            target.copy_from_slice(&taken);
        }
        Ok(taken.len())
    }
}

struct Entry {
    path: String,
    bytes: u64,
    is_file: bool,
}

impl Entry {
    fn parse(header: &[u8; BLOCK]) -> Result<Self> {
        let field = |start: usize, len: usize| header.get(start..start + len).unwrap_or_default();
        let text = |field: &[u8]| {
            let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
            String::from_utf8_lossy(field.get(..end).unwrap_or_default()).into_owned()
        };
        let octal = |field: &[u8], what: &str| {
            let digits = text(field);
            u64::from_str_radix(digits.trim_matches(' '), 8)
                .map_err(|_| invalid(format!("a tar header's {what} is no number")))
        };
        let sum =
            header.iter().enumerate().map(|(at, &byte)| u64::from(if (148..156).contains(&at) { b' ' } else { byte }));
        if octal(field(148, 8), "checksum")? != sum.sum::<u64>() {
            return Err(invalid("a tar header has a wrong checksum"));
        }
        let (prefix, name) = (text(field(345, 155)), text(field(0, 100)));
        let path = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
        let is_file = matches!(header.get(156), Some(b'0' | 0));
        Ok(Self { path: path.trim_start_matches("./").to_owned(), bytes: octal(field(124, 12), "size")?, is_file })
    }
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::invalid("index layer", reason)
}
