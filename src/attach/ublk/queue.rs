//! One thread and the queues that it serves.

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
use crate::device::{Device, Local};
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
    /// A miss is here.
    Fetched {
        /// The queue.
        slot: u32,
        /// The request.
        tag: u16,
        /// Which of the thread's misses.
        turn: u64,
        /// The data, or why there are none.
        data: Result<Vec<u8>>,
    },
    /// Answer all requests of this device with an error from now on.
    Fail(Arc<Served>),
    /// End.
    Quit,
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
    /// Whether the last miss failed, which was said.
    complained: bool,
}

impl Queue {
    /// Says why a reader gets an error; once until reads succeed again.
    fn complain(&mut self, error: &Error) {
        if !self.complained {
            self.complained = true;
            tracing::warn!("/dev/ublkb{}: a read fails: {error}", self.served.number);
        }
    }
}

/// A place for a request.
#[derive(Default)]
struct Tag {
    /// The fetch that the request waits for, and the miss's number: an answer that comes too late is told by it.
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
    /// Misses so far.
    turns: u64,
    quit: bool,
}

impl QueueThread {
    /// A thread without queues.
    #[must_use]
    pub fn new(ring: QueueRing, inbox: Arc<Inbox>, runtime: Handle) -> Self {
        Self { ring, inbox, runtime, queues: Vec::new(), turns: 0, quit: false }
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
                Message::Fetched { slot, tag, turn, data } => self.fetched(slot, tag, turn, data)?,
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
            Command::Read if request.len <= IO_MAX => return self.read(slot, tag, request),
            // There is nothing that could be lost.
            Command::Flush => return self.ring.commit(&queue.files, slot, tag, 0),
            Command::Read => Errno::INVAL,
            Command::Other(_) => Errno::ROFS,
        };
        self.ring.commit(&queue.files, slot, tag, -errno.raw_os_error())
    }

    fn read(&mut self, slot: u32, tag: u16, request: Request) -> io::Result<()> {
        let Some(Some(queue)) = self.queues.get_mut(slot as usize) else { return Ok(()) };
        let len = request.len as usize;
        let buffer = self.ring.buffer(len)?;
        match queue.served.device.read_local(request.offset, buffer) {
            Ok(Local::Done) => self.ring.commit_buffer(&queue.files, slot, tag, request.len),
            Ok(Local::Missing) => {
                let Some(place) = queue.tags.get_mut(usize::from(tag)) else { return Ok(()) };
                self.turns += 1;
                let (device, inbox, turn) = (Arc::clone(&queue.served.device), Arc::clone(&self.inbox), self.turns);
                let fetch = self.runtime.spawn(async move {
                    let mut data = vec![0; len];
                    let data = device.read_at(request.offset, &mut data).await.map(|()| data);
                    inbox.send(Message::Fetched { slot, tag, turn, data });
                });
                place.waiting = Some((turn, fetch.abort_handle()));
                Ok(())
            }
            Err(error) => {
                queue.complain(&error);
                self.ring.commit(&queue.files, slot, tag, -error.errno())
            }
        }
    }

    fn fetched(&mut self, slot: u32, tag: u16, turn: u64, data: Result<Vec<u8>>) -> io::Result<()> {
        let Some(Some(queue)) = self.queues.get_mut(slot as usize) else { return Ok(()) };
        let Some(place) = queue.tags.get_mut(usize::from(tag)) else { return Ok(()) };
        // Answered already, or of a queue that had this slot before.
        if place.waiting.take_if(|(waiting, _)| *waiting == turn).is_none() {
            return Ok(());
        }
        match data {
            Ok(data) => {
                queue.complained = false;
                self.ring.commit_data(&queue.files, slot, tag, data)
            }
            Err(error) => {
                queue.complain(&error);
                self.ring.commit(&queue.files, slot, tag, -error.errno())
            }
        }
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
