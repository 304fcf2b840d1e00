//! Further places of blobs: web servers and object stores that hold a copy of an OCI layout.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Access, Layout, Source};
use crate::chunk::Digest;
use crate::error::Result;
use crate::oci::Reference;

/// What the URL of a directory begins with.
const FILE: &str = "file://";

/// Most places that are kept.
const MAX_PLACES: usize = 32;

/// A place of blobs: `URL`, or `HOST/REPOSITORY=URL` for the images below that alone.
///
/// URL is `http://` or `https://`, or an object store's: `s3://BUCKET/PATH`, `gs://BUCKET/PATH`,
/// `azure://CONTAINER/PATH`, or `file:///PATH` for a directory on this machine. Below it are the blobs as in an OCI layout: `blobs/sha256/HEX`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BlobPlace {
    /// Which images it is for: the beginning of their names, whole components; empty: all.
    of: String,
    url: String,
}

impl FromStr for BlobPlace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // A URL may have a `=` as well, but behind its scheme.
        let scheme = text.find("://").ok_or_else(|| format!("{text:?} is no URL such as s3://bucket/path"))?;
        let (of, url) = match text.get(..scheme).and_then(|head| head.split_once('=')) {
            Some((of, _)) => (of, text.get(of.len() + 1..).unwrap_or_default()),
            None => ("", text),
        };
        let kind = url.split("://").next().unwrap_or_default();
        if !matches!(kind, "http" | "https" | "s3" | "gs" | "azure" | "file") {
            return Err(format!("{url:?} is no place of blobs: write http, https, s3, gs, azure or file"));
        }
        Ok(Self { of: of.trim_matches('/').to_owned(), url: url.to_owned() })
    }
}

impl TryFrom<String> for BlobPlace {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<BlobPlace> for String {
    fn from(place: BlobPlace) -> Self {
        place.to_string()
    }
}

impl fmt::Display for BlobPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.of.is_empty() { f.write_str(&self.url) } else { write!(f, "{}={}", self.of, self.url) }
    }
}

impl BlobPlace {
    /// The directory `dir` of this machine, for all images.
    #[must_use]
    pub fn local(dir: &Path) -> Self {
        Self { of: String::new(), url: format!("{FILE}{}", dir.display()) }
    }

    /// Whether it is for the image `name` (host and repository).
    fn serves(&self, name: &str) -> bool {
        match name.strip_prefix(self.of.as_str()) {
            Some(rest) => self.of.is_empty() || rest.is_empty() || rest.starts_with('/'),
            None => false,
        }
    }

    fn open(&self, access: &Access) -> Result<Arc<dyn Source>> {
        if let Some(dir) = self.url.strip_prefix(FILE) {
            return Ok(Arc::new(Layout::blobs_of(Path::new(dir))));
        }
        if self.url.starts_with("http") {
            #[cfg(feature = "registry")]
            return Ok(Arc::new(super::Web::new(&self.url, access)?));
        }
        #[cfg(feature = "objects")]
        return Ok(Arc::new(super::Objects::new(&self.url, access)?));
        #[cfg(not(feature = "objects"))]
        {
            let _ = access;
            Err(crate::error::Error::Unsupported(format!(
                "{}: this program was built without the feature `objects`",
                self.url
            )))
        }
    }
}

/// The places that `access` names for the image of `reference`, in their order.
///
/// # Errors
/// A place that can't be used, for what it says of itself.
pub fn open_places(reference: &Reference, access: &Access) -> Result<Vec<Arc<dyn Source>>> {
    let name = match reference {
        Reference::Registry(reference) => format!("{}/{}", reference.host, reference.repository),
        other => other.to_string(),
    };
    let places = access.blobs.iter().filter(|place| place.serves(&name)).take(MAX_PLACES);
    places.map(|place| place.open(access)).collect()
}

/// Where a blob is in an OCI layout.
#[cfg_attr(not(any(feature = "registry", feature = "objects")), allow(dead_code))]
pub(super) fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_place_is_for_the_images_that_it_names() {
        let place: BlobPlace = "r.example/team=s3://bucket/a=b".parse().unwrap();
        assert_eq!((place.of.as_str(), place.url.as_str()), ("r.example/team", "s3://bucket/a=b"));
        assert!(place.serves("r.example/team/app") && place.serves("r.example/team"));
        assert!(!place.serves("r.example/teams/app") && !place.serves("other/r.example/team"));
        assert_eq!(place.to_string().parse(), Ok(place));
        let all: BlobPlace = "https://cdn.example/x?a=b".parse().unwrap();
        assert!(all.serves("r.example/app") && all.of.is_empty());
        let local: BlobPlace = "file:///var/lib/x".parse().unwrap();
        assert_eq!(local, BlobPlace::local(Path::new("/var/lib/x")));
        for text in ["", "bucket", "ftp://x", "a=b", "a=://"] {
            assert!(text.parse::<BlobPlace>().is_err(), "{text}");
        }
    }
}
