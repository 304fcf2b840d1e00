//! Decoding: stored bytes become a verified chunk, or are dropped.

use std::time::Instant;

use zstd::zstd_safe;

use crate::chunk::{ChunkRef, Codec, Verified, verify};
use crate::error::Error;

/// Decodes and verifies `stored`, which should be `chunk`. Allocates no more than the chunk's plain length, whatever the
/// bytes claim.
///
/// # Errors
/// [`Error::WrongBytes`] that names the source and says what is wrong, with the digest that was found.
pub fn decode(chunk: &ChunkRef, stored: Vec<u8>, source_name: &str) -> Result<Verified, Error> {
    decode_timed(chunk, stored, source_name).map(|(chunk, _)| chunk)
}

/// The same, and when the bytes were inflated.
pub(super) fn decode_timed(chunk: &ChunkRef, stored: Vec<u8>, source_name: &str) -> Result<(Verified, Instant), Error> {
    let wrong = |reason| Error::WrongBytes { chunk: chunk.digest, source_name: source_name.to_owned(), reason };
    let plain = match chunk.codec {
        Codec::Plain => stored,
        Codec::Zstd => inflate(&stored, chunk.plain_len as usize).map_err(wrong)?,
    };
    if plain.len() != chunk.plain_len as usize {
        return Err(wrong(format!("it has {} plain bytes, not {}", plain.len(), chunk.plain_len)));
    }
    let inflated = Instant::now();
    match verify(&chunk.digest, plain) {
        Ok(chunk) => Ok((chunk, inflated)),
        Err(mismatch) => Err(Error::mismatch(&mismatch, source_name)),
    }
}

/// Inflates exactly one zstd frame that takes all of `stored` and has `plain_len` plain bytes (RFC 8878, section 3.1).
fn inflate(stored: &[u8], plain_len: usize) -> Result<Vec<u8>, String> {
    let frame = zstd_safe::find_frame_compressed_size(stored)
        .map_err(|code| format!("it is no zstd frame: {}", zstd_safe::get_error_name(code)))?;
    if frame != stored.len() {
        return Err(format!("its zstd frame has {frame} bytes, not {}", stored.len()));
    }
    if let Ok(Some(promised)) = zstd_safe::get_frame_content_size(stored)
        && promised != plain_len as u64
    {
        return Err(format!("its zstd frame inflates to {promised} bytes, not {plain_len}"));
    }
    zstd::bulk::decompress(stored, plain_len)
        .map_err(|error| format!("its zstd frame does not inflate to {plain_len} bytes: {error}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::chunk::Digest;

    fn chunk(plain: &[u8], stored: &[u8], codec: Codec) -> ChunkRef {
        ChunkRef {
            digest: Digest::of(plain),
            blob: 0,
            offset: 0,
            stored_len: stored.len() as u32,
            plain_len: plain.len() as u32,
            codec,
        }
    }

    fn without_content_size(plain: &[u8]) -> Vec<u8> {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
        std::io::Write::write_all(&mut encoder, plain).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn right_bytes_are_verified() {
        let plain = b"plain bytes".repeat(1000);
        let framed = zstd::bulk::compress(&plain, 3).unwrap();
        for (stored, codec) in
            [(plain.clone(), Codec::Plain), (framed, Codec::Zstd), (without_content_size(&plain), Codec::Zstd)]
        {
            let verified = decode(&chunk(&plain, &stored, codec), stored, "source").unwrap();
            assert_eq!(verified.bytes(), plain);
        }
    }

    #[test]
    fn wrong_bytes_are_dropped() {
        let plain = b"plain bytes".repeat(1000);
        let framed = zstd::bulk::compress(&plain, 3).unwrap();
        let refused = |stored: Vec<u8>, codec| {
            let chunk = chunk(&plain, &stored, codec);
            decode(&chunk, stored, "the source").unwrap_err().to_string()
        };
        let mut flipped = plain.clone();
        flipped[77] ^= 1;
        let text = refused(flipped.clone(), Codec::Plain);
        assert!(text.contains(&Digest::of(&flipped).to_string()) && text.contains("the source"), "{text}");
        refused(plain[..100].to_vec(), Codec::Plain);
        refused(Vec::new(), Codec::Zstd);
        refused(framed[..framed.len() - 1].to_vec(), Codec::Zstd);
        refused([&framed[..], &framed[..]].concat(), Codec::Zstd);
        refused([&framed[..], b"x"].concat(), Codec::Zstd);
        refused(zstd::bulk::compress(&plain[1..], 3).unwrap(), Codec::Zstd);
        // Skippable frame.
        refused([0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4].to_vec(), Codec::Zstd);
    }

    #[test]
    fn a_frame_that_inflates_further_is_refused() {
        let plain = vec![7; 4096];
        let bomb = vec![7; 64 << 20];
        for stored in [zstd::bulk::compress(&bomb, 3).unwrap(), without_content_size(&bomb)] {
            let error = decode(&chunk(&plain, &stored, Codec::Zstd), stored, "source").unwrap_err();
            assert!(error.to_string().contains("inflate"), "{error}");
        }
    }
}
