//! Sources: where stored bytes come from. Untrusted: nothing that a source says is believed before it is verified.

pub(crate) mod files;
mod layout;
#[cfg(feature = "objects")]
mod objects;
mod places;
#[cfg(feature = "registry")]
mod registry;
mod repository;

use std::future::Future;
use std::pin::Pin;

use bytes::Bytes;
use futures_util::Stream;

use crate::error::Result;
use crate::index::Blob;

pub use layout::Layout;
#[cfg(feature = "objects")]
pub use objects::Objects;
#[cfg(any(feature = "registry", feature = "objects"))]
use places::blob_path;
pub use places::{BlobPlace, open_places};
#[cfg(feature = "registry")]
pub use registry::{Connections, Registry, Web};
pub use repository::{Access, Content, Publish, Purpose, RawDocument, Repository};

/// The body of a ranged read: pieces as they arrive. Ends after exactly the bytes asked for, or with an error.
pub type Body = Pin<Box<dyn Stream<Item = Result<Bytes>> + Send>>;

/// A future that a source returns.
pub type SourceFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// A place that has an image's blobs: a registry repository, an OCI layout.
pub trait Source: Send + Sync {
    /// For people: `registry.example/team/app`, `oci:/path`. Errors and events name the source by it.
    fn name(&self) -> &str;

    /// What its requests share with other sources of the same name: a host, a disk.
    fn host(&self) -> &str {
        self.name()
    }

    /// Whether others stand before it to spare it, as mirrors before their registry: it is asked when they can't answer, and
    /// not when they are slow.
    fn is_spared(&self) -> bool {
        false
    }

    /// Starts to read `len` stored bytes from `offset` of `blob`.
    ///
    /// The implementation checks that the answer is the range that was asked for (a server that sends 200 for 206,
    /// another range or too few bytes is an error), and bounds the time it waits without progress.
    ///
    /// # Errors
    /// [`Error::Unreachable`](crate::Error::Unreachable) when another try may help,
    /// [`Error::Refused`](crate::Error::Refused) and [`Error::NotFound`](crate::Error::NotFound) when not.
    fn read_at<'a>(&'a self, blob: &'a Blob, offset: u64, len: u64) -> SourceFuture<'a, Body>;
}
