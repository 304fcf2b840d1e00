//! The threads that serve queues: few, whatever the number of devices.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;

use sha2::{Digest as _, Sha256};
use tokio::runtime::Handle;

use super::queue::{Inbox, Message, QueueThread, Served};
use super::{Shared, UblkOptions, open_control};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::sys::ublk::{Control, QueueFiles, QueueRing};

/// Most threads; a queue's thread answers some hundred thousand requests a second.
const THREADS_MAX: usize = 4;

/// Memory of a thread for what hits read, in bytes: four of the largest requests.
const ARENA: usize = 4 << 20;

/// What devices carry to be known again: one value for each root directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(pub(super) u64);

impl Mark {
    /// The mark of whoever is the only one to have this name.
    #[must_use]
    pub fn of(name: &[u8]) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"firstread ublk device of ");
        hash.update(name);
        let digest: [u8; 32] = hash.finalize().into();
        let mut first = [0u8; 8];
        first.copy_from_slice(&digest[..8]);
        Self(u64::from_le_bytes(first))
    }
}

/// The threads, started with the first device. They end with the process, or when the server is dropped.
pub struct UblkServer {
    options: UblkOptions,
    mark: Mark,
    runtime: Handle,
    threads: Shared<Vec<Thread>>,
    next: AtomicUsize,
    /// The control device, while nobody gives commands.
    idle: Shared<Option<Control>>,
}

struct Thread {
    inbox: Arc<Inbox>,
    handle: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for UblkServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UblkServer").field("options", &self.options).finish_non_exhaustive()
    }
}

impl UblkServer {
    /// A server whose misses run on `runtime`.
    #[must_use]
    pub fn new(options: UblkOptions, mark: Mark, runtime: Handle) -> Arc<Self> {
        let (threads, next, idle) = (Shared::default(), AtomicUsize::new(0), Shared::default());
        Arc::new(Self { options, mark, runtime, threads, next, idle })
    }

    /// Runs commands on the control device, which is kept open afterwards: opening it takes as long as several commands.
    /// Commands wait, so that whoever finds it in use opens another one.
    pub(super) fn control<T>(&self, commands: impl FnOnce(&mut Control) -> Result<T>) -> Result<T> {
        let idle = self.idle.lock().take();
        let mut control = match idle {
            Some(control) => control,
            None => open_control()?,
        };
        let result = commands(&mut control);
        *self.idle.lock() = Some(control);
        result
    }

    pub(super) fn options(&self) -> UblkOptions {
        self.options
    }

    pub(super) fn mark(&self) -> Mark {
        self.mark
    }

    /// Fetches from all queues of a device. The queues of one device are on threads of their own as far as there are
    /// enough.
    pub(super) fn serve(&self, number: u32, device: Arc<dyn Device>, queues: Vec<QueueFiles>) -> Result<Arc<Served>> {
        let served = Served::new(number, device, queues.len());
        let inboxes = self.inboxes()?;
        let first = self.next.fetch_add(queues.len(), Ordering::Relaxed);
        let (answer, answers) = mpsc::channel();
        for (place, files) in queues.into_iter().enumerate() {
            if let Some(inbox) = inboxes.get((first + place) % inboxes.len().max(1)) {
                inbox.send(Message::Serve { served: Arc::clone(&served), files, answer: answer.clone() });
            }
        }
        drop(answer);
        // It ends when every thread has answered or is gone.
        answers.iter().collect::<std::io::Result<()>>().map_err(|error| {
            self.fail(&served);
            Error::io(format!("fetch from the ublk device {number}"), error)
        })?;
        Ok(served)
    }

    /// Answers everything that the device is asked, and was asked, with an error.
    pub(super) fn fail(&self, served: &Arc<Served>) {
        for thread in self.threads.lock().iter() {
            thread.inbox.send(Message::Fail(Arc::clone(served)));
        }
    }

    fn inboxes(&self) -> Result<Vec<Arc<Inbox>>> {
        let mut threads = self.threads.lock();
        if threads.is_empty() {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            for number in 0..cores.min(THREADS_MAX).max(usize::from(self.options.queues).min(cores)) {
                threads.push(self.start(number)?);
            }
        }
        Ok(threads.iter().map(|thread| Arc::clone(&thread.inbox)).collect())
    }

    fn start(&self, number: usize) -> Result<Thread> {
        let failed = |error| Error::io("start a thread for ublk queues", error);
        let (sender, receiver) = mpsc::channel();
        let runtime = self.runtime.clone();
        let body = move || match QueueRing::new(ARENA) {
            Ok(ring) => {
                let inbox = Arc::new(Inbox::new(ring.waker()));
                if sender.send(Ok(Arc::clone(&inbox))).is_ok() {
                    QueueThread::new(ring, inbox, runtime).run();
                }
            }
            // The other end waits for this.
            Err(error) => drop(sender.send(Err(error))),
        };
        let handle = std::thread::Builder::new().name(format!("ublk-{number}")).spawn(body).map_err(failed)?;
        let inbox = receiver.recv().map_err(|error| failed(std::io::Error::other(error)))?.map_err(failed)?;
        Ok(Thread { inbox, handle: Some(handle) })
    }
}

impl Drop for UblkServer {
    fn drop(&mut self) {
        for thread in self.threads.get_mut() {
            thread.inbox.send(Message::Quit);
            if let Some(handle) = thread.handle.take() {
                // A thread that panicked has said so.
                let _ = handle.join();
            }
        }
    }
}
