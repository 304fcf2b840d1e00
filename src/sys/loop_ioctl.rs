//! The ioctls of `/dev/loop-control` and `/dev/loopN`: numbers and structures of `include/uapi/linux/loop.h`.

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::ioctl::{Getter, Ioctl, IoctlOutput, Opcode, Setter, ioctl};

const LOOP_GET_STATUS64: Opcode = 0x4C05;
const LOOP_CONFIGURE: Opcode = 0x4C0A;
const LOOP_CTL_GET_FREE: Opcode = 0x4C82;

const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// Bytes of a loop device's name, with the closing zero.
pub const NAME_SIZE: usize = 64;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; NAME_SIZE],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl LoopInfo64 {
    const EMPTY: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; NAME_SIZE],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// How a loop device reads its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoopIo {
    /// Past the file's page cache; requests are asynchronous, so that many are in flight.
    Direct,
    /// Through the file's page cache; one request at a time.
    Buffered,
}

/// Whether a loop device can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoopWrites {
    /// It can't.
    Refused,
    /// It can, if its file and itself are open for writing.
    Accepted,
}

/// What a bound loop device says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoopStatus {
    /// The name given to [`configure`].
    pub name: String,
    /// What the kernel made of the wish; direct I/O is refused silently by files that can't do it.
    pub io: LoopIo,
}

/// `LOOP_CTL_GET_FREE`: the answer is the return value.
struct GetFree;

// SAFETY: the ioctl takes no argument and writes no memory; its number identifies it on the control device.
unsafe impl Ioctl for GetFree {
    type Output = c_int;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        LOOP_CTL_GET_FREE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<Self::Output> {
        Ok(output)
    }
}

/// The number of a loop device that nobody uses right now, made when there is none. Others may take it at any time.
///
/// # Errors
/// What the system says.
pub fn get_free(control: &File) -> io::Result<u32> {
    // SAFETY: see the implementation of GetFree.
    let number = unsafe { ioctl(control, GetFree) }?;
    u32::try_from(number).map_err(io::Error::other)
}

/// Binds `device` to `backing`, to be released when its last user closes it (`LOOP_CONFIGURE`, since 5.8).
/// `name` is cut to what fits.
///
/// # Errors
/// EBUSY when somebody else was faster, or what the system says.
pub fn configure(
    device: &File,
    backing: BorrowedFd<'_>,
    name: &str,
    block_size: u32,
    mode: LoopIo,
    writes: LoopWrites,
) -> io::Result<()> {
    let mut info = LoopInfo64::EMPTY;
    info.flags = LO_FLAGS_AUTOCLEAR;
    if writes == LoopWrites::Refused {
        info.flags |= LO_FLAGS_READ_ONLY;
    }
    if mode == LoopIo::Direct {
        info.flags |= LO_FLAGS_DIRECT_IO;
    }
    for (to, from) in info.file_name[..NAME_SIZE - 1].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let fd = u32::try_from(backing.as_raw_fd()).map_err(io::Error::other)?;
    let config = LoopConfig { fd, block_size, info, reserved: [0; 8] };
    // SAFETY: LOOP_CONFIGURE reads one struct loop_config, whose layout LoopConfig has; the descriptor in it is open
    // for the time of the call, since it is borrowed, and the kernel takes a reference of its own.
    unsafe { ioctl(device, Setter::<LOOP_CONFIGURE, LoopConfig>::new(config)) }?;
    Ok(())
}

/// What `device` is bound to (`LOOP_GET_STATUS64`).
///
/// # Errors
/// ENXIO when it is bound to nothing, or what the system says.
pub fn status(device: impl AsFd) -> io::Result<LoopStatus> {
    // SAFETY: LOOP_GET_STATUS64 fills one struct loop_info64, whose layout LoopInfo64 has; every bit pattern is valid.
    let info = unsafe { ioctl(device, Getter::<LOOP_GET_STATUS64, LoopInfo64>::new()) }?;
    let name = info.file_name.split(|byte| *byte == 0).next().unwrap_or_default();
    let io = if info.flags & LO_FLAGS_DIRECT_IO == 0 { LoopIo::Buffered } else { LoopIo::Direct };
    Ok(LoopStatus { name: String::from_utf8_lossy(name).into_owned(), io })
}

// The sizes that the kernel's structures have on 64-bit machines.
const _: () = assert!(size_of::<LoopInfo64>() == 232 && size_of::<LoopConfig>() == 304);
