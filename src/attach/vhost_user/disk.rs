//! What a guest is told of its disk: features, configuration space, serial number.

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::device::{Access, Device};

/// Bytes of a sector: the unit of virtio-blk's positions.
pub const SECTOR: u64 = 512;

/// Queues that a guest may use; each costs a thread while it is used.
pub const QUEUES: u16 = 16;

/// Largest queue in entries.
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// Data segments of one request that guests are told to keep to: with header and status it fills the queues of 128 that
/// most VMMs make.
pub const SEGMENTS: u32 = 126;

/// Bytes of the configuration space; those behind the fields are zero.
const CONFIG_BYTES: usize = 256;

/// Largest range in sectors that one request discards or zeroes: 1 GiB.
pub const DISCARD_SECTORS: u32 = 1 << 21;

/// Log2 of physical blocks in logical ones of 512 bytes: images are made of blocks of 4096.
const PHYSICAL_BLOCK_EXP: u8 = 3;

/// A device as guests see it.
#[derive(Clone)]
pub struct Disk {
    /// What is read, and written if it can be.
    pub device: Arc<dyn Device>,
    /// Serial number: the first 20 bytes are shown.
    pub serial: String,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("serial", &self.serial).field("size", &self.device.size()).finish_non_exhaustive()
    }
}

impl Disk {
    /// Virtio features on offer.
    #[must_use]
    pub fn features(&self) -> u64 {
        let always = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ];
        let access = match self.device.access() {
            Access::ReadOnly => 1 << VIRTIO_BLK_F_RO,
            Access::ReadWrite => 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
        };
        always.into_iter().fold(access, |bits, bit| bits | 1 << bit)
    }

    /// `size` bytes of `struct virtio_blk_config` from `offset` (virtio 1.2, 5.2.4); `None` beyond its end.
    #[must_use]
    pub fn config(&self, offset: u32, size: u32) -> Option<Vec<u8>> {
        let mut config = [0; CONFIG_BYTES];
        config[..8].copy_from_slice(&(self.device.size() / SECTOR).to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENTS.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        config[24] = PHYSICAL_BLOCK_EXP;
        // The cache can't be turned off (`wce`, byte 32): what is written is durable after a flush.
        config[34..36].copy_from_slice(&QUEUES.to_le_bytes());
        if self.device.access() == Access::ReadWrite {
            // Of one range in a request; a guest may keep the room of what it zeroes, or not (`write_zeroes_may_unmap`).
            let [range, one] = [DISCARD_SECTORS.to_le_bytes(), 1_u32.to_le_bytes()];
            let fields =
                [(36, range), (40, one), (44, (1_u32 << PHYSICAL_BLOCK_EXP).to_le_bytes()), (48, range), (52, one)];
            for (at, field) in fields {
                config[at..at + 4].copy_from_slice(&field);
            }
            config[56] = 1;
        }
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(size).ok()?)?;
        config.get(start..end).map(<[u8]>::to_vec)
    }

    /// The answer to `VIRTIO_BLK_T_GET_ID`: text, filled up with zeros.
    #[must_use]
    pub fn id(&self) -> [u8; VIRTIO_BLK_ID_BYTES as usize] {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (place, byte) in id.iter_mut().zip(self.serial.bytes()) {
            *place = byte;
        }
        id
    }
}
