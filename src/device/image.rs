//! The image as a device: a map, and chunks from the pool or from the image's sources.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use serde::Serialize;

use super::counts::Counts;
use super::touch::Touches;
use super::waits::{Wait, Waits};
use super::{Device, DeviceFuture, Local, Residence, add_run, check_range};
use crate::chunk::{CHUNK_MAX, ChunkRef};
use crate::error::{Error, Result};
use crate::fetch::{Fetcher, Filling, Origin, Prefetch, Priority};
use crate::map::{Map, Piece};
use crate::pool::{Lookup, Pool, Run, Ticket};
use crate::profile::Touch;

/// Plain bytes that one request of a device waits for at a time: bounds the memory of a read however many chunks it
/// touches.
const BATCH_BYTES: u64 = 16 * CHUNK_MAX as u64;

/// Most tickets, 8 bytes each: those of 256 GiB in chunks of the usual size.
const MAX_TICKETS: u32 = 1 << 20;

/// Pieces that one question for residence looks at.
const RESIDENCE_PIECES: usize = 1 << 16;

/// An image's device: read-only.
pub struct ImageDevice {
    map: Map,
    origin: Arc<Origin>,
    fetcher: Arc<Fetcher>,
    pool: Arc<Pool>,
    /// By number of the chunk; what is behind their end is looked up each time.
    tickets: Box<[Ticket]>,
    touches: Touches,
    waits: Waits,
    /// Ends with the device.
    filling: OnceLock<Filling>,
    counts: Counts,
}

/// What a device has been asked for since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReadCounts {
    /// Bytes read, zeros included.
    pub bytes: u64,
    /// Reads answered from local data and zeros.
    pub hits: u64,
    /// Reads that had to wait for a source.
    pub misses: u64,
}

/// Whether a read is recorded.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trace {
    Kept,
    None,
}

/// A piece of a request whose chunk is not in the pool.
struct Missing {
    chunk: u32,
    /// First byte in the chunk.
    skip: usize,
    /// First byte in the request's buffer.
    at: usize,
    len: usize,
}

impl ImageDevice {
    /// A device whose content `map` describes; its chunks come from `pool`, and from `origin` through `fetcher`.
    #[must_use]
    pub fn new(map: Map, origin: Arc<Origin>, fetcher: Arc<Fetcher>, pool: Arc<Pool>) -> Arc<Self> {
        let touches = Touches::new(map.index().device_bytes());
        let waits = Waits::default();
        let tickets = (0..map.index().chunk_count().min(MAX_TICKETS)).map(|_| Ticket::default()).collect();
        Arc::new(Self {
            map,
            origin,
            fetcher,
            pool,
            tickets,
            touches,
            waits,
            filling: OnceLock::new(),
            counts: Counts::default(),
        })
    }

    /// Fetches what its start needs before anybody reads it: the start-up stream, or of an image without a start-up pack
    /// everything, behind its readers, while the device exists. Runs on a tokio runtime.
    pub fn prefetch(&self, prefetch: Prefetch) {
        let index = self.map.index();
        match (prefetch, index.startup_order().len() > 0) {
            (Prefetch::Startup | Prefetch::All, true) => self.fetcher.start_up(&self.origin, index),
            (Prefetch::All, false) => {
                self.filling.get_or_init(|| self.fetcher.fill(&self.origin, index));
            }
            (Prefetch::None | Prefetch::Startup, _) => {}
        }
    }

    /// When the device was made: what all its times count from.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.touches.started()
    }

    /// The blocks that were read, in the order of first touch, and whether that is all of them.
    #[must_use]
    pub fn touches(&self) -> (Vec<Touch>, bool) {
        self.touches.snapshot()
    }

    /// What was touched after the first `seen` runs.
    #[must_use]
    pub fn touches_from(&self, seen: usize) -> Vec<Touch> {
        self.touches.from(seen)
    }

    /// The latest reads that waited for a source, oldest first, and how many before them were forgotten.
    #[must_use]
    pub fn waits(&self) -> (Vec<Wait>, u64) {
        self.waits.snapshot()
    }

    /// Reads without leaving a trace in what was touched and waited for: for those who look at the device's contents
    /// on behalf of nobody.
    ///
    /// # Errors
    /// As of [`Device::read_at`].
    pub async fn inspect_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read(offset, buf, Trace::None).await
    }

    /// The map.
    #[must_use]
    pub fn map(&self) -> &Map {
        &self.map
    }

    /// Where the chunks come from.
    #[must_use]
    pub fn origin(&self) -> &Arc<Origin> {
        &self.origin
    }

    /// What was read so far.
    #[must_use]
    pub fn counts(&self) -> ReadCounts {
        self.counts.sums()
    }

    fn chunk(&self, number: u32) -> Result<ChunkRef> {
        // A valid index has all chunks that its extents name.
        self.map.index().chunk(number).ok_or_else(|| Error::invalid("index", format!("it has no chunk {number}")))
    }

    /// Reads a piece of a chunk that the pool has.
    fn read_chunk(&self, number: u32, skip: u32, part: &mut [u8]) -> Result<Lookup> {
        let none = Ticket::default();
        let ticket = self.tickets.get(number as usize).unwrap_or(&none);
        if self.pool.read_known(ticket, skip, part) {
            return Ok(Lookup::Hit);
        }
        Ok(self.pool.read_noting(&self.chunk(number)?.digest, skip, part, ticket))
    }

    /// Adds a piece to a run if it can be read with it.
    fn extend(&self, run: &mut Run, piece: Piece) -> bool {
        let Piece::Chunk { chunk, skip, len } = piece else { return false };
        self.tickets.get(chunk as usize).is_some_and(|ticket| run.extend(ticket, skip, len))
    }

    /// Reads what is local, neighbours in a slab at once.
    fn read_pieces(&self, offset: u64, buf: &mut [u8]) -> Result<Local> {
        // The last bytes of `buf` before `at`, which are still to be read.
        let mut run = Run::default();
        let mut at = 0;
        for piece in self.map.cover(offset, buf.len() as u64) {
            let end = at + piece.len() as usize;
            if !self.extend(&mut run, piece) {
                let from = at - run.len();
                if self.read_run(&run, offset + from as u64, part(buf, from, at)?)? == Local::Missing {
                    return Ok(Local::Missing);
                }
                run = Run::default();
                if !self.extend(&mut run, piece) && self.read_piece(piece, part(buf, at, end)?)? == Local::Missing {
                    return Ok(Local::Missing);
                }
            }
            at = end;
        }
        let from = at - run.len();
        self.read_run(&run, offset + from as u64, part(buf, from, at)?)
    }

    /// Reads a piece that is local.
    fn read_piece(&self, piece: Piece, part: &mut [u8]) -> Result<Local> {
        match piece {
            Piece::Zero { .. } => part.fill(0),
            Piece::Chunk { chunk, skip, .. } => {
                if self.read_chunk(chunk, skip, part)? == Lookup::Miss {
                    return Ok(Local::Missing);
                }
            }
        }
        Ok(Local::Done)
    }

    /// Reads a run, which is the device's bytes at `offset`; piece by piece when one of its tickets is old.
    fn read_run(&self, run: &Run, offset: u64, buf: &mut [u8]) -> Result<Local> {
        if run.is_empty() || self.pool.read_run(run, buf) {
            return Ok(Local::Done);
        }
        let mut at = 0;
        for piece in self.map.cover(offset, buf.len() as u64) {
            let end = at + piece.len() as usize;
            if self.read_piece(piece, part(buf, at, end)?)? == Local::Missing {
                return Ok(Local::Missing);
            }
            at = end;
        }
        Ok(Local::Done)
    }

    async fn read(&self, offset: u64, buf: &mut [u8], trace: Trace) -> Result<()> {
        check_range(self.size(), offset, buf.len() as u64)?;
        if trace == Trace::Kept {
            self.touches.note(offset, buf.len());
        }
        let mut missing = Vec::new();
        let mut waited = false;
        let (mut at, mut bytes) = (0, 0);
        for piece in self.map.cover(offset, buf.len() as u64) {
            let end = at + piece.len() as usize;
            let part = part(buf, at, end)?;
            match piece {
                Piece::Zero { .. } => part.fill(0),
                Piece::Chunk { chunk, skip, len } => {
                    if self.read_chunk(chunk, skip, part)? == Lookup::Miss {
                        missing.push(Missing { chunk, skip: skip as usize, at, len: len as usize });
                        bytes += u64::from(self.chunk(chunk)?.plain_len);
                        waited = true;
                    }
                }
            }
            at = end;
            if bytes >= BATCH_BYTES {
                self.fetch(offset, &std::mem::take(&mut missing), buf, trace).await?;
                bytes = 0;
            }
        }
        if !missing.is_empty() {
            self.fetch(offset, &missing, buf, trace).await?;
        }
        if trace == Trace::None {
            return Ok(());
        }
        if waited {
            self.counts.miss(buf.len());
        } else {
            self.counts.hit(buf.len());
        }
        Ok(())
    }

    /// Fetches the chunks of `missing` at once, so that neighbours come in one request, and copies the pieces to `buf`,
    /// which is read from `offset`.
    async fn fetch(&self, offset: u64, missing: &[Missing], buf: &mut [u8], trace: Trace) -> Result<()> {
        let mut numbers: Vec<u32> = missing.iter().map(|piece| piece.chunk).collect();
        numbers.sort_unstable();
        numbers.dedup();
        let references = numbers.iter().map(|&number| self.chunk(number)).collect::<Result<Vec<_>>>()?;
        let asked = self.started().elapsed();
        let mut fetched = self.fetcher.fetch(&self.origin, &references, Priority::Demand).await;
        if trace == Trace::Kept {
            let pieces = missing.iter().map(|piece| (piece.chunk, offset + piece.at as u64, piece.len as u32));
            self.waits.add(asked, self.started().elapsed(), pieces);
        }
        if fetched.len() != references.len() {
            return Err(Error::invalid("fetch", format!("{} results for {} chunks", fetched.len(), references.len())));
        }
        for piece in missing {
            let Ok(position) = numbers.binary_search(&piece.chunk) else { continue };
            let chunk = match &mut fetched[position] {
                Ok(chunk) => chunk,
                Err(error) => return Err(error.clone()),
            };
            let bytes = chunk.bytes().get(piece.skip..piece.skip + piece.len).ok_or_else(|| {
                let (digest, len) = (chunk.digest(), chunk.bytes().len());
                Error::invalid("index", format!("it says that chunk {digest} is longer than its {len} bytes"))
            })?;
            part(buf, piece.at, piece.at + piece.len)?.copy_from_slice(bytes);
        }
        Ok(())
    }
}

/// `buf[from..to]`; a cover never leaves its range.
fn part(buf: &mut [u8], from: usize, to: usize) -> Result<&mut [u8]> {
    buf.get_mut(from..to).ok_or_else(|| Error::invalid("map", format!("bytes {from} to {to} are outside the request")))
}

impl Device for ImageDevice {
    fn size(&self) -> u64 {
        self.map.index().device_bytes()
    }

    fn read_local(&self, offset: u64, buf: &mut [u8]) -> Result<Local> {
        check_range(self.size(), offset, buf.len() as u64)?;
        self.touches.note(offset, buf.len());
        let local = match self.map.cover(offset, buf.len() as u64).next() {
            Some(piece) if piece.len() == buf.len() as u64 => self.read_piece(piece, buf)?,
            _ => self.read_pieces(offset, buf)?,
        };
        if local == Local::Missing {
            return Ok(Local::Missing);
        }
        self.counts.hit(buf.len());
        Ok(Local::Done)
    }

    fn read_at<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> DeviceFuture<'a, ()> {
        Box::pin(self.read(offset, buf, Trace::Kept))
    }

    /// Looks at a bounded number of pieces; what lies behind them counts as remote.
    fn residence(&self, offset: u64, len: u64) -> Result<Vec<(u64, Residence)>> {
        check_range(self.size(), offset, len)?;
        let mut runs = Vec::new();
        let mut left = len;
        for piece in self.map.cover(offset, len).take(RESIDENCE_PIECES) {
            let residence = match piece {
                Piece::Zero { .. } => Residence::Zero,
                Piece::Chunk { chunk, .. } if self.pool.contains(&self.chunk(chunk)?.digest) => Residence::Local,
                Piece::Chunk { .. } => Residence::Remote,
            };
            add_run(&mut runs, piece.len(), residence);
            left -= piece.len();
        }
        if left > 0 {
            add_run(&mut runs, left, Residence::Remote);
        }
        Ok(runs)
    }
}
