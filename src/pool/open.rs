//! Opening: from what is on disk to the index in memory. Everything found is unchecked until it is read.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;

use super::admit::{Health, OpenSlab, Writer};
use super::bound::Bound;
use super::claims::Claims;
use super::journal::{Found, Journal};
use super::lost::Lost;
use super::record::{ALIGN, Kind, Record};
use super::shards::{At, Shards, Trust};
use super::slab::{self, Slab, Unusable};
use super::{Pool, PoolOptions};
use crate::error::{Error, Result};
use crate::media::MediaDir;

/// A slab found on disk.
struct Present {
    slab: Arc<Slab>,
    slot: u32,
    /// Length of its file.
    len: u64,
    /// First byte, and first record of the table, behind all that any record names, whether it is there or not.
    announced: Cell<(u64, u32)>,
}

/// The slabs found, by number.
type Slabs = HashMap<u32, Present>;

impl Pool {
    /// Opens the pool whose files are in `dir`; events call it `name`. Nobody else may use these files meanwhile.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory can't be listed.
    pub fn open_on(dir: Box<dyn MediaDir>, name: &str, options: &PoolOptions) -> Result<Self> {
        let names = dir.names().map_err(|error| Error::io(format!("listing the pool {name}"), error))?;
        let mut numbers: Vec<u32> = names.iter().filter_map(|name| slab::number(name)).collect();
        numbers.sort_unstable();
        let shards = Shards::new();
        let mut slabs = Slabs::new();
        for number in numbers {
            match Slab::open(&*dir, number).and_then(|slab| Ok((slab.len().map_err(Unusable::Io)?, Arc::new(slab)))) {
                Ok((len, slab)) => {
                    let slot = shards.add_slab(&slab);
                    slabs.insert(number, Present { slab, slot, len, announced: Cell::default() });
                }
                Err(reason) => tracing::warn!(
                    pool = name, file = slab::name(number), %reason,
                    "a file with a slab's name is left alone; remove it if nothing else needs it"
                ),
            }
        }
        let (journal, last_number) = recover(&*dir, name, &slabs, &shards);
        let last = slabs.keys().copied().max().max(last_number);
        let open = slabs.values().max_by_key(|present| present.slab.number).and_then(continued);
        let next_number = last.map_or(0, |number| number.saturating_add(1));
        let bound = Bound::new(&*dir, options);
        let pool = Self {
            dir,
            name: name.to_owned(),
            options: options.clone(),
            shards,
            claims: Claims::default(),
            writer: Mutex::new(Writer { open, next_number }),
            journal,
            health: Health::default(),
            quarantined: AtomicU64::new(0),
            lost: Lost::default(),
            bound,
            owner: None,
        };
        // What a crash left behind, or what was evicted last; after a limit was lowered, the rest goes as chunks come.
        for (slot, slab) in pool.shards.slabs() {
            if slab.live() == 0 {
                pool.retire(&slab, slot);
            }
        }
        Ok(pool)
    }
}

/// Fills `shards` from the journal, or without one from the tables of the slabs. Returns the journal to append to, and
/// the highest number of a slab that the journal knows of.
fn recover(dir: &dyn MediaDir, name: &str, slabs: &Slabs, shards: &Shards) -> (Option<Journal>, Option<u32>) {
    let mut last = None;
    let unusable = match Journal::open(dir) {
        Found::Absent if slabs.is_empty() => None,
        Found::Absent => Some("there is none".to_owned()),
        Found::Unusable(reason) => Some(reason),
        Found::Journal(journal, next_slab) => {
            last = next_slab.checked_sub(1);
            let replayed = journal.replay(|record| {
                last = last.max(Some(record.slab));
                replay(&record, slabs, shards);
            });
            match replayed {
                Ok(0) => return (Some(journal), last),
                Ok(gaps) => {
                    tracing::info!(pool = name, gaps, "records of the pool's journal were lost in a crash and skipped");
                    return (Some(journal), last);
                }
                Err(error) => Some(error.to_string()),
            }
        }
    };
    if let Some(reason) = unusable {
        let mut in_order: Vec<_> = slabs.values().collect();
        in_order.sort_unstable_by_key(|present| present.slab.number);
        for present in in_order {
            if let Err(error) = present.slab.table(|record| replay(&record, slabs, shards)) {
                tracing::warn!(pool = name, slab = present.slab.number, %error, "a slab's table can't be read");
            }
        }
        let _ = Journal::set_aside(dir);
        let chunks = shards.chunks();
        tracing::warn!(pool = name, reason, chunks, "the pool's journal can't be used; it was rebuilt from the slabs");
    }
    match Journal::create(dir, 0, shards.records()) {
        Ok(journal) => (Some(journal), last),
        Err(error) => {
            tracing::warn!(pool = name, %error, "the pool has no journal until its next start");
            (None, last)
        }
    }
}

fn replay(record: &Record, slabs: &Slabs, shards: &Shards) {
    let Some(present) = slabs.get(&record.slab) else { return };
    let (end, row) = present.announced.get();
    present.announced.set((end.max(record.end()), row.max(record.row)));
    match record.kind {
        Kind::Drop => {
            shards.remove(&record.digest, present.slot, record.block);
        }
        Kind::Admit if present.slab.holds(record, present.len) => {
            let at = At { slot: present.slot, block: record.block, len: record.len, row: record.row };
            if !shards.insert(&record.digest, at, Trust::Unchecked)
                && let Some(earlier) = shards.peek(&record.digest)
            {
                shards.remove(&record.digest, earlier.slot, earlier.block);
                shards.insert(&record.digest, at, Trust::Unchecked);
            }
        }
        Kind::Admit => {}
    }
}

/// The slab to go on with: behind everything that is in it or was announced for it. A record whose chunk a crash took names
/// its place for ever.
fn continued(present: &Present) -> Option<OpenSlab> {
    let Present { slab, slot, len, announced } = present;
    let (end, row) = announced.get();
    let mut next = len.checked_next_multiple_of(ALIGN)?.max(slab.data_start()).max(end);
    let next_record = slab.table(|record| next = next.max(record.end())).ok()?.max(row);
    Some(OpenSlab { slab: Arc::clone(slab), slot: *slot, next, next_record })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::{Duration, Instant};

    /// Time that this thread was on a processor: what others do there counts for nothing.
    fn worked() -> Duration {
        let times = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        Duration::from_nanos(times.split(' ').next().unwrap().parse().unwrap())
    }

    use super::*;
    use crate::chunk::Digest;
    use crate::media::Directory;
    use crate::pool::slab::SLAB_MAX;

    fn resident() -> u64 {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    /// In a process of its own: what other tests hold at the time is not the pool's.
    #[test]
    fn a_million_chunks_open_quickly_and_take_little_memory() {
        const ALONE: &str = "FIRSTREAD_TEST_ALONE";
        if std::env::var_os(ALONE).is_some() {
            return open_a_million();
        }
        let name = "pool::open::tests::a_million_chunks_open_quickly_and_take_little_memory";
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        print!("{said}");
        assert!(
            output.status.success() && said.contains("chunks: "),
            "{said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    fn open_a_million() {
        const CHUNKS: u64 = 1_000_000;
        let temporary = tempfile::tempdir().unwrap();
        let dir = Directory::new(temporary.path());
        let mut places = Vec::new();
        for number in 0..3 {
            let slab = Slab::create(&dir, number, SLAB_MAX).unwrap();
            let file = std::fs::File::options().write(true).open(temporary.path().join(slab::name(number))).unwrap();
            file.set_len(SLAB_MAX).unwrap();
            places.push((slab.data_start() / ALIGN, (SLAB_MAX - slab.data_start()) / ALIGN));
        }
        let record = |number: u64| {
            let (slab, &(start, blocks)) = (0..).zip(&places).nth((number % 3) as usize).unwrap();
            let block = (start + number / 3 % blocks) as u32;
            let digest = Digest::of(&number.to_le_bytes());
            Record { kind: Kind::Admit, digest, slab, block, len: 4096, row: 1 }
        };
        Journal::create(&dir, 3, (0..CHUNKS).map(record)).unwrap();
        let (before, began, started) = (resident(), worked(), Instant::now());
        let pool = Pool::open(temporary.path(), &PoolOptions::default()).unwrap();
        let (took, memory) = (worked() - began, resident().saturating_sub(before));
        println!("{CHUNKS} chunks: {took:?} of work in {:?}, {} MB", started.elapsed(), memory / 1_000_000);
        assert_eq!(pool.stat().chunks, CHUNKS);
        // The optimized program takes a fraction of this.
        assert!(took < Duration::from_secs(5), "{took:?}");
        assert!(memory < 100_000_000, "{memory} bytes");
    }
}
