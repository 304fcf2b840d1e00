//! Media: what durable local state is written to. Real files in production, a crashing medium in tests.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// A random-access file. All offsets and lengths are in bytes.
///
/// What a caller may assume after a crash: data written before a successful [`sync`](Media::sync) is there; of what was
/// written after it, any subset of the 512-byte sectors is, in any order; the length is the old or the new one.
pub trait Media: Send + Sync {
    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the medium ends inside the range, or what the system says.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes all of `bytes` at `offset`, growing the medium when needed.
    ///
    /// # Errors
    /// What the system says, e.g. ENOSPC; part of the range may then be written.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// The current length in bytes.
    ///
    /// # Errors
    /// What the system says.
    fn len(&self) -> io::Result<u64>;

    /// Whether the medium is empty.
    ///
    /// # Errors
    /// What the system says.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Cuts or extends (with zeros) to `len` bytes.
    ///
    /// # Errors
    /// What the system says.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// What the system says; the data must then be taken for lost.
    fn sync(&self) -> io::Result<()>;
}

impl Media for File {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buf, offset)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}
