//! Chunks: the unit of digest, fetch and caching.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::Error;

/// Largest plain length of a chunk in bytes; anything that claims more is refused.
pub const CHUNK_MAX: u32 = 1 << 20;

/// Plain length in bytes at which the builder cuts files.
pub const CHUNK_SIZE: u32 = 256 << 10;

/// Largest stored length of a chunk: an incompressible chunk grows by a zstd frame's overhead.
pub const STORED_MAX: u32 = CHUNK_MAX + (64 << 10);

/// A sha256 content hash.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// A digest computed elsewhere, e.g. read from an index.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 raw bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 lower-case hexadecimal digits, without an algorithm prefix.
    #[must_use]
    pub fn hex(&self) -> String {
        const DIGITS: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
        self.0.iter().flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]).collect()
    }
}

/// `sha256:<hex>`, the form of OCI descriptors.
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

/// Reads `sha256:<64 lower-case hexadecimal digits>`.
impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let invalid = || Error::invalid("digest", format!("{text:?} is not sha256:<64 hexadecimal digits>"));
        let hex = text.strip_prefix("sha256:").ok_or_else(invalid)?.as_bytes();
        if hex.len() != 64 {
            return Err(invalid());
        }
        let value = |digit: u8| match digit {
            b'0'..=b'9' => Ok(digit - b'0'),
            b'a'..=b'f' => Ok(digit - b'a' + 10),
            _ => Err(invalid()),
        };
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            *byte = value(pair[0])? << 4 | value(pair[1])?;
        }
        Ok(Self(bytes))
    }
}

/// A sha256 computed piece by piece, for streams.
#[derive(Clone, Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// A hasher that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `bytes` to what is hashed.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of everything added.
    #[must_use]
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

/// How a chunk is stored in its blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// As it is: stored and plain bytes are equal.
    Plain,
    /// One independent zstd frame.
    Zstd,
}

/// Where a chunk's stored bytes are and what they must decode to.
///
/// Made by a validated [`Index`](crate::index::Index): lengths are within [`CHUNK_MAX`] and [`STORED_MAX`], and
/// the stored range is within the blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRef {
    /// sha256 of the plain bytes; the chunk's identity in the pool.
    pub digest: Digest,
    /// Number of the blob in the index's blob table.
    pub blob: u32,
    /// First stored byte, counted from the start of the blob.
    pub offset: u64,
    /// Stored length in bytes.
    pub stored_len: u32,
    /// Plain length in bytes.
    pub plain_len: u32,
    /// How the stored bytes are encoded.
    pub codec: Codec,
}

/// Plain bytes whose digest was checked. Only [`verify`] makes one, and the pool admits nothing else.
#[derive(Debug)]
pub struct Verified {
    digest: Digest,
    bytes: Vec<u8>,
}

impl Verified {
    /// The digest that the bytes have.
    #[must_use]
    pub const fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The plain bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Bytes that did not have the digest they should have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mismatch {
    /// What the index promised.
    pub expected: Digest,
    /// What the bytes hash to.
    pub found: Digest,
}

/// Checks that `plain` hashes to `digest`: the one way from untrusted to trusted bytes.
///
/// # Errors
/// [`Mismatch`] with both digests; the bytes are dropped.
pub fn verify(digest: &Digest, plain: Vec<u8>) -> Result<Verified, Mismatch> {
    let found = Digest::of(&plain);
    if found == *digest {
        Ok(Verified { digest: found, bytes: plain })
    } else {
        Err(Mismatch { expected: *digest, found })
    }
}

/// Whether all bytes are zero. Ends at the first that isn't, so that it costs nothing for data.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    match bytes {
        [] => true,
        // Every byte equals the one before it, and the first is zero; slices compare with memcmp.
        [first, rest @ ..] => *first == 0 && bytes[..rest.len()] == *rest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_round_trips_through_text() {
        let digest = Digest::of(b"abc");
        assert_eq!(digest.to_string(), "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(digest.to_string().parse::<Digest>().ok(), Some(digest));
    }

    #[test]
    fn malformed_digests_are_refused() {
        for text in [
            "",
            "sha256:",
            "sha256:zz",
            "md5:00",
            &format!("sha256:{}", "A".repeat(64)),
            &format!("sha256:{}", "é".repeat(32)),
        ] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_matching_bytes_are_verified() {
        let digest = Digest::of(b"right");
        assert_eq!(verify(&digest, b"right".to_vec()).map(|v| v.bytes().to_vec()), Ok(b"right".to_vec()));
        assert_eq!(
            verify(&digest, b"wrong".to_vec()).map(|_| ()),
            Err(Mismatch { expected: digest, found: Digest::of(b"wrong") })
        );
    }
}
