//! A layer's stored bytes become a tar stream, on a thread of its own; both digests are computed on the way.

use std::io::{self, BufRead, BufReader, Chain, Cursor, Read};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, bounded};
use flate2::bufread::MultiGzDecoder;

use super::progress::{Event, Progress};
use super::tar::fill;
use crate::chunk::{Digest, Hasher};
use crate::error::{Error, Result};

/// Stored bytes from anywhere.
pub(super) type Stored = Box<dyn Read + Send>;

/// What a layer must be, as far as its manifest and config say.
#[derive(Clone, Debug, Default)]
pub(super) struct Expected {
    /// Digest of the stored bytes.
    pub digest: Option<Digest>,
    /// Digest of the tar.
    pub diff_id: Option<Digest>,
}

/// Media types of layers that can be read; what the bytes really are is told by their first ones.
pub(super) fn check_media_type(media_type: &str) -> Result<()> {
    match media_type {
        "application/vnd.oci.image.layer.v1.tar"
        | "application/vnd.oci.image.layer.v1.tar+gzip"
        | "application/vnd.oci.image.layer.v1.tar+zstd"
        | "application/vnd.docker.image.rootfs.diff.tar"
        | "application/vnd.docker.image.rootfs.diff.tar.gzip"
        | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Ok(()),
        other => Err(Error::Unsupported(format!(
            "a layer of media type {other:?}: only tar layers, plain, gzip or zstd, can be built from"
        ))),
    }
}

type Input = BufReader<Chain<Cursor<Vec<u8>>, Counted>>;

enum Decoder {
    Plain(Box<Input>),
    Gzip(Box<MultiGzDecoder<Input>>),
    Zstd(Box<zstd::stream::read::Decoder<'static, Input>>),
}

/// A tar stream with a bound on its length.
///
/// A thread reads, hashes and inflates the stored bytes, at most [`PIECES`] ahead; the plain ones are hashed as they are
/// taken. The thread ends when the stream does or is dropped, as soon as it has what it waits for.
pub(super) struct Layer {
    pieces: Receiver<Piece>,
    free: Sender<Vec<u8>>,
    current: Vec<u8>,
    /// Bytes of `current` that are taken already.
    taken: usize,
    /// The stream's end was reached; with the digest of the stored bytes, if that is wanted.
    end: Option<Option<Digest>>,
    plain: Option<Hasher>,
    left: u64,
    limit: u64,
}

/// What comes out of the thread.
enum Piece {
    Plain(Vec<u8>),
    Failed(io::Error),
    /// The digest of the stored bytes, if it is wanted.
    End(Option<Digest>),
}

/// Plain bytes that are inflated together.
const PIECE: usize = 256 << 10;
/// Pieces that wait to be taken or are being made.
const PIECES: usize = 4;
/// Longest prefix needed to tell a compression.
const MAGIC: usize = 6;

impl Layer {
    /// Opens a stream that may inflate to `limit` bytes.
    pub(super) fn open(stored: Stored, expected: &Expected, limit: u64, progress: Arc<dyn Progress>) -> Result<Self> {
        let mut counted = Counted { inner: stored, hasher: expected.digest.map(|_| Hasher::new()), progress };
        let mut magic = vec![0; MAGIC];
        let filled = fill(&mut counted, &mut magic).map_err(|error| Error::io("reading", error))?;
        magic.truncate(filled);
        let kind = magic.clone();
        let input = BufReader::with_capacity(256 << 10, Cursor::new(magic).chain(counted));
        let decoder = match kind.as_slice() {
            [0x1f, 0x8b, ..] => Decoder::Gzip(Box::new(MultiGzDecoder::new(input))),
            // A frame, or a skippable one in front of it (RFC 8878, 3.1).
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Decoder::Zstd(Box::new(
                zstd::stream::read::Decoder::with_buffer(input).map_err(|error| Error::io("decoding zstd", error))?,
            )),
            [0xfd, b'7', b'z', b'X', b'Z', 0] => return Err(Error::Unsupported("xz compression".into())),
            [b'B', b'Z', b'h', ..] => return Err(Error::Unsupported("bzip2 compression".into())),
            _ => Decoder::Plain(Box::new(input)),
        };
        let (to, pieces) = bounded(PIECES);
        let (free, buffers) = bounded(PIECES);
        for _ in 0..PIECES {
            let _ = free.send(Vec::with_capacity(PIECE));
        }
        std::thread::Builder::new()
            .name("inflate".into())
            .spawn(move || decoder.run(&to, &buffers))
            .map_err(|error| Error::io("starting a thread", error))?;
        let plain = expected.diff_id.map(|_| Hasher::new());
        Ok(Self { pieces, free, current: Vec::new(), taken: 0, end: None, plain, left: limit, limit })
    }

    /// Reads to the end, checks the digests, and returns how many bytes of the limit are left.
    pub(super) fn finish(mut self, expected: &Expected) -> Result<u64> {
        io::copy(&mut self, &mut io::sink()).map_err(|error| Error::io("reading", error))?;
        let check = |what: &str, found: Option<Digest>, expected: Option<Digest>| match (found, expected) {
            (Some(found), Some(expected)) if found != expected => {
                Err(Error::invalid("layer", format!("its {what} hash to {found} instead of {expected}")))
            }
            (None, Some(_)) => Err(Error::invalid("layer", format!("its {what} were not hashed"))),
            _ => Ok(()),
        };
        check("stored bytes", self.end.flatten(), expected.digest)?;
        check("plain bytes", self.plain.map(Hasher::finish), expected.diff_id)?;
        Ok(self.left)
    }

    /// Waits for the next bytes; false at the end of the stream.
    fn next(&mut self) -> io::Result<bool> {
        if self.end.is_some() {
            return Ok(false);
        }
        // The thread does not wait for a buffer that is not needed any more.
        let _ = self.free.try_send(std::mem::take(&mut self.current));
        match self.pieces.recv() {
            Ok(Piece::Plain(piece)) => {
                self.left = self.left.checked_sub(piece.len() as u64).ok_or_else(|| {
                    let left = format!("{} bytes of it were left for this one", self.limit);
                    let reason = format!("the layers inflate beyond the limit; {left}");
                    io::Error::new(io::ErrorKind::FileTooLarge, reason)
                })?;
                if let Some(hasher) = &mut self.plain {
                    hasher.update(&piece);
                }
                (self.current, self.taken) = (piece, 0);
                Ok(true)
            }
            Ok(Piece::Failed(error)) => Err(error),
            Ok(Piece::End(stored)) => {
                self.end = Some(stored);
                Ok(false)
            }
            Err(_) => Err(io::Error::other("the thread that inflates ended")),
        }
    }
}

impl Read for Layer {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.current.len() {
            if !self.next()? {
                return Ok(0);
            }
        }
        let rest = self.current.get(self.taken..).unwrap_or_default();
        let len = rest.len().min(buf.len());
        let (Some(to), Some(from)) = (buf.get_mut(..len), rest.get(..len)) else { return Ok(0) };
        to.copy_from_slice(from);
        self.taken += len;
        Ok(len)
    }
}

impl Decoder {
    /// Inflates until the stream ends or nobody wants more of it.
    fn run(mut self, to: &Sender<Piece>, buffers: &Receiver<Vec<u8>>) {
        for mut piece in buffers {
            piece.resize(PIECE, 0);
            let mut filled = 0;
            let stopped = loop {
                match piece.get_mut(filled..).filter(|rest| !rest.is_empty()).map(|rest| self.read(rest)) {
                    Some(Ok(0)) => break Some(Ok(())),
                    Some(Ok(read)) => filled += read,
                    Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                    Some(Err(error)) => break Some(Err(error)),
                    None => break None,
                }
            };
            piece.truncate(filled);
            // What comes before an error is taken first, so that the error is told where it is.
            if filled > 0 && to.send(Piece::Plain(piece)).is_err() {
                return;
            }
            let last = match stopped {
                None => continue,
                Some(Ok(())) => self.end().map_or_else(Piece::Failed, Piece::End),
                Some(Err(error)) => Piece::Failed(error),
            };
            let _ = to.send(last);
            return;
        }
    }

    /// Reads what follows the end of the plain bytes, and returns the digest of all stored ones, if it is wanted.
    fn end(self) -> io::Result<Option<Digest>> {
        let mut input = match self {
            Self::Plain(input) => *input,
            Self::Gzip(decoder) => decoder.into_inner(),
            Self::Zstd(decoder) => decoder.finish(),
        };
        loop {
            let rest = input.fill_buf()?.len();
            if rest == 0 {
                break;
            }
            input.consume(rest);
        }
        let (_, counted) = input.into_inner().into_inner();
        Ok(counted.hasher.map(Hasher::finish))
    }
}

impl Read for Decoder {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(input) => input.read(buf),
            Self::Gzip(decoder) => decoder.read(buf),
            Self::Zstd(decoder) => decoder.read(buf),
        }
    }
}

/// Counts and hashes what is read.
struct Counted {
    inner: Stored,
    hasher: Option<Hasher>,
    progress: Arc<dyn Progress>,
}

impl Read for Counted {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buf)?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(buf.get(..read).unwrap_or_default());
        }
        self.progress.event(Event::Read(read as u64));
        Ok(read)
    }
}
