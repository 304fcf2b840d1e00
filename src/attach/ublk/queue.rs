//! One thread and the queues that it serves.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use parking_lot::Condvar;
use rustix::io::Errno;
use rustix::thread::CapabilitySet;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use super::{IO_MAX, Shared};
use crate::device::{Access, Device, Local, Zeroing};
use crate::error::{Error, Result};
use crate::sys::ublk::{Command, Event, QueueFiles, QueueRing, Request, Waker};

/// A device as its queues see it.
pub struct Served {
    number: u32,
    device: Arc<dyn Device>,
    /// Queues that have not ended.
    live: Shared<usize>,
    ended: Condvar,
}

impl std::fmt::Debug for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Served").field("number", &self.number).finish_non_exhaustive()
    }
}

impl Served {
    /// A device with so many queues.
    #[must_use]
    pub fn new(number: u32, device: Arc<dyn Device>, queues: usize) -> Arc<Self> {
        Arc::new(Self { number, device, live: Shared::new(queues), ended: Condvar::new() })
    }

    /// Waits until no queue has a descriptor of the device any more; says whether that came true in time.
    pub fn wait_until_ended(&self, patience: Duration) -> bool {
        let mut live = self.live.lock();
        !self.ended.wait_while_for(&mut live, |live| *live > 0, patience).timed_out()
    }

    fn end_queue(&self) {
        *self.live.lock() -= 1;
        self.ended.notify_all();
    }
}

/// What a thread is told.
pub enum Message {
    /// Serve this queue.
    Serve {
        /// Its device.
        served: Arc<Served>,
        /// The queue.
        files: QueueFiles,
        /// Gets told whether it was fetched from.
        answer: Sender<io::Result<()>>,
    },
    /// What a task was for is done.
    Done {
        /// The queue.
        slot: u32,
        /// The request.
        tag: u16,
        /// Which of the thread's tasks.
        turn: u64,
        /// How it ended.
        outcome: Result<Done>,
    },
    /// Answer all requests of this device with an error from now on.
    Fail(Arc<Served>),
    /// End.
    Quit,
}

/// What a task has done.
pub enum Done {
    /// A read: its data.
    Read(Vec<u8>),
    /// Anything else: what it is to be answered with.
    Other(i32),
}

/// Messages for a thread.
pub struct Inbox {
    messages: Shared<Vec<Message>>,
    waker: Waker,
}

impl Inbox {
    /// An empty one that wakes a ring.
    #[must_use]
    pub fn new(waker: Waker) -> Self {
        Self { messages: Shared::default(), waker }
    }

    /// Tells the thread something.
    pub fn send(&self, message: Message) {
        let first = {
            let mut messages = self.messages.lock();
            messages.push(message);
            messages.len() == 1
        };
        // For the others it was woken and has not looked yet.
        if first {
            self.waker.wake();
        }
    }
}

/// A queue.
struct Queue {
    served: Arc<Served>,
    files: QueueFiles,
    tags: Vec<Tag>,
    /// Tags that may still get requests.
    live: u16,
    failing: bool,
    /// Whether the last request failed, which was said.
    complained: bool,
}

impl Queue {
    /// Says why a user gets an error; once until requests succeed again.
    fn complain(&mut self, error: &Error) {
        if !self.complained {
            self.complained = true;
            tracing::warn!("/dev/ublkb{}: a request fails: {error}", self.served.number);
        }
    }
}

/// A place for a request.
#[derive(Default)]
struct Tag {
    /// The task that the request waits for, and its number: an answer that comes too late is told by it.
    waiting: Option<(u64, AbortHandle)>,
}

impl Drop for Queue {
    fn drop(&mut self) {
        for tag in &mut self.tags {
            if let Some((_, fetch)) = tag.waiting.take() {
                fetch.abort();
            }
        }
    }
}

/// The state of a thread.
pub struct QueueThread {
    ring: QueueRing,
    inbox: Arc<Inbox>,
    runtime: Handle,
    queues: Vec<Option<Queue>>,
    /// Where writes are taken to: the largest request's bytes.
    buffer: Vec<u8>,
    /// Tasks so far.
    turns: u64,
    quit: bool,
}

impl QueueThread {
    /// A thread without queues.
    #[must_use]
    pub fn new(ring: QueueRing, inbox: Arc<Inbox>, runtime: Handle) -> Self {
        Self { ring, inbox, runtime, queues: Vec::new(), buffer: vec![0; IO_MAX as usize], turns: 0, quit: false }
    }

    /// Serves until it is told to quit.
    pub fn run(mut self) {
        suppress_partition_scans();
        let mut events = Vec::new();
        while !self.quit {
            let done = self.ring.wait(&mut events).and_then(|()| {
                events.drain(..).try_for_each(|event| match event {
                    Event::Woken => self.messages(),
                    Event::Request { slot, tag } => self.request(slot, tag),
                    Event::Refused { slot, tag } => self.refused(slot, tag),
                    Event::Ended { slot, errno, .. } => {
                        self.ended(slot, errno);
                        Ok(())
                    }
                })
            });
            if let Err(error) = done {
                // The devices wait for another server: nothing can be answered without the ring.
                tracing::error!("a thread for ublk queues ends: {error}");
                return;
            }
        }
    }

    fn messages(&mut self) -> io::Result<()> {
        let messages = std::mem::take(&mut *self.inbox.messages.lock());
        for message in messages {
            match message {
                Message::Serve { served, files, answer } => {
                    // Whoever waits for it may have given up.
                    let _ = answer.send(self.serve(served, files));
                }
                Message::Done { slot, tag, turn, outcome } => self.done(slot, tag, turn, outcome)?,
                Message::Fail(served) => self.fail(&served)?,
                Message::Quit => self.quit = true,
            }
        }
        Ok(())
    }

    fn serve(&mut self, served: Arc<Served>, mut files: QueueFiles) -> io::Result<()> {
        let slot = match self.queues.iter().position(Option::is_none) {
            Some(slot) => slot,
            None => {
                self.queues.push(None);
                self.queues.len() - 1
            }
        };
        let depth = files.depth();
        let fetched = self.ring.fetch(&mut [(slot as u32, &mut files)]);
        // Also when it can't be used: its tags end one by one when the device is removed.
        let tags = (0..depth).map(|_| Tag::default()).collect();
        let queue = Queue { served, files, tags, live: depth, failing: false, complained: false };
        if let Some(place) = self.queues.get_mut(slot) {
            *place = Some(queue);
        }
        fetched
    }

    fn request(&mut self, slot: u32, tag: u16) -> io::Result<()> {
        let Some(Some(queue)) = self.queues.get_mut(slot as usize) else { return Ok(()) };
        let request = queue.files.request(tag)?;
        let errno = match request.command {
            _ if queue.failing => Errno::IO,
            Command::Read | Command::Write | Command::WriteDurable if request.len > IO_MAX => Errno::INVAL,
            Command::Read => return self.read(slot, tag, request),
            Command::Write | Command::WriteDurable => return self.write(slot, tag, request),
            // There is nothing that could be lost.
            Command::Flush if queue.served.device.access() == Access::ReadOnly => {
                return self.ring.commit(&queue.files, slot, tag, 0);
            }
            Command::Flush => {
                return self.start(slot, tag, |device| async move { device.flush().await.map(|()| Done::Other(0)) });
            }
            Command::Discard => return self.zero(slot, tag, request, Zeroing::Discard),
            Command::Zero => return self.zero(slot, tag, request, Zeroing::Hole),
            Command::ZeroKeepingRoom => return self.zero(slot, tag, request, Zeroing::Allocated),
            Command::Other(_) => Errno::OPNOTSUPP,
        };
        self.ring.commit(&queue.files, slot, tag, -errno.raw_os_error())
    }

    fn read(&mut self, slot: u32, tag: u16, request: Request) -> io::Result<()> {
        let Some(Some(queue)) = self.queues.get_mut(slot as usize) else { return Ok(()) };
        let len = request.len as usize;
        let buffer = self.ring.buffer(len)?;
        match queue.served.device.read_local(request.offset, buffer) {
            Ok(Local::Done) => self.ring.commit_buffer(&queue.files, slot, tag, request.len),
            Ok(Local::Missing) => self.start(slot, tag, move |device| async move {
                let mut data = vec![0; len];
                device.read_at(request.offset, &mut data).await.map(|()| Done::Read(data))
            }),
            Err(error) => {
                queue.complain(&error);
                self.ring.commit(&queue.files, slot, tag, -error.errno())
            }
        }
    }

    fn write(&mut self, slot: u32, tag: u16, request: Request) -> io::Result<()> {
        let Some(Some(queue)) = self.queues.get_mut(slot as usize) else { return Ok(()) };
        let len = request.len as usize;
        let Some(data) = self.buffer.get_mut(..len) else { return Ok(()) };
        let taken =
            queue.files.take(tag, data).map_err(|error| Error::io("take a write's data from the kernel", error));
        let answer = Done::Other(len as i32);
        match taken.and_then(|()| queue.served.device.write_local(request.offset, data)) {
            Ok(Local::Done) if request.command == Command::WriteDurable => {
                self.start(slot, tag, move |device| async move { device.flush().await.map(|()| answer) })
            }
            Ok(Local::Done) => self.ring.commit(&queue.files, slot, tag, len as i32),
            Ok(Local::Missing) => {
                let data = data.to_vec();
                self.start(slot, tag, move |device| async move {
                    device.write_at(request.offset, &data).await?;
                    if request.command == Command::WriteDurable {
                        device.flush().await?;
                    }
                    Ok(answer)
                })
            }
            Err(error) => {
                queue.complain(&error);
                self.ring.commit(&queue.files, slot, tag, -error.errno())
            }
        }
    }

    fn zero(&mut self, slot: u32, tag: u16, request: Request, how: Zeroing) -> io::Result<()> {
        self.start(slot, tag, move |device| async move {
            device.zero(request.offset, u64::from(request.len), how).await.map(|()| Done::Other(0))
        })
    }

    /// Has the runtime do what may have to wait; its message brings the answer.
    fn start<W, F>(&mut self, slot: u32, tag: u16, work: W) -> io::Result<()>
    where
        W: FnOnce(Arc<dyn Device>) -> F,
        F: Future<Output = Result<Done>> + Send + 'static,
    {
        let Some(Some(queue)) = self.queues.get_mut(slot as usize) else { return Ok(()) };
        let Some(place) = queue.tags.get_mut(usize::from(tag)) else { return Ok(()) };
        self.turns += 1;
        let (inbox, turn, work) = (Arc::clone(&self.inbox), self.turns, work(Arc::clone(&queue.served.device)));
        let task = self.runtime.spawn(async move {
            let outcome = work.await;
            inbox.send(Message::Done { slot, tag, turn, outcome });
        });
        place.waiting = Some((turn, task.abort_handle()));
        Ok(())
    }

    fn done(&mut self, slot: u32, tag: u16, turn: u64, outcome: Result<Done>) -> io::Result<()> {
        let Some(Some(queue)) = self.queues.get_mut(slot as usize) else { return Ok(()) };
        let Some(place) = queue.tags.get_mut(usize::from(tag)) else { return Ok(()) };
        // Answered already, or of a queue that had this slot before.
        if place.waiting.take_if(|(waiting, _)| *waiting == turn).is_none() {
            return Ok(());
        }
        let answer = match outcome {
            Ok(done) => {
                queue.complained = false;
                match done {
                    Done::Read(data) => return self.ring.commit_data(&queue.files, slot, tag, data),
                    Done::Other(answer) => answer,
                }
            }
            Err(error) => {
                queue.complain(&error);
                -error.errno()
            }
        };
        self.ring.commit(&queue.files, slot, tag, answer)
    }

    fn refused(&mut self, slot: u32, tag: u16) -> io::Result<()> {
        let Some(Some(queue)) = self.queues.get_mut(slot as usize) else { return Ok(()) };
        queue.complain(&Error::io("give the kernel its data", io::Error::other("it does not take them")));
        self.ring.commit(&queue.files, slot, tag, -Errno::IO.raw_os_error())
    }

    fn fail(&mut self, served: &Arc<Served>) -> io::Result<()> {
        for (slot, queue) in self.queues.iter_mut().enumerate() {
            let Some(queue) = queue.as_mut().filter(|queue| Arc::ptr_eq(&queue.served, served)) else { continue };
            queue.failing = true;
            for (number, tag) in queue.tags.iter_mut().enumerate() {
                if let Some((_, fetch)) = tag.waiting.take() {
                    fetch.abort();
                    self.ring.commit(&queue.files, slot as u32, number as u16, -Errno::IO.raw_os_error())?;
                }
            }
        }
        Ok(())
    }

    fn ended(&mut self, slot: u32, errno: i32) {
        let Some(place) = self.queues.get_mut(slot as usize) else { return };
        let Some(queue) = place else { return };
        if errno != Errno::NODEV.raw_os_error() {
            let error = io::Error::from_raw_os_error(errno);
            tracing::error!("a request of the ublk device {} could not be answered: {error}", queue.served.number);
        }
        queue.live = queue.live.saturating_sub(1);
        if queue.live == 0
            && let Some(queue) = place.take()
        {
            let served = Arc::clone(&queue.served);
            // Its descriptor first.
            drop(queue);
            served.end_queue();
        }
    }
}

/// Has the kernel look for no partitions when a device is started, which it does for servers with CAP_SYS_ADMIN: reading
/// the table may have to wait for a source, and while it waits the process can't even be killed.
fn suppress_partition_scans() {
    let dropped = rustix::thread::capabilities(None).and_then(|mut sets| {
        sets.effective.remove(CapabilitySet::SYS_ADMIN);
        rustix::thread::set_capabilities(None, sets)
    });
    if let Err(errno) = dropped {
        tracing::warn!("giving a capability up in a ublk thread: {}", io::Error::from(errno));
    }
}
