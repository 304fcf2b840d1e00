//! Read-only memory maps of files that firstread owns.

use std::fs::File;
use std::io;

/// A whole file mapped read-only.
#[derive(Debug)]
pub struct Mapping(memmap2::Mmap);

impl Mapping {
    /// Maps all of `file`.
    ///
    /// The caller promises that nobody cuts the file while it is mapped: reading past a cut raises SIGBUS. firstread
    /// maps only files in its own root directory, which it writes once and replaces by rename.
    ///
    /// # Errors
    /// What the system says.
    pub fn read_only(file: &File) -> io::Result<Self> {
        // SAFETY: the map is private to this process and read-only; the caller's promise above covers changes of the
        // file by others, and a reader of the bytes validates whatever it finds in them.
        unsafe { memmap2::Mmap::map(file) }.map(Self)
    }

    /// The file's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}
