//! Sparse files: old GNU headers, and PAX 0.0, 0.1 and 1.0 (GNU tar's manual, "Storing Sparse Files").

use std::io::Read;

use super::super::limits::Limits;
use super::Archive;
use super::header::{BLOCK, Raw, gnu_extension};
use super::pax::decimal;
use crate::error::{Error, Result};

/// The GNU.sparse records of a PAX header.
#[derive(Default)]
pub(super) struct PaxSparse {
    pub name: Option<Vec<u8>>,
    major: Option<u64>,
    size: Option<u64>,
    map: Vec<(u64, u64)>,
    /// An offset of version 0.0 that waits for its length.
    offset: Option<u64>,
    present: bool,
}

impl PaxSparse {
    pub(super) fn record(&mut self, key: &[u8], value: &[u8], limits: &Limits) -> Option<()> {
        self.present = true;
        match key {
            b"name" => self.name = Some(value.to_vec()),
            b"major" => self.major = Some(decimal(value)?),
            b"size" | b"realsize" => self.size = Some(decimal(value)?),
            b"offset" => self.offset = Some(decimal(value)?),
            b"numbytes" => self.map.push((self.offset.take()?, decimal(value)?)),
            b"map" => {
                let numbers: Option<Vec<_>> = value.split(|byte| *byte == b',').map(decimal).collect();
                let (pairs, rest) = numbers.as_deref()?.as_chunks::<2>();
                if !rest.is_empty() {
                    return None;
                }
                self.map = pairs.iter().map(|[offset, len]| (*offset, *len)).collect();
            }
            _ => {}
        }
        (self.map.len() <= limits.segments).then_some(())
    }
}

impl<R: Read> Archive<R> {
    /// Length and data segments of the file behind the current header, of which the archive has `stored` bytes.
    pub(super) fn sparse(
        &mut self,
        raw: &Raw<'_>,
        pax: &super::pax::Pax,
        stored: u64,
    ) -> Result<(u64, Vec<(u64, u64)>)> {
        let (size, map) = if raw.kind() == b'S' {
            (raw.gnu_real_size()?, self.old_gnu_map(raw)?)
        } else if pax.sparse.present {
            let size = pax.sparse.size.ok_or_else(|| Error::invalid("sparse file", "its real size is missing"))?;
            match pax.sparse.major {
                None | Some(0) => (size, pax.sparse.map.clone()),
                Some(1) => (size, self.map_in_data()?),
                Some(other) => return Err(Error::Unsupported(format!("sparse files of version {other}"))),
            }
        } else {
            let map = if stored == 0 { Vec::new() } else { vec![(0, stored)] };
            return Ok((stored, map));
        };
        Ok((size, self.check(size, map)?))
    }

    /// Ascending, without overlap, within the size, and as many bytes as the archive has.
    fn check(&self, size: u64, mut map: Vec<(u64, u64)>) -> Result<Vec<(u64, u64)>> {
        let invalid = |reason: &str| Error::invalid("sparse map", reason.to_owned());
        let (mut end, mut sum) = (0u64, 0u64);
        for (offset, len) in &map {
            if *offset < end {
                return Err(invalid("its pieces overlap or are out of order"));
            }
            end = offset
                .checked_add(*len)
                .filter(|end| *end <= size)
                .ok_or_else(|| invalid("it goes beyond the file"))?;
            sum += len;
        }
        if sum != self.remaining {
            return Err(invalid("it does not account for the bytes in the archive"));
        }
        map.retain(|(_, len)| *len > 0);
        Ok(map)
    }

    fn old_gnu_map(&mut self, raw: &Raw<'_>) -> Result<Vec<(u64, u64)>> {
        let (mut map, mut more) = raw.gnu_sparse()?;
        while more {
            let block = self.block()?.ok_or_else(|| self.truncated())?;
            let (entries, another) = gnu_extension(&block)?;
            let entries_ended = entries.len() < 21;
            map.extend(entries);
            more = another && !entries_ended;
            self.bound(map.len())?;
        }
        Ok(map)
    }

    /// Version 1.0: the map is decimal lines in front of the data, padded to a block.
    fn map_in_data(&mut self) -> Result<Vec<(u64, u64)>> {
        let mut lines = Lines { block: [0; BLOCK], at: BLOCK };
        let count = usize::try_from(lines.number(self)?).unwrap_or(usize::MAX);
        self.bound(count)?;
        let mut map = Vec::new();
        for _ in 0..count {
            map.push((lines.number(self)?, lines.number(self)?));
        }
        Ok(map)
    }

    fn bound(&self, segments: usize) -> Result<()> {
        if segments > self.limits.segments {
            let reason = format!("more than {} pieces (limit)", self.limits.segments);
            return Err(Error::invalid("sparse map", reason));
        }
        Ok(())
    }
}

/// Decimal lines taken block by block from an entry's data.
struct Lines {
    block: [u8; BLOCK],
    at: usize,
}

impl Lines {
    fn number<R: Read>(&mut self, archive: &mut Archive<R>) -> Result<u64> {
        let mut digits = Vec::new();
        loop {
            if self.at == BLOCK {
                if archive.remaining < BLOCK as u64 {
                    return Err(Error::invalid("sparse map", "it is longer than the data"));
                }
                archive.exact(&mut self.block)?;
                archive.remaining -= BLOCK as u64;
                self.at = 0;
            }
            let byte = self.block[self.at];
            self.at += 1;
            match byte {
                b'\n' => break,
                _ if digits.len() < 20 => digits.push(byte),
                _ => return Err(Error::invalid("sparse map", "a number is too long")),
            }
        }
        decimal(&digits).ok_or_else(|| Error::invalid("sparse map", "a line is not a number"))
    }
}
