//! Commands to `/dev/ublk-control`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::{
    ATTR_FUA, ATTR_READ_ONLY, ATTR_VOLATILE_CACHE, ControlCommand, DeviceInfo, PARAM_TYPE_BASIC, PARAM_TYPE_DISCARD,
    Params, READ, READ_WRITE, SECTOR, command,
};

const fn control(direction: u32, number: u32) -> u32 {
    command(direction, size_of::<ControlCommand>(), number)
}

const ADD_DEV: u32 = control(READ_WRITE, 0x04);
const DEL_DEV: u32 = control(READ_WRITE, 0x05);
const START_DEV: u32 = control(READ_WRITE, 0x06);
const STOP_DEV: u32 = control(READ_WRITE, 0x07);
const SET_PARAMS: u32 = control(READ_WRITE, 0x08);
const GET_PARAMS: u32 = control(READ, 0x09);
const START_USER_RECOVERY: u32 = control(READ_WRITE, 0x10);
const END_USER_RECOVERY: u32 = control(READ_WRITE, 0x11);
const GET_DEV_INFO: u32 = control(READ, 0x02);
const GET_FEATURES: u32 = control(READ, 0x13);
const DEL_DEV_ASYNC: u32 = control(READ, 0x14);

/// Logical blocks of 512 bytes suit every image, partition tables included; ext4 reads whole blocks of 4 KiB anyway.
const LOGICAL_SHIFT: u8 = 9;
const PHYSICAL_SHIFT: u8 = 12;

/// Largest range in sectors that one request discards or zeroes: 1 GiB.
const DISCARD_SECTORS: u32 = 1 << 21;

/// Whether a device can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writes {
    /// It can't.
    Refused,
    /// It can; what was written is durable after a flush.
    Accepted,
}

/// The control device, opened. Each command waits for its answer.
pub struct Control {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    file: File,
    /// The driver's, once they were asked for: it stays the same while this file is open.
    features: Option<u64>,
}

impl Control {
    /// Opens `/dev/ublk-control`.
    ///
    /// # Errors
    /// What the system says.
    pub fn open() -> io::Result<Self> {
        let file = File::options().read(true).write(true).open("/dev/ublk-control")?;
        Ok(Self { ring: IoUring::builder().build(2)?, file, features: None })
    }

    /// The features that the driver has, `F_…`.
    ///
    /// # Errors
    /// What the system says; EOPNOTSUPP before 6.5.
    pub fn features(&mut self) -> io::Result<u64> {
        if let Some(features) = self.features {
            return Ok(features);
        }
        let mut features = 0u64;
        self.with(GET_FEATURES, u32::MAX, &mut features)?;
        self.features = Some(features);
        Ok(features)
    }

    /// Makes a device. `info.number` is the wanted one, or `u32::MAX` for any; afterwards `info` is what the driver made
    /// of it.
    ///
    /// # Errors
    /// What the system says.
    pub fn add(&mut self, info: &mut DeviceInfo) -> io::Result<()> {
        self.with(ADD_DEV, info.number, info)
    }

    /// What the driver knows of a device.
    ///
    /// # Errors
    /// ENODEV when there is none, or what the system says.
    pub fn info(&mut self, number: u32) -> io::Result<DeviceInfo> {
        let mut info = DeviceInfo::default();
        self.with(GET_DEV_INFO, number, &mut info)?;
        Ok(info)
    }

    /// Gives a device its size in bytes, and says whether it can be written.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_size(&mut self, info: &DeviceInfo, size: u64, writes: Writes) -> io::Result<()> {
        let basic = Params {
            len: size_of::<Params>() as u32,
            types: PARAM_TYPE_BASIC,
            attrs: ATTR_READ_ONLY,
            logical_shift: LOGICAL_SHIFT,
            physical_shift: PHYSICAL_SHIFT,
            io_opt_shift: PHYSICAL_SHIFT,
            io_min_shift: PHYSICAL_SHIFT,
            max_sectors: info.max_io_bytes / SECTOR,
            sectors: size / u64::from(SECTOR),
            ..Params::default()
        };
        let mut params = match writes {
            Writes::Refused => basic,
            Writes::Accepted => Params {
                types: PARAM_TYPE_BASIC | PARAM_TYPE_DISCARD,
                attrs: ATTR_VOLATILE_CACHE | ATTR_FUA,
                discard_granularity: 1 << PHYSICAL_SHIFT,
                max_discard_sectors: DISCARD_SECTORS,
                max_write_zeroes_sectors: DISCARD_SECTORS,
                max_discard_segments: 1,
                ..basic
            },
        };
        self.with(SET_PARAMS, info.number, &mut params)
    }

    /// The size of a device in bytes.
    ///
    /// # Errors
    /// What the system says.
    pub fn size(&mut self, number: u32) -> io::Result<u64> {
        let mut params = Params { len: size_of::<Params>() as u32, ..Params::default() };
        self.with(GET_PARAMS, number, &mut params)?;
        Ok(params.sectors.saturating_mul(u64::from(SECTOR)))
    }

    /// Makes `/dev/ublkbN` appear. Waits until every queue was fetched from.
    ///
    /// # Errors
    /// What the system says.
    pub fn start(&mut self, number: u32) -> io::Result<()> {
        self.plain(START_DEV, number, u64::from(std::process::id()))
    }

    /// Makes `/dev/ublkbN` vanish: requests that wait for the server fail. Waits for those that the server has.
    ///
    /// # Errors
    /// What the system says.
    pub fn stop(&mut self, number: u32) -> io::Result<()> {
        self.plain(STOP_DEV, number, 0)
    }

    /// Removes a device as soon as its last user leaves, without waiting for that (since 6.9).
    ///
    /// # Errors
    /// EINVAL or EOPNOTSUPP before 6.9, ENODEV when there is none, or what the system says.
    pub fn delete_later(&mut self, number: u32) -> io::Result<()> {
        self.plain(DEL_DEV_ASYNC, number, 0)
    }

    /// Removes a device. Waits until nobody has `/dev/ublkcN` or `/dev/ublkbN` open.
    ///
    /// # Errors
    /// ENODEV when there is none, or what the system says.
    pub fn delete(&mut self, number: u32) -> io::Result<()> {
        self.plain(DEL_DEV, number, 0)
    }

    /// Begins to take a device over.
    ///
    /// # Errors
    /// EBUSY while its old server is not gone for good; EINVAL when somebody began before and did not get to fetch, or
    /// when it can't be taken over at all.
    pub fn start_recovery(&mut self, number: u32) -> io::Result<()> {
        self.plain(START_USER_RECOVERY, number, 0)
    }

    /// Ends it: requests flow again. Waits until every queue was fetched from.
    ///
    /// # Errors
    /// What the system says.
    pub fn end_recovery(&mut self, number: u32) -> io::Result<()> {
        self.plain(END_USER_RECOVERY, number, u64::from(std::process::id()))
    }

    fn plain(&mut self, op: u32, number: u32, data: u64) -> io::Result<()> {
        // SAFETY: no address is passed.
        unsafe { self.run(op, ControlCommand { number, queue: u16::MAX, data, ..ControlCommand::default() }) }
    }

    /// A command with an argument that the driver reads or fills.
    fn with<T: Argument>(&mut self, op: u32, number: u32, argument: &mut T) -> io::Result<()> {
        let addr = std::ptr::from_mut(argument) as u64;
        let command =
            ControlCommand { number, queue: u16::MAX, len: size_of::<T>() as u16, addr, ..ControlCommand::default() };
        // SAFETY: the argument is borrowed until `run` returns, the command is over by then, and its length is passed.
        // Every bit pattern that the driver may write is a valid argument.
        unsafe { self.run(op, command) }
    }

    /// # Safety
    /// The memory that the command names must be valid until this returns.
    unsafe fn run(&mut self, op: u32, command: ControlCommand) -> io::Result<()> {
        let mut bytes = [0u8; 80];
        // SAFETY: the structure has no padding and is smaller than the array.
        let raw: [u8; size_of::<ControlCommand>()] = unsafe { std::mem::transmute(command) };
        bytes[..raw.len()].copy_from_slice(&raw);
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), op).cmd(bytes).build();
        // SAFETY: the caller's promise; the command itself is copied into the entry.
        unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)?;
        // Until its answer is here the command may use the memory, whatever interrupts the wait.
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nothing was submitted.
                Err(error) if !self.ring.submission().is_empty() => return Err(error),
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
            }
            if let Some(answer) = self.ring.completion().next() {
                let result = answer.result();
                return if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) };
            }
        }
    }
}

/// What the driver may write to: any bit pattern is valid.
trait Argument {}
impl Argument for u64 {}
impl Argument for DeviceInfo {}
impl Argument for Params {}
