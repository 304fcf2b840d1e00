//! Which blocks were written since the machine started: a byte a block, so that nobody who sets one has to read or
//! order anything. Written before a write is answered and never synced: it has to survive a process, not the machine.

use std::io;
use std::ops::Range;

use super::directory::remove_file;
use super::map::BlockMap;
use crate::media::{Media, MediaDir};

pub(super) const NAME: &str = "live";
/// Bytes before the first block's byte: the name of the start of the machine, and its checksum.
const HEADER: u64 = 4096;
const SET: u8 = 1;
/// Bytes that are read or written at a time.
const PIECE: usize = 1 << 16;
static SETS: [u8; PIECE] = [SET; PIECE];

pub(super) struct Live {
    file: Box<dyn Media>,
}

impl Live {
    /// Opens the file. Blocks that it names are set in `map`, if it is of this start of the machine; otherwise it begins
    /// anew.
    pub fn open(dir: &dyn MediaDir, boot: &str, map: &BlockMap) -> io::Result<Self> {
        let header = header(boot);
        if let Ok(file) = dir.open(NAME)
            && file.len()? >= HEADER
        {
            let mut found = vec![0; header.len()];
            file.read(0, &mut found)?;
            // A start that can't be told from others is never the same.
            if found == header && !boot.is_empty() {
                replay(file.as_ref(), map)?;
                return Ok(Self { file });
            }
        }
        remove_file(dir, NAME)?;
        let file = dir.create(NAME)?;
        file.set_len(HEADER)?;
        file.write(0, &header)?;
        Ok(Self { file })
    }

    /// Names blocks.
    pub fn add(&self, blocks: &Range<u64>) -> io::Result<()> {
        let mut at = blocks.start;
        while at < blocks.end {
            let sets = SETS.get(..(blocks.end - at).min(PIECE as u64) as usize).unwrap_or_default();
            self.file.write(HEADER + at, sets)?;
            at += sets.len() as u64;
        }
        Ok(())
    }
}

/// What tells this start of the machine from others; empty where the system does not say.
#[must_use]
pub fn boot() -> String {
    // proc_sys_kernel_random in Linux' Documentation/admin-guide/sysctl/kernel.rst.
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// The name of a start of the machine behind its checksum.
fn header(boot: &str) -> Vec<u8> {
    let mut header = crc32c::crc32c(boot.as_bytes()).to_le_bytes().to_vec();
    header.extend((boot.len() as u32).to_le_bytes());
    header.extend(boot.bytes().take(256));
    header
}

fn replay(file: &dyn Media, map: &BlockMap) -> io::Result<()> {
    let named = (file.len()? - HEADER).min(map.blocks());
    let mut piece = vec![0; PIECE];
    let mut start = 0;
    while start < named {
        let len = (named - start).min(PIECE as u64);
        let bytes = piece.get_mut(..len as usize).unwrap_or_default();
        file.read(HEADER + start, bytes)?;
        let mut at = 0;
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            let set = rest.first() == Some(&SET);
            let run = rest.iter().take_while(|&&byte| (byte == SET) == set).count();
            if set {
                let first = start + at as u64;
                map.set(&(first..first + run as u64));
            }
            at += run;
        }
        start += len;
    }
    Ok(())
}
