//! The snapshots by key: the rules of containerd's snapshotters, and no two changes of one snapshot at once.
//!
//! The table is in memory and locked for moments; a change of a snapshot claims its key, works on the disk without the
//! lock, and shows the result. Whoever wants to change a claimed key waits. Blocks: call it where that is allowed.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::failure::Failure;
use super::record::{Kind, Loaded, Role, Snapshot, State, Unfinished, Wanted};
use super::usage::Usage;
use crate::error::Result;

/// Most snapshots below each other that are followed.
const DEPTH_MAX: usize = 1024;

/// All snapshots.
#[derive(Debug)]
pub struct Store {
    state: State,
    table: Mutex<Table>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    slots: BTreeMap<String, Slot>,
    /// How many are based on a snapshot, those included that are just being made.
    children: HashMap<String, usize>,
    next: u64,
}

/// One key. Without `shown` it is being made.
#[derive(Debug, Default)]
struct Slot {
    shown: Option<Arc<Snapshot>>,
    claim: Claim,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Claim {
    #[default]
    Free,
    Taken,
}

impl Store {
    /// Opens the state in `dir`; says which records are damaged.
    ///
    /// # Errors
    /// A state that another process uses, or what the system says.
    pub fn open(dir: &Path) -> Result<(Self, Vec<(PathBuf, String)>)> {
        let state = State::open(dir)?;
        let Loaded { snapshots, damaged, next } = state.load()?;
        let mut table = Table { next, ..Table::default() };
        for snapshot in snapshots {
            if let Some(parent) = &snapshot.parent {
                *table.children.entry(parent.clone()).or_default() += 1;
            }
            let slot = Slot { shown: Some(Arc::new(snapshot)), claim: Claim::Free };
            if let Some(Slot { shown: Some(other), .. }) = slot.key().and_then(|key| table.slots.insert(key, slot)) {
                tracing::error!("two snapshots are called {:?}; number {} is not used", other.key, other.id);
            }
        }
        Ok((Self { state, table: Mutex::new(table), freed: Condvar::new() }, damaged))
    }

    /// The directory that the snapshots' directories are in.
    #[must_use]
    pub fn snapshots(&self) -> PathBuf {
        self.state.snapshots()
    }

    /// A snapshot's directory.
    #[must_use]
    pub fn dir(&self, snapshot: &Snapshot) -> PathBuf {
        self.state.dir_of(snapshot.id)
    }

    /// The snapshot with this key.
    ///
    /// # Errors
    /// [`Failure::NotFound`].
    pub fn stat(&self, key: &str) -> Result<Arc<Snapshot>, Failure> {
        self.table.lock().shown(key)
    }

    /// All of them, by key.
    #[must_use]
    pub fn list(&self) -> Vec<Arc<Snapshot>> {
        self.table.lock().slots.values().filter_map(|slot| slot.shown.clone()).collect()
    }

    /// Whether there is a snapshot with this number.
    #[must_use]
    pub fn knows(&self, id: u64) -> bool {
        let table = self.table.lock();
        table.slots.values().any(|slot| slot.shown.as_ref().is_some_and(|snapshot| snapshot.id == id))
    }

    /// What `snapshot` is based on: its parent first, then that one's, ….
    ///
    /// # Errors
    /// A parent that is not there, since its record is damaged.
    pub fn parents(&self, snapshot: &Snapshot) -> Result<Vec<Arc<Snapshot>>, Failure> {
        let table = self.table.lock();
        let mut parents: Vec<Arc<Snapshot>> = Vec::new();
        let mut next = snapshot.parent.clone();
        while let Some(key) = next {
            let parent = table.slots.get(&key).and_then(|slot| slot.shown.clone()).ok_or_else(|| {
                let child = &snapshot.key;
                Failure::Failed(format!(
                    "the snapshot {key:?}, which {child:?} is based on, is damaged; remove the image and pull it again"
                ))
            })?;
            if parents.len() == DEPTH_MAX {
                return Err(Failure::Failed(format!("{:?} has more than {DEPTH_MAX} parents", snapshot.key)));
            }
            next = parent.parent.clone();
            parents.push(parent);
        }
        Ok(parents)
    }

    /// Makes a snapshot; `fill` makes what is in its directory.
    ///
    /// # Errors
    /// A key that is taken, a parent that is not there or not committed, or what the system says.
    pub fn create(&self, wanted: Wanted, fill: impl FnOnce(&Path) -> io::Result<()>) -> Result<Arc<Snapshot>, Failure> {
        let (key, parent) = (wanted.key.clone(), wanted.parent.clone());
        if key.is_empty() {
            return Err(Failure::Argument("a snapshot needs a key".to_owned()));
        }
        let id = {
            let mut table = self.table.lock();
            if table.slots.contains_key(&key) {
                return Err(exists(&key));
            }
            if let Some(parent) = &parent {
                let found = table.shown(parent)?;
                if found.kind != Kind::Committed {
                    return Err(Failure::Argument(format!("the parent {parent:?} is not a committed snapshot")));
                }
                *table.children.entry(parent.clone()).or_default() += 1;
            }
            table.slots.insert(key.clone(), Slot { shown: None, claim: Claim::Taken });
            table.next += 1;
            table.next - 1
        };
        let snapshot = Arc::new(Snapshot::new(id, wanted));
        let made = self.state.create(&snapshot, fill);
        let mut table = self.table.lock();
        match made {
            Ok(()) => {
                table.show(Arc::clone(&snapshot));
            }
            Err(_) => table.drop_slot(&key, snapshot.parent.as_deref()),
        }
        self.freed.notify_all();
        drop(table);
        made?;
        Ok(snapshot)
    }

    /// Commits the active snapshot `key` as `name`; `measure` says what it takes and is.
    ///
    /// # Errors
    /// A name that is taken, a key that is not there or not active, or what the system says.
    pub fn commit(
        &self,
        key: &str,
        name: &str,
        labels: BTreeMap<String, String>,
        measure: impl FnOnce(&Snapshot) -> Result<(Usage, Role), Failure>,
    ) -> Result<(), Failure> {
        if name.is_empty() {
            return Err(Failure::Argument("a committed snapshot needs a name".to_owned()));
        }
        let old = {
            let mut table = self.table.lock();
            if table.slots.contains_key(name) {
                return Err(exists(name));
            }
            let old = self.claim(&mut table, key)?;
            if old.kind != Kind::Active || table.slots.contains_key(name) {
                table.free(key);
                self.freed.notify_all();
                return Err(match old.kind {
                    Kind::Active => exists(name),
                    _ => Failure::Precondition(format!("the snapshot {key:?} is not active")),
                });
            }
            table.slots.insert(name.to_owned(), Slot { shown: None, claim: Claim::Taken });
            old
        };
        let done = measure(&old).and_then(|(usage, role)| {
            let now = SystemTime::now();
            let mut new = Snapshot::clone(&old);
            new.key = name.to_owned();
            new.kind = Kind::Committed;
            (new.labels, new.role, new.usage) = (labels, role, Some(usage));
            (new.created, new.updated) = (now, now);
            self.state.save(&new)?;
            Ok(Arc::new(new))
        });
        let mut table = self.table.lock();
        match &done {
            Ok(new) => {
                table.slots.remove(key);
                table.show(Arc::clone(new));
            }
            Err(_) => {
                table.slots.remove(name);
                table.free(key);
            }
        }
        self.freed.notify_all();
        done.map(drop)
    }

    /// Changes a snapshot's record.
    ///
    /// # Errors
    /// A key that is not there, what `change` says, or what the system says.
    pub fn update(
        &self,
        key: &str,
        change: impl FnOnce(&mut Snapshot) -> Result<(), Failure>,
    ) -> Result<Arc<Snapshot>, Failure> {
        let old = self.claim(&mut self.table.lock(), key)?;
        let mut new = Snapshot::clone(&old);
        let done = change(&mut new).and_then(|()| Ok(self.state.save(&new)?));
        let new = Arc::new(new);
        let mut table = self.table.lock();
        match done {
            Ok(()) => table.show(Arc::clone(&new)),
            Err(_) => table.free(key),
        }
        self.freed.notify_all();
        done.map(|()| new)
    }

    /// Removes a snapshot that nothing is based on; `release` gives up what it holds.
    ///
    /// # Errors
    /// A key that is not there or has children, what `release` says, or what the system says.
    pub fn remove(&self, key: &str, release: impl FnOnce(&Snapshot) -> Result<(), Failure>) -> Result<(), Failure> {
        let old = {
            let mut table = self.table.lock();
            let old = self.claim(&mut table, key)?;
            if table.children.get(key).is_some_and(|&children| children > 0) {
                table.free(key);
                self.freed.notify_all();
                return Err(Failure::Precondition(format!("the snapshot {key:?} has others that are based on it")));
            }
            // From here on nobody finds it as a parent.
            if let Some(slot) = table.slots.get_mut(key) {
                slot.shown = None;
            }
            old
        };
        let done = release(&old).and_then(|()| Ok(self.state.remove(old.id)?));
        let mut table = self.table.lock();
        match done {
            Ok(()) => table.drop_slot(key, old.parent.as_deref()),
            Err(_) => table.show(old),
        }
        self.freed.notify_all();
        done
    }

    /// Deletes the files of what was removed; nothing may be mounted on them any more.
    pub fn sweep(&self, unfinished: Unfinished) {
        self.state.sweep(unfinished);
    }

    /// Waits until `key` is nobody's, and takes it.
    fn claim(&self, table: &mut MutexGuard<'_, Table>, key: &str) -> Result<Arc<Snapshot>, Failure> {
        loop {
            match table.slots.get_mut(key) {
                None => return Err(not_found(key)),
                Some(slot) if slot.claim == Claim::Taken => self.freed.wait(table),
                Some(slot) => {
                    slot.claim = Claim::Taken;
                    return slot.shown.clone().ok_or_else(|| not_found(key));
                }
            }
        }
    }
}

impl Slot {
    fn key(&self) -> Option<String> {
        self.shown.as_ref().map(|snapshot| snapshot.key.clone())
    }
}

impl Table {
    fn shown(&self, key: &str) -> Result<Arc<Snapshot>, Failure> {
        self.slots.get(key).and_then(|slot| slot.shown.clone()).ok_or_else(|| not_found(key))
    }

    fn show(&mut self, snapshot: Arc<Snapshot>) {
        self.slots.insert(snapshot.key.clone(), Slot { shown: Some(snapshot), claim: Claim::Free });
    }

    fn free(&mut self, key: &str) {
        if let Some(slot) = self.slots.get_mut(key) {
            slot.claim = Claim::Free;
        }
    }

    fn drop_slot(&mut self, key: &str, parent: Option<&str>) {
        self.slots.remove(key);
        let Some(parent) = parent else { return };
        if let Some(children) = self.children.get_mut(parent) {
            *children = children.saturating_sub(1);
            if *children == 0 {
                self.children.remove(parent);
            }
        }
    }
}

fn exists(key: &str) -> Failure {
    Failure::Exists(format!("the snapshot {key:?} exists already"))
}

fn not_found(key: &str) -> Failure {
    Failure::NotFound(format!("there is no snapshot {key:?}"))
}
