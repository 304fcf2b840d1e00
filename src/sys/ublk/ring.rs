//! A ring that serves queues of ublk devices from one thread.
//!
//! A read's data are written to the character device, and the answer, linked to the write, says that they are there: both
//! in the `io_uring_enter` that also waits for the next request. The driver can fetch the data from an address in the answer
//! as well; then a server that is killed at that moment leaves a reader with an error, or with a request cut at a byte that
//! is no sector's (`kernel-notes/ublk.md`).
//!
//! A write's data are read from the character device ([`QueueFiles::take`]).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};
use rustix::event::EventfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

use super::{IoCommand, IoDescriptor, READ_WRITE, SECTOR, command};

/// `UBLKSRV_IO_BUF_OFFSET`, `UBLK_TAG_OFF` and `UBLK_QID_OFF`: where a request's data are in the character device.
const DATA_OFFSET: u64 = 0x8000_0000;
const TAG_SHIFT: u32 = 25;
const QUEUE_SHIFT: u32 = 41;
/// `UBLK_IO_F_FUA` and `UBLK_IO_F_NOUNMAP`.
const FUA: u32 = 1 << 13;
const NO_UNMAP: u32 = 1 << 15;
/// Tries to read data of which the driver gives nothing.
const TRIES: u32 = 16;

const fn io_op(number: u32) -> u32 {
    command(READ_WRITE, size_of::<IoCommand>(), number)
}

const FETCH_REQ: u32 = io_op(0x20);
const COMMIT_AND_FETCH_REQ: u32 = io_op(0x21);

const MAX_QUEUE_DEPTH: usize = 4096;

/// The user data of the waker's poll; queues use small numbers.
const WAKE: u64 = u64::MAX;
/// What an answer ends with whose data could not be written: ECANCELED.
const LINK_FAILED: i32 = -rustix::io::Errno::CANCELED.raw_os_error();
/// In the user data of a write of data, whose answer has the same without it.
const DATA: u64 = 1 << 62;

/// Entries of the submission queue: a device is fetched from in one `io_uring_enter`, so that a server that is killed has
/// fetched from all of it or from nothing.
const ENTRIES: u32 = 4096;

/// One request of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is wanted.
    pub command: Command,
    /// From which byte.
    pub offset: u64,
    /// How many bytes.
    pub len: u32,
}

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Data.
    Read,
    /// Data written.
    Write,
    /// Data written and made durable.
    WriteDurable,
    /// All that was written made durable.
    Flush,
    /// A range that is needed no more.
    Discard,
    /// A range that shall read as zeros.
    Zero,
    /// The same, without its room being given back.
    ZeroKeepingRoom,
    /// Anything else: the operation's number.
    Other(u8),
}

/// What happened on the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Another thread woke this one.
    Woken,
    /// A tag of the queue `slot` has a request.
    Request {
        /// The queue, as it was named to [`QueueRing::fetch`].
        slot: u32,
        /// The request's tag.
        tag: u16,
    },
    /// The driver did not take the data for a read: it is still to be answered.
    Refused {
        /// The queue.
        slot: u32,
        /// The request's tag.
        tag: u16,
    },
    /// A tag of the queue `slot` gets no requests any more.
    Ended {
        /// The queue.
        slot: u32,
        /// Its tag.
        tag: u16,
        /// The errno: ENODEV when the device was stopped.
        errno: i32,
    },
}

/// `/dev/ublkcN` and one of its queues.
pub struct QueueFiles {
    device: Arc<File>,
    queue: u16,
    depth: u16,
    descriptors: Option<Descriptors>,
}

/// The requests of a queue, which the driver writes and this process only reads.
struct Descriptors {
    start: *const IoDescriptor,
    bytes: usize,
}

// SAFETY: the memory is a map of this value's own; nothing in it belongs to a thread.
unsafe impl Send for Descriptors {}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: the range is what mmap gave, and no reference to it exists: requests are copied out.
        let _ = unsafe { rustix::mm::munmap(self.start.cast_mut().cast(), self.bytes) };
    }
}

impl QueueFiles {
    /// The queue number `queue` of the device that `device` is the character device of.
    #[must_use]
    pub fn new(device: Arc<File>, queue: u16, depth: u16) -> Self {
        Self { device, queue, depth, descriptors: None }
    }

    /// Its depth.
    #[must_use]
    pub fn depth(&self) -> u16 {
        self.depth
    }

    /// Maps the requests. To be done after the queue was fetched from: the driver remembers who mapped it first, and
    /// forgets that only for a server that had fetched.
    ///
    /// # Errors
    /// What the system says.
    pub fn map(&mut self) -> io::Result<()> {
        let page = rustix::param::page_size();
        let bytes = (usize::from(self.depth) * size_of::<IoDescriptor>()).next_multiple_of(page);
        let stride = (MAX_QUEUE_DEPTH * size_of::<IoDescriptor>()).next_multiple_of(page);
        let offset = (usize::from(self.queue) * stride) as u64;
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a new map at an address of the kernel's choice.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), bytes, ProtFlags::READ, flags, self.device.as_fd(), offset)
        }?;
        self.descriptors = Some(Descriptors { start: start.cast_const().cast(), bytes });
        Ok(())
    }

    /// The request that `tag` has.
    ///
    /// # Errors
    /// A tag that the queue does not have, or a queue that is not mapped.
    pub fn request(&self, tag: u16) -> io::Result<Request> {
        let descriptors = self.descriptors.as_ref().filter(|_| tag < self.depth);
        let descriptors = descriptors.ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the map has `depth` descriptors and lives as long as self; the driver does not write to this one
        // between the event of its tag and the answer, and the copy is volatile in case it did.
        let found = unsafe { descriptors.start.add(usize::from(tag)).read_volatile() };
        let (durable, keeping) = (found.op_flags & FUA != 0, found.op_flags & NO_UNMAP != 0);
        let command = match found.op_flags & 0xff {
            0 => Command::Read,
            1 if durable => Command::WriteDurable,
            1 => Command::Write,
            2 => Command::Flush,
            3 => Command::Discard,
            5 if keeping => Command::ZeroKeepingRoom,
            5 => Command::Zero,
            other => Command::Other(other as u8),
        };
        let len = found.sectors.saturating_mul(SECTOR);
        Ok(Request { command, offset: found.start.saturating_mul(u64::from(SECTOR)), len })
    }

    /// Where the data of the request that `tag` has are in the character device.
    fn data_offset(&self, tag: u16) -> u64 {
        DATA_OFFSET + (u64::from(self.queue) << QUEUE_SHIFT) + (u64::from(tag) << TAG_SHIFT)
    }

    /// Reads the data of the write that `tag` has. The request is still to be answered.
    ///
    /// # Errors
    /// EINVAL when the tag has no write any more, or what the system says.
    pub fn take(&self, tag: u16, data: &mut [u8]) -> io::Result<()> {
        let start = self.data_offset(tag);
        let (mut done, mut tries) = (0, 0);
        while let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match rustix::io::pread(&*self.device, rest, start + done as u64) {
                Ok(0) if tries == TRIES => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(0) => tries += 1,
                Ok(count) => done += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

/// Wakes the thread of a ring.
#[derive(Clone, Debug)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// Makes [`QueueRing::wait`] return [`Event::Woken`].
    pub fn wake(&self) {
        // It can only fail when it was woken 2^64 times and did not look.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }
}

/// The ring of one thread.
pub struct QueueRing {
    ring: IoUring,
    waker: Waker,
    polling: bool,
    /// Where hits are read to; what is committed from it stays there until it is written.
    arena: memmap2::MmapMut,
    used: usize,
    /// Where the buffer starts that was given last.
    given: Option<usize>,
    /// Other data that were committed.
    committed: Vec<Vec<u8>>,
    /// Writes of data that were pushed and have not ended.
    writes: usize,
    /// What has happened and was not told yet: user data and result.
    answers: Vec<(u64, i32)>,
}

impl QueueRing {
    /// A ring without queues, with an arena of so many bytes.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(arena: usize) -> io::Result<Self> {
        let ring = IoUring::builder().setup_cqsize(2 * ENTRIES).setup_coop_taskrun().build(ENTRIES)?;
        let waker = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let arena = memmap2::MmapMut::map_anon(arena)?;
        let waker = Waker(Arc::new(waker));
        let (committed, answers) = (Vec::new(), Vec::new());
        Ok(Self { ring, waker, polling: false, arena, used: 0, given: None, committed, writes: 0, answers })
    }

    /// What wakes this ring's thread.
    #[must_use]
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// `len` bytes of the arena, after all that are in use. When there are not so many left, what was committed is
    /// submitted first.
    ///
    /// # Errors
    /// More than the whole arena, or what the system says.
    pub fn buffer(&mut self, len: usize) -> io::Result<&mut [u8]> {
        self.reserve(2)?;
        if self.arena.len() - self.used < len {
            self.submit()?;
        }
        let start = self.used;
        self.given = Some(start);
        self.arena.get_mut(start..start.saturating_add(len)).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Answers a read with the first `len` bytes of what [`buffer`](Self::buffer) gave last.
    ///
    /// # Errors
    /// More than the buffer has, or what the system says.
    pub fn commit_buffer(&mut self, files: &QueueFiles, slot: u32, tag: u16, len: u32) -> io::Result<()> {
        // Nothing was submitted since, or the buffer would be free for others.
        let start = self.given.take().ok_or(io::ErrorKind::InvalidInput)?;
        let end = start.saturating_add(len as usize);
        let data = self.arena.get(start..end).ok_or(io::ErrorKind::InvalidInput)?.as_ptr();
        // The next one is aligned as pages are.
        self.used = end.next_multiple_of(4096).min(self.arena.len());
        self.commit_data_at(files, slot, tag, data, len)
    }

    /// Answers a read with `data`.
    ///
    /// # Errors
    /// What the system says.
    pub fn commit_data(&mut self, files: &QueueFiles, slot: u32, tag: u16, data: Vec<u8>) -> io::Result<()> {
        self.reserve(2)?;
        let (start, len) = (data.as_ptr(), u32::try_from(data.len()).map_err(io::Error::other)?);
        self.committed.push(data);
        self.commit_data_at(files, slot, tag, start, len)
    }

    /// Pushes the write of data and the answer linked to it. There is room for both, so that they are submitted together.
    fn commit_data_at(&mut self, files: &QueueFiles, slot: u32, tag: u16, data: *const u8, len: u32) -> io::Result<()> {
        let write = opcode::Write::new(types::Fd(files.device.as_raw_fd()), data, len).offset(files.data_offset(tag));
        let write = write.build().flags(squeue::Flags::IO_LINK).user_data(DATA | user_data(slot, tag));
        self.push(&write)?;
        self.writes += 1;
        self.command(COMMIT_AND_FETCH_REQ, files, slot, tag, len.cast_signed())
    }

    /// Answers a request with the number of its bytes that were read, or with a negative errno.
    ///
    /// # Errors
    /// What the system says.
    pub fn commit(&mut self, files: &QueueFiles, slot: u32, tag: u16, result: i32) -> io::Result<()> {
        self.command(COMMIT_AND_FETCH_REQ, files, slot, tag, result)
    }

    /// Fetches requests for every tag of every one of the queues, in one `io_uring_enter`, and maps them.
    ///
    /// # Errors
    /// More queues than the ring has room for, or what the system says.
    pub fn fetch(&mut self, queues: &mut [(u32, &mut QueueFiles)]) -> io::Result<()> {
        self.submit()?;
        let tags: usize = queues.iter().map(|(_, files)| usize::from(files.depth)).sum();
        if tags > ENTRIES as usize {
            return Err(io::Error::other(format!("{tags} requests in flight are more than {ENTRIES}")));
        }
        for (slot, files) in queues.iter() {
            for tag in 0..files.depth {
                self.command(FETCH_REQ, files, *slot, tag, 0)?;
            }
        }
        self.submit()?;
        queues.iter_mut().try_for_each(|(_, files)| files.map())
    }

    /// Submits what was committed, waits until something happens, and adds all that happened to `events`.
    ///
    /// # Errors
    /// What the system says.
    pub fn wait(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        if !self.polling {
            let entry = opcode::PollAdd::new(types::Fd(self.waker.0.as_raw_fd()), pollin()).build();
            self.push(&entry.user_data(WAKE))?;
            self.polling = true;
        }
        self.enter(Wanted::Answer)?;
        let mut woken = false;
        for (data, result) in self.answers.drain(..) {
            if data == WAKE {
                woken = true;
                continue;
            }
            let (slot, tag) = ((data >> 16) as u32, data as u16);
            events.push(match result {
                0 => Event::Request { slot, tag },
                LINK_FAILED => Event::Refused { slot, tag },
                _ => Event::Ended { slot, tag, errno: -result },
            });
        }
        if woken {
            self.polling = false;
            // Empty when somebody else's wake was read before: it does not block.
            let _ = rustix::io::read(&*self.waker.0, &mut [0u8; 8]);
            events.push(Event::Woken);
        }
        Ok(())
    }

    fn command(&mut self, op: u32, files: &QueueFiles, slot: u32, tag: u16, result: i32) -> io::Result<()> {
        let command = IoCommand { queue: files.queue, tag, result, addr: 0 };
        // SAFETY: the structure has no padding.
        let bytes: [u8; size_of::<IoCommand>()] = unsafe { std::mem::transmute(command) };
        let entry = opcode::UringCmd16::new(types::Fd(files.device.as_raw_fd()), op).cmd(bytes).build();
        self.push(&entry.user_data(user_data(slot, tag)))
    }

    /// Makes room for so many entries.
    fn reserve(&mut self, entries: usize) -> io::Result<()> {
        let queue = self.ring.submission();
        if queue.capacity() - queue.len() < entries {
            drop(queue);
            self.submit()?;
        }
        Ok(())
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        self.reserve(1)?;
        // SAFETY: the descriptors are open: the caller has the queue's file, and the ring its waker; the kernel takes
        // references of its own on submission. Memory that a write names is in the arena or in `committed`, and is neither
        // moved, reused nor freed before `enter` has seen all writes end.
        unsafe { self.ring.submission().push(entry) }.map_err(io::Error::other)
    }

    fn submit(&mut self) -> io::Result<()> {
        self.enter(Wanted::Nothing)
    }

    /// Submits everything, waits for all writes and, if there is none yet, for one answer; for less when it is interrupted.
    fn enter(&mut self, wanted: Wanted) -> io::Result<()> {
        loop {
            let answers = usize::from(wanted == Wanted::Answer && self.answers.is_empty());
            let submitted = self.ring.submit_and_wait(self.writes + answers);
            for entry in self.ring.completion() {
                match (entry.user_data(), entry.result()) {
                    (data, _) if data != WAKE && data & DATA != 0 => self.writes -= 1,
                    answer => self.answers.push(answer),
                }
            }
            match submitted {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // More completions were waiting than fit: now they are taken.
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => {}
                Err(error) => return Err(error),
            }
            if self.ring.submission().is_empty() && self.writes == 0 {
                break;
            }
        }
        (self.used, self.given) = (0, None);
        self.committed.clear();
        Ok(())
    }
}

/// What [`QueueRing::enter`] waits for besides writes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Nothing,
    Answer,
}

fn user_data(slot: u32, tag: u16) -> u64 {
    u64::from(slot) << 16 | u64::from(tag)
}

/// `POLLIN` as the ring wants it.
fn pollin() -> u32 {
    u32::from(rustix::event::PollFlags::IN.bits())
}
