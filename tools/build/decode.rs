//! A layer's stored bytes become a tar stream; both digests are computed on the way.

use std::io::{self, BufRead, BufReader, Chain, Cursor, Read};
use std::sync::Arc;

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
pub(super) struct Layer {
    decoder: Decoder,
    plain: Option<Hasher>,
    left: u64,
    limit: u64,
}

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
        Ok(Self { decoder, plain: expected.diff_id.map(|_| Hasher::new()), left: limit, limit })
    }

    /// Reads to the end, checks the digests, and returns how many bytes of the limit are left.
    pub(super) fn finish(mut self, expected: &Expected) -> Result<u64> {
        io::copy(&mut self, &mut io::sink()).map_err(|error| Error::io("reading", error))?;
        let mut input = match self.decoder {
            Decoder::Plain(input) => *input,
            Decoder::Gzip(decoder) => decoder.into_inner(),
            Decoder::Zstd(decoder) => decoder.finish(),
        };
        loop {
            let rest = input.fill_buf().map_err(|error| Error::io("reading", error))?.len();
            if rest == 0 {
                break;
            }
            input.consume(rest);
        }
        let (_, counted) = input.into_inner().into_inner();
        let check = |what: &str, hasher: Option<Hasher>, expected: Option<Digest>| match (hasher, expected) {
            (Some(hasher), Some(expected)) => match hasher.finish() {
                found if found == expected => Ok(()),
                found => Err(Error::invalid("layer", format!("its {what} hash to {found} instead of {expected}"))),
            },
            _ => Ok(()),
        };
        check("stored bytes", counted.hasher, expected.digest)?;
        check("plain bytes", self.plain, expected.diff_id)?;
        Ok(self.left)
    }
}

impl Read for Layer {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = match &mut self.decoder {
            Decoder::Plain(input) => input.read(buf),
            Decoder::Gzip(decoder) => decoder.read(buf),
            Decoder::Zstd(decoder) => decoder.read(buf),
        }?;
        self.left = self.left.checked_sub(read as u64).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("the layers inflate beyond the limit; {} bytes of it were left for this one", self.limit),
            )
        })?;
        if let Some(hasher) = &mut self.plain {
            hasher.update(buf.get(..read).unwrap_or_default());
        }
        Ok(read)
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
