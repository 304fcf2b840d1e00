//! One attached device, whatever its transport, and the choice of a transport.

use std::path::Path;
use std::sync::Arc;

use tokio::runtime::Handle;

use super::control::DeviceInfo;
use crate::attach::holders::describe;
use crate::attach::loop_device::{self, LoopAttachment, LoopOptions, Stale};
use crate::device::Device;
use crate::error::{Error, Result};

/// How a kernel sees a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A FUSE file under a loop device.
    Loop,
}

impl Transport {
    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Loop => "loop",
        }
    }
}

/// A device that a kernel sees.
#[derive(Debug)]
pub enum Attachment {
    /// Through [`Transport::Loop`].
    Loop(LoopAttachment),
}

impl Attachment {
    /// Attaches `device` with a read-ahead; its misses run on `runtime`. Blocks.
    ///
    /// # Errors
    /// What the transport says.
    pub fn attach(transport: Transport, device: Arc<dyn Device>, read_ahead_kb: u32, runtime: Handle) -> Result<Self> {
        match transport {
            Transport::Loop => {
                let options = LoopOptions { read_ahead_kb, ..LoopOptions::default() };
                loop_device::attach(device, options, runtime).map(Self::Loop)
            }
        }
    }

    /// The path of the block device.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Loop(attachment) => attachment.device_path(),
        }
    }

    /// Takes the device from the kernel. Blocks, for seconds when somebody looks at the device just now. After success
    /// only dropping is left; after an error everything is as before.
    ///
    /// # Errors
    /// [`Error::Busy`] that names who uses it.
    pub fn detach(&mut self) -> Result<()> {
        match self {
            Self::Loop(attachment) => attachment.detach(),
        }
    }
}

/// Whether the block device at `path` is one of firstread's whose server died.
#[must_use]
pub fn is_stale(path: &Path) -> bool {
    loop_device::stale().iter().any(|stale| stale.path == path)
}

/// Whether somebody holds a device whose server died. A lost device is free by itself when they leave.
#[must_use]
pub fn is_held(lost: &DeviceInfo) -> bool {
    holders_of(lost).is_some()
}

/// Makes sure that nobody holds a device whose server died.
///
/// # Errors
/// [`Error::Busy`] that names who does.
pub fn release_lost(lost: &DeviceInfo) -> Result<()> {
    match holders_of(lost) {
        None => Ok(()),
        Some(stale) => Err(Error::Busy(format!(
            "{} lost its server and is still in use: {}",
            lost.device.display(),
            describe(&stale.holders)
        ))),
    }
}

fn holders_of(lost: &DeviceInfo) -> Option<Stale> {
    loop_device::stale().into_iter().find(|stale| stale.path == lost.device)
}

/// A transport, and why the better ones were not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// What to use.
    pub transport: Transport,
    /// A reason for each transport before it.
    pub passed_over: Vec<String>,
}

/// Finds the transport for `wanted`: `auto` or a name.
///
/// # Errors
/// [`Error::Unsupported`] when the one that was asked for, or every one, is not possible; [`Error::Invalid`] for a name
/// that is none.
pub fn choose(wanted: &str) -> Result<Choice> {
    choose_on(wanted, Path::new("/dev"))
}

fn choose_on(wanted: &str, dev: &Path) -> Result<Choice> {
    let mut passed_over = Vec::new();
    for (name, obstacle) in [("ublk", ublk(dev)), ("nbd", nbd(dev)), ("loop", loop_device(dev))] {
        if wanted != "auto" && wanted != name {
            continue;
        }
        match obstacle {
            None => return Ok(Choice { transport: Transport::Loop, passed_over }),
            Some(reason) => passed_over.push(format!("{name}: {reason}")),
        }
    }
    match wanted {
        "auto" => Err(Error::Unsupported(format!("no transport is possible here ({})", passed_over.join("; ")))),
        _ => match passed_over.pop() {
            Some(reason) => Err(Error::Unsupported(format!("transport {reason}"))),
            None => Err(Error::invalid("transport", format!("{wanted:?} is none of auto, ublk, nbd, loop"))),
        },
    }
}

fn ublk(dev: &Path) -> Option<String> {
    Some(match dev.join("ublk-control").exists() {
        true => "the kernel offers it, this build has no server for it".to_owned(),
        false => "neither this build nor the kernel has it (no /dev/ublk-control)".to_owned(),
    })
}

fn nbd(dev: &Path) -> Option<String> {
    Some(match dev.join("nbd0").exists() {
        true => {
            "the kernel offers it, this build can't connect it (`firstread export --nbd` serves nbd-client)".to_owned()
        }
        false => "neither this build nor the kernel has a client for it (no /dev/nbd0)".to_owned(),
    })
}

fn loop_device(dev: &Path) -> Option<String> {
    if !cfg!(feature = "loop") {
        return Some("this build has no server for it".to_owned());
    }
    let missing: Vec<&str> = ["fuse", "loop-control"].into_iter().filter(|name| !dev.join(name).exists()).collect();
    (!missing.is_empty()).then(|| format!("the kernel does not offer it (no /dev/{})", missing.join(", no /dev/")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn auto_says_why_the_better_transports_were_not_possible() {
        let dev = tempfile::tempdir().unwrap();
        for name in ["fuse", "loop-control", "ublk-control"] {
            std::fs::write(dev.path().join(name), "").unwrap();
        }
        let choice = choose_on("auto", dev.path()).unwrap();
        assert_eq!(choice.transport, Transport::Loop);
        assert!(choice.passed_over[0].starts_with("ublk: the kernel offers it"), "{choice:?}");
        assert!(choice.passed_over[1].contains("/dev/nbd0"), "{choice:?}");
        assert!(choose_on("loop", dev.path()).unwrap().passed_over.is_empty());
        let error = choose_on("ublk", dev.path()).unwrap_err().to_string();
        assert!(error.contains("ublk"), "{error}");
        std::fs::remove_file(dev.path().join("fuse")).unwrap();
        let error = choose_on("auto", dev.path()).unwrap_err().to_string();
        assert!(error.contains("no /dev/fuse"), "{error}");
    }
}
