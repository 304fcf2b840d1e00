//! Where writable devices keep what was written: in a directory that a user names, which stays, or in one of the node's,
//! `uppers/ID` in its root directory, which goes with the device.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use super::config::Config;
use super::control::DeviceInfo;
use super::growth::grow;
use super::journal;
use super::node::{Node, blocking};
use crate::device::upper::boot;
use crate::device::upper::{self, Durability, LowerIdentity, Upper, UpperOptions};
use crate::device::{Device, ImageDevice, Overlay};
use crate::error::{Error, Result};
use crate::fetch::Image;

/// What the names of exports' private uppers begin with; no device's id does.
const EXPORT: &str = "export.";

/// A wish for a device that can be written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Writable {
    /// Where what is written goes.
    pub place: Place,
    /// Size of the device in bytes, if it is to be larger than the image's.
    #[serde(default)]
    pub size: Option<u64>,
    /// Whether its file system is to have a journal.
    #[serde(default)]
    pub journal: Journal,
}

/// Which file systems get a journal when they are attached. One that is there stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Journal {
    /// Those in an upper that is kept.
    #[default]
    Auto,
    /// None.
    None,
}

impl FromStr for Journal {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            _ => Err(format!("{text:?} is neither auto nor none")),
        }
    }
}

/// Where what is written goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Into this directory, which is kept; absolute.
    Kept(PathBuf),
    /// It is thrown away with the device.
    Private,
}

/// The upper of a device, as `list` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpperInfo {
    /// Its directory.
    pub dir: PathBuf,
    /// Whether it outlives the device.
    pub kept: bool,
}

impl UpperInfo {
    /// What a wish comes to for the device `id`.
    fn of(place: &Place, config: &Config, id: &str) -> Result<Self> {
        match place {
            Place::Kept(dir) => Ok(Self { dir: upper::directory(dir)?, kept: true }),
            Place::Private => Ok(Self { dir: directory(config).join(id), kept: false }),
        }
    }

    fn durability(&self) -> Durability {
        if self.kept { Durability::Kept } else { Durability::Private }
    }
}

fn directory(config: &Config) -> PathBuf {
    config.root.join("uppers")
}

/// A device that can be written, and its upper.
pub(super) struct Opened {
    pub overlay: Arc<Overlay>,
    pub info: UpperInfo,
    /// What its user should know of it.
    pub remarks: Vec<String>,
}

impl Node {
    /// Opens the upper that is wished for over an image's device; a private one is new. The file system is grown to its size, and gets
    /// a journal if it is to survive a loss of power.
    pub(super) async fn new_upper(
        &self,
        image: &Arc<Image>,
        device: &Arc<ImageDevice>,
        writable: &Writable,
        id: &str,
    ) -> Result<Opened> {
        let info = UpperInfo::of(&writable.place, &self.config, id)?;
        if !info.kept {
            let dir = info.dir.clone();
            blocking(move || upper::remove(&dir)).await?;
        }
        let (opened, lower_bytes) = (self.open_upper(image, device, info, writable.size).await?, device.size());
        let runtime = Handle::current();
        let has_journal = opened.info.kept && writable.journal == Journal::Auto;
        blocking(move || {
            let changed = grow(&opened.overlay, lower_bytes, &runtime).and_then(|grown| {
                let journal = if has_journal { journal::add(&opened.overlay, &runtime)? } else { None };
                Ok(grown.into_iter().chain(journal).collect())
            });
            match changed {
                Ok(remarks) => Ok(Opened { remarks, ..opened }),
                Err(error) => {
                    // The error that is told is the first one.
                    let _ = close(Some(opened.overlay.upper()), &opened.info);
                    Err(error)
                }
            }
        })
        .await
    }

    /// Opens the upper of a device again, or that of a new one.
    pub(super) async fn open_upper(
        &self,
        image: &Arc<Image>,
        device: &Arc<ImageDevice>,
        info: UpperInfo,
        size: Option<u64>,
    ) -> Result<Opened> {
        let (image, device) = (Arc::clone(image), Arc::clone(device) as Arc<dyn Device>);
        blocking(move || {
            let lower = LowerIdentity {
                contents: image.index.device_digest(),
                device_bytes: device.size(),
                image: image.reference.to_string(),
                manifest: image.manifest_digest,
            };
            let options = UpperOptions { size, durability: info.durability(), boot: boot() };
            let upper = Arc::new(Upper::open(&info.dir, &lower, &options)?);
            Ok(Opened { overlay: Overlay::new(device, upper)?, info, remarks: Vec::new() })
        })
        .await
    }

    /// A directory's name for the private upper of an export.
    pub(super) fn export_upper(&self) -> Result<String> {
        let parent = directory(&self.config);
        let failed = |error| Error::io(format!("make an upper in {}", parent.display()), error);
        fs::create_dir_all(&parent).map_err(failed)?;
        let mut number = 1u32;
        loop {
            let name = format!("{EXPORT}{number}");
            match fs::create_dir(parent.join(&name)) {
                Ok(()) => return Ok(name),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(failed(error)),
            }
        }
    }
}

/// Makes durable what is to be kept, gives the directory up, and removes what is not to be kept. Nobody writes any more.
/// Blocks.
///
/// # Errors
/// What was written and could not be made durable, or what could not be removed.
pub(super) fn close(upper: Option<&Upper>, info: &UpperInfo) -> Result<()> {
    let closed = upper.map_or(Ok(()), Upper::close);
    if info.kept { closed } else { upper::remove(&info.dir) }
}

/// Removes the private uppers of devices that are not known any more.
pub(super) fn remove_unknown<'a>(config: &Config, known: impl Iterator<Item = &'a DeviceInfo>) {
    let known: Vec<&Path> = known.filter_map(|info| info.upper.as_ref()).map(|upper| upper.dir.as_path()).collect();
    let Ok(found) = fs::read_dir(directory(config)) else { return };
    for dir in found.flatten().map(|entry| entry.path()).filter(|dir| !known.contains(&dir.as_path())) {
        if let Err(error) = upper::remove(&dir) {
            tracing::warn!("what was written to a device that is gone: {error}");
        }
    }
}
