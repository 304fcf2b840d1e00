//! Reading tar as a stream: ustar, PAX and GNU, with sparse files in all of their dialects.
//!
//! An own reader, since a layer is hostile until proved otherwise: the length of every extended header, name and map is
//! bounded before it is read, and values of PAX records may hold any byte (a file capability can hold a newline).
//! PAX global headers are ignored, as containerd does.

mod header;
mod pax;
mod sparse;

use std::io::{self, Read};

use self::header::{BLOCK, Raw};
use self::pax::Pax;
use super::limits::Limits;
use crate::error::{Error, Result};
use crate::ext4::{Time, Xattr};

/// What an entry is. Numbers of devices are not yet checked against what a file system can hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum EntryKind {
    File,
    HardLink,
    Symlink,
    CharDevice { major: u64, minor: u64 },
    BlockDevice { major: u64, minor: u64 },
    Directory,
    Fifo,
}

/// One entry, without its data.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// As it is in the archive: may be absolute, have `..`, end in a slash.
    pub path: Vec<u8>,
    /// Target of a hard or symbolic link.
    pub link: Vec<u8>,
    pub kind: EntryKind,
    /// Permission bits with set-uid, set-gid and sticky.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Time,
    /// Length in bytes of a file, holes included.
    pub size: u64,
    /// Where the data of a file goes: offset and length, ascending, within `size`. The archive has nothing but these.
    pub segments: Vec<(u64, u64)>,
    pub xattrs: Vec<Xattr>,
}

/// A tar as a stream of entries. Reads the data of the current entry; what is left unread is skipped by `next_entry`.
pub(super) struct Archive<R> {
    reader: R,
    limits: Limits,
    /// Bytes read from the stream.
    position: u64,
    /// Unread bytes of the current entry's data.
    remaining: u64,
    /// Bytes behind the data, up to the next block.
    padding: u64,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(reader: R, limits: &Limits) -> Self {
        Self { reader, limits: *limits, position: 0, remaining: 0, padding: 0 }
    }

    /// The stream, positioned where the archive was left.
    pub(super) fn into_inner(self) -> R {
        self.reader
    }

    /// Offset in the stream of the next byte of the current entry's data.
    pub(super) const fn position(&self) -> u64 {
        self.position
    }

    /// The next entry, or `None` at the end of the archive.
    pub(super) fn next_entry(&mut self) -> Result<Option<Entry>> {
        self.skip()?;
        let mut pax = Pax::default();
        let (mut long_name, mut long_link) = (None, None);
        loop {
            let at = self.position;
            let Some(block) = self.block()? else { return Ok(None) };
            let Some(raw) = Raw::parse(&block, at)? else { return Ok(None) };
            match raw.kind() {
                b'x' | b'X' => pax = Pax::parse(&self.extended(&raw, at)?, at, &self.limits)?,
                b'g' => drop(self.extended(&raw, at)?),
                b'L' => long_name = Some(until_nul(self.extended(&raw, at)?)),
                b'K' => long_link = Some(until_nul(self.extended(&raw, at)?)),
                b'V' => self.pass(raw.size(at)?)?,
                _ => return self.entry(&raw, at, pax, long_name, long_link).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        raw: &Raw<'_>,
        at: u64,
        mut pax: Pax,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry> {
        let path = pax.path.take().or(long_name).unwrap_or_else(|| raw.path());
        let link = pax.link.take().or(long_link).unwrap_or_else(|| raw.link());
        let path = pax.sparse.name.take().unwrap_or(path);
        let invalid = |reason: String| Error::invalid("tar entry", format!("{} (at byte {at}): {reason}", show(&path)));
        if path.contains(&0) || link.contains(&0) {
            return Err(invalid("its name or link target has a NUL".into()));
        }
        let kind = match raw.kind() {
            b'0' | 0 if path.ends_with(b"/") => EntryKind::Directory,
            b'0' | 0 | b'7' | b'S' => EntryKind::File,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::CharDevice { major: raw.major(at)?, minor: raw.minor(at)? },
            b'4' => EntryKind::BlockDevice { major: raw.major(at)?, minor: raw.minor(at)? },
            b'5' | b'D' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => return Err(invalid(format!("its type {:?} is not supported", char::from(other)))),
        };
        let id = |value: u64, what: &str| {
            u32::try_from(value).map_err(|_| invalid(format!("its {what} {value} does not fit 32 bits")))
        };
        let uid = id(pax.uid.map_or_else(|| raw.uid(at), Ok)?, "uid")?;
        let gid = id(pax.gid.map_or_else(|| raw.gid(at), Ok)?, "gid")?;
        let mtime = match pax.mtime {
            Some(time) => time,
            None => Time { secs: raw.mtime(at)?, nanos: 0 },
        };
        let mode = (raw.mode(at)? & 0o7777) as u16;
        let mut entry = Entry {
            link,
            kind,
            mode,
            uid,
            gid,
            mtime,
            size: 0,
            segments: Vec::new(),
            xattrs: std::mem::take(&mut pax.xattrs),
            path: Vec::new(),
        };
        let stored = match (&entry.kind, raw.kind()) {
            (EntryKind::File, _) | (EntryKind::Directory, b'D') => pax.size.map_or_else(|| raw.size(at), Ok)?,
            _ => 0,
        };
        if stored > self.limits.file_bytes.min(self.limits.plain_bytes) {
            return Err(invalid(format!("its {stored} bytes are beyond the limit")));
        }
        self.remaining = stored;
        self.padding = stored.wrapping_neg() % BLOCK as u64;
        if entry.kind == EntryKind::File {
            let (size, segments) = self.sparse(raw, &pax, stored).map_err(|error| match error {
                Error::Io { .. } => error,
                error => invalid(error.to_string()),
            })?;
            if size > self.limits.file_bytes {
                return Err(invalid(format!("its {size} bytes are beyond the limit of {}", self.limits.file_bytes)));
            }
            (entry.size, entry.segments) = (size, segments);
        }
        entry.path = path;
        Ok(entry)
    }

    /// The data of an extended header.
    fn extended(&mut self, raw: &Raw<'_>, at: u64) -> Result<Vec<u8>> {
        let size = raw.size(at)?;
        if size > self.limits.header_bytes {
            let limit = self.limits.header_bytes;
            let reason = format!("an extended header of {size} bytes at byte {at} is beyond the limit of {limit}");
            return Err(Error::invalid("tar", reason));
        }
        let mut data = vec![0; size as usize];
        self.exact(&mut data)?;
        self.pass(size.wrapping_neg() % BLOCK as u64)?;
        Ok(data)
    }

    /// Skips what is left of the current entry.
    fn skip(&mut self) -> Result<()> {
        let left = self.remaining + self.padding;
        (self.remaining, self.padding) = (0, 0);
        self.pass(left)
    }

    fn pass(&mut self, bytes: u64) -> Result<()> {
        let passed = io::copy(&mut (&mut self.reader).take(bytes), &mut io::sink()).map_err(|error| self.io(error))?;
        self.position += passed;
        if passed < bytes { Err(self.truncated()) } else { Ok(()) }
    }

    fn exact(&mut self, buf: &mut [u8]) -> Result<()> {
        let filled = fill(&mut self.reader, buf).map_err(|error| self.io(error))?;
        self.position += filled as u64;
        if filled < buf.len() { Err(self.truncated()) } else { Ok(()) }
    }

    /// The next block; `None` when the stream ends before it.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        let filled = fill(&mut self.reader, &mut block).map_err(|error| self.io(error))?;
        self.position += filled as u64;
        match filled {
            BLOCK => Ok(Some(block)),
            0 => Ok(None),
            _ => Err(self.truncated()),
        }
    }

    fn truncated(&self) -> Error {
        Error::invalid("tar", format!("it ends in the middle of an entry, at byte {}", self.position))
    }

    fn io(&self, error: io::Error) -> Error {
        Error::io(format!("reading the tar at byte {}", self.position), error)
    }
}

/// The data of the current entry.
impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = buf.len().min(usize::try_from(self.remaining).unwrap_or(usize::MAX));
        let Some(buf) = buf.get_mut(..len).filter(|buf| !buf.is_empty()) else { return Ok(0) };
        let read = self.reader.read(buf)?;
        self.position += read as u64;
        self.remaining -= read as u64;
        Ok(read)
    }
}

/// Reads until `buf` is full or the stream ends.
pub(super) fn fill(reader: &mut impl Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match reader.read(rest) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

/// A path for an error's text.
pub(super) fn show(path: &[u8]) -> String {
    let shown = path.escape_ascii().to_string();
    if shown.len() <= 500 { shown } else { format!("{}…", shown.chars().take(500).collect::<String>()) }
}
