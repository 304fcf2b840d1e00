//! The journal: which chunks there are and where. Appended to, never synced by itself; FORMAT.md says why that is
//! enough.
#![deny(clippy::indexing_slicing)]

use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::record::{BODY, Header, JOURNAL_MAGIC, RECORD, Record, VERSION};
use crate::media::{Media, MediaDir};

const NAME: &str = "journal";
const NEW: &str = "journal.new";
const ASIDE: &str = "journal.aside";

/// Records read or written at once.
const BATCH: u64 = 4096;

/// An open journal.
pub(super) struct Journal {
    media: Box<dyn Media>,
    /// Number of the next record.
    next: AtomicU64,
}

/// What was found in place of the journal.
pub(super) enum Found {
    Journal(Journal),
    /// There is none.
    Absent,
    /// There is one that this version can't use.
    Unusable(String),
}

impl Journal {
    /// Opens the journal. It must be [replayed](Self::replay) before it is appended to.
    pub fn open(dir: &dyn MediaDir) -> Found {
        let media = match dir.open(NAME) {
            Ok(media) => media,
            Err(error) if error.kind() == ErrorKind::NotFound => return Found::Absent,
            Err(error) => return Found::Unusable(error.to_string()),
        };
        let mut bytes = [0; RECORD as usize];
        if let Err(error) = media.read(0, &mut bytes) {
            return Found::Unusable(error.to_string());
        }
        match Header::decode(JOURNAL_MAGIC, &bytes) {
            Some(header) if header.version == VERSION => Found::Journal(Self { media, next: AtomicU64::new(0) }),
            Some(header) => Found::Unusable(format!("format version {}, this program has {VERSION}", header.version)),
            None => Found::Unusable("its header is damaged".to_owned()),
        }
    }

    /// Moves the journal out of the way.
    pub fn set_aside(dir: &dyn MediaDir) -> io::Result<()> {
        dir.rename(NAME, ASIDE)
    }

    /// Writes a new journal of `records` and puts it in place, whole or not at all.
    pub fn create(dir: &dyn MediaDir, records: impl Iterator<Item = Record>) -> io::Result<Self> {
        match dir.remove(NEW) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let media = dir.create(NEW)?;
        let header = Header { magic: JOURNAL_MAGIC, version: VERSION, slab: 0, bytes: 0, records: 0 };
        media.write(0, &header.encode())?;
        let (mut next, mut start, mut batch) = (0, 0, Vec::new());
        for record in records {
            batch.extend_from_slice(&record.encode(next));
            next += 1;
            if next - start == BATCH {
                media.write(BODY + start * RECORD, &batch)?;
                batch.clear();
                start = next;
            }
        }
        media.write(BODY + start * RECORD, &batch)?;
        media.sync()?;
        dir.rename(NEW, NAME)?;
        dir.sync()?;
        Ok(Self { media, next: AtomicU64::new(next) })
    }

    /// Calls `found` with every valid record in order, and cuts what follows the last one. Returns how many records
    /// before it are not valid.
    pub fn replay(&self, mut found: impl FnMut(Record)) -> io::Result<u64> {
        let len = self.media.len()?;
        let records = len.saturating_sub(BODY) / RECORD;
        let mut batch = vec![0; (BATCH.min(records) * RECORD) as usize];
        let (mut number, mut valid, mut next) = (0, 0, 0);
        while number < records {
            let want = (records - number).min(BATCH);
            let piece = batch.get_mut(..(want * RECORD) as usize).unwrap_or_default();
            self.media.read(BODY + number * RECORD, piece)?;
            for bytes in piece.chunks_exact(RECORD as usize) {
                if let Some(record) = Record::decode(number, bytes) {
                    found(record);
                    valid += 1;
                    next = number + 1;
                }
                number += 1;
            }
        }
        self.next.store(next, Relaxed);
        let end = BODY + next * RECORD;
        if len > end {
            // Only tidiness: what is behind the end is overwritten, or skipped by the next replay.
            let _ = self.media.set_len(end);
        }
        Ok(next - valid)
    }

    /// Appends a record. One that fails leaves a gap, which a replay skips.
    pub fn append(&self, record: &Record) -> io::Result<()> {
        let number = self.next.fetch_add(1, Relaxed);
        self.media.write(BODY + number * RECORD, &record.encode(number))
    }

    pub fn sync(&self) -> io::Result<()> {
        self.media.sync()
    }
}
