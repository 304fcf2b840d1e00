//! A queue's thread: takes a guest's requests, answers hits at once, and answers misses as they finish.
//!
//! Hits are read straight into the guest's memory, and writes that need no source are copied out of it and written. A miss
//! is a task of the fetch runtime that reads into a buffer of its own and wakes this thread up, which alone touches the
//! guest; so are writes that have to wait, flushes and zeros. What a guest can make this hold: as many requests as its
//! queue has entries, and [`MISSES_MAX`] misses of together [`MISS_BYTES_MAX`] bytes; further requests wait.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::runtime::Handle;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::disk::Disk;
use super::inflight::Tracker;
use super::memory::{Memory, SharedMemory};
use super::request::{self, Operation, Request, Table};
use super::segments::{Cursor, gather, scatter};
use super::shared::{Finished, Shared};
use crate::device::{Access, Local};
use crate::sys::guest_memory;

/// Misses of one queue at a time.
const MISSES_MAX: usize = 64;
/// Bytes that the misses of one queue read at a time.
const MISS_BYTES_MAX: usize = 32 << 20;
/// Bytes of one miss; a longer request is several, one after the other.
const MISS_BYTES: usize = 4 << 20;
/// Bytes of a hit that are read at a time.
const PIECE: usize = 256 << 10;
/// Segments of at least this many bytes are read one by one straight into the guest; shorter ones together into a buffer,
/// since a read of the pool costs more than a copy of this size.
const DIRECT: usize = 16 << 10;
/// How long the thread looks for the next request before it sleeps: a guest with one request in flight sends the next in
/// less time than a wake-up takes.
const SPIN: Duration = Duration::from_micros(40);
/// How long a queue that is to stop waits for its misses.
const PATIENCE: Duration = Duration::from_secs(5);
/// Requests that are answered before the guest is told, so that it works on them meanwhile.
const BATCH: usize = 32;

/// A request that is not answered yet.
#[derive(Debug)]
struct Reading {
    request: Request,
    offset: u64,
    len: u64,
    /// Bytes that the guest has, or that were written.
    done: u64,
}

/// A miss on its way.
#[derive(Debug)]
struct Miss {
    reading: Reading,
    /// Bytes that it reads.
    cost: usize,
}

/// How far a read got.
enum Progress {
    Done,
    Failed,
    Missing,
}

/// What a queue's thread needs.
pub struct Worker {
    pub disk: Disk,
    pub memory: SharedMemory,
    pub queue: Queue,
    pub kick: File,
    /// Where misses run.
    pub runtime: Handle,
    pub tracker: Option<Tracker>,
    /// Requests that an earlier back-end took and did not answer.
    pub resubmitted: Vec<u16>,
}

/// What is left of a thread: where its queue stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// The next entry of the available ring.
    pub next_avail: u16,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// What the system says, when it has no thread or no descriptor left.
    pub fn start(self, call: Arc<Mutex<Option<File>>>) -> io::Result<(Arc<Shared>, std::thread::JoinHandle<Stopped>)> {
        let shared = Arc::new(Shared::new(call)?);
        let mut running = Running {
            shared: Arc::clone(&shared),
            waiting: VecDeque::new(),
            misses: HashMap::new(),
            next_miss: 0,
            miss_bytes: 0,
            unsignalled: 0,
            scratch: Vec::new(),
            worker: self,
        };
        let thread =
            std::thread::Builder::new().name("vhost-user".into()).stack_size(512 << 10).spawn(move || running.run())?;
        Ok((shared, thread))
    }
}

struct Running {
    worker: Worker,
    shared: Arc<Shared>,
    /// Reads that the budget for misses has no room for.
    waiting: VecDeque<Reading>,
    misses: HashMap<u64, Miss>,
    next_miss: u64,
    miss_bytes: usize,
    /// Answers that the guest was not told of yet.
    unsignalled: usize,
    scratch: Vec<u8>,
}

impl Running {
    fn run(&mut self) -> Stopped {
        let memory = self.worker.memory.view();
        for head in std::mem::take(&mut self.worker.resubmitted) {
            self.take(head, &memory);
        }
        self.signal(&memory);
        drop(memory);
        while !self.shared.stops() {
            self.finish_misses();
            self.serve();
            if let Err(error) = self.wait(None) {
                tracing::warn!("vhost-user: waiting for requests: {error}; the queue stops");
                break;
            }
        }
        self.drain();
        Stopped { next_avail: self.worker.queue.next_avail() }
    }

    /// Waits for misses, so that nothing is left unanswered where nobody could answer it later.
    fn drain(&mut self) {
        let until = Instant::now() + PATIENCE;
        while !self.misses.is_empty() && !self.shared.stops_at_once() && Instant::now() < until {
            if self.wait(Some(Duration::from_millis(100))).is_err() {
                break;
            }
            self.finish_misses();
        }
        let memory = self.worker.memory.view();
        // With a tracker the next back-end finds them.
        if self.worker.tracker.is_none() && !self.shared.stops_at_once() {
            let misses = std::mem::take(&mut self.misses).into_values().map(|miss| miss.reading);
            for reading in misses.chain(std::mem::take(&mut self.waiting)) {
                self.answer(&reading.request, VIRTIO_BLK_S_IOERR, 0, &memory);
            }
        }
        self.signal(&memory);
    }

    /// Waits until there is something to do, or `limit` is over.
    fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        if limit.is_none() && self.misses.is_empty() && self.spin() {
            return Ok(());
        }
        let mut ready = [PollFd::new(&self.worker.kick, PollFlags::IN), PollFd::new(&self.shared.wake, PollFlags::IN)];
        let timeout = limit.map(|limit| Timespec { tv_sec: 0, tv_nsec: i64::from(limit.subsec_nanos()) });
        // Before the ring stops, kicks are left for the next thread.
        let watched = if limit.is_some() { &mut ready[1..] } else { &mut ready[..] };
        match poll(watched, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut count = [0; 8];
        let kicked = ready[0].revents();
        if kicked.contains(PollFlags::IN) {
            let _ = rustix::io::read(&self.worker.kick, &mut count);
        } else if kicked.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
            return Err(io::Error::other("the front-end closed its end of the kick descriptor"));
        }
        let _ = rustix::io::read(&self.shared.wake, &mut count);
        Ok(())
    }

    /// Looks for requests for a while. True if there are some, or something else is to be done.
    fn spin(&mut self) -> bool {
        let memory = self.worker.memory.view();
        let until = Instant::now() + SPIN;
        while Instant::now() < until {
            let found = self.worker.queue.avail_idx(&*memory, Ordering::Acquire);
            if found.is_ok_and(|index| index.0 != self.worker.queue.next_avail()) || self.shared.stops() {
                return true;
            }
            std::thread::yield_now();
        }
        false
    }

    /// Takes and answers what is in the ring.
    fn serve(&mut self) {
        let memory = self.worker.memory.view();
        loop {
            if self.worker.queue.disable_notification(&*memory).is_err() {
                return;
            }
            let mut taken = 0_usize;
            while self.misses.len() + self.waiting.len() < usize::from(self.worker.queue.size()) {
                let Some(chain) = self.worker.queue.pop_descriptor_chain(&*memory) else { break };
                taken += 1;
                self.take(chain.head_index(), &memory);
                if self.unsignalled >= BATCH {
                    self.signal(&memory);
                }
            }
            self.signal(&memory);
            // A ring whose index makes no sense says for ever that there is more, and gives nothing.
            if !matches!(self.worker.queue.enable_notification(&*memory), Ok(true)) || taken == 0 {
                return;
            }
        }
    }

    /// Begins the request whose chain starts at `head`, and answers it if that needs no source.
    fn take(&mut self, head: u16, memory: &Memory) {
        if let Some(tracker) = &mut self.worker.tracker {
            tracker.begin(head);
        }
        let disk = &self.worker.disk;
        let table = Table { address: GuestAddress(self.worker.queue.desc_table()), len: self.worker.queue.size() };
        let Some(request) = request::parse(memory, table, head, disk.device.size(), disk.device.access()) else {
            // There is no place for a status: the guest gets its descriptors back, and nothing in them.
            return self.give_back(head, 0, memory);
        };
        match request.operation {
            Operation::Read { offset, len } => self.advance(Reading { request, offset, len, done: 0 }, memory),
            Operation::GetId => {
                let id = disk.id();
                let written = scatter(memory, &request.segments, 0, &id);
                let status = if written { VIRTIO_BLK_S_OK } else { VIRTIO_BLK_S_IOERR };
                self.answer(&request, status, id.len() as u64, memory);
            }
            // There is nothing that could be lost.
            Operation::Flush if disk.device.access() == Access::ReadOnly => {
                self.answer(&request, VIRTIO_BLK_S_OK, 0, memory);
            }
            Operation::Write { offset, len } | Operation::Zero { offset, len, .. } => {
                self.advance(Reading { request, offset, len, done: 0 }, memory);
            }
            Operation::Flush => self.advance(Reading { request, offset: 0, len: 0, done: 0 }, memory),
            Operation::Refuse(status) => self.answer(&request, u32::from(status), 0, memory),
        }
    }

    /// Goes on; what has to wait becomes a miss, or waits until there is room for one.
    fn advance(&mut self, mut reading: Reading, memory: &Memory) {
        let progress = match reading.request.operation {
            Operation::Write { .. } => self.write_local(&mut reading, memory),
            Operation::Zero { .. } | Operation::Flush => Progress::Missing,
            _ => self.read_local(&mut reading, memory),
        };
        match progress {
            Progress::Done => self.answer(&reading.request, VIRTIO_BLK_S_OK, given(&reading), memory),
            Progress::Failed => self.answer(&reading.request, VIRTIO_BLK_S_IOERR, given(&reading), memory),
            Progress::Missing => {
                let cost = match reading.request.operation {
                    Operation::Zero { .. } | Operation::Flush => 0,
                    _ => MISS_BYTES.min(usize::try_from(reading.len - reading.done).unwrap_or(MISS_BYTES)),
                };
                if self.misses.len() >= MISSES_MAX || self.miss_bytes + cost > MISS_BYTES_MAX {
                    self.waiting.push_back(reading);
                } else {
                    self.miss(reading, cost, memory);
                }
            }
        }
    }

    /// Writes what needs no source, from where the write has got to.
    fn write_local(&mut self, writing: &mut Reading, memory: &Memory) -> Progress {
        while writing.done < writing.len {
            let len = usize::try_from(writing.len - writing.done).unwrap_or(usize::MAX).min(PIECE);
            self.scratch.resize(PIECE, 0);
            let piece = &mut self.scratch[..len];
            if !gather(memory, &writing.request.segments, writing.done, piece) {
                return Progress::Failed;
            }
            match self.worker.disk.device.write_local(writing.offset + writing.done, piece) {
                Ok(Local::Done) => writing.done += len as u64,
                Ok(Local::Missing) => return Progress::Missing,
                Err(error) => {
                    tracing::debug!("vhost-user: a write of {} bytes at {}: {error}", writing.len, writing.offset);
                    return Progress::Failed;
                }
            }
        }
        Progress::Done
    }

    /// Reads what is local, from where the read has got to.
    fn read_local(&mut self, reading: &mut Reading, memory: &Memory) -> Progress {
        let mut cursor = Cursor::new(&reading.request.segments, reading.done);
        while reading.done < reading.len {
            let offset = reading.offset + reading.done;
            let rest = usize::try_from(reading.len - reading.done).unwrap_or(usize::MAX).min(PIECE);
            let Some(segment) = cursor.rest() else { return Progress::Failed };
            let direct = rest.min(segment.len as usize);
            let (len, read) = if direct >= DIRECT || direct == rest {
                let Ok(slice) = memory.get_slice(segment.address, direct) else { return Progress::Failed };
                (direct, guest_memory::write_to(&slice, |bytes| self.worker.disk.device.read_local(offset, bytes)))
            } else {
                self.scratch.resize(PIECE, 0);
                let bytes = &mut self.scratch[..rest];
                let read = self.worker.disk.device.read_local(offset, bytes);
                if matches!(read, Ok(Local::Done)) && !scatter(memory, &reading.request.segments, reading.done, bytes) {
                    return Progress::Failed;
                }
                (rest, read)
            };
            match read {
                Ok(Local::Done) => {}
                Ok(Local::Missing) => return Progress::Missing,
                Err(_) => return Progress::Failed,
            }
            reading.done += len as u64;
            cursor.skip(len as u64);
        }
        Progress::Done
    }

    fn miss(&mut self, reading: Reading, cost: usize, memory: &Memory) {
        let (number, offset) = (self.next_miss, reading.offset + reading.done);
        let mut data = vec![0; cost];
        let operation = reading.request.operation;
        if matches!(operation, Operation::Write { .. })
            && !gather(memory, &reading.request.segments, reading.done, &mut data)
        {
            return self.answer(&reading.request, VIRTIO_BLK_S_IOERR, 0, memory);
        }
        self.next_miss += 1;
        self.miss_bytes += cost;
        self.misses.insert(number, Miss { reading, cost });
        let (shared, device) = (Arc::clone(&self.shared), Arc::clone(&self.worker.disk.device));
        self.worker.runtime.spawn(async move {
            let done = match operation {
                Operation::Write { .. } => device.write_at(offset, &data).await,
                Operation::Zero { offset, len, how } => device.zero(offset, len, how).await,
                Operation::Flush => device.flush().await,
                _ => device.read_at(offset, &mut data).await,
            };
            shared.finish(Finished { number, data: done.map(|()| data) });
        });
    }

    /// Answers the misses that have ended, and begins reads that waited for them.
    fn finish_misses(&mut self) {
        let finished = std::mem::take(&mut *self.shared.finished.lock());
        if finished.is_empty() {
            return;
        }
        let memory = self.worker.memory.view();
        for Finished { number, data } in finished {
            let Some(Miss { mut reading, cost }) = self.misses.remove(&number) else { continue };
            self.miss_bytes -= cost;
            match data {
                Ok(data) if matches!(reading.request.operation, Operation::Write { .. }) => {
                    reading.done += data.len() as u64;
                    self.advance(reading, &memory);
                }
                Ok(_) if matches!(reading.request.operation, Operation::Zero { .. } | Operation::Flush) => {
                    self.answer(&reading.request, VIRTIO_BLK_S_OK, 0, &memory);
                }
                Ok(data) if scatter(&memory, &reading.request.segments, reading.done, &data) => {
                    reading.done += data.len() as u64;
                    self.advance(reading, &memory);
                }
                Ok(_) => self.answer(&reading.request, VIRTIO_BLK_S_IOERR, given(&reading), &memory),
                Err(error) => {
                    tracing::debug!("vhost-user: a request of {} bytes at {}: {error}", reading.len, reading.offset);
                    self.answer(&reading.request, VIRTIO_BLK_S_IOERR, given(&reading), &memory);
                }
            }
        }
        for _ in 0..self.waiting.len() {
            let Some(reading) = self.waiting.pop_front() else { break };
            self.advance(reading, &memory);
        }
        self.signal(&memory);
    }

    /// Writes the status and gives the chain back to the guest; `data` bytes were written before the status.
    fn answer(&mut self, request: &Request, status: u32, data: u64, memory: &Memory) {
        let written = match memory.write_obj(status as u8, request.status) {
            Ok(()) => u32::try_from(data + 1).unwrap_or(u32::MAX),
            Err(_) => 0,
        };
        self.give_back(request.head, written, memory);
    }

    fn give_back(&mut self, head: u16, written: u32, memory: &Memory) {
        if let Some(tracker) = &self.worker.tracker {
            tracker.answering(head);
        }
        // A head outside the queue: the guest has lost its request by naming it.
        if let Err(error) = self.worker.queue.add_used(memory, head, written) {
            tracing::debug!("vhost-user: a request can't be answered: {error}");
        }
        if let Some(tracker) = &self.worker.tracker {
            tracker.answered(head, self.worker.queue.next_used());
        }
        self.unsignalled += 1;
    }

    /// Tells the guest of answers.
    fn signal(&mut self, memory: &Memory) {
        if self.unsignalled == 0 {
            return;
        }
        self.unsignalled = 0;
        if !self.worker.queue.needs_notification(memory).unwrap_or(true) {
            return;
        }
        if let Some(call) = &*self.shared.call.lock() {
            // What is full has not been read yet, so that the guest will look. It must never block this thread.
            let mut room = [PollFd::new(call, PollFlags::OUT)];
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            if poll(&mut room, Some(&now)).is_ok_and(|ready| ready > 0) {
                let _ = rustix::io::write(call, &1_u64.to_ne_bytes());
            }
        }
    }
}

/// Bytes of the guest's memory that a request has written so far, its status apart.
fn given(reading: &Reading) -> u64 {
    if matches!(reading.request.operation, Operation::Read { .. }) { reading.done } else { 0 }
}
