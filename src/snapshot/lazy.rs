//! Devices of images below snapshots: attached by the daemon, mounted here.
//!
//! Nothing is remembered in memory: whether a device is there is asked of the daemon and of the kernel each time, so that
//! either may have been restarted meanwhile. What belongs to which snapshot is told by paths: a device that is mounted
//! on, or writes to, a directory below `snapshots/N` is snapshot N's.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::failure::Failure;
use super::record::Found;
use crate::daemon::client::Client;
use crate::daemon::control::{
    Attach, Attached, Call, DeviceInfo, Expect, Expected, InUse, Kind, Lifetime, OrdinaryLayers, Problem, SourceAccess,
    State,
};
use crate::daemon::images::index_cache;
use crate::daemon::mounts;
use crate::daemon::uppers::{Journal, Place, Writable};
use crate::fetch::{Parts, keep_image};
use crate::source::BlobPlace;

/// How the daemon is reached.
#[derive(Clone)]
pub struct Daemon {
    /// Its run directory.
    pub run: PathBuf,
    /// Connects, and starts it when none runs.
    pub start: Arc<dyn Fn() -> Result<Client, Problem> + Send + Sync>,
}

/// The devices of one snapshotter.
pub struct Devices {
    daemon: Daemon,
    access: SourceAccess,
    transport: String,
    snapshots: PathBuf,
    /// One at a time works on a snapshot's device; the others find it done.
    turns: Mutex<HashMap<PathBuf, Arc<Mutex<()>>>>,
}

impl Devices {
    /// The devices of snapshots in the directory `snapshots`, whose sources are reached by `access`.
    #[must_use]
    pub fn new(daemon: Daemon, access: SourceAccess, transport: String, snapshots: PathBuf) -> Self {
        Self { daemon, access, transport, snapshots, turns: Mutex::default() }
    }

    /// Puts what containerd has of an image where the daemon looks before it asks a registry. Blocks.
    ///
    /// # Errors
    /// Parts that do not belong together, or what the system says.
    pub fn keep(&self, parts: &Parts<'_>) -> Result<(), Failure> {
        let root = (self.daemon.start)()?.hello().root.clone();
        Ok(keep_image(&index_cache(&root), parts)?)
    }

    /// Starts the daemon when none runs, so that nobody waits for that later. Blocks.
    pub fn wake(&self) {
        if let Err(problem) = (self.daemon.start)() {
            tracing::debug!("starting the daemon ahead: {problem}");
        }
    }

    /// Has what a start of the image reads fetched, of which nothing is waited for. Blocks.
    ///
    /// # Errors
    /// What the daemon says.
    pub fn expect(&self, found: &Found) -> Result<(), Failure> {
        let mut client = (self.daemon.start)()?;
        let request = Expect { reference: found.reference.clone(), access: self.access_to(found) };
        let Expected { digest } = client.call(Call::Expect(request))?;
        tracing::debug!("a start of {digest} is expected");
        Ok(())
    }

    /// Where the image's device is mounted, read-only, for the index in `dir`; it is attached and mounted when it is not.
    /// Blocks.
    ///
    /// # Errors
    /// What the daemon or mount(2) says.
    pub fn lower(&self, dir: &Path, found: &Found) -> Result<PathBuf, Failure> {
        let point = dir.join("mnt");
        let turn = self.turn(dir);
        let _turn = turn.lock();
        let mounted = mounts::at(&point)?;
        let mut client = match ((self.daemon.start)(), &mounted) {
            (Ok(client), _) => client,
            (Err(problem), Some(mount)) => {
                // It may be on its way back; its devices are served again then, or fail as they do without us.
                tracing::warn!("{} is used without asking the daemon: {problem}", mount.source.display());
                return Ok(point);
            }
            (Err(problem), None) => return Err(problem.into()),
        };
        let known = of_dir(&mut client, dir)?;
        let serves = |device: &&DeviceInfo| {
            device.state != State::Lost && mounted.as_ref().is_some_and(|mount| mount.source == device.device)
        };
        if known.iter().any(|device| serves(&device)) {
            return Ok(point);
        }
        // A device whose server died: what is open on it stays as it is, what comes from now on gets another one.
        if mounted.is_some() {
            unmount(&point)?;
        }
        for device in known {
            tracing::warn!("{}: {} is replaced", device.id, device.device.display());
            detach(&mut client, &device);
        }
        std::fs::create_dir_all(&point)
            .map_err(|error| Failure::Failed(format!("creating {}: {error}", point.display())))?;
        let attached = self.attach(&mut client, found, None)?;
        mounts::mount(&attached, &point)?;
        let settle = Call::Settle { target: attached.device.id, mountpoint: Some(point.clone()) };
        match client.call::<DeviceInfo>(settle) {
            Ok(_) => Ok(point),
            Err(problem) => {
                unmount(&point)?;
                Err(problem.into())
            }
        }
    }

    /// The block device of the container whose snapshot is in `dir`: the image's, with what the container writes kept
    /// in that directory, and of `size` bytes when that is more. Blocks.
    ///
    /// # Errors
    /// What the daemon says.
    pub fn block(&self, dir: &Path, found: &Found, size: Option<u64>) -> Result<PathBuf, Failure> {
        let turn = self.turn(dir);
        let _turn = turn.lock();
        let mut client = (self.daemon.start)()?;
        for device in of_dir(&mut client, dir)? {
            if device.state != State::Lost {
                return Ok(device.device);
            }
            detach(&mut client, &device);
        }
        let place = Place::Kept(dir.join("upper"));
        let writable = Writable { place, size, journal: Journal::Auto };
        let attached = self.attach(&mut client, found, Some(writable))?;
        if attached.file_system != "ext4" {
            let message = format!("{}: its file system is {:?}, not ext4", found.reference, attached.file_system);
            return Err(Failure::Precondition(message));
        }
        let settle = Call::Settle { target: attached.device.id, mountpoint: None };
        Ok(client.call::<DeviceInfo>(settle)?.device)
    }

    /// Gives up what the snapshot in `dir` holds. A device that somebody still uses stays until
    /// [`reap`](Self::reap) finds it free. Blocks.
    ///
    /// # Errors
    /// A mount that can't be undone.
    pub fn release(&self, dir: &Path) -> Result<(), Failure> {
        let turn = self.turn(dir);
        let held = turn.lock();
        let point = dir.join("mnt");
        if mounts::at(&point)?.is_some() {
            unmount(&point)?;
        }
        // Without a daemon there is nothing to detach; it looks for what it left behind when it starts.
        if let Some(mut client) = Client::connect(&self.daemon.run)? {
            for device in of_dir(&mut client, dir)? {
                detach(&mut client, &device);
            }
        }
        drop(held);
        self.turns.lock().remove(dir);
        Ok(())
    }

    /// Unmounts and detaches what belongs to snapshots whose number `is_known` does not know: that are not there any more,
    /// or damaged. Says how many devices are still in use. Blocks.
    ///
    /// # Errors
    /// A table of mounts that can't be read, or what the daemon says.
    pub fn reap(&self, is_known: impl Fn(u64) -> bool) -> Result<usize, Failure> {
        let state = self.snapshots.parent().unwrap_or(&self.snapshots);
        let orphaned = |path: &Path| match path.strip_prefix(&self.snapshots) {
            // Asked after the mount or device was seen: a snapshot is known before it has either.
            Ok(inside) => inside.iter().next().and_then(|id| id.to_str()?.parse().ok()).is_some_and(|id| !is_known(id)),
            // A mount moves along with the directory of a snapshot that is on its way out.
            Err(_) => path.starts_with(state),
        };
        for mount in mounts::all()?.iter().rev().filter(|mount| orphaned(&mount.dir)) {
            unmount(&mount.dir)?;
        }
        let Some(mut client) = Client::connect(&self.daemon.run)? else { return Ok(0) };
        let devices: Vec<DeviceInfo> = client.call(Call::List)?;
        let is_ours = |device: &&DeviceInfo| {
            device.mountpoint.as_deref().is_some_and(orphaned)
                || device.upper.as_ref().is_some_and(|upper| orphaned(&upper.dir))
        };
        Ok(devices.iter().filter(is_ours).filter(|device| !detach(&mut client, device)).count())
    }

    fn attach(&self, client: &mut Client, found: &Found, writable: Option<Writable>) -> Result<Attached, Failure> {
        let attach = Attach {
            reference: found.reference.clone(),
            access: self.access_to(found),
            on_outage: None,
            transport: self.transport.clone(),
            read_ahead_kb: None,
            writable,
            lifetime: Lifetime::Tentative,
            // Those are snapshots of their own, which containerd puts on top.
            ordinary: OrdinaryLayers::LeaveOut,
        };
        Ok(client.call(Call::Attach(attach))?)
    }

    fn access_to(&self, found: &Found) -> SourceAccess {
        let mut access = self.access.clone();
        if let Some(dir) = &found.blobs {
            // What is on this machine is asked first.
            access.blobs.insert(0, BlobPlace::local(dir));
        }
        access
    }

    fn turn(&self, dir: &Path) -> Arc<Mutex<()>> {
        Arc::clone(self.turns.lock().entry(dir.to_owned()).or_default())
    }
}

/// The devices that are mounted on, or write to, what is in a snapshot's directory: one, and those before it that lost
/// their server and are still in use.
fn of_dir(client: &mut Client, dir: &Path) -> Result<Vec<DeviceInfo>, Failure> {
    let mut devices: Vec<DeviceInfo> = client.call(Call::List)?;
    devices.retain(|device| {
        let upper = device.upper.as_ref().map(|upper| upper.dir.as_path());
        device.mountpoint.as_deref().into_iter().chain(upper).any(|path| path.starts_with(dir))
    });
    Ok(devices)
}

/// Says whether the device is gone.
fn detach(client: &mut Client, device: &DeviceInfo) -> bool {
    match client.call::<DeviceInfo>(Call::Detach { target: device.id.clone(), in_use: InUse::Refuse }) {
        Ok(_) => true,
        Err(problem) if problem.kind == Kind::NotFound => true,
        Err(problem) => {
            tracing::info!("{problem}; tried again later");
            false
        }
    }
}

/// Overlays keep what they were made of, so that a mount below one that runs can be undone. One that is gone is none.
fn unmount(point: &Path) -> Result<(), Failure> {
    let undo = |flags| match rustix::mount::unmount(point, UnmountFlags::NOFOLLOW | flags) {
        Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        other => other,
    };
    undo(UnmountFlags::empty())
        .or_else(|_| undo(UnmountFlags::DETACH))
        .map_err(|errno| Failure::Failed(format!("unmounting {}: {}", point.display(), std::io::Error::from(errno))))
}
