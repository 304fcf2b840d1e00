//! One queue as the front-end sets it up, and its thread while it runs.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use vhost::vhost_user::{Error, Result};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::disk::{Disk, QUEUE_SIZE_MAX};
use super::inflight::{Area, Tracker};
use super::memory::SharedMemory;
use super::shared::{Shared, Stop};
use super::worker::{Stopped, Worker};

/// The places of a queue's parts in the guest.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// The descriptor table.
    pub descriptors: GuestAddress,
    /// The ring of what the guest offers.
    pub available: GuestAddress,
    /// The ring of what was answered.
    pub used: GuestAddress,
}

/// What all queues of a front-end have in common.
#[derive(Clone, Debug)]
pub struct Common {
    pub disk: Disk,
    pub memory: SharedMemory,
    pub runtime: Handle,
    pub area: Option<Arc<Area>>,
    pub event_idx: bool,
}

/// A queue.
#[derive(Debug, Default)]
pub struct Ring {
    size: u16,
    places: Option<Places>,
    next_avail: u16,
    kick: Option<File>,
    call: Arc<Mutex<Option<File>>>,
    enabled: bool,
    running: Option<(Arc<Shared>, JoinHandle<Stopped>)>,
}

fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

impl Ring {
    /// Sets the number of entries.
    ///
    /// # Errors
    /// It is no power of two, too large, or the queue runs.
    pub fn set_size(&mut self, size: u32) -> Result<()> {
        let size = u16::try_from(size).ok().filter(|size| size.is_power_of_two() && *size <= QUEUE_SIZE_MAX);
        self.size = size.filter(|_| self.running.is_none()).ok_or(Error::InvalidParam)?;
        Ok(())
    }

    /// Sets where the queue is.
    pub fn set_places(&mut self, places: Places, common: &Common, index: u16) -> Result<()> {
        self.stop();
        self.places = Some(places);
        self.start_if_ready(common, index)
    }

    /// Sets the next entry of the available ring.
    ///
    /// # Errors
    /// The queue runs, or it is no index.
    pub fn set_base(&mut self, base: u32) -> Result<()> {
        let base = u16::try_from(base).ok().filter(|_| self.running.is_none());
        self.next_avail = base.ok_or(Error::InvalidParam)?;
        Ok(())
    }

    /// Sets how the guest tells of requests, which starts the queue once it is enabled.
    pub fn set_kick(&mut self, kick: Option<File>, common: &Common, index: u16) -> Result<()> {
        self.stop();
        self.kick = kick;
        self.start_if_ready(common, index)
    }

    /// Sets how the guest is told of answers.
    pub fn set_call(&self, call: Option<File>) {
        *self.call.lock() = call;
    }

    /// Lets the queue run, or not.
    pub fn enable(&mut self, enabled: bool, common: &Common, index: u16) -> Result<()> {
        self.enabled = enabled;
        if enabled {
            return self.start_if_ready(common, index);
        }
        self.stop();
        Ok(())
    }

    /// Ends the queue: the next entry of the available ring.
    pub fn end(&mut self) -> u16 {
        self.stop();
        self.kick = None;
        self.set_call(None);
        self.next_avail
    }

    fn start_if_ready(&mut self, common: &Common, index: u16) -> Result<()> {
        let (Some(places), Some(kick), true, None) = (self.places, &self.kick, self.enabled, &self.running) else {
            return Ok(());
        };
        let kick = kick.try_clone().map_err(failed)?;
        let mut queue = Queue::new(QUEUE_SIZE_MAX).map_err(failed)?;
        queue.try_set_size(self.size).map_err(failed)?;
        queue.try_set_desc_table_address(places.descriptors).map_err(failed)?;
        queue.try_set_avail_ring_address(places.available).map_err(failed)?;
        queue.try_set_used_ring_address(places.used).map_err(failed)?;
        queue.set_event_idx(common.event_idx);
        queue.set_ready(true);
        let memory = common.memory.view();
        if !queue.is_valid(&*memory) {
            return Err(Error::InvalidParam);
        }
        let used = queue.used_idx(&*memory, std::sync::atomic::Ordering::Acquire).map_err(failed)?.0;
        queue.set_next_used(used);
        let mut tracker = common.area.as_ref().and_then(|area| Tracker::new(area, index, self.size));
        let mut resubmitted = tracker.as_mut().map(|tracker| tracker.recover(used)).unwrap_or_default();
        resubmitted.retain(|head| *head < self.size);
        if tracker.is_some() {
            // Every entry that was taken is answered, or among these. What the front-end says of it counts from the
            // answered ones after a crash, and from the taken ones otherwise.
            self.next_avail = used.wrapping_add(resubmitted.len() as u16);
        }
        queue.set_next_avail(self.next_avail);
        let worker = Worker {
            disk: common.disk.clone(),
            memory: common.memory.clone(),
            queue,
            kick,
            runtime: common.runtime.clone(),
            tracker,
            resubmitted,
        };
        self.running = Some(worker.start(Arc::clone(&self.call)).map_err(failed)?);
        Ok(())
    }

    /// Tells the queue's thread that its front-end is gone; it has ended when this is dropped.
    pub fn abandon(&self) {
        if let Some((shared, _)) = &self.running {
            shared.stop(Stop::AtOnce);
        }
    }

    fn stop(&mut self) {
        if let Some((shared, thread)) = self.running.take() {
            shared.stop(Stop::Orderly);
            if let Ok(stopped) = thread.join() {
                self.next_avail = stopped.next_avail;
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.stop();
    }
}
