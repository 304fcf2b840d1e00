//! Plain HTTP: a server that has the blobs of an OCI layout as files, such as a CDN.

use reqwest::Url;

use super::client::Client;
use super::hosts::Host;
use super::{range, wire};
use crate::error::{Error, Result};
use crate::index::Blob;
use crate::source::{Access, Body, Source, SourceFuture, blob_path};

/// A directory on a web server.
pub struct Web {
    name: String,
    base: Url,
    client: Client,
}

impl Web {
    /// The directory at `url`; nothing is sent yet. `hosts.toml` of its host says of certificates and headers.
    ///
    /// # Errors
    /// A URL that is none, or settings of its host that are malformed.
    pub fn new(url: &str, access: &Access) -> Result<Self> {
        let base = Url::parse(&format!("{}/", url.trim_end_matches('/')))
            .ok()
            .filter(|base| matches!(base.scheme(), "http" | "https") && base.has_host());
        let base = base.ok_or_else(|| Error::invalid("place of blobs", format!("{url:?} is no URL")))?;
        let name = wire::shown(&base).trim_end_matches('/').to_owned();
        let client = Client::new(&Host::plain(&access.hosts_dir, &base)?, &name, access)?;
        Ok(Self { name, base, client })
    }
}

impl Source for Web {
    fn name(&self) -> &str {
        &self.name
    }

    fn host(&self) -> &str {
        self.client.host()
    }

    fn read_at<'a>(&'a self, blob: &'a Blob, offset: u64, len: u64) -> SourceFuture<'a, Body> {
        Box::pin(async move {
            let path = blob_path(&blob.digest);
            let url = self.base.join(&path).map_err(|error| Error::invalid("path of a blob", error.to_string()))?;
            range::read(&self.client, url, "", blob, offset, len).await
        })
    }
}
