//! The header of an upper: text, so that people can read which image a directory belongs to.
//!
//! One line `firstread-upper 1 CHECKSUM`, where the checksum is the CRC-32C of all that follows in eight hexadecimal digits,
//! and then a JSON document.

use std::io;

use serde::{Deserialize, Serialize};

use super::directory::remove_file;
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::media::MediaDir;

pub(super) const NAME: &str = "header";
/// Where a header is written before it is put in place.
pub(super) const NEW: &str = "header.new";
const MAGIC: &str = "firstread-upper";
const VERSION: u32 = 1;
/// Largest header in bytes that is read.
const HEADER_MAX: u64 = 64 << 10;

/// What an upper lies over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LowerIdentity {
    /// The digest of the lower's contents: what must be the same.
    pub contents: Digest,
    /// Size of the lower in bytes.
    pub device_bytes: u64,
    /// The image as it was named, for people.
    pub image: String,
    /// The digest of its manifest.
    pub manifest: Digest,
}

/// A header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    /// Size of the writable device in bytes.
    pub device_bytes: u64,
    /// What it lies over.
    pub lower: LowerIdentity,
}

impl Header {
    pub fn new(lower: LowerIdentity, device_bytes: u64) -> Self {
        Self { device_bytes, lower }
    }

    /// Reads the header of the upper `name`; `None` when there is none.
    pub fn read(dir: &dyn MediaDir, name: &str) -> Result<Option<Self>> {
        let failed = |error| Error::io(format!("read the header of the upper {name}"), error);
        let file = match dir.open(NAME) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let len = file.len().map_err(failed)?;
        if len > HEADER_MAX {
            return Err(Error::invalid("upper", format!("{name}: its header has {len} bytes")));
        }
        let mut bytes = vec![0; len as usize];
        file.read(0, &mut bytes).map_err(failed)?;
        Self::parse(&bytes).map(Some).map_err(|reason| Error::invalid("upper", format!("{name}: {reason}")))
    }

    fn parse(bytes: &[u8]) -> std::result::Result<Self, String> {
        let end = bytes.iter().position(|&byte| byte == b'\n').ok_or("its header is none")?;
        let (first, body) = bytes.split_at(end);
        let body = body.get(1..).unwrap_or_default();
        let first = std::str::from_utf8(first).map_err(|_| "its header is none")?;
        let mut words = first.split(' ');
        if words.next() != Some(MAGIC) {
            return Err("its header is none".to_owned());
        }
        let version = words.next().and_then(|word| word.parse::<u32>().ok());
        if version != Some(VERSION) {
            let version = version.map_or_else(|| "another".to_owned(), |version| version.to_string());
            return Err(format!("it is of version {version}, this program knows {VERSION}"));
        }
        let checksum = words.next().and_then(|word| u32::from_str_radix(word, 16).ok());
        if checksum != Some(crc32c::crc32c(body)) {
            return Err("its header is damaged (the checksum is wrong)".to_owned());
        }
        serde_json::from_slice(body).map_err(|error| format!("its header is damaged: {error}"))
    }

    /// Refuses a lower that is not the upper's.
    pub fn check(&self, lower: &LowerIdentity, name: &str) -> Result<()> {
        if (self.lower.contents, self.lower.device_bytes) == (lower.contents, lower.device_bytes) {
            return Ok(());
        }
        let (its, manifest) = (&self.lower.image, self.lower.manifest);
        let (other, other_manifest) = (&lower.image, lower.manifest);
        let reason =
            format!("{name} belongs to {its} ({manifest}), not to {other} ({other_manifest}); use another directory");
        Err(Error::invalid("upper", reason))
    }

    /// Puts this header in place: a crash shows it or the one before, whole.
    pub fn write(&self, dir: &dyn MediaDir) -> io::Result<()> {
        let body = serde_json::to_vec(self)?;
        let mut bytes = format!("{MAGIC} {VERSION} {:08x}\n", crc32c::crc32c(&body)).into_bytes();
        bytes.extend_from_slice(&body);
        remove_file(dir, NEW)?;
        let file = dir.create(NEW)?;
        file.write(0, &bytes)?;
        file.sync()?;
        dir.rename(NEW, NAME)?;
        dir.sync()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::media::Directory;

    #[test]
    fn a_header_is_read_back_and_any_changed_byte_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let media = Directory::new(dir.path());
        assert_eq!(Header::read(&media, "it").unwrap(), None);
        let (contents, manifest) = (Digest::of(b"device"), Digest::of(b"manifest"));
        let lower = LowerIdentity { contents, device_bytes: 8192, image: "oci:/image".to_owned(), manifest };
        let header = Header::new(lower.clone(), 16384);
        header.write(&media).unwrap();
        assert_eq!(Header::read(&media, "it").unwrap(), Some(header.clone()));
        let bytes = std::fs::read(dir.path().join(NAME)).unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 4;
            assert!(Header::parse(&changed).is_err(), "byte {at}");
            assert!(Header::parse(&bytes[..at]).is_err(), "{at} bytes");
        }
        // The same contents under another name are the same lower.
        let same = LowerIdentity { image: "oci:/other".to_owned(), manifest: Digest::of(b"other"), ..lower.clone() };
        header.check(&same, "it").unwrap();
        let other = LowerIdentity { contents: Digest::of(b"other"), ..same };
        let error = header.check(&other, "it").unwrap_err().to_string();
        assert!(error.contains("belongs to oci:/image") && error.contains("not to oci:/other"), "{error}");
    }
}
