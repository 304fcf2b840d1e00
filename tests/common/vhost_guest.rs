//! A vhost-user front-end with a guest's memory, whose queues are written by hand.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use firstread::attach::vhost_user::{Disk, VhostUserListener, serve};
use firstread::device::Device;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

pub const BASE: u64 = 0x10_0000;
pub const MEMORY: usize = 64 << 20;
/// Entries of each queue.
pub const ENTRIES: u16 = 128;
/// Queues are so far apart in the guest.
const QUEUE_BYTES: u64 = 0x1_0000;
/// Where a queue keeps what its requests point to.
const BUFFERS: u64 = 0x100_0000;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A server in the test's process.
pub struct Server {
    pub path: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    runtime: Option<Runtime>,
}

impl Server {
    pub fn start(path: PathBuf, device: Arc<dyn Device>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let guard = runtime.enter();
        let listener = VhostUserListener::bind(&path).unwrap();
        drop(guard);
        let disk = Disk { device, serial: "0123456789abcdefghijklmnop".to_owned() };
        let (stop, stopped) = oneshot::channel::<()>();
        runtime.spawn(async move {
            let stopped = async {
                let _ = stopped.await;
            };
            serve(listener, disk, stopped).await.unwrap();
        });
        Self { path, stop: Some(stop), runtime: Some(runtime) }
    }

    /// As if it was killed: what is on its way is answered no more.
    pub fn die(mut self) {
        self.stop = None;
        for _ in 0..1000 {
            if !self.path.exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the socket outlives the server");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The guest's memory and where its queues stand; it outlives front-ends and servers.
pub struct Guest {
    pub memory: GuestMemoryMmap<()>,
    pub queues: Vec<Queue>,
    kept: Option<(VhostUserInflight, File)>,
}

/// A queue as the guest sees it.
pub struct Queue {
    number: u64,
    pub available: u16,
    pub seen: u16,
    pub kick: EventFd,
    pub call: EventFd,
}

impl Guest {
    pub fn new(queues: u64) -> Self {
        let file: OwnedFd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(file);
        file.set_len(MEMORY as u64).unwrap();
        let region = GuestRegionMmap::from_range(GuestAddress(BASE), MEMORY, Some(FileOffset::new(file, 0))).unwrap();
        let queue = |number| Queue {
            number,
            available: 0,
            seen: 0,
            kick: EventFd::new(libc_nonblock()).unwrap(),
            call: EventFd::new(libc_nonblock()).unwrap(),
        };
        Self {
            memory: GuestMemoryMmap::from_regions(vec![region]).unwrap(),
            queues: (0..queues).map(queue).collect(),
            kept: None,
        }
    }

    /// Connects a front-end and starts all queues from where they are.
    pub fn connect(&mut self, path: &Path) -> Frontend {
        let mut front = Frontend::connect(path, 16).unwrap();
        front.set_owner().unwrap();
        let features = front.get_features().unwrap();
        assert_ne!(features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), 0);
        let protocol = front.get_protocol_features().unwrap();
        front.set_protocol_features(protocol).unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD));
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        // Without event indices: every answer is told of.
        front.set_features(features & !(1 << 29)).unwrap();
        assert!(front.get_queue_num().unwrap() >= self.queues.len() as u64);
        let region = self.memory.iter().next().unwrap();
        let region = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        front.set_mem_table(&[region]).unwrap();
        if let Some((told, file)) = &self.kept {
            front.set_inflight_fd(told, file.as_raw_fd()).unwrap();
        } else {
            let wanted = VhostUserInflight::new(0, 0, self.queues.len() as u16, ENTRIES);
            let (told, file) = front.get_inflight_fd(&wanted).unwrap();
            front.set_inflight_fd(&told, file.as_raw_fd()).unwrap();
            self.kept = Some((told, file));
        }
        for (index, queue) in self.queues.iter().enumerate() {
            front.set_vring_num(index, ENTRIES).unwrap();
            let user = |address: GuestAddress| self.memory.get_host_address(address).unwrap() as u64;
            let places = VringConfigData {
                queue_max_size: ENTRIES,
                queue_size: ENTRIES,
                flags: 0,
                desc_table_addr: user(queue.descriptors()),
                used_ring_addr: user(queue.used()),
                avail_ring_addr: user(queue.ring()),
                log_addr: None,
            };
            front.set_vring_addr(index, &places).unwrap();
            front.set_vring_base(index, self.used_index(queue)).unwrap();
            front.set_vring_call(index, &queue.call).unwrap();
            front.set_vring_kick(index, &queue.kick).unwrap();
            front.set_vring_enable(index, true).unwrap();
        }
        front
    }

    pub fn used_index(&self, queue: &Queue) -> u16 {
        self.memory.load(GuestAddress(queue.used().0 + 2), Ordering::Acquire).unwrap()
    }

    pub fn descriptor(&self, queue: usize, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = self.queues[queue].descriptors().0 + 16 * u64::from(index);
        self.put_descriptor(at, address, len, flags, next);
    }

    pub fn put_descriptor(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    pub fn header(&self, at: u64, kind: u32, sector: u64) {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Offers the chain that starts at `head`.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let queue = &mut self.queues[queue];
        let slot = queue.ring().0 + 4 + 2 * u64::from(queue.available % ENTRIES);
        self.memory.store(head, GuestAddress(slot), Ordering::Release).unwrap();
        queue.available = queue.available.wrapping_add(1);
        self.memory.store(queue.available, GuestAddress(queue.ring().0 + 2), Ordering::SeqCst).unwrap();
    }

    pub fn kick(&self, queue: usize) {
        self.queues[queue].kick.write(1).unwrap();
    }

    /// Offers a request of three descriptors from `3 * slot` on: header, `len` bytes for data, status. Data and status lie
    /// at [`data`](Self::data) of the slot.
    pub fn request(&mut self, queue: usize, slot: u16, kind: u32, sector: u64, len: u32) {
        let (first, at) = (3 * slot, self.data(queue, slot));
        self.header(at - 4096, kind, sector);
        self.memory.write_obj(0xff_u8, GuestAddress(at - 1)).unwrap();
        self.descriptor(queue, first, at - 4096, 16, NEXT, first + 1);
        self.descriptor(queue, first + 1, at, len, NEXT | WRITE, first + 2);
        self.descriptor(queue, first + 2, at - 1, 1, WRITE, 0);
        self.offer(queue, first);
    }

    /// Where a slot's data is: at most 256 KiB. The status is the byte before it, the header a page before it.
    pub fn data(&self, queue: usize, slot: u16) -> u64 {
        BASE + BUFFERS + (queue as u64 * 40 + u64::from(slot)) * (264 << 10) + 8192
    }

    pub fn status(&self, queue: usize, slot: u16) -> u8 {
        self.memory.read_obj(GuestAddress(self.data(queue, slot) - 1)).unwrap()
    }

    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Waits for `count` answers: the heads and lengths.
    pub fn answers(&mut self, queue: usize, count: usize) -> Vec<(u16, u32)> {
        let until = Instant::now() + Duration::from_secs(20);
        let mut found = Vec::new();
        while found.len() < count {
            found.extend(self.take_answers(queue));
            assert!(Instant::now() < until, "{} of {count} answers came", found.len());
            std::thread::sleep(Duration::from_micros(200));
        }
        found
    }

    pub fn take_answers(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let used = self.used_index(&self.queues[queue]);
        let queue = &mut self.queues[queue];
        let mut found = Vec::new();
        while queue.seen != used {
            let at = queue.used().0 + 4 + 8 * u64::from(queue.seen % ENTRIES);
            let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
            let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
            found.push((head as u16, len));
            queue.seen = queue.seen.wrapping_add(1);
        }
        found
    }

    /// The queue as it is before its first use.
    pub fn clear(&mut self, queue: usize) {
        let queue = &mut self.queues[queue];
        let zeros = vec![0; QUEUE_BYTES as usize];
        self.memory.write_slice(&zeros, queue.descriptors()).unwrap();
        (queue.available, queue.seen) = (0, 0);
        self.kept = None;
    }
}

impl Queue {
    pub fn descriptors(&self) -> GuestAddress {
        GuestAddress(BASE + QUEUE_BYTES * self.number)
    }

    pub fn ring(&self) -> GuestAddress {
        GuestAddress(self.descriptors().0 + 0x2000)
    }

    pub fn used(&self) -> GuestAddress {
        GuestAddress(self.descriptors().0 + 0x4000)
    }
}

/// The configuration space.
pub fn config(front: &mut Frontend) -> Vec<u8> {
    front.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60]).unwrap().1
}

fn libc_nonblock() -> i32 {
    rustix::event::EventfdFlags::NONBLOCK.bits() as i32
}
