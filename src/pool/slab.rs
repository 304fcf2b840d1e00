//! Slabs: files of plain chunks, each with a table of what is in it.
#![deny(clippy::indexing_slicing)]

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{Ordering::Relaxed, fence};

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use zerocopy::FromZeros;

use super::record::{ALIGN, BODY, Header, Kind, RECORD, Record, SLAB_MAGIC, VERSION};
use crate::media::{Media, MediaDir};

/// Largest slab in bytes that is made or read.
pub(super) const SLAB_MAX: u64 = 2 << 30;

/// A slab's table has one record for so many bytes of the slab.
const BYTES_PER_RECORD: u64 = 16 << 10;

/// An open slab.
pub(super) struct Slab {
    pub number: u32,
    media: Box<dyn Media>,
    /// Where the slab ends at most.
    bytes: u64,
    /// Records in its table.
    records: u32,
    /// Whether something was written since the last sync.
    dirty: AtomicBool,
    /// Whether a failed read of this slab was already reported.
    reported: AtomicBool,
    /// Bytes of the places that the index knows.
    live: AtomicU64,
    /// Appends that took room and did not publish it yet.
    writers: AtomicU32,
    /// Whether the slab is being emptied, or could not be.
    retiring: AtomicBool,
    /// [`THERE`] and [`USED`] of every block that a chunk begins at, 32 blocks a word: 16 bytes for each 256 KiB, which are
    /// zeros that take no memory before they are written.
    places: Box<[AtomicU64]>,
}

/// Places of a word.
const PLACES: u64 = 32;
/// The index has a chunk here. Set once in the life of a place, and taken before anything else becomes of it.
const THERE: u64 = 1;
/// The chunk was used since the eviction's hand passed.
const USED: u64 = 2;

/// An append to a slab that is under way.
pub(super) struct Appending(Arc<Slab>);

impl Drop for Appending {
    fn drop(&mut self) {
        self.0.writers.fetch_sub(1, Ordering::Release);
    }
}

impl std::ops::Deref for Appending {
    type Target = Arc<Slab>;

    fn deref(&self) -> &Arc<Slab> {
        &self.0
    }
}

/// Why a file with a slab's name is not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error("it can't be read: {0}")]
    Io(#[from] io::Error),
    #[error("it has format version {0}, this program has {VERSION}")]
    Version(u32),
    #[error("its header is damaged, or it is not a slab")]
    Header,
}

/// The file name of slab `number`.
pub(super) fn name(number: u32) -> String {
    format!("slab-{number:08x}")
}

/// The number of the slab with this file name.
pub(super) fn number(file_name: &str) -> Option<u32> {
    let number = u32::from_str_radix(file_name.strip_prefix("slab-")?, 16).ok()?;
    (name(number) == file_name).then_some(number)
}

impl Slab {
    /// Creates slab `number` with room for about `bytes` (a multiple of 1 MiB, at most [`SLAB_MAX`]).
    pub fn create(dir: &dyn MediaDir, number: u32, bytes: u64) -> io::Result<Self> {
        let records = (bytes / BYTES_PER_RECORD) as u32;
        let name = name(number);
        let media = dir.create(&name)?;
        let header = Header { magic: SLAB_MAGIC, version: VERSION, slab: number, bytes, records };
        if let Err(error) = media.write(0, &header.encode()) {
            // An empty file with a slab's name would only be reported at every start.
            let _ = dir.remove(&name);
            return Err(error);
        }
        Self::with(number, media, bytes, records)
    }

    fn with(number: u32, media: Box<dyn Media>, bytes: u64, records: u32) -> io::Result<Self> {
        let words = (bytes / ALIGN).div_ceil(PLACES) as usize;
        let places = <[AtomicU64]>::new_box_zeroed_with_elems(words).map_err(|_| ErrorKind::OutOfMemory)?;
        Ok(Self {
            number,
            media,
            bytes,
            records,
            dirty: AtomicBool::default(),
            reported: AtomicBool::default(),
            live: AtomicU64::default(),
            writers: AtomicU32::default(),
            retiring: AtomicBool::default(),
            places,
        })
    }

    /// Opens slab `number`.
    pub fn open(dir: &dyn MediaDir, number: u32) -> Result<Self, Unusable> {
        let media = dir.open(&name(number))?;
        let mut bytes = [0; RECORD as usize];
        match media.read(0, &mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(Unusable::Header),
            read => read?,
        }
        let header = Header::decode(SLAB_MAGIC, &bytes).ok_or(Unusable::Header)?;
        if header.version != VERSION {
            return Err(Unusable::Version(header.version));
        }
        let table = u64::from(header.records) * RECORD;
        if header.slab != number
            || header.bytes > SLAB_MAX
            || !table.is_multiple_of(ALIGN)
            || BODY + table > header.bytes
        {
            return Err(Unusable::Header);
        }
        let (bytes, records) = (header.bytes, header.records);
        Ok(Self::with(number, media, bytes, records)?)
    }

    /// First byte after the table.
    pub fn data_start(&self) -> u64 {
        BODY + u64::from(self.records) * RECORD
    }

    /// Where the slab ends at most.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Records in the table.
    pub fn records(&self) -> u32 {
        self.records
    }

    /// Length of the file.
    pub fn len(&self) -> io::Result<u64> {
        self.media.len()
    }

    /// Whether `record` names a place in the data of a slab that is `len` bytes long now.
    pub fn holds(&self, record: &Record, len: u64) -> bool {
        record.offset() >= self.data_start()
            && record.end() <= self.bytes
            && record.offset() + u64::from(record.len) <= len
    }

    pub fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.media.read(offset, buf)
    }

    /// See [`Media::read_medium`].
    pub fn read_medium(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.media.read_medium(offset, buf)
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.media.write(offset, bytes)?;
        self.dirty.store(true, Relaxed);
        Ok(())
    }

    pub fn write_record(&self, number: u32, record: &Record) -> io::Result<()> {
        let number = u64::from(number);
        self.media.write(BODY + number * RECORD, &record.encode(number))
    }

    pub fn sync(&self) -> io::Result<()> {
        if self.dirty.swap(false, Relaxed) { self.media.sync() } else { Ok(()) }
    }

    /// Calls `found` with every valid record of the table, and returns how many records are in use, valid or not.
    pub fn table(&self, mut found: impl FnMut(Record)) -> io::Result<u32> {
        let table = self.data_start().min(self.len()?).saturating_sub(BODY) / RECORD;
        let mut page = [0; ALIGN as usize];
        let (mut number, mut used) = (0, 0);
        while number < table {
            let want = (table - number).min(ALIGN / RECORD);
            let piece = page.get_mut(..(want * RECORD) as usize).unwrap_or_default();
            self.media.read(BODY + number * RECORD, piece)?;
            for bytes in piece.chunks_exact(RECORD as usize) {
                if bytes.iter().any(|&byte| byte != 0) {
                    used = number + 1;
                }
                if let Some(record) = Record::decode(number, bytes)
                    && record.kind == Kind::Admit
                    && record.slab == self.number
                {
                    found(Record { row: (number + 1) as u32, ..record });
                }
                number += 1;
            }
        }
        Ok(used as u32)
    }

    /// Begins an append; the slab is not removed while it lasts.
    pub fn append(self: &Arc<Self>) -> Appending {
        self.writers.fetch_add(1, Relaxed);
        Appending(Arc::clone(self))
    }

    /// Whether an append is under way.
    pub fn is_appended_to(&self) -> bool {
        self.writers.load(Ordering::Acquire) > 0
    }

    /// Says that the index is about to have a chunk at `block`, of `bytes` bytes; false if it has another one there.
    pub fn gained(&self, block: u32, bytes: u64) -> bool {
        let Some((word, shift)) = self.place(block) else { return false };
        if (word.fetch_or(THERE << shift, Relaxed) >> shift) & THERE != 0 {
            return false;
        }
        self.live.fetch_add(bytes, Relaxed);
        true
    }

    /// Says that the index has the chunk at `block` not any more, which has `bytes` bytes; whether it was used lately.
    pub fn lost(&self, block: u32, bytes: u64) -> bool {
        let place = self.place(block);
        let marks =
            place.map_or(0, |(word, shift)| word.fetch_and(!((THERE | USED) << shift), Ordering::SeqCst) >> shift);
        self.live.fetch_sub(bytes, Relaxed);
        marks & USED != 0
    }

    fn place(&self, block: u32) -> Option<(&AtomicU64, u32)> {
        Some((self.places.get((u64::from(block) / PLACES) as usize)?, (u64::from(block) % PLACES * 2) as u32))
    }

    /// Whether the chunk at `block` is there, which is marked as used then. Who asks after reading knows that what was
    /// read is the chunk: the place was nothing else's before.
    pub fn use_place(&self, block: u32) -> bool {
        fence(Ordering::Acquire);
        let Some((word, shift)) = self.place(block) else { return false };
        let marks = word.load(Relaxed) >> shift;
        // Stored only if it is not yet: a hit on a hot chunk must not take the cache line from other readers.
        if marks & (THERE | USED) == THERE {
            word.fetch_or(USED << shift, Relaxed);
        }
        marks & THERE != 0
    }

    /// Whether the chunk at `block` was used since this was asked the last time.
    pub fn take_used(&self, block: u32) -> bool {
        let Some((word, shift)) = self.place(block) else { return false };
        let used = USED << shift;
        word.load(Relaxed) & used != 0 && word.fetch_and(!used, Relaxed) & used != 0
    }

    /// Bytes of the places that the index knows.
    pub fn live(&self) -> u64 {
        self.live.load(Relaxed)
    }

    /// Gives the blocks of a place back, which the index does not have any more, and its row in the table. Who is
    /// reading there finds that the chunk is not there any more.
    pub fn give_up(&self, offset: u64, len: u64, row: u32) -> io::Result<()> {
        self.media.punch(offset, len)?;
        if (1..=self.records).contains(&row) {
            self.media.write(BODY + u64::from(row - 1) * RECORD, &[0; RECORD as usize])?;
        }
        Ok(())
    }

    /// True for the one who may empty and remove the slab.
    pub fn retire_once(&self) -> bool {
        !self.retiring.load(Relaxed) && !self.retiring.swap(true, Relaxed)
    }

    /// True the first time only: one event for a slab that can't be read, not one for each chunk.
    pub fn report_once(&self) -> bool {
        !self.reported.swap(true, Relaxed)
    }
}
