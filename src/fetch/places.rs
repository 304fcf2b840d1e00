//! The places that have an image: mirrors before their registry, asked one after the other.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::oci::Reference;
use crate::source::{Access, RawDocument, Repository, Source};

/// Where an image is, best first.
pub(crate) struct Places(Vec<Arc<Repository>>);

impl Places {
    /// All places to read what `reference` names from.
    ///
    /// # Errors
    /// As of [`Repository::open_all`].
    pub async fn open(reference: &Reference, access: &Access) -> Result<Self> {
        Ok(Self(Repository::open_all(reference, access).await?.into_iter().map(Arc::new).collect()))
    }

    /// They as sources of chunks.
    pub fn sources(self) -> Vec<Arc<dyn Source>> {
        self.0.into_iter().map(|place| place as Arc<dyn Source>).collect()
    }

    /// What the reference names: of the places that may be asked for that.
    ///
    /// # Errors
    /// As of [`Repository::manifest`], the last place's.
    pub async fn manifest(&self) -> Result<RawDocument> {
        let may = self.0.iter().filter(|place| place.resolves());
        first(may, |place| async move { place.manifest().await }).await
    }

    /// Asks one place after the other until one has the right answer.
    ///
    /// # Errors
    /// The last place's.
    pub async fn ask<T, F: Future<Output = Result<T>>>(&self, ask: impl Fn(Arc<Repository>) -> F) -> Result<T> {
        first(self.0.iter(), ask).await
    }
}

/// The first good answer, or else the last place's error: that is the registry itself.
async fn first<'a, T, F: Future<Output = Result<T>>>(
    places: impl Iterator<Item = &'a Arc<Repository>>,
    ask: impl Fn(Arc<Repository>) -> F,
) -> Result<T> {
    let mut earlier: Option<Error> = None;
    for place in places {
        if let Some(error) = earlier.take() {
            tracing::warn!(%error, "asking {} instead", place.name());
        }
        match ask(Arc::clone(place)).await {
            Ok(answer) => return Ok(answer),
            Err(error) => earlier = Some(error),
        }
    }
    Err(earlier.unwrap_or_else(|| Error::unreachable("the image", "it has no source")))
}
