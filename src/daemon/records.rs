//! What the daemon remembers of its devices across its own death: one small file each, `<id>.json`.
//!
//! A record is written beside its place and renamed into it, so that the next daemon finds it whole or not at all. Nothing is
//! synced, which would be half of what an attach takes: devices end with the machine, and so what a loss of power makes of
//! their records does not matter. A record that is damaged all the same is set aside and costs one device, not the daemon.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::config::Patience;
use super::control::{DeviceInfo, Lifetime, SourceAccess, State};
use crate::device::upper::boot;
use crate::error::{Error, Result};

const VERSION: u32 = 1;

/// Largest record in bytes that is read.
const RECORD_MAX: u64 = 1 << 16;

/// One device as the daemon remembers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// The device.
    #[serde(flatten)]
    pub device: DeviceInfo,
    /// Which start of the machine it belongs to: devices do not outlive it.
    pub boot: String,
    /// How its image is opened again; older records don't say.
    #[serde(default)]
    pub reopen: Option<Reopen>,
    /// Whether its client has still to settle it.
    #[serde(default)]
    pub lifetime: Lifetime,
}

/// How an image is opened another time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reopen {
    /// The image; paths in it are absolute.
    pub reference: String,
    /// How its source is reached.
    pub access: SourceAccess,
    /// How long its readers wait for unreachable sources; `None`: as the node's setting says.
    pub on_outage: Option<Patience>,
}

impl Record {
    /// The record of a device of this start of the machine.
    #[must_use]
    pub fn new(device: DeviceInfo, reopen: Option<Reopen>, lifetime: Lifetime) -> Self {
        Self { version: VERSION, device, boot: boot(), reopen, lifetime }
    }
}

/// The directory of the records.
#[derive(Debug, Clone)]
pub struct Records {
    dir: PathBuf,
}

/// What [`Records::load`] found.
#[derive(Debug, Default)]
pub struct Found {
    /// The records, by id.
    pub records: Vec<Record>,
    /// Files that were no records, with the reason; they were set aside as `*.damaged`.
    pub damaged: Vec<(PathBuf, String)>,
}

impl Records {
    /// The records in `dir`, which is created if it is not there.
    ///
    /// # Errors
    /// What the system says.
    pub fn open(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).map_err(|error| Error::io(format!("creating {}", dir.display()), error))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Reads all records.
    ///
    /// # Errors
    /// A directory that can't be read.
    pub fn load(&self) -> Result<Found> {
        let failed = |error| Error::io(format!("reading the records in {}", self.dir.display()), error);
        let mut found = Found::default();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("json") => match read(&path) {
                    Ok(record) => found.records.push(record),
                    // What a loss of power left half written.
                    Err(_) if is_of_an_earlier_boot(&path) => fs::remove_file(&path).map_err(failed)?,
                    Err(reason) => {
                        let mut aside = path.clone().into_os_string();
                        aside.push(".damaged");
                        fs::rename(&path, aside).map_err(failed)?;
                        found.damaged.push((path, reason));
                    }
                },
                // Half-written when a daemon died.
                Some("new") => fs::remove_file(&path).map_err(failed)?,
                _ => {}
            }
        }
        found.records.sort_by(|a, b| a.device.id.cmp(&b.device.id));
        Ok(found)
    }

    /// Writes a record, over an older one of the same device. It outlives this process, not the machine.
    ///
    /// # Errors
    /// What the system says; the older record is then still there.
    pub fn save(&self, record: &Record) -> Result<()> {
        let path = self.path(&record.device.id);
        let written = || -> io::Result<()> {
            let new = path.with_extension("new");
            fs::write(&new, serde_json::to_vec(record)?)?;
            fs::rename(&new, &path)
        };
        written().map_err(|error| Error::io(format!("writing the record {}", path.display()), error))
    }

    /// Removes a device's record; there need not be one.
    ///
    /// # Errors
    /// What the system says.
    pub fn remove(&self, id: &str) -> Result<()> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io(format!("removing the record {}", path.display()), error))
            }
            _ => Ok(()),
        }
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }
}

/// Whether a file was written before the machine started.
fn is_of_an_earlier_boot(path: &Path) -> bool {
    let running = Duration::from_secs(rustix::system::sysinfo().uptime.try_into().unwrap_or(0));
    let written = fs::metadata(path).and_then(|metadata| metadata.modified());
    written.is_ok_and(|written| written.elapsed().is_ok_and(|age| age > running + Duration::from_secs(1)))
}

fn read(path: &Path) -> std::result::Result<Record, String> {
    let bytes = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if bytes > RECORD_MAX {
        return Err(format!("it has {bytes} bytes"));
    }
    let text = fs::read(path).map_err(|error| error.to_string())?;
    let mut record: Record = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    if record.version != VERSION {
        return Err(format!("it is of version {}, this program knows {VERSION}", record.version));
    }
    if path.file_stem().and_then(|stem| stem.to_str()) != Some(&record.device.id) {
        return Err(format!("it is the record of {:?}", record.device.id));
    }
    record.device.state = State::Lost;
    Ok(record)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn record(id: &str) -> Record {
        let device = DeviceInfo {
            id: id.into(),
            image: "oci:/image".into(),
            digest: "sha256:00".into(),
            device: "/dev/loop9".into(),
            transport: "loop".into(),
            mountpoint: None,
            read_only: true,
            upper: None,
            state: State::Lost,
        };
        Record::new(device, None, Lifetime::Permanent)
    }

    #[test]
    fn records_are_found_again_until_they_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(&dir.path().join("devices")).unwrap();
        let (one, mut two) = (record("a-1"), record("b-1"));
        records.save(&two).unwrap();
        records.save(&one).unwrap();
        two.device.mountpoint = Some("/mnt".into());
        records.save(&two).unwrap();
        assert_eq!(records.load().unwrap().records, [one, two.clone()]);
        records.remove("a-1").unwrap();
        records.remove("a-1").unwrap();
        assert_eq!(records.load().unwrap().records, [two]);
    }

    #[test]
    fn a_damaged_record_costs_one_device_only() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        for id in ["a-1", "b-1", "c-1"] {
            records.save(&record(id)).unwrap();
        }
        fs::write(dir.path().join("a-1.json"), "{\"version\":1").unwrap();
        fs::copy(dir.path().join("c-1.json"), dir.path().join("d-1.json")).unwrap();
        fs::write(dir.path().join("e-1.new"), "half").unwrap();
        let found = records.load().unwrap();
        assert_eq!(found.records, [record("b-1"), record("c-1")]);
        assert_eq!(found.damaged.len(), 2);
        assert!(!dir.path().join("e-1.new").exists());
        assert!(records.load().unwrap().damaged.is_empty(), "set aside once");
        // What was not on the disk yet when the machine stopped.
        let torn = dir.path().join("f-1.json");
        fs::write(&torn, "").unwrap();
        let earlier = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        fs::File::options().write(true).open(&torn).unwrap().set_modified(earlier).unwrap();
        let found = records.load().unwrap();
        assert_eq!((found.records.len(), found.damaged.len()), (2, 0));
        assert!(!torn.exists());
    }
}
