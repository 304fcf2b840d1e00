//! ublk: the structures of `include/uapi/linux/ublk_cmd.h`, its control commands, and a ring that serves queues.
//!
//! Commands are the ioctl-encoded ones (since 6.4); the driver is asked for its features (since 6.5).

mod control;
mod ring;

pub use control::{Control, Writes};
pub use ring::{Command, Event, QueueFiles, QueueRing, Request, Waker};

/// The device outlives its server, whose successor takes it over.
pub const F_USER_RECOVERY: u64 = 1 << 3;
/// Requests that the dead server had are given to its successor.
pub const F_USER_RECOVERY_REISSUE: u64 = 1 << 4;
/// The device may be made without privileges.
pub const F_UNPRIVILEGED_DEV: u64 = 1 << 5;
/// Commands are ioctl-encoded.
pub const F_CMD_IOCTL_ENCODE: u64 = 1 << 6;
/// The server reads and writes a request's data through the character device.
pub const F_USER_COPY: u64 = 1 << 7;

/// Not started, or stopped.
pub const S_DEAD: u16 = 0;
/// Served.
pub const S_LIVE: u16 = 1;
/// Its server is gone; requests wait for the next one.
pub const S_QUIESCED: u16 = 2;

/// The device can't be written.
const ATTR_READ_ONLY: u32 = 1;
/// What is written is durable after a flush only.
const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
/// Writes may ask to be durable.
const ATTR_FUA: u32 = 1 << 3;
const PARAM_TYPE_BASIC: u32 = 1;
const PARAM_TYPE_DISCARD: u32 = 1 << 1;

/// Bytes of a sector, the unit of the driver.
pub const SECTOR: u32 = 512;

/// `struct ublksrv_ctrl_dev_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Hardware queues.
    pub queues: u16,
    /// Requests of each queue.
    pub queue_depth: u16,
    /// [`S_DEAD`], [`S_LIVE`], [`S_QUIESCED`], or another one that later kernels have.
    pub state: u16,
    pad0: u16,
    /// Largest request in bytes.
    pub max_io_bytes: u32,
    /// N of `/dev/ublkbN`.
    pub number: u32,
    /// The server's process, or -1.
    pub server: i32,
    pad1: u32,
    /// `F_…`; the driver clears what it does not do.
    pub flags: u64,
    /// The server's own: the driver keeps it and does not look at it.
    pub mark: u64,
    owner_uid: u32,
    owner_gid: u32,
    reserved: [u64; 2],
}

impl DeviceInfo {
    /// What to ask for: a device with any number.
    #[must_use]
    pub fn wanted(queues: u16, queue_depth: u16, max_io_bytes: u32, flags: u64, mark: u64) -> Self {
        Self { queues, queue_depth, max_io_bytes, number: u32::MAX, flags, mark, ..Self::default() }
    }
}

/// `struct ublk_params` with its first two parts only.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Params {
    len: u32,
    types: u32,
    attrs: u32,
    logical_shift: u8,
    physical_shift: u8,
    io_opt_shift: u8,
    io_min_shift: u8,
    max_sectors: u32,
    chunk_sectors: u32,
    sectors: u64,
    virt_boundary_mask: u64,
    discard_alignment: u32,
    discard_granularity: u32,
    max_discard_sectors: u32,
    max_write_zeroes_sectors: u32,
    max_discard_segments: u16,
    reserved: u16,
    /// The first field of the part behind, which is not set.
    behind: u32,
}

/// `struct ublksrv_ctrl_cmd`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct ControlCommand {
    number: u32,
    queue: u16,
    len: u16,
    addr: u64,
    data: u64,
    path_len: u16,
    pad: u16,
    reserved: u32,
}

/// `struct ublksrv_io_desc`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct IoDescriptor {
    op_flags: u32,
    sectors: u32,
    start: u64,
    addr: u64,
}

/// `struct ublksrv_io_cmd`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct IoCommand {
    queue: u16,
    tag: u16,
    result: i32,
    addr: u64,
}

// The sizes that the kernel's structures have.
const _: () = assert!(size_of::<DeviceInfo>() == 64 && size_of::<Params>() == 64 && size_of::<ControlCommand>() == 32);
const _: () = assert!(size_of::<IoDescriptor>() == 24 && size_of::<IoCommand>() == 16);

const READ: u32 = 2 << 30;
const READ_WRITE: u32 = 3 << 30;

/// An ioctl-encoded command number of type 'u'.
const fn command(direction: u32, size: usize, number: u32) -> u32 {
    direction | (size as u32) << 16 | (b'u' as u32) << 8 | number
}
