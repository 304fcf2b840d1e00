//! The 512-byte header block: POSIX ustar (IEEE Std 1003.1, pax, "ustar Interchange Format") and GNU's variant.

use crate::error::{Error, Result};

/// Bytes in a block of a tar.
pub(super) const BLOCK: usize = 512;

/// A header block with a right checksum.
pub(super) struct Raw<'a>(&'a [u8; BLOCK]);

impl<'a> Raw<'a> {
    /// The header in `block`, which was read at byte `at`; `None` for a block of zeros, which ends the archive.
    pub(super) fn parse(block: &'a [u8; BLOCK], at: u64) -> Result<Option<Self>> {
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let raw = Self(block);
        let stated = raw.number(148, 8, "checksum", at)?;
        let (mut unsigned, mut signed) = (0i64, 0i64);
        for (offset, byte) in block.iter().enumerate() {
            let byte = if (148..156).contains(&offset) { b' ' } else { *byte };
            unsigned += i64::from(byte);
            signed += i64::from(byte.cast_signed());
        }
        if stated != unsigned && stated != signed {
            let reason = format!("the header at byte {at} has a wrong checksum: damaged, or not a tar");
            return Err(Error::invalid("tar", reason));
        }
        Ok(Some(raw))
    }

    fn field(&self, offset: usize, len: usize) -> &'a [u8] {
        self.0.get(offset..offset + len).unwrap_or_default()
    }

    fn text(&self, offset: usize, len: usize) -> &'a [u8] {
        let field = self.field(offset, len);
        field.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    /// A number in octal text, or in base 256 when the first bit is set (GNU, star).
    fn number(&self, offset: usize, len: usize, what: &str, at: u64) -> Result<i64> {
        let field = self.field(offset, len);
        let invalid =
            || Error::invalid("tar", format!("the header at byte {at} has a {what} that is not a number in range"));
        if field.first().is_some_and(|byte| byte & 0x80 != 0) {
            return base256(field).ok_or_else(invalid);
        }
        let text = field.split(|byte| *byte == 0).next().unwrap_or_default().trim_ascii();
        text.iter()
            .try_fold(0i64, |value, digit| match digit {
                b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
                _ => None,
            })
            .ok_or_else(invalid)
    }

    fn unsigned(&self, offset: usize, len: usize, what: &str, at: u64) -> Result<u64> {
        u64::try_from(self.number(offset, len, what, at)?)
            .map_err(|_| Error::invalid("tar", format!("the header at byte {at} has a negative {what}")))
    }

    pub(super) fn kind(&self) -> u8 {
        self.0[156]
    }

    /// The path, with the prefix of ustar where there is one.
    pub(super) fn path(&self) -> Vec<u8> {
        let name = self.text(0, 100);
        let prefix = match self.field(257, 6) {
            // star ends its header in "tar\0" and has times behind a shorter prefix.
            b"ustar\0" if self.field(508, 4) == b"tar\0" => self.text(345, 131),
            b"ustar\0" => self.text(345, 155),
            _ => &[],
        };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    pub(super) fn link(&self) -> Vec<u8> {
        self.text(157, 100).to_vec()
    }

    pub(super) fn mode(&self, at: u64) -> Result<u64> {
        self.unsigned(100, 8, "mode", at)
    }

    pub(super) fn uid(&self, at: u64) -> Result<u64> {
        self.unsigned(108, 8, "uid", at)
    }

    pub(super) fn gid(&self, at: u64) -> Result<u64> {
        self.unsigned(116, 8, "gid", at)
    }

    /// Bytes of data behind the header.
    pub(super) fn size(&self, at: u64) -> Result<u64> {
        self.unsigned(124, 12, "size", at)
    }

    pub(super) fn mtime(&self, at: u64) -> Result<i64> {
        self.number(136, 12, "time", at)
    }

    pub(super) fn major(&self, at: u64) -> Result<u64> {
        self.unsigned(329, 8, "device number", at)
    }

    pub(super) fn minor(&self, at: u64) -> Result<u64> {
        self.unsigned(337, 8, "device number", at)
    }

    /// Old GNU sparse: the file's length with its holes.
    pub(super) fn gnu_real_size(&self) -> Result<u64> {
        self.unsigned(483, 12, "real size", 0)
    }

    /// Old GNU sparse: the first entries of the map, and whether extension blocks follow.
    pub(super) fn gnu_sparse(&self) -> Result<(Vec<(u64, u64)>, bool)> {
        Ok((gnu_map(self, 386, 4)?, self.0[482] != 0))
    }
}

/// An extension block of an old GNU sparse map: its entries, and whether another one follows.
pub(super) fn gnu_extension(block: &[u8; BLOCK]) -> Result<(Vec<(u64, u64)>, bool)> {
    Ok((gnu_map(&Raw(block), 0, 21)?, block[504] != 0))
}

/// `count` pairs of offset and length in 12 bytes each; an empty one ends the map.
fn gnu_map(raw: &Raw<'_>, start: usize, count: usize) -> Result<Vec<(u64, u64)>> {
    let mut map = Vec::new();
    for offset in (0..count).map(|number| start + number * 24) {
        if raw.field(offset, 1) == [0] {
            break;
        }
        map.push((raw.unsigned(offset, 12, "sparse map", 0)?, raw.unsigned(offset + 12, 12, "sparse map", 0)?));
    }
    Ok(map)
}

/// Two's complement, big-endian, the first bit of the field being a mark.
fn base256(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    let negative = first & 0x40 != 0;
    // Sign-extend the 7 bits of the first byte.
    let mut value = i128::from(first & 0x7f) - if negative { 128 } else { 0 };
    for byte in rest {
        value = value.checked_mul(256)?.checked_add(i128::from(*byte))?;
    }
    i64::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_256_has_both_signs() {
        assert_eq!(base256(&[0x80, 0, 0, 1]), Some(1));
        assert_eq!(base256(&[0xff, 0xff, 0xff, 0xff]), Some(-1));
        assert_eq!(base256(&[0x80, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]), None);
    }
}
