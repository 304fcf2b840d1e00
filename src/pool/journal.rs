//! The journal: which chunks there are and where. Appended to, never synced by itself; FORMAT.md says why that is
//! enough.
#![deny(clippy::indexing_slicing)]

use std::io::{self, ErrorKind};
use std::sync::Arc;

use parking_lot::Mutex;

use super::record::{BODY, Header, JOURNAL_MAGIC, RECORD, Record, VERSION};
use crate::media::{Media, MediaDir};

const NAME: &str = "journal";
const NEW: &str = "journal.new";
const ASIDE: &str = "journal.aside";

/// Records read or written at once.
const BATCH: u64 = 4096;

/// An open journal.
pub(super) struct Journal {
    state: Mutex<State>,
}

struct State {
    file: Arc<dyn Media>,
    /// Number of the next record.
    next: u64,
    /// Records that are appended while the journal is rewritten: the new one gets them too.
    meanwhile: Option<Vec<Record>>,
    /// The journal is not rewritten before it has so many records.
    not_before: u64,
}

/// What was found in place of the journal.
pub(super) enum Found {
    /// With the number that the next slab has at least.
    Journal(Journal, u32),
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
            Some(header) if header.version == VERSION => Found::Journal(Self::with(media.into(), 0), header.slab),
            Some(header) => Found::Unusable(format!("format version {}, this program has {VERSION}", header.version)),
            None => Found::Unusable("its header is damaged".to_owned()),
        }
    }

    /// Moves the journal out of the way.
    pub fn set_aside(dir: &dyn MediaDir) -> io::Result<()> {
        dir.rename(NAME, ASIDE)
    }

    fn with(file: Arc<dyn Media>, next: u64) -> Self {
        Self { state: Mutex::new(State { file, next, meanwhile: None, not_before: 0 }) }
    }

    /// Writes a new journal of `records` and puts it in place, whole or not at all.
    pub fn create(dir: &dyn MediaDir, next_slab: u32, records: impl Iterator<Item = Record>) -> io::Result<Self> {
        let mut new = New::begin(dir, next_slab)?;
        new.write(records)?;
        new.media.sync()?;
        dir.rename(NEW, NAME)?;
        dir.sync()?;
        Ok(Self::with(new.media.into(), new.next))
    }

    /// Whether a journal that has `least` records, and more than the pool's `chunks` chunks need, is to be rewritten; true for one thread, which must
    /// [`compact`](Self::compact). From here on what is appended gets into the new journal too.
    pub fn begin_compaction(&self, chunks: u64, least: u64) -> bool {
        let mut state = self.state.lock();
        let due = state.next > state.not_before.max(2 * chunks).max(least) && state.meanwhile.is_none();
        if due {
            state.meanwhile = Some(Vec::new());
        }
        due
    }

    /// Puts a new journal of `records` in place of this one. A crash shows one or the other, whole; of what happened
    /// meanwhile any part may be missing, as always.
    pub fn compact(&self, dir: &dyn MediaDir, next_slab: u32, records: impl Iterator<Item = Record>) -> io::Result<()> {
        let rewritten = self.rewrite(dir, next_slab, records);
        if rewritten.is_err() {
            let mut state = self.state.lock();
            state.meanwhile = None;
            // Not again before it has grown by half.
            state.not_before = state.next + state.next / 2;
        }
        rewritten
    }

    fn rewrite(&self, dir: &dyn MediaDir, next_slab: u32, records: impl Iterator<Item = Record>) -> io::Result<()> {
        let mut new = New::begin(dir, next_slab)?;
        new.write(records)?;
        let meanwhile = self.state.lock().meanwhile.replace(Vec::new()).unwrap_or_default();
        new.write(meanwhile.into_iter())?;
        new.media.sync()?;
        dir.rename(NEW, NAME)?;
        let (file, start): (Arc<dyn Media>, u64) = (new.media.into(), new.next);
        let meanwhile = {
            let mut state = self.state.lock();
            let meanwhile = state.meanwhile.take().unwrap_or_default();
            state.file = Arc::clone(&file);
            state.next = start + meanwhile.len() as u64;
            state.not_before = 0;
            meanwhile
        };
        // The journal is switched: what fails now costs records, as an append that fails does.
        for (number, record) in (start..).zip(meanwhile) {
            let _ = file.write(BODY + number * RECORD, &record.encode(number));
        }
        dir.sync()
    }

    /// Calls `found` with every valid record in order, and cuts what follows the last one. Returns how many records
    /// before it are not valid.
    pub fn replay(&self, mut found: impl FnMut(Record)) -> io::Result<u64> {
        let file = self.file();
        let len = file.len()?;
        let records = len.saturating_sub(BODY) / RECORD;
        let mut batch = vec![0; (BATCH.min(records) * RECORD) as usize];
        let (mut number, mut valid, mut next) = (0, 0, 0);
        while number < records {
            let want = (records - number).min(BATCH);
            let piece = batch.get_mut(..(want * RECORD) as usize).unwrap_or_default();
            file.read(BODY + number * RECORD, piece)?;
            for bytes in piece.chunks_exact(RECORD as usize) {
                if let Some(record) = Record::decode(number, bytes) {
                    found(record);
                    valid += 1;
                    next = number + 1;
                }
                number += 1;
            }
        }
        self.state.lock().next = next;
        let end = BODY + next * RECORD;
        if len > end {
            // Only tidiness: what is behind the end is overwritten, or skipped by the next replay.
            let _ = file.set_len(end);
        }
        Ok(next - valid)
    }

    /// Appends a record. One that fails leaves a gap, which a replay skips.
    pub fn append(&self, record: &Record) -> io::Result<()> {
        let (file, number) = {
            let mut state = self.state.lock();
            if let Some(meanwhile) = &mut state.meanwhile {
                meanwhile.push(*record);
            }
            state.next += 1;
            (Arc::clone(&state.file), state.next - 1)
        };
        file.write(BODY + number * RECORD, &record.encode(number))
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        BODY + self.state.lock().next * RECORD
    }

    pub fn sync(&self) -> io::Result<()> {
        self.file().sync()
    }

    fn file(&self) -> Arc<dyn Media> {
        Arc::clone(&self.state.lock().file)
    }
}

/// A journal that is being written.
struct New {
    media: Box<dyn Media>,
    next: u64,
}

impl New {
    fn begin(dir: &dyn MediaDir, next_slab: u32) -> io::Result<Self> {
        match dir.remove(NEW) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let media = dir.create(NEW)?;
        let header = Header { magic: JOURNAL_MAGIC, version: VERSION, slab: next_slab, bytes: 0, records: 0 };
        media.write(0, &header.encode())?;
        Ok(Self { media, next: 0 })
    }

    fn write(&mut self, records: impl Iterator<Item = Record>) -> io::Result<()> {
        let (mut start, mut batch) = (self.next, Vec::new());
        for record in records {
            batch.extend_from_slice(&record.encode(self.next));
            self.next += 1;
            if self.next - start == BATCH {
                self.media.write(BODY + start * RECORD, &batch)?;
                batch.clear();
                start = self.next;
            }
        }
        self.media.write(BODY + start * RECORD, &batch)
    }
}
