//! Registries: a client for the OCI distribution protocol (distribution-spec v1.1) that reads blobs by range.
//!
//! Control plane and Range reads share one client, because they need the same tokens, and because redirects have to be
//! followed by hand: a blob often comes from object storage, which must not see the registry's credentials.

mod auth;
mod challenge;
mod client;
mod credentials;
mod hosts;
mod push;
mod redirects;
mod wire;

use reqwest::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, Response, StatusCode};

use self::client::{Call, Client};
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
}

impl Registry {
    /// A client for what `reference` names; nothing is sent yet.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a host that is none, [`Error::Unreachable`] when TLS can't be set up.
    pub fn new(reference: &RegistryReference, access: &Access, purpose: Purpose) -> Result<Self> {
        let name = format!("{}/{}", reference.host, reference.repository);
        let actions = match purpose {
            Purpose::Read => "pull",
            Purpose::Push => "pull,push",
        };
        let scope = format!("repository:{}:{actions}", reference.repository);
        let client = Client::new(&reference.host, &name, access)?;
        Ok(Self { reference: reference.clone(), name, scope, client })
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
        let (headers, bytes) = retry(|| async {
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
        match retry(|| self.client.send(&call, |status| status == StatusCode::OK)).await {
            Ok(_) => Ok(true),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn range(&self, blob: &Blob, offset: u64, len: u64) -> Result<Body> {
        let last = offset.checked_add(len).filter(|&end| len > 0 && end <= blob.bytes).map(|end| end - 1);
        let last = last.ok_or_else(|| {
            Error::invalid(
                "range",
                format!("{len} bytes from {offset} are not inside blob {} of {} bytes", blob.digest, blob.bytes),
            )
        })?;
        let what = format!("bytes {offset} to {last} of blob {}", blob.digest);
        let url = self.client.url(&format!("{}/blobs/{}", self.reference.repository, blob.digest))?;
        let mut call = Call::new(Method::GET, url, what.clone(), &self.scope);
        call.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let range = HeaderValue::try_from(format!("bytes={offset}-{last}"));
        call.headers.insert(RANGE, range.map_err(|error| Error::invalid("range", error.to_string()))?);
        let response = self.client.send(&call, |status| status.is_success()).await?;
        check_range_answer(&response, blob, offset, len).map_err(|reason| {
            self.client.forget_redirect(&call);
            Error::Refused { source_name: self.name.clone(), what, reason }
        })?;
        Ok(wire::body(response, len, self.name.clone(), self.client.timeouts()))
    }
}

impl Source for Registry {
    fn name(&self) -> &str {
        &self.name
    }

    fn read_at<'a>(&'a self, blob: &'a Blob, offset: u64, len: u64) -> SourceFuture<'a, Body> {
        Box::pin(async move {
            if len == 0 {
                return Ok(Box::pin(futures_util::stream::empty()) as Body);
            }
            self.range(blob, offset, len).await
        })
    }
}

/// Checks that the head of an answer promises exactly the range that was asked for (RFC 9110, section 15.3.7).
fn check_range_answer(response: &Response, blob: &Blob, offset: u64, len: u64) -> Result<(), String> {
    let headers = response.headers();
    match response.status() {
        StatusCode::PARTIAL_CONTENT => {
            let found = content_range(headers).ok_or("it answered 206 without a valid Content-Range")?;
            if found.first != offset || found.last.checked_sub(offset) != Some(len - 1) {
                return Err(format!("it answered with bytes {} to {}", found.first, found.last));
            }
            if found.total.is_some_and(|total| total != blob.bytes) {
                return Err(format!("its blob has {:?} bytes, not {}", found.total, blob.bytes));
            }
        }
        StatusCode::OK if offset == 0 && len == blob.bytes => {}
        StatusCode::OK => return Err("it ignores Range: it answered 200 with the whole blob".to_owned()),
        status => return Err(format!("it answered {status}")),
    }
    match wire::content_length(headers) {
        Some(bytes) if bytes != len => Err(format!("it announces {bytes} bytes where {len} were asked for")),
        _ => Ok(()),
    }
}

struct ContentRange {
    first: u64,
    last: u64,
    total: Option<u64>,
}

/// `Content-Range: bytes FIRST-LAST/TOTAL`, where the total may be `*`.
fn content_range(headers: &HeaderMap) -> Option<ContentRange> {
    let (range, total) = headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    Some(ContentRange { first: first.trim().parse().ok()?, last: last.trim().parse().ok()?, total })
}

/// Tries again, a few times, what failed for a cause that may pass.
async fn retry<T, F: Future<Output = Result<T>>>(mut attempt: impl FnMut() -> F) -> Result<T> {
    let mut pause = std::time::Duration::from_millis(200);
    for _ in 1..TRIES {
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
