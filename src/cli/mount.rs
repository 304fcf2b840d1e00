//! `firstread mount` and `umount`: a device on a directory, in the caller's mount namespace.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::Args;
use rustix::mount::UnmountFlags;

use super::Outcome;
use super::attach::{AttachOptions, request};
use super::connect::connect;
use super::options::{Context, absolute};
use crate::daemon::control::{Call, DeviceInfo, InUse, Kind, Lifetime, Problem, State};
use crate::daemon::{attachment::is_stale, mounts};

/// Arguments of `mount`.
#[derive(Debug, Args)]
pub struct Mount {
    /// The image: HOST[:PORT]/REPO[:TAG][@DIGEST] or oci:DIR[:TAG]
    #[arg(value_name = "REF")]
    reference: String,
    /// Where to mount it; must be a directory
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    #[command(flatten)]
    options: AttachOptions,
}

/// Arguments of `umount`.
#[derive(Debug, Args)]
pub struct Umount {
    /// Where the image is mounted
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

impl Mount {
    /// Runs the verb.
    ///
    /// # Errors
    /// A directory that is none, what the daemon says, or what mount(2) says; the device is then detached again.
    pub fn run(&self, context: &Context) -> Outcome {
        let dir = directory(&self.dir)?;
        // Until it is settled the device goes away with this process's connection, however this process ends.
        let (mut client, attached) = request(context, &self.reference, &self.options, Lifetime::Tentative)?;
        mounts::mount(&attached, &dir)?;
        let settle = Call::Settle { target: attached.device.id.clone(), mountpoint: Some(dir.clone()) };
        match client.call::<DeviceInfo>(settle) {
            Ok(device) => {
                let text = |info: &DeviceInfo| format!("{} on {}", info.device.display(), dir.display());
                context.output.answer(&device, text)
            }
            Err(problem) => {
                // The first error is the one to tell.
                let _ = rustix::mount::unmount(&dir, UnmountFlags::DETACH);
                Err(problem)
            }
        }
    }
}

impl Umount {
    /// Runs the verb. Needs no daemon: a device whose server is gone is unmounted as well.
    ///
    /// # Errors
    /// A directory where no image is mounted, or that is in use.
    pub fn run(&self, context: &Context) -> Outcome {
        // A lost device may not answer, so that its directory is not looked into.
        let dir = resolve(&self.dir)?;
        let mut client = connect(context)?;
        let device = match &mut client {
            Some(client) => match client.call::<DeviceInfo>(Call::Find { target: dir.display().to_string() }) {
                Ok(device) => Some(device),
                Err(problem) if problem.kind == Kind::NotFound => None,
                Err(problem) => return Err(problem),
            },
            None => None,
        };
        let mounted = mounts::at(&dir)?;
        match (&device, &mounted) {
            (None, None) => return Err(nothing_there(&dir)),
            (None, Some(mount)) if !is_stale(&mount.source) => return Err(nothing_there(&dir)),
            (Some(device), Some(mount)) if device.device != mount.source => {
                let source = mount.source.display();
                let message = format!("{source} is mounted over {} on {}", device.device.display(), dir.display());
                return Err(Problem::new(Kind::Busy, message).hint("unmount that first"));
            }
            _ => {}
        }
        if mounted.is_some() {
            unmount(&dir)?;
        }
        if let (Some(client), Some(device)) = (&mut client, &device) {
            // Whoever makes a container has a copy of every mount, until it has left the old root.
            match client.call::<DeviceInfo>(Call::Detach { target: device.id.clone(), in_use: InUse::Wait }) {
                // It was lost, and unmounting it was all that kept it.
                Err(problem) if problem.kind == Kind::NotFound && device.state == State::Lost => {}
                done => drop(done?),
            }
        }
        context.output.answer(&device, |_| String::new())
    }
}

fn unmount(dir: &Path) -> Outcome {
    rustix::mount::unmount(dir, UnmountFlags::NOFOLLOW).map_err(|errno| {
        let message = format!("unmounting {}: {}", dir.display(), std::io::Error::from(errno));
        match errno {
            rustix::io::Errno::BUSY => {
                let users = mounts::users(dir);
                let hint = match users.as_slice() {
                    [] => "something in it is open, or is a process's working directory".to_owned(),
                    users => format!("in use by {}", users.join(", ")),
                };
                Problem::new(Kind::Busy, message).hint(hint)
            }
            _ => Problem::new(Kind::Failed, message),
        }
    })
}

fn nothing_there(dir: &Path) -> Problem {
    Problem::new(Kind::NotFound, format!("no image of firstread is mounted on {}", dir.display()))
        .hint("`firstread list` shows what is")
}

/// The directory `path`, without symbolic links.
fn directory(path: &Path) -> Outcome<PathBuf> {
    let failed = |reason: &dyn std::fmt::Display| {
        Problem::new(Kind::Failed, format!("the mount point {}: {reason}", path.display()))
            .hint("create the directory first")
    };
    let dir = std::fs::canonicalize(path).map_err(|error| failed(&error))?;
    if !dir.is_dir() {
        return Err(failed(&"it is not a directory"));
    }
    if dir.as_os_str().as_bytes().len() > 4000 || dir.to_str().is_none() {
        return Err(failed(&"its path is too long or not UTF-8"));
    }
    Ok(dir)
}

/// The path of a mount point that may not answer: symbolic links in its parents are resolved, the last part is kept.
fn resolve(path: &Path) -> Outcome<PathBuf> {
    let path = absolute(path)?;
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => {
            let parent = std::fs::canonicalize(parent).map_err(|error| {
                Problem::new(Kind::NotFound, format!("the directory {}: {error}", parent.display()))
            })?;
            let path = parent.join(name);
            // Reading a link asks its parent directory only.
            Ok(std::fs::read_link(&path).ok().and_then(|_| std::fs::canonicalize(&path).ok()).unwrap_or(path))
        }
        _ => Ok(path),
    }
}
