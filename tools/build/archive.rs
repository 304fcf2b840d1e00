//! A tar file on disk as a directory of members, for `docker save` archives and archives of OCI layouts.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::decode::{Expected, Layer, Stored};
use super::limits::Limits;
use super::progress::Silent;
use super::rootfs::clean;
use super::tar::{Archive, EntryKind, show};
use crate::error::{Error, Result};
use crate::source::files::unlinked;

/// Most members that an archive may have: an image has a few for each layer.
const MEMBERS_MAX: usize = 100_000;
/// Links are followed as often as this.
const LINKS_MAX: usize = 8;

enum Member {
    File { offset: u64, len: u64 },
    Link(Vec<u8>),
}

/// An archive whose members can be read in any order.
pub(super) struct TarFile {
    name: String,
    file: Arc<File>,
    members: HashMap<Vec<u8>, Member>,
}

impl TarFile {
    /// Reads the headers of the tar at `path`. One that is compressed is inflated into `temp` first.
    pub(super) fn open(path: &Path, temp: &Path, limits: &Limits) -> Result<Self> {
        let name = path.display().to_string();
        let action = |error| Error::io(format!("reading {name}"), error);
        let mut file = File::open(path).map_err(action)?;
        let mut magic = [0; 4];
        let filled = super::tar::fill(&mut file, &mut magic).map_err(action)?;
        io::Seek::rewind(&mut file).map_err(action)?;
        if matches!(magic.get(..filled), Some([0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd])) {
            let none = Expected::default();
            let mut layer = Layer::open(Box::new(file), &none, limits.plain_bytes, Arc::new(Silent))?;
            file = unlinked(temp)?;
            io::copy(&mut layer, &mut file).map_err(action)?;
            io::Seek::rewind(&mut file).map_err(action)?;
        }
        let mut members = HashMap::new();
        let mut archive = Archive::new(file, limits);
        while let Some(entry) = archive.next_entry()? {
            if members.len() >= MEMBERS_MAX {
                return Err(Error::invalid(name, format!("more than {MEMBERS_MAX} members")));
            }
            let key = clean(&entry.path).join(&b'/');
            let member = match entry.kind {
                EntryKind::File => Member::File { offset: archive.position(), len: entry.size },
                EntryKind::Symlink => {
                    let dir = entry.path.rsplitn(2, |byte| *byte == b'/').nth(1).unwrap_or_default();
                    Member::Link(clean(&[dir, b"/", &entry.link].concat()).join(&b'/'))
                }
                EntryKind::HardLink => Member::Link(clean(&entry.link).join(&b'/')),
                _ => continue,
            };
            members.insert(key, member);
        }
        let file = archive.into_inner();
        Ok(Self { name, file: Arc::new(file), members })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    fn find(&self, path: &str) -> Result<(u64, u64)> {
        let mut key = clean(path.as_bytes()).join(&b'/');
        for _ in 0..LINKS_MAX {
            match self.members.get(&key) {
                Some(Member::File { offset, len }) => return Ok((*offset, *len)),
                Some(Member::Link(target)) => key = target.clone(),
                None => break,
            }
        }
        Err(Error::NotFound { source_name: self.name.clone(), what: show(path.as_bytes()) })
    }

    /// Length in bytes of the member at `path`.
    pub(super) fn len(&self, path: &str) -> Result<u64> {
        self.find(path).map(|(_, len)| len)
    }

    /// The member as a stream.
    pub(super) fn stream(&self, path: &str) -> Result<Stored> {
        let (offset, len) = self.find(path)?;
        Ok(Box::new(Part { file: self.file.clone(), at: offset, end: offset.saturating_add(len) }))
    }

    /// The whole member, if it has at most `max` bytes.
    pub(super) fn small(&self, path: &str, max: u64) -> Result<Vec<u8>> {
        let (offset, len) = self.find(path)?;
        if len > max {
            return Err(Error::invalid(format!("{path} in {}", self.name), format!("{len} bytes, more than {max}")));
        }
        let mut bytes = vec![0; len as usize];
        let read = self.file.read_exact_at(&mut bytes, offset);
        read.map_err(|error| Error::io(format!("reading {path} in {}", self.name), error))?;
        Ok(bytes)
    }
}

struct Part {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for Part {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = buf.len().min(usize::try_from(self.end - self.at).unwrap_or(usize::MAX));
        let read = self.file.read_at(buf.get_mut(..len).unwrap_or_default(), self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}
