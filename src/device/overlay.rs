//! An upper over a lower: a device that can be written.
//!
//! A write of whole blocks fetches nothing. A write of a part of a block that is not in the upper completes it from the lower,
//! which fetches that block's chunk and no other.

use std::ops::Range;
use std::sync::Arc;

use super::upper::{Claim, Upper};
use super::{Access, Device, DeviceFuture, Local, Residence, Zeroing, add_run, check_range};
use crate::error::{Error, Result};
use crate::index::BLOCK;

const BLOCK_BYTES: u64 = BLOCK as u64;

/// A block as it will be written: the first and the last of a write may have to be completed from the lower.
type Block = [u8; BLOCK as usize];

/// The device.
pub struct Overlay {
    lower: Arc<dyn Device>,
    upper: Arc<Upper>,
}

/// Where a run of bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Upper,
    Lower,
    /// Behind the end of the lower: zeros.
    Beyond,
}

/// What a first write completes its edges with: the first block and the last one, where they need it.
#[derive(Default)]
struct Edges {
    head: Option<Box<Block>>,
    tail: Option<Box<Block>>,
}

impl Overlay {
    /// An upper over its lower.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the upper is smaller than the lower.
    pub fn new(lower: Arc<dyn Device>, upper: Arc<Upper>) -> Result<Arc<Self>> {
        if upper.size() < lower.size() {
            let reason = format!("it has {} bytes, the image {}", upper.size(), lower.size());
            return Err(Error::invalid("upper", reason));
        }
        Ok(Arc::new(Self { lower, upper }))
    }

    /// What was written.
    #[must_use]
    pub fn upper(&self) -> &Arc<Upper> {
        &self.upper
    }

    /// The place of `offset`, and the end of the run of it before `end`.
    fn run(&self, offset: u64, end: u64) -> (Place, u64) {
        let (changed, blocks) = self.upper.run(offset / BLOCK_BYTES, end.div_ceil(BLOCK_BYTES));
        let stop = ((offset / BLOCK_BYTES + blocks.max(1)) * BLOCK_BYTES).min(end);
        match (changed, self.lower.size()) {
            (true, _) => (Place::Upper, stop),
            (false, size) if offset >= size => (Place::Beyond, stop),
            (false, size) => (Place::Lower, stop.min(size)),
        }
    }

    /// The runs of a range, in order, each as it is when it is reached.
    fn runs(&self, offset: u64, len: u64) -> impl Iterator<Item = (Place, Range<u64>)> {
        let (mut at, end) = (offset, offset + len);
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let (start, (place, stop)) = (at, self.run(at, end));
                at = stop;
                (place, start..stop)
            })
        })
    }

    /// A lower's block, without waiting.
    fn block_local(&self, block: u64) -> Result<Option<Box<Block>>> {
        let mut bytes = Box::new([0; BLOCK as usize]);
        if block * BLOCK_BYTES < self.lower.size()
            && self.lower.read_local(block * BLOCK_BYTES, bytes.as_mut_slice())? == Local::Missing
        {
            return Ok(None);
        }
        Ok(Some(bytes))
    }

    async fn block(&self, block: u64) -> Result<Box<Block>> {
        let mut bytes = Box::new([0; BLOCK as usize]);
        if block * BLOCK_BYTES < self.lower.size() {
            self.lower.read_at(block * BLOCK_BYTES, bytes.as_mut_slice()).await?;
        }
        Ok(bytes)
    }

    /// Which of the edges of a write have to be completed. To be asked under a claim.
    fn incomplete(&self, offset: u64, end: u64) -> (Option<u64>, Option<u64>) {
        let cold = |block: u64| !self.upper.has(&(block..block + 1));
        let (first, last) = (offset / BLOCK_BYTES, (end - 1) / BLOCK_BYTES);
        let whole_head = offset.is_multiple_of(BLOCK_BYTES) && (first < last || end.is_multiple_of(BLOCK_BYTES));
        let head = (!whole_head && cold(first)).then_some(first);
        let tail = (last > first && !end.is_multiple_of(BLOCK_BYTES) && cold(last)).then_some(last);
        (head, tail)
    }

    /// Writes what is claimed. The edges that are in the upper, or whole, are written in place.
    fn fill(&self, claim: &Claim, offset: u64, data: &[u8], edges: Edges) -> Result<()> {
        let end = offset + data.len() as u64;
        let (first, last) = (offset / BLOCK_BYTES, (end - 1) / BLOCK_BYTES);
        let (mut offset, mut data) = (offset, data);
        if let Some(mut block) = edges.head {
            let from = (offset - first * BLOCK_BYTES) as usize;
            let (now, later) = data.split_at(data.len().min(BLOCK as usize - from));
            put(block.as_mut_slice(), from, now);
            self.upper.write(first * BLOCK_BYTES, block.as_slice())?;
            (offset, data) = (offset + now.len() as u64, later);
        }
        if let Some(mut block) = edges.tail {
            let (now, later) = data.split_at((last * BLOCK_BYTES - offset) as usize);
            put(block.as_mut_slice(), 0, later);
            self.upper.write(last * BLOCK_BYTES, block.as_slice())?;
            data = now;
        }
        if !data.is_empty() {
            self.upper.write(offset, data)?;
        }
        self.upper.add(claim, &(first..last + 1))
    }

    async fn zero_range(&self, offset: u64, len: u64, how: Zeroing) -> Result<()> {
        check_range(self.size(), offset, len)?;
        let end = offset + len;
        let whole = offset.div_ceil(BLOCK_BYTES)..end / BLOCK_BYTES;
        if how != Zeroing::Discard {
            let inner = (whole.start * BLOCK_BYTES).min(end)..(whole.end * BLOCK_BYTES).max(offset);
            let edges =
                if inner.start >= inner.end { [offset..end, end..end] } else { [offset..inner.start, inner.end..end] };
            for edge in edges.into_iter().filter(|edge| edge.start < edge.end) {
                let zeros = [0; 2 * BLOCK as usize];
                let zeros = zeros.get(..(edge.end - edge.start) as usize).unwrap_or_default();
                self.write(edge.start, zeros).await?;
            }
        }
        if whole.start >= whole.end {
            return Ok(());
        }
        self.upper.released().await;
        let claim = self.upper.claims().take(whole.clone()).await;
        // The disk's time, not a source's.
        let upper = Arc::clone(&self.upper);
        let zeroed = tokio::task::spawn_blocking(move || {
            upper.zero(&whole, how)?;
            upper.add(&claim, &whole)
        });
        zeroed.await.unwrap_or_else(|error| Err(Error::Stopping(format!("a task ({error})"))))
    }

    async fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        if self.write_local(offset, data)? == Local::Done {
            return Ok(());
        }
        self.upper.released().await;
        let end = offset + data.len() as u64;
        let claim = self.upper.claims().take(offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES)).await;
        let (head, tail) = self.incomplete(offset, end);
        let mut edges = Edges::default();
        if let Some(block) = head {
            edges.head = Some(self.block(block).await?);
        }
        if let Some(block) = tail {
            edges.tail = Some(self.block(block).await?);
        }
        self.fill(&claim, offset, data, edges)
    }
}

/// Copies `bytes` to `block` from `from` on, as many as fit.
fn put(block: &mut [u8], from: usize, bytes: &[u8]) {
    for (to, byte) in block.iter_mut().skip(from).zip(bytes) {
        *to = *byte;
    }
}

/// `buf[from..to]`; runs never leave their range.
fn part(buf: &mut [u8], range: Range<u64>) -> Result<&mut [u8]> {
    buf.get_mut(range.start as usize..range.end as usize)
        .ok_or_else(|| Error::invalid("range", format!("bytes {range:?} are outside the request")))
}

impl Device for Overlay {
    fn size(&self) -> u64 {
        self.upper.size()
    }

    fn read_local(&self, offset: u64, buf: &mut [u8]) -> Result<Local> {
        check_range(self.size(), offset, buf.len() as u64)?;
        for (place, run) in self.runs(offset, buf.len() as u64) {
            let part = part(buf, run.start - offset..run.end - offset)?;
            match place {
                Place::Upper => self.upper.read(run.start, part)?,
                Place::Beyond => part.fill(0),
                Place::Lower if self.lower.read_local(run.start, part)? == Local::Missing => return Ok(Local::Missing),
                Place::Lower => {}
            }
        }
        Ok(Local::Done)
    }

    fn read_at<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> DeviceFuture<'a, ()> {
        Box::pin(async move {
            check_range(self.size(), offset, buf.len() as u64)?;
            for (place, run) in self.runs(offset, buf.len() as u64) {
                let part = part(buf, run.start - offset..run.end - offset)?;
                match place {
                    Place::Upper => self.upper.read(run.start, part)?,
                    Place::Beyond => part.fill(0),
                    Place::Lower => self.lower.read_at(run.start, part).await?,
                }
            }
            Ok(())
        })
    }

    /// What is in the upper counts as local, zeros included.
    fn residence(&self, offset: u64, len: u64) -> Result<Vec<(u64, Residence)>> {
        check_range(self.size(), offset, len)?;
        let mut runs = Vec::new();
        for (place, run) in self.runs(offset, len) {
            let len = run.end - run.start;
            match place {
                Place::Upper => add_run(&mut runs, len, Residence::Local),
                Place::Beyond => add_run(&mut runs, len, Residence::Zero),
                Place::Lower => {
                    for (len, residence) in self.lower.residence(run.start, len)? {
                        add_run(&mut runs, len, residence);
                    }
                }
            }
        }
        Ok(runs)
    }

    fn access(&self) -> Access {
        Access::ReadWrite
    }

    fn write_local(&self, offset: u64, data: &[u8]) -> Result<Local> {
        check_range(self.size(), offset, data.len() as u64)?;
        if data.is_empty() {
            return Ok(Local::Done);
        }
        if self.upper.is_held() {
            return Ok(Local::Missing);
        }
        let end = offset + data.len() as u64;
        let blocks = offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES);
        if self.upper.has(&blocks) {
            self.upper.write(offset, data)?;
            return Ok(Local::Done);
        }
        let Some(claim) = self.upper.claims().try_take(blocks) else { return Ok(Local::Missing) };
        let (head, tail) = self.incomplete(offset, end);
        let mut edges = Edges::default();
        for (place, block) in [(&mut edges.head, head), (&mut edges.tail, tail)] {
            if let Some(block) = block {
                let Some(bytes) = self.block_local(block)? else { return Ok(Local::Missing) };
                *place = Some(bytes);
            }
        }
        self.fill(&claim, offset, data, edges)?;
        Ok(Local::Done)
    }

    fn write_at<'a>(&'a self, offset: u64, data: &'a [u8]) -> DeviceFuture<'a, ()> {
        Box::pin(self.write(offset, data))
    }

    fn zero(&self, offset: u64, len: u64, how: Zeroing) -> DeviceFuture<'_, ()> {
        Box::pin(self.zero_range(offset, len, how))
    }

    fn flush(&self) -> DeviceFuture<'_, ()> {
        Box::pin(self.upper.flush_soon())
    }
}
