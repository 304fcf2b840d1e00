//! Registries: a client for the OCI distribution protocol (distribution-spec v1.1) that reads blobs by range.
//!
//! Control plane and Range reads share one client, because they need the same tokens, and because redirects have to be
//! followed by hand: a blob often comes from object storage, which must not see the registry's credentials.

mod auth;
mod challenge;
mod client;
mod connections;
mod credentials;
mod hosts;
mod http;
mod push;
mod range;
mod redirects;
mod web;
mod wire;

use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, StatusCode};

use self::client::{Call, Client};
pub use self::connections::Connections;
use self::hosts::{Capability, Host};
pub use self::web::Web;
use super::{Access, Body, Purpose, RawDocument, Source, SourceFuture};
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::index::Blob;
use crate::oci::{MAX_DOCUMENT_BYTES, RegistryReference, media_type};

/// Tries of a request that must not fail for a passing cause; the fetcher has its own, longer patience.
const TRIES: u32 = 3;

/// A repository in a registry.
pub struct Registry {
    reference: RegistryReference,
    name: String,
    scope: String,
    client: Client,
    /// How often a request that must not fail is tried.
    tries: u32,
    resolves: bool,
    /// Whether it is a registry with mirrors before it.
    spared: bool,
}

impl Registry {
    /// A client for what `reference` names; nothing is sent yet.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a host that is none, or settings of it that are malformed; [`Error::Unreachable`] when TLS
    /// can't be set up.
    pub fn new(reference: &RegistryReference, access: &Access, purpose: Purpose) -> Result<Self> {
        let (server, _) = hosts(reference, access)?;
        Self::at(&server, reference, access, purpose, TRIES)
    }

    /// Clients to read what `reference` names: its registry's mirrors in their order, then the registry.
    ///
    /// # Errors
    /// As of [`new`](Self::new).
    pub fn with_mirrors(reference: &RegistryReference, access: &Access) -> Result<Vec<Self>> {
        let (server, mirrors) = hosts(reference, access)?;
        let mut all = Vec::new();
        for mirror in mirrors.iter().filter(|mirror| mirror.can(Capability::Pull)) {
            // The next one is the second try.
            all.push(Self::at(mirror, reference, access, Purpose::Read, 1)?);
        }
        let spared = !all.is_empty();
        all.push(Self { resolves: true, spared, ..Self::at(&server, reference, access, Purpose::Read, TRIES)? });
        Ok(all)
    }

    fn at(host: &Host, reference: &RegistryReference, access: &Access, purpose: Purpose, tries: u32) -> Result<Self> {
        let name = format!("{}/{}", host.name, reference.repository);
        let actions = match purpose {
            Purpose::Read => "pull",
            Purpose::Push => "pull,push",
        };
        let scope = format!("repository:{}:{actions}", reference.repository);
        let client = Client::new(host, &name, access)?;
        let resolves = host.can(Capability::Resolve);
        Ok(Self { reference: reference.clone(), name, scope, client, tries, resolves, spared: false })
    }

    /// Whether it may be asked what a tag stands for.
    pub(super) fn resolves(&self) -> bool {
        self.resolves
    }

    /// The manifest that the reference names, or the one with `digest`.
    pub(super) async fn manifest(&self, digest: Option<&Digest>) -> Result<RawDocument> {
        let expected = digest.copied().or(self.reference.digest);
        let manifest_name = expected.map_or_else(|| self.reference.manifest_name(), |digest| digest.to_string());
        let what = format!("manifest {manifest_name}");
        let url = self.client.url(&format!("{}/manifests/{manifest_name}", self.reference.repository))?;
        let mut call = Call::new(Method::GET, url, what.clone(), &self.scope);
        for accepted in [media_type::MANIFEST, media_type::INDEX, media_type::DOCKER_MANIFEST, media_type::DOCKER_INDEX]
        {
            call.headers.append(ACCEPT, HeaderValue::from_static(accepted));
        }
        let (headers, bytes) = retry(self.tries, || async {
            let response = self.client.send(&call, |status| status == StatusCode::OK).await?;
            let headers = response.headers().clone();
            let body = wire::read_bounded(response, MAX_DOCUMENT_BYTES, &self.name, self.client.timeouts()).await?;
            Ok((headers, body))
        })
        .await?;
        let found = Digest::of(&bytes);
        let promised = headers.get("docker-content-digest").and_then(|value| value.to_str().ok()?.parse().ok());
        if let Some(expected) = expected.or(promised).filter(|expected| *expected != found) {
            let what = format!("{what} of {}", self.name);
            return Err(Error::invalid(what, format!("its bytes hash to {found}, not to {expected}")));
        }
        let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let media_type = kind.split(';').next().unwrap_or_default().trim().to_owned();
        Ok(RawDocument { bytes, digest: found, media_type })
    }

    /// Whether the blob is there.
    pub(super) async fn exists(&self, digest: &Digest) -> Result<bool> {
        let url = self.client.url(&format!("{}/blobs/{digest}", self.reference.repository))?;
        let call = Call::new(Method::HEAD, url, format!("blob {digest}"), &self.scope);
        match retry(self.tries, || self.client.send(&call, |status| status == StatusCode::OK)).await {
            Ok(_) => Ok(true),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Source for Registry {
    fn name(&self) -> &str {
        &self.name
    }

    fn host(&self) -> &str {
        self.client.host()
    }

    fn is_spared(&self) -> bool {
        self.spared
    }

    fn read_at<'a>(&'a self, blob: &'a Blob, offset: u64, len: u64) -> SourceFuture<'a, Body> {
        Box::pin(async move {
            let url = self.client.url(&format!("{}/blobs/{}", self.reference.repository, blob.digest))?;
            range::read(&self.client, url, &self.scope, blob, offset, len).await
        })
    }
}

/// The registry of `reference` and its mirrors.
fn hosts(reference: &RegistryReference, access: &Access) -> Result<(Host, Vec<Host>)> {
    Host::load(&access.hosts_dir, &reference.host, |host| {
        if access.plain_http || wire::is_loopback(host) { "http" } else { "https" }
    })
}

/// Tries again, `tries` times in all, what failed for a cause that may pass.
async fn retry<T, F: Future<Output = Result<T>>>(tries: u32, mut attempt: impl FnMut() -> F) -> Result<T> {
    let mut pause = std::time::Duration::from_millis(200);
    for _ in 1..tries {
        match attempt().await {
            Err(Error::Unreachable { source_name, reason }) => {
                tracing::debug!(source = source_name, reason, "trying again");
                tokio::time::sleep(pause).await;
                pause *= 4;
            }
            other => return other,
        }
    }
    attempt().await
}
