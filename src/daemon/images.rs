//! Open images: devices of one image share its index and its origin, and so its fetches.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::config::Patience;
use super::control::SourceAccess;
use crate::chunk::Digest;
use crate::error::Result;
use crate::fetch::{Image, open_image};
use crate::oci::{Platform, Reference};
use crate::source::{Access, Connections};

type Key = (String, Digest, SourceAccess, Option<Patience>);

/// The images that devices and exports use.
#[derive(Default)]
pub struct Images {
    open: Mutex<HashMap<Key, Weak<Image>>>,
    cache: PathBuf,
    /// What the images of one host share.
    connections: Connections,
}

impl Images {
    /// No image is open; indexes are kept in `cache`.
    #[must_use]
    pub fn new(cache: &Path) -> Self {
        Self { open: Mutex::default(), cache: cache.to_owned(), connections: Connections::default() }
    }

    /// Opens an image, or finds it open with the same patience: devices of different patience wait each by themselves. The reference is resolved in any case: a tag may have moved.
    ///
    /// # Errors
    /// Those of [`open_image`].
    pub async fn open(
        &self,
        reference: &Reference,
        access: &SourceAccess,
        on_outage: Option<Patience>,
    ) -> Result<Arc<Image>> {
        let source = Access { connections: self.connections.clone(), ..source_access(access) };
        let image = open_image(reference, &source, &Platform::host(), &self.cache).await?;
        let image = match on_outage {
            Some(patience) => image.patient(patience),
            None => image,
        };
        let key = (reference.to_string(), image.manifest_digest, access.clone(), on_outage);
        let mut open = self.open.lock();
        if let Some(image) = open.get(&key).and_then(Weak::upgrade) {
            return Ok(image);
        }
        open.retain(|_, image| image.strong_count() > 0);
        let image = Arc::new(image);
        open.insert(key, Arc::downgrade(&image));
        Ok(image)
    }
}

impl Images {
    /// The images that devices and exports use now.
    #[must_use]
    pub fn in_use(&self) -> Vec<Arc<Image>> {
        self.open.lock().values().filter_map(Weak::upgrade).collect()
    }
}

/// The source layer's view of how an image is reached.
#[must_use]
pub fn source_access(access: &SourceAccess) -> Access {
    let default = Access::default();
    Access {
        plain_http: access.plain_http,
        docker_config: access.docker_config.clone(),
        hosts_dir: access.hosts_dir.clone().unwrap_or_else(|| default.hosts_dir.clone()),
        blobs: access.blobs.clone(),
        ..default
    }
}

/// Where the verified indexes of the root directory `root` are.
#[must_use]
pub fn index_cache(root: &Path) -> PathBuf {
    root.join("index")
}
