//! Limits on what a source may ask of the builder. Everything that a source claims is checked against them before
//! memory or time is spent on it.

use crate::error::{Error, Result};

/// Bounds on one build. The defaults are far above any sane image and far below what harms a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Plain bytes of all layers together, tar headers included.
    pub plain_bytes: u64,
    /// Bytes of one file, holes included.
    pub file_bytes: u64,
    /// Tar entries of all layers together, or files of a directory tree.
    pub entries: u64,
    /// Bytes of names, link targets and extended attributes, of all entries together.
    pub name_bytes: u64,
    /// Bytes of one extended header or long name of a tar entry.
    pub header_bytes: u64,
    /// Pieces of one sparse file.
    pub segments: usize,
    /// Directories below each other.
    pub depth: usize,
    /// Layers of one image.
    pub layers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            plain_bytes: 1 << 40,
            file_bytes: 8 << 40,
            entries: 20_000_000,
            name_bytes: 2 << 30,
            header_bytes: 1 << 20,
            segments: 1 << 20,
            depth: 2048,
            layers: 1000,
        }
    }
}

/// What was spent of the [`Limits`] so far.
#[derive(Debug, Default)]
pub(super) struct Spent {
    entries: u64,
    name_bytes: u64,
}

impl Spent {
    /// Counts an entry with `name_bytes` of names, link targets and attributes.
    pub(super) fn entry(&mut self, limits: &Limits, name_bytes: usize) -> Result<()> {
        self.entries += 1;
        self.name_bytes = self.name_bytes.saturating_add(name_bytes as u64);
        if self.entries > limits.entries {
            return Err(Error::invalid("source", format!("more than {} entries (limit)", limits.entries)));
        }
        if self.name_bytes > limits.name_bytes {
            let reason = format!("more than {} bytes of names and attributes (limit)", limits.name_bytes);
            return Err(Error::invalid("source", reason));
        }
        Ok(())
    }
}
