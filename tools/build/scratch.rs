//! A directory for what is only needed while the builder works.

use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::chunk::Digest;
use crate::error::{Error, Result};

/// A directory that goes when this does.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    /// Makes one in `temp`.
    pub(super) fn new(temp: &Path) -> Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let name = Digest::of(format!("{} {:?}", std::process::id(), Instant::now()).as_bytes()).hex();
        let path = temp.join(format!(".firstread-{}", name.get(..16).unwrap_or_default()));
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|error| Error::io(format!("making {} (--temp or TMPDIR says where)", path.display()), error))?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A directory that stays is no reason to fail.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
