//! The map: a bit for each block that is in the upper, in memory and on disk.
//!
//! On disk a sector of 512 bytes has 504 bytes of bits (4032 blocks), the CRC-32C of its number and these bytes, and four
//! zero bytes. A sector of zeros has no bits. Bits are only ever set.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::media::Media;

const WORDS: usize = 63;
const BITS: u64 = WORDS as u64 * 64;
const SECTOR: usize = 512;
const BITS_BYTES: usize = WORDS * 8;
/// Sectors that are read or written at a time.
const BATCH: usize = 128;

type Encoded = [u8; SECTOR];

struct Sector {
    words: [AtomicU64; WORDS],
    /// Whether it is among the dirty ones; changed under their lock.
    dirty: AtomicBool,
}

impl Sector {
    fn empty() -> Box<Self> {
        Box::new(Self { words: std::array::from_fn(|_| AtomicU64::new(0)), dirty: AtomicBool::new(false) })
    }
}

/// The bits in memory. A bit is set after its block's data were written, and seen set only by those who then find them.
pub(super) struct BlockMap {
    blocks: u64,
    sectors: Box<[OnceLock<Box<Sector>>]>,
    /// Sectors with bits that are not on disk.
    dirty: Mutex<Vec<u32>>,
}

/// Sectors as they were at a moment.
pub(super) struct Snapshot(BTreeMap<u32, Encoded>);

impl BlockMap {
    /// Bytes that the map of so many blocks has on disk.
    pub fn file_bytes(blocks: u64) -> u64 {
        blocks.div_ceil(BITS) * SECTOR as u64
    }

    fn empty(blocks: u64) -> Self {
        let sectors = (0..blocks.div_ceil(BITS)).map(|_| OnceLock::new()).collect();
        Self { blocks, sectors, dirty: Mutex::default() }
    }

    /// Reads the map of the upper `name`.
    pub fn load(file: &dyn Media, blocks: u64, name: &str) -> Result<Self> {
        let map = Self::empty(blocks);
        for_each_sector(file, map.sectors.len(), |number, bytes| {
            let words = decode(number, bytes)?;
            if let (Some(words), Some(place)) = (words, map.sectors.get(number as usize)) {
                let sector = place.get_or_init(Sector::empty);
                for (to, from) in sector.words.iter().zip(words) {
                    to.store(from, Relaxed);
                }
            }
            Ok(())
        })
        .map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => Error::invalid("upper", format!("the map of {name} is damaged: {error}")),
            _ => Error::io(format!("read the map of the upper {name}"), error),
        })?;
        Ok(map)
    }

    /// Whether a map on disk, however long, has a sector with bits.
    pub fn holds_bits(file: &dyn Media) -> io::Result<bool> {
        let sectors = usize::try_from(file.len()? / SECTOR as u64).unwrap_or(usize::MAX);
        let mut found = false;
        for_each_sector(file, sectors, |number, bytes| {
            found |= matches!(decode(number, bytes), Ok(Some(_)));
            Ok(())
        })?;
        Ok(found)
    }

    /// How many blocks the device has.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Whether block `start` is set, and how many blocks from there on, before `end`, are alike.
    pub fn run(&self, start: u64, end: u64) -> (bool, u64) {
        let mut at = start;
        let mut first = None;
        while at < end {
            let (bits, len) = self.word(at);
            let len = len.min(end - at);
            let set = *first.get_or_insert(bits & 1 == 1);
            let alike = match (set, bits) {
                (true, _) => u64::from(bits.trailing_ones()),
                (false, 0) => len,
                (false, _) => u64::from(bits.trailing_zeros()),
            };
            at += alike.min(len);
            if alike < len {
                break;
            }
        }
        (first.unwrap_or(false), at - start)
    }

    /// The bits from block `at` on, as many as its word has, or a sector without bits.
    fn word(&self, at: u64) -> (u64, u64) {
        let (sector, within) = (at / BITS, at % BITS);
        let Some(sector) = self.sectors.get(sector as usize).and_then(OnceLock::get) else { return (0, BITS - within) };
        let bit = within % 64;
        let word = sector.words.get((within / 64) as usize).map_or(0, |word| word.load(Acquire));
        (word >> bit, 64 - bit)
    }

    /// Sets the bits of blocks whose data were written.
    pub fn set(&self, blocks: &Range<u64>) {
        // Held until the sector is among the dirty ones: a flush of somebody who has seen the bit must find it there.
        let mut dirty = self.dirty.lock();
        let mut at = blocks.start;
        while at < blocks.end.min(self.blocks) {
            let (number, within) = (at / BITS, at % BITS);
            let bit = within % 64;
            let len = (64 - bit).min(blocks.end - at);
            at += len;
            let Some(place) = self.sectors.get(number as usize) else { return };
            let sector = place.get_or_init(Sector::empty);
            let Some(word) = sector.words.get((within / 64) as usize) else { return };
            let mask = (u64::MAX >> (64 - len)) << bit;
            if word.fetch_or(mask, Release) & mask != mask && !sector.dirty.swap(true, Relaxed) {
                dirty.push(number as u32);
            }
        }
    }

    /// The sectors that are not on disk, which count as being there from now on.
    pub fn take_dirty(&self) -> Snapshot {
        let mut dirty = self.dirty.lock();
        let mut snapshot = BTreeMap::new();
        for number in dirty.drain(..) {
            let Some(sector) = self.sectors.get(number as usize).and_then(OnceLock::get) else { continue };
            sector.dirty.store(false, Relaxed);
            snapshot.insert(number, encode(number, &sector.words));
        }
        Snapshot(snapshot)
    }

    /// The sectors could not be written.
    pub fn put_back(&self, snapshot: &Snapshot) {
        let mut dirty = self.dirty.lock();
        for &number in snapshot.0.keys() {
            let Some(sector) = self.sectors.get(number as usize).and_then(OnceLock::get) else { continue };
            if !sector.dirty.swap(true, Relaxed) {
                dirty.push(number);
            }
        }
    }
}

impl Snapshot {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Writes neighbours together.
    pub fn write(&self, file: &dyn Media) -> io::Result<()> {
        let mut batch: Vec<u8> = Vec::new();
        let mut start = 0;
        for (&number, bytes) in &self.0 {
            let next = start + (batch.len() / SECTOR) as u32;
            if !batch.is_empty() && (number != next || batch.len() == BATCH * SECTOR) {
                file.write(u64::from(start) * SECTOR as u64, &batch)?;
                batch.clear();
            }
            if batch.is_empty() {
                start = number;
            }
            batch.extend_from_slice(bytes);
        }
        file.write(u64::from(start) * SECTOR as u64, &batch)
    }
}

fn checksum(number: u32, bits: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&number.to_le_bytes()), bits)
}

fn encode(number: u32, words: &[AtomicU64; WORDS]) -> Encoded {
    let mut bytes = [0; SECTOR];
    for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.load(Acquire).to_le_bytes());
    }
    let sum = checksum(number, bytes.get(..BITS_BYTES).unwrap_or_default());
    for (to, from) in bytes.iter_mut().skip(BITS_BYTES).zip(sum.to_le_bytes()) {
        *to = from;
    }
    bytes
}

/// The words of a sector; `None` for one without bits.
fn decode(number: u32, bytes: &[u8]) -> io::Result<Option<[u64; WORDS]>> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    let (bits, sum) = bytes.split_at(BITS_BYTES.min(bytes.len()));
    if sum.get(..4) != Some(checksum(number, bits).to_le_bytes().as_slice()) {
        let message = format!("sector {number} has a wrong checksum");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    let mut words = [0; WORDS];
    for (to, from) in words.iter_mut().zip(bits.as_chunks().0) {
        *to = u64::from_le_bytes(*from);
    }
    Ok(Some(words))
}

fn for_each_sector(
    file: &dyn Media,
    sectors: usize,
    mut found: impl FnMut(u32, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut batch = vec![0; BATCH.min(sectors) * SECTOR];
    let mut number = 0;
    while number < sectors {
        let want = (sectors - number).min(BATCH);
        let bytes = batch.get_mut(..want * SECTOR).unwrap_or_default();
        file.read((number * SECTOR) as u64, bytes)?;
        for sector in bytes.chunks_exact(SECTOR) {
            found(number as u32, sector)?;
            number += 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn runs_are_those_of_a_plain_list() {
        let blocks = 3 * BITS + 17;
        let map = BlockMap::empty(blocks);
        let mut model = vec![false; blocks as usize];
        let mut seed = 7u64;
        for _ in 0..60 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let start = (seed >> 33) % blocks;
            let end = (start + 1 + (seed >> 20) % 300).min(blocks);
            map.set(&(start..end));
            model[start as usize..end as usize].fill(true);
            let mut at = 0;
            while at < blocks {
                let (set, len) = map.run(at, blocks);
                assert!(len > 0);
                assert!(model[at as usize..(at + len) as usize].iter().all(|&bit| bit == set), "{at} {len}");
                assert!(at + len == blocks || model[(at + len) as usize] != set, "{at} {len}");
                at += len;
            }
            assert_eq!(map.run(start, end), (true, end - start));
        }
    }

    #[test]
    fn what_is_dirty_is_written_once_and_read_back() {
        let file: Box<dyn Media> = Box::new(tempfile::tempfile().unwrap());
        let blocks = 300 * BITS;
        file.set_len(BlockMap::file_bytes(blocks)).unwrap();
        assert!(!BlockMap::holds_bits(file.as_ref()).unwrap());
        let map = BlockMap::empty(blocks);
        for range in [0..1, 5 * BITS - 1..7 * BITS + 1, 200 * BITS..blocks] {
            map.set(&range);
        }
        let snapshot = map.take_dirty();
        assert!(map.take_dirty().is_empty());
        map.put_back(&snapshot);
        map.take_dirty().write(file.as_ref()).unwrap();
        assert!(BlockMap::holds_bits(file.as_ref()).unwrap());
        let read = BlockMap::load(file.as_ref(), blocks, "it").unwrap();
        let mut at = 0;
        while at < blocks {
            assert_eq!(read.run(at, blocks), map.run(at, blocks));
            at += map.run(at, blocks).1;
        }
        file.write(6 * 512 + 9, &[1]).unwrap();
        let error = BlockMap::load(file.as_ref(), blocks, "it").err().unwrap().to_string();
        assert!(error.contains("sector 6"), "{error}");
    }
}
