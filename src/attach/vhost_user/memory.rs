//! The memory of a front-end's guest, as far as it was shared.

use std::fs::File;
use std::sync::Arc;

use parking_lot::RwLock;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vhost::vhost_user::{Error, Result};
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// A view of a guest's memory; it stays mapped as long as somebody has it.
pub type Memory = GuestMemoryMmap<()>;

/// Regions that a front-end may share, as many as QEMU has slots.
pub const REGIONS_MAX: usize = 509;

/// The current memory. Queue threads take a view for each batch of requests.
#[derive(Clone, Debug, Default)]
pub struct SharedMemory(Arc<RwLock<Arc<Memory>>>);

impl SharedMemory {
    /// The memory as it is now.
    #[must_use]
    pub fn view(&self) -> Arc<Memory> {
        Arc::clone(&self.0.read())
    }
}

/// Where a region is in the front-end's own address space, which it names the parts of a queue by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    user: u64,
    guest: u64,
    len: u64,
}

impl Place {
    fn of(region: &VhostUserMemoryRegion) -> Self {
        Self { user: region.user_addr, guest: region.guest_phys_addr, len: region.memory_size }
    }
}

/// The regions of a front-end.
#[derive(Debug, Default)]
pub struct Regions {
    shared: SharedMemory,
    places: Vec<Place>,
}

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(std::io::Error::other(error))
}

/// Refuses a mapping of `len` bytes from `offset` that goes behind the end of the file: reading there would be a SIGBUS, and
/// neither crate that maps it looks.
///
/// # Errors
/// The file is shorter, or can't be asked.
pub fn check_covers(file: &File, offset: u64, len: u64) -> Result<()> {
    let bytes = file.metadata().map_err(refused)?.len();
    if offset.checked_add(len).is_none_or(|end| end > bytes) {
        return Err(refused(std::io::Error::other(format!("{len} bytes from {offset} of a file that has {bytes}"))));
    }
    Ok(())
}

fn map(region: &VhostUserMemoryRegion, file: File) -> Result<Arc<GuestRegionMmap<()>>> {
    check_covers(&file, region.mmap_offset, region.memory_size)?;
    let mapping: MmapRegion<()> = region.mmap_region(file)?;
    GuestRegionMmap::new(mapping, GuestAddress(region.guest_phys_addr)).map(Arc::new).ok_or(Error::InvalidParam)
}

impl Regions {
    /// What the queues read and write.
    #[must_use]
    pub fn shared(&self) -> SharedMemory {
        self.shared.clone()
    }

    /// Replaces all regions.
    ///
    /// # Errors
    /// Regions that overlap, or can't be mapped: then everything is as before.
    pub fn replace(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        if regions.len() != files.len() || regions.len() > REGIONS_MAX {
            return Err(Error::InvalidParam);
        }
        let mut memory = Memory::new();
        for (region, file) in regions.iter().zip(files) {
            memory = memory.insert_region(map(region, file)?).map_err(refused)?;
        }
        self.places = regions.iter().map(Place::of).collect();
        self.publish(memory);
        Ok(())
    }

    /// Adds a region.
    ///
    /// # Errors
    /// It overlaps another, can't be mapped, or is one too many.
    pub fn add(&mut self, region: &VhostUserMemoryRegion, file: File) -> Result<()> {
        if self.places.len() >= REGIONS_MAX {
            return Err(Error::InvalidParam);
        }
        let memory = self.shared.view().insert_region(map(region, file)?).map_err(refused)?;
        self.places.push(Place::of(region));
        self.publish(memory);
        Ok(())
    }

    /// Removes a region.
    ///
    /// # Errors
    /// There is none like it.
    pub fn remove(&mut self, region: &VhostUserMemoryRegion) -> Result<()> {
        let place = Place::of(region);
        let at = self.places.iter().position(|found| *found == place).ok_or(Error::InvalidParam)?;
        let (memory, _) = self.shared.view().remove_region(GuestAddress(place.guest), place.len).map_err(refused)?;
        self.places.swap_remove(at);
        self.publish(memory);
        Ok(())
    }

    /// Where the front-end's own address is in the guest.
    ///
    /// # Errors
    /// It is in no region.
    pub fn translate(&self, user: u64) -> Result<GuestAddress> {
        let inside = |place: &&Place| user.checked_sub(place.user).is_some_and(|offset| offset < place.len);
        let place = self.places.iter().find(inside).ok_or(Error::InvalidParam)?;
        Ok(GuestAddress(place.guest + (user - place.user)))
    }

    fn publish(&self, memory: Memory) {
        *self.shared.0.write() = Arc::new(memory);
    }
}
