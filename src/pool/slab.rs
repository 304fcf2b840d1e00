//! Slabs: files of plain chunks, each with a table of what is in it.
#![deny(clippy::indexing_slicing)]

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

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
        Ok(Self::with(number, media, bytes, records))
    }

    fn with(number: u32, media: Box<dyn Media>, bytes: u64, records: u32) -> Self {
        Self { number, media, bytes, records, dirty: AtomicBool::default(), reported: AtomicBool::default() }
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
        if header.slab != number || header.bytes > SLAB_MAX || table % ALIGN != 0 || BODY + table > header.bytes {
            return Err(Unusable::Header);
        }
        let (bytes, records) = (header.bytes, header.records);
        Ok(Self::with(number, media, bytes, records))
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
                    found(record);
                }
                number += 1;
            }
        }
        Ok(used as u32)
    }

    /// True the first time only: one event for a slab that can't be read, not one for each chunk.
    pub fn report_once(&self) -> bool {
        !self.reported.swap(true, Relaxed)
    }
}
