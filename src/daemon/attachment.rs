//! One attached device, whatever its transport, and the choice of a transport.

use std::path::Path;
use std::sync::Arc;

use tokio::runtime::Handle;

use super::config::Config;
use super::control::{DeviceInfo, InUse};
use crate::attach::holders::{self, Holder, describe};
use crate::attach::loop_device::{self, LoopAttachment, LoopOptions};
use crate::attach::nbd::kernel::{self, Identifier, NbdAttachment, NbdDeviceOptions};
use crate::attach::ublk::{self, Mark, Recovered, UblkAttachment, UblkServer, Users};
use crate::chunk::Digest;
use crate::device::Device;
use crate::error::{Error, Result};

/// How a kernel sees a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// ublk.
    Ublk,
    /// The kernel's NBD client.
    Nbd,
    /// A FUSE file under a loop device.
    Loop,
}

impl Transport {
    /// All that this build has, best first.
    const ALL: [Self; 3] = [Self::Ublk, Self::Nbd, Self::Loop];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ublk => "ublk",
            Self::Nbd => "nbd",
            Self::Loop => "loop",
        }
    }

    /// The transport with this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|transport| transport.name() == name)
    }

    /// Whether its devices outlive their server, and are taken over by the next one.
    #[must_use]
    pub fn recovers(self) -> bool {
        match self {
            Self::Ublk | Self::Nbd => true,
            Self::Loop => false,
        }
    }
}

/// What the transports of a node share.
pub struct Transports {
    runtime: Handle,
    ublk: Arc<UblkServer>,
    nbd: NbdDeviceOptions,
    /// What tells this node's NBD devices from others.
    node: String,
}

impl Transports {
    /// The transports of a node with these settings; misses run on `runtime`.
    #[must_use]
    pub fn new(config: &Config, runtime: Handle) -> Self {
        let ublk = UblkServer::new(config.ublk, mark(&config.root), runtime.clone());
        Self { runtime, ublk, nbd: config.nbd, node: node(&config.root) }
    }
}

/// What tells this node's devices from others: it is the only one with its root directory.
fn mark(root: &Path) -> Mark {
    let root = root.canonicalize().unwrap_or_else(|_| root.to_owned());
    Mark::of(root.as_os_str().as_encoded_bytes())
}

/// The same as text.
fn node(root: &Path) -> String {
    let root = root.canonicalize().unwrap_or_else(|_| root.to_owned());
    Digest::of(root.as_os_str().as_encoded_bytes()).hex()[..16].to_owned()
}

/// A device that a kernel sees.
#[derive(Debug)]
pub enum Attachment {
    /// Through [`Transport::Ublk`].
    Ublk(UblkAttachment),
    /// Through [`Transport::Nbd`].
    Nbd(NbdAttachment),
    /// Through [`Transport::Loop`].
    Loop(LoopAttachment),
}

impl Attachment {
    /// Attaches `device` with a read-ahead through the first of the candidates that can; the reasons why others could not are added to those of
    /// the choice. Blocks.
    ///
    /// # Errors
    /// What the only candidate says, or [`Error::Unsupported`] with what all of them say.
    pub fn attach(
        choice: &mut Choice,
        device: &Arc<dyn Device>,
        read_ahead_kb: u32,
        transports: &Transports,
    ) -> Result<Self> {
        for transport in &choice.candidates {
            let device = Arc::clone(device);
            let attached = match transport {
                Transport::Ublk => ublk::attach(&transports.ublk, device, read_ahead_kb).map(Self::Ublk),
                Transport::Nbd => {
                    let options = NbdDeviceOptions { read_ahead_kb, ..transports.nbd };
                    let identifier = Identifier::new(&transports.node, device.size());
                    kernel::attach(device, identifier, options, transports.runtime.clone()).map(Self::Nbd)
                }
                Transport::Loop => {
                    let options = LoopOptions { read_ahead_kb, ..LoopOptions::default() };
                    loop_device::attach(device, options, transports.runtime.clone()).map(Self::Loop)
                }
            };
            match attached {
                Ok(attachment) => return Ok(attachment),
                Err(error) if choice.candidates.len() == 1 && choice.passed_over.is_empty() => return Err(error),
                Err(error) => {
                    tracing::warn!("transport {}: {error}", transport.name());
                    choice.passed_over.push(format!("{}: {error}", transport.name()));
                }
            }
        }
        Err(impossible(&choice.passed_over))
    }

    /// Takes over a device of an earlier process; `None` when it is there no more. Blocks.
    ///
    /// # Errors
    /// What the transport says; it may be tried again.
    pub fn recover(info: &DeviceInfo, device: Arc<dyn Device>, transports: &Transports) -> Result<Option<Self>> {
        match Transport::named(&info.transport) {
            Some(Transport::Ublk) => {
                let Some(number) = ublk::number_of(&info.device) else { return Ok(None) };
                match ublk::recover(&transports.ublk, number, device)? {
                    Recovered::Attached(attachment) => Ok(Some(Self::Ublk(attachment))),
                    Recovered::Gone => Ok(None),
                }
            }
            Some(Transport::Nbd) => {
                let Some(index) = kernel::index_of(&info.device) else { return Ok(None) };
                let identifier = Identifier::new(&transports.node, device.size());
                let recovered = kernel::recover(index, device, identifier, transports.nbd, transports.runtime.clone());
                recovered.map(|attachment| attachment.map(Self::Nbd))
            }
            Some(Transport::Loop) | None => Ok(None),
        }
    }

    /// Its transport.
    #[must_use]
    pub fn transport(&self) -> Transport {
        match self {
            Self::Ublk(_) => Transport::Ublk,
            Self::Nbd(_) => Transport::Nbd,
            Self::Loop(_) => Transport::Loop,
        }
    }

    /// The path of the block device.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Ublk(attachment) => attachment.device_path(),
            Self::Nbd(attachment) => attachment.device_path(),
            Self::Loop(attachment) => attachment.device_path(),
        }
    }

    /// Takes the device from the kernel. Blocks, for seconds when somebody looks at the device just now. After success
    /// only dropping is left; after [`Error::Busy`] everything is as before.
    ///
    /// # Errors
    /// [`Error::Busy`] that names who uses it, unless they are to be abandoned.
    pub fn detach(&mut self, in_use: InUse) -> Result<()> {
        match (self, in_use) {
            (Self::Ublk(attachment), InUse::Abandon) => attachment.detach(Users::Fail),
            (Self::Nbd(attachment), InUse::Abandon) => attachment.fail(),
            (Self::Loop(attachment), InUse::Abandon) => {
                attachment.fail();
                Ok(())
            }
            (Self::Ublk(attachment), _) => attachment.detach(Users::Respect),
            (Self::Nbd(attachment), _) => attachment.detach(),
            (Self::Loop(attachment), _) => attachment.detach(),
        }
    }
}

/// Removes what a process of this node that was killed left half made: devices that no record knows. Blocks.
///
/// # Errors
/// What the system says.
pub fn remove_unknown(config: &Config, known: &[&Path]) -> Result<()> {
    let mark = mark(&config.root);
    let known_to_ublk: Vec<u32> = known.iter().filter_map(|path| ublk::number_of(path)).collect();
    for number in ublk::all_of(mark)?.into_iter().filter(|number| !known_to_ublk.contains(number)) {
        tracing::warn!("the ublk device {number} was left half made by an earlier daemon and is removed");
        ublk::remove_abandoned(number, mark)?;
    }
    let known: Vec<u32> = known.iter().filter_map(|path| kernel::index_of(path)).collect();
    for index in kernel::all_of(&node(&config.root)).into_iter().filter(|index| !known.contains(index)) {
        tracing::warn!("/dev/nbd{index} was left half made by an earlier daemon and is disconnected");
        kernel::remove_abandoned(index)?;
    }
    Ok(())
}

/// Whether the block device at `path` is one of firstread's whose server died.
#[must_use]
pub fn is_stale(path: &Path) -> bool {
    loop_device::stale().iter().any(|stale| stale.path == path)
}

/// Whether somebody holds a device whose server died. A lost device is free by itself when they leave.
#[must_use]
pub fn is_held(lost: &DeviceInfo) -> bool {
    !holders_of(lost).is_empty()
}

/// Makes sure that nobody holds a device whose server died, and that it is gone.
///
/// # Errors
/// [`Error::Busy`] that names who does, unless they are to be abandoned; or what the system says.
pub fn release_lost(lost: &DeviceInfo, in_use: InUse, config: &Config) -> Result<()> {
    let holders = holders_of(lost);
    if in_use != InUse::Abandon && !holders.is_empty() {
        let (device, by) = (lost.device.display(), describe(&holders));
        return Err(Error::Busy(format!("{device} lost its server and is still in use: {by}")));
    }
    let (number, index) = (ublk::number_of(&lost.device), kernel::index_of(&lost.device));
    match (Transport::named(&lost.transport), number, index) {
        (Some(Transport::Ublk), Some(number), _) => ublk::remove_abandoned(number, mark(&config.root)),
        // It may be somebody else's by now.
        (Some(Transport::Nbd), _, Some(index)) if kernel::all_of(&node(&config.root)).contains(&index) => {
            kernel::remove_abandoned(index)
        }
        _ => Ok(()),
    }
}

fn holders_of(lost: &DeviceInfo) -> Vec<Holder> {
    match (ublk::number_of(&lost.device), kernel::index_of(&lost.device)) {
        (Some(number), _) => ublk::users_of(number),
        (None, Some(_)) => holders::find(&lost.device),
        (None, None) => {
            let stale = loop_device::stale().into_iter().find(|stale| stale.path == lost.device);
            stale.map(|stale| stale.holders).unwrap_or_default()
        }
    }
}

/// The transports that may be tried, and why others may not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// What to try, best first; at least one.
    pub candidates: Vec<Transport>,
    /// A reason for each transport that is out of the question.
    pub passed_over: Vec<String>,
}

/// Finds the transports for `wanted`: `auto` or a name.
///
/// # Errors
/// [`Error::Unsupported`] when the one that was asked for, or every one, is not possible; [`Error::Invalid`] for a name
/// that is none.
pub fn choose(wanted: &str, transports: &Transports) -> Result<Choice> {
    choose_from(wanted, |name| match name {
        "ublk" => ublk::obstacle(&transports.ublk),
        "nbd" => kernel::obstacle(),
        _ => loop_device(Path::new("/dev")),
    })
}

/// Asks what stands in the way of those transports alone that are wanted: an answer costs some system calls.
fn choose_from(wanted: &str, obstacle: impl Fn(&str) -> Option<String>) -> Result<Choice> {
    let (mut candidates, mut passed_over) = (Vec::new(), Vec::new());
    for name in ["ublk", "nbd", "loop"] {
        if wanted != "auto" && wanted != name {
            continue;
        }
        match (obstacle(name), Transport::named(name)) {
            (None, Some(transport)) => candidates.push(transport),
            (obstacle, _) => passed_over.push(format!("{name}: {}", obstacle.unwrap_or_default())),
        }
    }
    if !candidates.is_empty() {
        return Ok(Choice { candidates, passed_over });
    }
    match wanted {
        "auto" => Err(impossible(&passed_over)),
        _ => match passed_over.pop() {
            Some(reason) => Err(Error::Unsupported(format!("transport {reason}"))),
            None => Err(Error::invalid("transport", format!("{wanted:?} is none of auto, ublk, nbd, loop"))),
        },
    }
}

fn impossible(reasons: &[String]) -> Error {
    let reasons = reasons.join("; ");
    Error::Unsupported(format!(
        "no transport is possible here ({reasons}); `firstread export` serves programs over NBD and vhost-user, and needs neither privileges nor drivers"
    ))
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

    fn obstacles(ublk: Option<&str>, dev: &Path) -> impl Fn(&str) -> Option<String> {
        move |name| match name {
            "ublk" => ublk.map(str::to_owned),
            "nbd" => Some("no client".to_owned()),
            _ => loop_device(dev),
        }
    }

    #[test]
    fn auto_says_why_the_better_transports_were_not_possible() {
        let dev = tempfile::tempdir().unwrap();
        for name in ["fuse", "loop-control"] {
            std::fs::write(dev.path().join(name), "").unwrap();
        }
        let choice = choose_from("auto", obstacles(Some("no driver"), dev.path())).unwrap();
        assert_eq!(choice.candidates, [Transport::Loop]);
        assert!(choice.passed_over[0].starts_with("ublk: no driver"), "{choice:?}");
        assert!(choice.passed_over[1].starts_with("nbd: no client"), "{choice:?}");
        let both = choose_from("auto", obstacles(None, dev.path())).unwrap();
        assert_eq!(both.candidates, [Transport::Ublk, Transport::Loop]);
        assert!(choose_from("loop", obstacles(None, dev.path())).unwrap().passed_over.is_empty());
        let error = choose_from("ublk", obstacles(Some("no driver"), dev.path())).unwrap_err().to_string();
        assert!(error.contains("ublk: no driver"), "{error}");
        std::fs::remove_file(dev.path().join("fuse")).unwrap();
        let error = choose_from("auto", obstacles(Some("no driver"), dev.path())).unwrap_err().to_string();
        assert!(error.contains("no /dev/fuse"), "{error}");
    }
}
