//! One front-end: what it says, and the queues that it sets up.

use std::fs::File;
use std::io;

use tokio::runtime::Handle;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::disk::{Disk, QUEUES};
use super::inflight::Area;
use super::memory::{REGIONS_MAX, Regions};
use super::ring::{Common, Places, Ring};

/// What a front-end has set up. Dropping it stops the queues.
pub struct Session {
    rings: Vec<Ring>,
    regions: Regions,
    common: Common,
    /// The front-end's channel for messages of a back-end. There are none, but it must stay open; and User Mode Linux
    /// has an interrupt for its queues only with a back-end that takes it.
    channel: Option<Backend>,
}

impl Session {
    /// A session in which nothing is set up; misses run on `runtime`.
    #[must_use]
    pub fn new(disk: Disk, runtime: Handle) -> Self {
        let regions = Regions::default();
        let common = Common { disk, memory: regions.shared(), runtime, area: None, event_idx: false };
        Self { rings: (0..QUEUES).map(|_| Ring::default()).collect(), regions, common, channel: None }
    }

    fn ring(&mut self, index: u32) -> Result<(&mut Ring, &Common, u16)> {
        let number = u16::try_from(index).map_err(|_| Error::InvalidParam)?;
        let ring = self.rings.get_mut(usize::from(number)).ok_or(Error::InvalidParam)?;
        Ok((ring, &self.common, number))
    }

    fn reset(&mut self) {
        for ring in &mut self.rings {
            ring.end();
            *ring = Ring::default();
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // All of them first, so that they end together.
        for ring in &self.rings {
            ring.abandon();
        }
    }
}

fn unsupported() -> Error {
    Error::InvalidOperation("not offered")
}

/// A descriptor of the front-end must not block a queue's thread.
fn nonblocking(file: File) -> Result<File> {
    let failed = |errno| Error::ReqHandlerError(io::Error::from(errno));
    let flags = rustix::fs::fcntl_getfl(&file).map_err(failed)?;
    rustix::fs::fcntl_setfl(&file, flags | rustix::fs::OFlags::NONBLOCK).map_err(failed)?;
    Ok(file)
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.common.disk.features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::InvalidParam);
        }
        self.common.event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            // Such a front-end has no message to enable queues.
            for (ring, index) in self.rings.iter_mut().zip(0..) {
                ring.enable(true, &self.common, index)?;
            }
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(QUEUES))
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        self.regions.replace(regions, files).map(|()| None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        self.regions.add(region, file).map(|()| None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.regions.remove(region)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.ring(index)?.0.set_size(num)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let places = Places {
            descriptors: self.regions.translate(descriptor)?,
            available: self.regions.translate(available)?,
            used: self.regions.translate(used)?,
        };
        let (ring, common, index) = self.ring(index)?;
        ring.set_places(places, common, index)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.ring(index)?.0.set_base(base)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = self.ring(index)?.0.end();
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let file = file.map(nonblocking).transpose()?;
        let (ring, common, index) = self.ring(u32::from(index))?;
        ring.set_kick(file, common, index)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let file = file.map(nonblocking).transpose()?;
        self.ring(u32::from(index))?.0.set_call(file);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _file: Option<File>) -> Result<()> {
        // Errors of a queue are answered in the queue.
        self.ring(u32::from(index)).map(|_| ())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let (ring, common, index) = self.ring(index)?;
        ring.enable(enable, common, index)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        self.common.disk.config(offset, size).ok_or(Error::InvalidParam)
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        // The one field that may be set, the cache's mode, is of a feature that is not offered.
        Err(unsupported())
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (area, told, file) = Area::make(wanted)?;
        self.common.area = Some(area);
        Ok((told, file))
    }

    fn set_inflight_fd(&mut self, told: &VhostUserInflight, file: File) -> Result<()> {
        self.common.area = Some(Area::take(told, file)?);
        Ok(())
    }

    fn set_backend_req_fd(&mut self, backend: Backend) {
        self.channel = Some(backend);
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        Err(unsupported())
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(unsupported())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(unsupported())
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(unsupported())
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(unsupported())
    }

    fn set_log_base(&mut self, _log: &vhost::vhost_user::message::VhostUserLog, _file: File) -> Result<()> {
        Err(unsupported())
    }
}
