//! What a device is, apart from how its index finds it.

use super::Index;
use crate::chunk::{Digest, Hasher};

impl Index {
    /// A digest of the device's contents: of its size, and of which chunk's bytes are where. Start-up extents, blobs and
    /// compression make no difference.
    #[must_use]
    pub fn device_digest(&self) -> Digest {
        let mut hasher = Hasher::new();
        hasher.update(&self.device_bytes().to_le_bytes());
        hasher.update(self.file_system().as_bytes());
        for extent in self.extents().iter() {
            let digest = self.chunk(extent.chunk).map(|chunk| chunk.digest);
            for number in [extent.block, extent.blocks, extent.offset] {
                hasher.update(&number.to_le_bytes());
            }
            hasher.update(digest.as_ref().map_or(&[0; 32], Digest::as_bytes).as_slice());
        }
        hasher.finish()
    }
}
