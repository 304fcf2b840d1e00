//! A disk in memory whose power can be cut at any change, and that then shows what a real one may show.
//!
//! ```text
//! let disk = CrashDisk::new();          // write to it through disk.dir()
//! disk.cut_power_after(7);              // the 7th change from now is the last, and may be torn
//! let later = disk.after_crash(Survivors::Some(seed));
//! ```
// Every test program uses its own part of this.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::io::{self, Error, ErrorKind};
use std::sync::Arc;

use firstread::media::{Media, MediaDir, Space};
use parking_lot::Mutex;

use crate::random::Random;

const SECTOR: usize = 512;

/// Which unsynced changes survive a crash.
#[derive(Clone, Copy, Debug)]
pub enum Survivors {
    /// None.
    None,
    /// All.
    All,
    /// Some sectors, lengths and directory entries, in any order, chosen by the seed. Sectors of a file that grew but
    /// that were not written show zeros or rubbish.
    Some(u64),
}

#[derive(Clone)]
enum Step {
    Create(String, usize),
    Rename(String, String, usize),
    Remove(String, usize),
}

#[derive(Clone, Default)]
struct Content {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// Writes since the last sync.
    pending: Vec<(usize, Vec<u8>)>,
    /// Lengths since the last sync.
    lengths: Vec<usize>,
}

#[derive(Default)]
struct State {
    files: Vec<Content>,
    now: BTreeMap<String, usize>,
    durable: BTreeMap<String, usize>,
    pending: Vec<Step>,
    /// Changes so far.
    changes: u64,
    /// Bytes read so far.
    read: u64,
    /// Changes until the power is cut.
    left: Option<u64>,
    /// Done before the next read.
    before_read: Option<Box<dyn FnOnce() + Send>>,
}

/// The disk. Clones are the same disk.
#[derive(Clone, Default)]
pub struct CrashDisk(Arc<Mutex<State>>);

struct CrashFile {
    disk: CrashDisk,
    id: usize,
}

impl CrashDisk {
    pub fn new() -> Self {
        Self::default()
    }

    /// The disk's only directory.
    pub fn dir(&self) -> Box<dyn MediaDir> {
        Box::new(self.clone())
    }

    /// How many changes (writes, lengths, syncs, creations, renames, removals) were made.
    pub fn changes(&self) -> u64 {
        self.0.lock().changes
    }

    /// How many bytes were read.
    pub fn bytes_read(&self) -> u64 {
        self.0.lock().read
    }

    /// Lets `changes` more changes happen; of the last one any part survives. Everything after it fails.
    pub fn cut_power_after(&self, changes: u64) {
        self.0.lock().left = Some(changes);
    }

    /// Does something when the next read is about to take its bytes.
    pub fn before_read(&self, act: impl FnOnce() + Send + 'static) {
        self.0.lock().before_read = Some(Box::new(act));
    }

    /// Whether the power is off.
    pub fn is_off(&self) -> bool {
        self.0.lock().left == Some(0)
    }

    /// The disk after the power is back.
    pub fn after_crash(&self, survivors: Survivors) -> Self {
        let state = self.0.lock();
        let mut random = match survivors {
            Survivors::Some(seed) => Random(seed),
            _ => Random(0),
        };
        let mut names = state.durable.clone();
        for step in &state.pending {
            let happens = match survivors {
                Survivors::None => false,
                Survivors::All => true,
                Survivors::Some(_) => random.one_in(2),
            };
            if happens {
                step.apply(&mut names);
            }
        }
        let files = state.files.iter().map(|file| Content::durable(file.after_crash(survivors, &mut random))).collect();
        Self(Arc::new(Mutex::new(State { files, now: names.clone(), durable: names, ..State::default() })))
    }

    /// The disk as the next process finds it when only this one was killed, or ended: nothing is lost, and what was not
    /// durable is not durable yet.
    pub fn after_crash_of_process(&self) -> Self {
        let state = self.0.lock();
        let (files, now, durable) = (state.files.clone(), state.now.clone(), state.durable.clone());
        Self(Arc::new(Mutex::new(State { files, now, durable, pending: state.pending.clone(), ..State::default() })))
    }

    /// Begins a change, or fails when the power is off.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.0.lock();
        match &mut state.left {
            Some(0) => return Err(off()),
            Some(left) => *left -= 1,
            None => {}
        }
        state.changes += 1;
        change(&mut state)
    }

    fn file(&self, id: usize) -> Box<dyn Media> {
        Box::new(CrashFile { disk: self.clone(), id })
    }
}

fn off() -> Error {
    Error::other("the power is off")
}

impl Step {
    fn apply(&self, names: &mut BTreeMap<String, usize>) {
        match self {
            Self::Create(name, id) => {
                names.insert(name.clone(), *id);
            }
            Self::Rename(from, to, id) => {
                if names.get(from) == Some(id) {
                    names.remove(from);
                }
                names.insert(to.clone(), *id);
            }
            Self::Remove(name, id) => {
                if names.get(name) == Some(id) {
                    names.remove(name);
                }
            }
        }
    }
}

impl Content {
    fn durable(bytes: Vec<u8>) -> Self {
        Self { now: bytes.clone(), durable: bytes, ..Self::default() }
    }

    fn after_crash(&self, survivors: Survivors, random: &mut Random) -> Vec<u8> {
        match survivors {
            Survivors::None => return self.durable.clone(),
            Survivors::All => return self.now.clone(),
            Survivors::Some(_) => {}
        }
        let old = self.durable.len();
        let longest = self.pending.iter().map(|(at, bytes)| at + bytes.len()).max().unwrap_or(0).max(old);
        let mut bytes = self.durable.clone();
        if random.one_in(2) {
            bytes.resize(longest, 0);
        } else {
            bytes.extend(random.bytes(longest - old));
        }
        let mut sectors = Vec::new();
        for (at, written) in &self.pending {
            let mut from = 0;
            while from < written.len() {
                let to = written.len().min((at + from) / SECTOR * SECTOR + SECTOR - at);
                sectors.push((at + from, &written[from..to]));
                from = to;
            }
        }
        for last in (1..sectors.len()).rev() {
            sectors.swap(last, random.below(last as u64 + 1) as usize);
        }
        // From nearly all lost to nearly all there.
        let odds = 1 + random.below(4);
        let mostly = random.one_in(2);
        for (at, sector) in sectors {
            if random.one_in(odds) || (mostly && !random.one_in(50)) {
                bytes[at..at + sector.len()].copy_from_slice(sector);
            }
        }
        let lengths = [old, self.now.len()];
        let len =
            self.lengths.iter().chain(&lengths).copied().nth(random.below(self.lengths.len() as u64 + 2) as usize);
        bytes.resize(len.unwrap_or(old), 0);
        bytes
    }
}

impl MediaDir for CrashDisk {
    fn names(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().now.keys().cloned().collect())
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn Media>> {
        let id = *self.0.lock().now.get(name).ok_or(ErrorKind::NotFound)?;
        Ok(self.file(id))
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn Media>> {
        let id = self.change(|state| {
            if state.now.contains_key(name) {
                return Err(ErrorKind::AlreadyExists.into());
            }
            let id = state.files.len();
            state.files.push(Content::default());
            state.now.insert(name.to_owned(), id);
            state.pending.push(Step::Create(name.to_owned(), id));
            Ok(id)
        })?;
        Ok(self.file(id))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.change(|state| {
            let id = *state.now.get(from).ok_or(ErrorKind::NotFound)?;
            let step = Step::Rename(from.to_owned(), to.to_owned(), id);
            step.apply(&mut state.now);
            state.pending.push(step);
            Ok(())
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.change(|state| {
            let id = *state.now.get(name).ok_or(ErrorKind::NotFound)?;
            let step = Step::Remove(name.to_owned(), id);
            step.apply(&mut state.now);
            state.pending.push(step);
            Ok(())
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.change(|state| {
            // A sync that the power is cut in has done nothing for sure.
            if state.left != Some(0) {
                state.durable = state.now.clone();
                state.pending.clear();
            }
            Ok(())
        })
    }

    fn space(&self) -> io::Result<Space> {
        Ok(Space { free: 1 << 40, total: 1 << 40 })
    }
}

impl Media for CrashFile {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let act = self.disk.0.lock().before_read.take();
        if let Some(act) = act {
            act();
        }
        let mut state = self.disk.0.lock();
        if state.left == Some(0) {
            return Err(off());
        }
        state.read += buf.len() as u64;
        let from = offset as usize;
        let bytes = state.files[self.id].now.get(from..from + buf.len()).ok_or(ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.disk.change(|state| {
            let file = &mut state.files[self.id];
            let (from, to) = (offset as usize, offset as usize + bytes.len());
            if file.now.len() < to {
                file.now.resize(to, 0);
                file.lengths.push(to);
            }
            file.now[from..to].copy_from_slice(bytes);
            file.pending.push((from, bytes.to_vec()));
            Ok(())
        })
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.0.lock().files[self.id].now.len() as u64)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.change(|state| {
            let file = &mut state.files[self.id];
            let from = (offset as usize).min(file.now.len());
            let to = (from + len as usize).min(file.now.len());
            file.now[from..to].fill(0);
            file.pending.push((from, vec![0; to - from]));
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.change(|state| {
            let file = &mut state.files[self.id];
            file.now.resize(len as usize, 0);
            file.lengths.push(len as usize);
            Ok(())
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.change(|state| {
            if state.left != Some(0) {
                let Content { now, durable, pending, lengths } = &mut state.files[self.id];
                if lengths.is_empty() {
                    // Only these bytes differ.
                    pending.iter().map(|(at, bytes)| *at..at + bytes.len()).for_each(|written| {
                        durable[written.clone()].copy_from_slice(&now[written]);
                    });
                } else {
                    durable.clone_from(now);
                }
                pending.clear();
                lengths.clear();
            }
            Ok(())
        })
    }
}
