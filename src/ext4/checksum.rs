//! crc32c as ext4 uses it: without the inversions at either end, chained over several pieces.

/// A running checksum (`ext4_chksum` in `fs/ext4/ext4.h`).
#[derive(Debug, Clone, Copy)]
pub struct Checksum(u32);

impl Checksum {
    /// The start of a chain.
    pub const START: Self = Self(!0);

    /// The start of the checksums of one file system: over its UUID (`s_csum_seed`).
    #[must_use]
    pub fn of_file_system(uuid: &[u8; 16]) -> Self {
        Self::START.add(uuid)
    }

    /// The start of the checksums of one inode's blocks: its number and its generation, which is 0 (`i_csum_seed`).
    #[must_use]
    pub fn of_inode(self, number: u32) -> Self {
        self.add(&number.to_le_bytes()).add(&[0; 4])
    }

    /// With more bytes.
    #[must_use]
    pub fn add(self, bytes: &[u8]) -> Self {
        Self(!crc32c::crc32c_append(!self.0, bytes))
    }

    /// The value so far.
    #[must_use]
    pub fn value(self) -> u32 {
        self.0
    }

    /// The lower half of the value so far, which is all that short fields hold.
    #[must_use]
    pub fn low(self) -> u16 {
        (self.0 & 0xffff) as u16
    }
}
