//! The transport ublk: the kernel hands requests to this process by io_uring. Devices outlive the process: the next one
//! takes them over, and their users wait meanwhile. What this process had of their requests is given to the next one again,
//! which does a write no harm: the dead one can't do it any more.
//!
//! Hits, and writes that need no source, are answered on the queue's thread; misses go to the runtime, and wake the thread when they are there.
//! `kernel-notes/ublk.md` has what this relies on.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::holders::{self, Holder};
use super::read_ahead;
use crate::device::{Access, Device};
use crate::error::{Error, Result};
use crate::sys::ublk::{
    Control, DeviceInfo, F_CMD_IOCTL_ENCODE, F_USER_COPY, F_USER_RECOVERY, F_USER_RECOVERY_REISSUE, QueueFiles, S_DEAD,
    S_QUIESCED, Writes,
};

mod queue;
mod server;

use queue::Served;
pub use server::{Mark, UblkServer};

/// What every device needs of the driver.
const NEEDED: [(u64, &str); 4] = [
    (F_CMD_IOCTL_ENCODE, "ioctl-encoded commands"),
    (F_USER_COPY, "copies by the server"),
    (F_USER_RECOVERY, "recovery"),
    (F_USER_RECOVERY_REISSUE, "recovery with reissue"),
];
const CONTROL: &str = "/dev/ublk-control";
/// Largest request in bytes.
const IO_MAX: u32 = 1 << 20;
/// Most requests in flight of a queue.
pub const QUEUE_DEPTH_MAX: u16 = 1024;
/// Most queues of a device.
pub const QUEUES_MAX: u16 = 16;
/// How long queues have to end after the kernel stopped their device.
const ENDING: Duration = Duration::from_secs(5);
/// How long device nodes have to appear.
const APPEARING: Duration = Duration::from_secs(3);
/// How long a server that dies may take: the kernel waits for the last of its threads.
const DYING: Duration = Duration::from_secs(10);

/// How devices are set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UblkOptions {
    /// Hardware queues of each device; each is served by one thread.
    pub queues: u16,
    /// Requests in flight of each queue.
    pub queue_depth: u16,
}

impl Default for UblkOptions {
    fn default() -> Self {
        Self { queues: 1, queue_depth: 64 }
    }
}

/// What to do about those who use a device that is to be detached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Users {
    /// Leave them the device.
    Respect,
    /// Take it from them: they get errors.
    Fail,
}

/// Why there can be no ublk devices here; `None` when there can.
#[must_use]
pub fn obstacle(server: &UblkServer) -> Option<String> {
    if !Path::new(CONTROL).exists() {
        return Some(
            "the kernel does not offer it (no /dev/ublk-control; `modprobe ublk_drv` if it is a module)".into(),
        );
    }
    // Unprivileged devices are another thing: the driver refuses them recovery and user copy, so that a kill would be an error.
    let privileged =
        rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN));
    if !privileged {
        return Some("it needs CAP_SYS_ADMIN: the kernel lets no other device survive its server".into());
    }
    let features = match server.control(|control| Ok(control.features())) {
        Ok(Ok(features)) => features,
        Ok(Err(error)) => return Some(format!("/dev/ublk-control can't be used (it needs Linux 6.5): {error}")),
        Err(error) => return Some(error.to_string()),
    };
    let missing = NEEDED.iter().find(|(feature, _)| features & feature == 0);
    missing.map(|(_, name)| format!("the kernel's driver has no {name}"))
}

fn needed_flags() -> u64 {
    NEEDED.iter().fold(0, |flags, (flag, _)| flags | flag)
}

/// A device attached as `/dev/ublkbN`. Dropping it leaves the device to the next process.
#[derive(Debug)]
pub struct UblkAttachment {
    path: PathBuf,
    number: u32,
    served: Arc<Served>,
    server: Arc<UblkServer>,
}

/// Attaches `device` with a read-ahead in KiB. Blocks for milliseconds: call it on a blocking thread.
///
/// # Errors
/// What the system says; then nothing is left behind.
pub fn attach(server: &Arc<UblkServer>, device: Arc<dyn Device>, read_ahead_kb: u32) -> Result<UblkAttachment> {
    server.control(|control| attach_by(control, server, device, read_ahead_kb))
}

fn attach_by(
    control: &mut Control,
    server: &Arc<UblkServer>,
    device: Arc<dyn Device>,
    read_ahead_kb: u32,
) -> Result<UblkAttachment> {
    let options = server.options();
    let (queues, depth) = (options.queues.max(1), options.queue_depth.clamp(1, QUEUE_DEPTH_MAX));
    let mut info = DeviceInfo::wanted(queues, depth, IO_MAX, needed_flags(), server.mark().0);
    control.add(&mut info).map_err(|error| Error::io("make a ublk device", error))?;
    let number = info.number;
    let started = |control: &mut Control| -> Result<UblkAttachment> {
        let failed = |what: &str| {
            let action = format!("{what} the ublk device {number}");
            move |error| Error::io(action, error)
        };
        let writes = match device.access() {
            Access::ReadOnly => Writes::Refused,
            Access::ReadWrite => Writes::Accepted,
        };
        control.set_size(&info, device.size(), writes).map_err(failed("set the size of"))?;
        let served = serve(server, &info, device)?;
        control.start(number).map_err(failed("start"))?;
        let path = block_device(number);
        read_ahead::set(&path, read_ahead_kb)?;
        wait_for_node(&path)?;
        Ok(UblkAttachment { path, number, served, server: Arc::clone(server) })
    };
    started(control).inspect_err(|_| {
        if let Err(error) = remove(control, number) {
            tracing::warn!("the ublk device {number} stays behind: {error}");
        }
    })
}

/// Opens the character device and has the server fetch from all queues.
fn serve(server: &UblkServer, info: &DeviceInfo, device: Arc<dyn Device>) -> Result<Arc<Served>> {
    let character = Arc::new(open_character(info.number)?);
    let queues = (0..info.queues)
        .map(|queue| QueueFiles::new(Arc::clone(&character), queue, info.queue_depth))
        .collect::<Vec<_>>();
    drop(character);
    server.serve(info.number, device, queues)
}

/// What became of a device whose server died.
#[derive(Debug)]
pub enum Recovered {
    /// It is served again.
    Attached(UblkAttachment),
    /// It is there no more, or is another one.
    Gone,
}

/// Takes over the device number `number`, which an earlier process with the same mark served: its readers go on. Blocks, for
/// as long as that process takes to die.
///
/// # Errors
/// A device of another size, or what the system says; the device and its readers are then as before.
pub fn recover(server: &Arc<UblkServer>, number: u32, device: Arc<dyn Device>) -> Result<Recovered> {
    let mut control = open_control()?;
    let failed = |what: &str| {
        let action = format!("{what} the ublk device {number}");
        move |error| Error::io(action, error)
    };
    let deadline = Instant::now() + DYING;
    let info = loop {
        let Some(info) = ours(&mut control, number, server.mark())? else { return Ok(Recovered::Gone) };
        let size = control.size(number).map_err(failed("ask for the size of"))?;
        if size != device.size() {
            let reason = format!("/dev/ublkb{number} has {size} bytes, the image {}", device.size());
            return Err(Error::invalid("device to take over", reason));
        }
        if info.flags & needed_flags() != needed_flags() {
            let reason =
                format!("/dev/ublkb{number} was made by another version of firstread; detach it with that one");
            return Err(Error::invalid("device to take over", reason));
        }
        if info.state == S_QUIESCED {
            match control.start_recovery(number) {
                // EINVAL: a server died between this and its first fetch, and all is prepared.
                Ok(()) => break info,
                Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => break info,
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
                Err(error) => return Err(failed("take over")(error)),
            }
        }
        if Instant::now() >= deadline {
            let state = if info.state == S_QUIESCED { "open" } else { "in use" };
            return Err(Error::Busy(format!("/dev/ublkc{number} is still {state} by process {}", info.server)));
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let served = serve(server, &info, device)?;
    control.end_recovery(number).map_err(failed("serve"))?;
    Ok(Recovered::Attached(UblkAttachment { path: block_device(number), number, served, server: Arc::clone(server) }))
}

/// The numbers of all devices with this mark; none where the kernel has no ublk.
///
/// # Errors
/// What the system says.
pub fn all_of(mark: Mark) -> Result<Vec<u32>> {
    if !Path::new(CONTROL).exists() {
        return Ok(Vec::new());
    }
    let mut control = open_control()?;
    let entries = fs::read_dir("/dev").map_err(|error| Error::io("read /dev", error))?;
    let names = entries.flatten().map(|entry| entry.file_name());
    let numbers = names.filter_map(|name| name.to_str()?.strip_prefix("ublkc")?.parse().ok());
    let mut found = Vec::new();
    for number in numbers {
        if marked(&mut control, number, mark)?.is_some() {
            found.push(number);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Removes a device with this mark whose server is gone, whoever uses it. One that is not there is removed.
///
/// # Errors
/// What the system says.
pub fn remove_abandoned(number: u32, mark: Mark) -> Result<()> {
    let mut control = open_control()?;
    match marked(&mut control, number, mark)? {
        Some(_) => remove_later(&mut control, number),
        None => Ok(()),
    }
}

/// Who uses a device whose server is gone.
#[must_use]
pub fn users_of(number: u32) -> Vec<Holder> {
    holders::find(&block_device(number))
}

/// The number N of `/dev/ublkbN`.
#[must_use]
pub fn number_of(path: &Path) -> Option<u32> {
    path.to_str()?.strip_prefix("/dev/ublkb")?.parse().ok()
}

fn marked(control: &mut Control, number: u32, mark: Mark) -> Result<Option<DeviceInfo>> {
    match control.info(number) {
        Ok(info) => Ok((info.mark == mark.0).then_some(info)),
        Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => Ok(None),
        Err(error) => Err(Error::io(format!("ask for the ublk device {number}"), error)),
    }
}

/// Like [`marked`], without those that were never started or were stopped: nobody can have them open.
fn ours(control: &mut Control, number: u32, mark: Mark) -> Result<Option<DeviceInfo>> {
    Ok(marked(control, number, mark)?.filter(|info| info.state != S_DEAD))
}

impl UblkAttachment {
    /// `/dev/ublkbN`.
    #[must_use]
    pub fn device_path(&self) -> &Path {
        &self.path
    }

    /// Who uses the device.
    #[must_use]
    pub fn holders(&self) -> Vec<Holder> {
        holders::find(&self.path)
    }

    /// Takes the device from the kernel. Blocks for up to some seconds. After success only dropping is left; after an
    /// [`Error::Busy`] the device is as before.
    ///
    /// # Errors
    /// [`Error::Busy`] that names who uses the device, unless they don't matter; or what the system says.
    pub fn detach(&mut self, users: Users) -> Result<()> {
        if users == Users::Respect {
            holders::wait_until_unused(&self.path)?;
        }
        // Nothing may keep the kernel waiting for an answer, or it never stops the device.
        self.server.fail(&self.served);
        self.server.control(|control| {
            control.stop(self.number).map_err(|error| Error::io(format!("stop {}", self.path.display()), error))?;
            if !self.served.wait_until_ended(ENDING) {
                return Err(Error::Busy(format!("the queues of {} do not end", self.path.display())));
            }
            match users {
                Users::Respect => remove(control, self.number),
                Users::Fail => remove_later(control, self.number),
            }
        })
    }
}

/// Stops a device at once, and deletes it when its last user leaves it.
fn remove_later(control: &mut Control, number: u32) -> Result<()> {
    let failed = |error| Error::io(format!("remove the ublk device {number}"), error);
    control.stop(number).map_err(failed)?;
    match control.delete_later(number) {
        Err(error)
            if matches!(error.raw_os_error().map(Errno::from_raw_os_error), Some(Errno::INVAL | Errno::OPNOTSUPP)) =>
        {
            let delete = move || {
                if let Err(error) = open_control().and_then(|mut control| remove(&mut control, number)) {
                    tracing::warn!("{error}");
                }
            };
            // It ends with the users, or with the process: then the next one finds the device.
            std::thread::Builder::new().name(format!("ublk-del-{number}")).spawn(delete).map_err(failed)?;
            Ok(())
        }
        Err(error) if error.raw_os_error() != Some(Errno::NODEV.raw_os_error()) => Err(failed(error)),
        _ => Ok(()),
    }
}

/// Stops and deletes a device that is not served by this process.
fn remove(control: &mut Control, number: u32) -> Result<()> {
    let gone = |error: &io::Error| error.raw_os_error() == Some(Errno::NODEV.raw_os_error());
    let removed = control.stop(number).and_then(|()| control.delete(number));
    match removed {
        Err(error) if !gone(&error) => Err(Error::io(format!("remove the ublk device {number}"), error)),
        _ => Ok(()),
    }
}

fn open_control() -> Result<Control> {
    Control::open().map_err(|error| Error::io("open /dev/ublk-control", error))
}

/// udev may not have made the node yet, and an earlier server may be about to close it.
fn open_character(number: u32) -> Result<File> {
    let path = format!("/dev/ublkc{number}");
    let deadline = Instant::now() + APPEARING;
    // O_NONBLOCK makes io_uring write to it at once, not on a thread of its own; the driver does not look at it.
    let nonblock = OFlags::NONBLOCK.bits().cast_signed();
    loop {
        match File::options().read(true).write(true).custom_flags(nonblock).open(&path) {
            Ok(file) => return Ok(file),
            Err(error) if Instant::now() >= deadline => return Err(Error::io(format!("open {path}"), error)),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn block_device(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{number}"))
}

fn wait_for_node(path: &Path) -> Result<()> {
    let deadline = Instant::now() + APPEARING;
    while !path.exists() {
        if Instant::now() >= deadline {
            return Err(Error::io(format!("wait for {}", path.display()), io::ErrorKind::NotFound.into()));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// A lock that several threads of this module share.
type Shared<T> = Mutex<T>;
