//! The devices of a node: served ones, and lost ones that a dead daemon left in somebody's hands.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use super::attachment::Attachment;
use super::control::{DeviceInfo, InUse, Kind, Lifetime, Problem, SourceAccess, State};
use super::records::{Record, Records, Reopen};
use super::starts::Start;
use crate::device::ImageDevice;
use crate::device::upper::Upper;
use crate::error::Result;
use crate::fetch::Image;

/// Longest name in an id, in bytes.
const NAME_MAX: usize = 24;

/// A device.
pub struct Entry {
    info: Mutex<DeviceInfo>,
    /// How its image is opened again by the next daemon.
    reopen: Option<Reopen>,
    /// `None` for a lost device, or one that is being recovered.
    pub served: Option<Served>,
    /// Taken out while somebody detaches it.
    attachment: Mutex<Option<Attachment>>,
}

/// What a device serves.
pub struct Served {
    /// The image, shared with its other devices.
    pub image: Arc<Image>,
    /// The device itself; of one that can be written its lower.
    pub device: Arc<ImageDevice>,
    /// What was written.
    pub upper: Option<Arc<Upper>>,
    /// Its start.
    pub start: Start,
}

impl Entry {
    /// What users see of it.
    #[must_use]
    pub fn info(&self) -> DeviceInfo {
        self.info.lock().clone()
    }

    /// How its image's source is reached.
    #[must_use]
    pub fn access(&self) -> SourceAccess {
        self.reopen.as_ref().map(|reopen| reopen.access.clone()).unwrap_or_default()
    }

    /// What it serves.
    ///
    /// # Errors
    /// Its server is gone.
    pub fn served(&self) -> std::result::Result<&Served, Problem> {
        self.served.as_ref().ok_or_else(|| {
            let info = self.info.lock();
            Problem::new(Kind::NotFound, format!("{} lost its server: nothing is known of its reads", info.id))
                .hint("`firstread umount` or `firstread detach` it")
        })
    }

    /// Takes the attachment in order to detach it.
    ///
    /// # Errors
    /// Somebody else is doing that.
    pub fn take(&self) -> std::result::Result<Option<Attachment>, Problem> {
        match (self.attachment.lock().take(), &self.served) {
            (None, Some(_)) => Err(Problem::new(Kind::Busy, format!("{} is being detached", self.info.lock().id))),
            (attachment, _) => Ok(attachment),
        }
    }

    /// Puts the attachment back that could not be detached.
    pub fn put_back(&self, attachment: Attachment) {
        *self.attachment.lock() = Some(attachment);
    }
}

/// All devices, by id.
pub struct Devices {
    /// `None`: the id is taken by a device that is being attached.
    table: Mutex<BTreeMap<String, Option<Arc<Entry>>>>,
    records: Records,
}

impl Devices {
    /// The devices of an earlier daemon that are to be recovered, or that it lost and somebody still holds.
    #[must_use]
    pub fn new(records: Records, lost: Vec<Record>) -> Self {
        let entry = |record: Record| {
            let id = record.device.id.clone();
            let (info, reopen) = (Mutex::new(record.device), record.reopen);
            let entry = Entry { info, reopen, served: None, attachment: Mutex::new(None) };
            (id, Some(Arc::new(entry)))
        };
        Self { table: Mutex::new(lost.into_iter().map(entry).collect()), records }
    }

    /// An id for a new device of the image `name`, e.g. `python-1`; free again when it is dropped unused.
    #[must_use]
    pub fn reserve(self: &Arc<Self>, name: &str) -> Reserved {
        let name = readable(name);
        let mut table = self.table.lock();
        let mut number = 1u64;
        let id = loop {
            let id = format!("{name}-{number}");
            if !table.contains_key(&id) {
                break id;
            }
            number += 1;
        };
        table.insert(id.clone(), None);
        Reserved { devices: Arc::clone(self), id }
    }

    /// All devices, in the order of their ids.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Entry>> {
        self.table.lock().values().flatten().cloned().collect()
    }

    /// The device with this id, device path or mountpoint.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, target: &str) -> std::result::Result<Arc<Entry>, Problem> {
        if let Some(Some(entry)) = self.table.lock().get(target) {
            return Ok(Arc::clone(entry));
        }
        let is_it = |entry: &&Arc<Entry>| {
            let info = entry.info.lock();
            info.device.as_os_str() == target || info.mountpoint.as_ref().is_some_and(|dir| dir.as_os_str() == target)
        };
        self.all().iter().rev().find(is_it).cloned().ok_or_else(|| {
            Problem::new(Kind::NotFound, format!("there is no device {target}"))
                .hint("`firstread list` shows the devices")
        })
    }

    /// Records where a device is mounted. Blocks.
    ///
    /// # Errors
    /// A record that can't be written.
    pub fn set_mountpoint(&self, entry: &Entry, mountpoint: Option<PathBuf>) -> Result<DeviceInfo> {
        let mut info = entry.info();
        info.mountpoint = mountpoint;
        self.records.save(&Record::new(info.clone(), entry.reopen.clone(), Lifetime::Permanent))?;
        *entry.info.lock() = info.clone();
        Ok(info)
    }

    /// Shows a recovered device as attached. Gives the attachment back when the device was detached meanwhile.
    ///
    /// # Errors
    /// The attachment of a device that is not waited for any more.
    pub fn restore(
        &self,
        id: &str,
        served: Served,
        attachment: Attachment,
    ) -> std::result::Result<(), Box<Attachment>> {
        let mut table = self.table.lock();
        let Some(Some(place)) = table.get_mut(id) else { return Err(Box::new(attachment)) };
        let info = DeviceInfo { state: State::Attached, ..place.info() };
        let (info, reopen) = (Mutex::new(info), place.reopen.clone());
        *place = Arc::new(Entry { info, reopen, served: Some(served), attachment: Mutex::new(Some(attachment)) });
        Ok(())
    }

    /// Forgets a device. Blocks.
    ///
    /// # Errors
    /// A record that can't be removed; the device is forgotten until the next start.
    pub fn forget(&self, id: &str) -> Result<()> {
        self.table.lock().remove(id);
        self.records.remove(id)
    }
}

/// An id that is kept for a device.
pub struct Reserved {
    devices: Arc<Devices>,
    id: String,
}

impl Reserved {
    /// The id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Records the device and shows it to everybody. Blocks.
    ///
    /// # Errors
    /// A record that can't be written; the device is then detached.
    pub fn fill(self, record: Record, served: Served, mut attachment: Attachment) -> Result<()> {
        if let Err(error) = self.devices.records.save(&record) {
            // The first error is the one to tell.
            let _ = attachment.detach(InUse::Abandon);
            return Err(error);
        }
        let (info, reopen) = (Mutex::new(record.device), record.reopen);
        let entry = Entry { info, reopen, served: Some(served), attachment: Mutex::new(Some(attachment)) };
        self.devices.table.lock().insert(self.id.clone(), Some(Arc::new(entry)));
        Ok(())
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut table = self.devices.table.lock();
        if matches!(table.get(&self.id), Some(None)) {
            table.remove(&self.id);
        }
    }
}

/// A lost device that nobody holds any more is gone.
#[must_use]
pub fn still_held(info: &DeviceInfo) -> bool {
    info.state != State::Lost || super::attachment::is_held(info)
}

/// What of an image's name goes into an id: the last part of its repository or path, lower case.
fn readable(name: &str) -> String {
    let mut text = String::new();
    for c in name.chars() {
        match c.to_ascii_lowercase() {
            c if c.is_ascii_alphanumeric() => text.push(c),
            _ if text.is_empty() || text.ends_with('-') => {}
            _ => text.push('-'),
        }
        if text.len() == NAME_MAX {
            break;
        }
    }
    match text.trim_end_matches('-') {
        "" => "image".to_owned(),
        text => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn ids_are_readable_and_free_again_when_unused() {
        assert_eq!(readable("Python"), "python");
        assert_eq!(readable("..my_app  v2!"), "my-app-v2");
        assert_eq!(readable("日本"), "image");
        let dir = tempfile::tempdir().unwrap();
        let devices = Arc::new(Devices::new(Records::open(dir.path()).unwrap(), Vec::new()));
        let first = devices.reserve("python");
        let second = devices.reserve("python");
        assert_eq!((first.id(), second.id()), ("python-1", "python-2"));
        assert!(devices.find("python-1").is_err(), "it is only reserved");
        drop(first);
        assert_eq!(devices.reserve("python").id(), "python-1");
    }
}
