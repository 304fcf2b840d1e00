//! Pushing: blobs by one upload each, then the manifest (distribution-spec, "Push").

use bytes::Bytes;
use reqwest::header::{CONTENT_TYPE, HeaderValue, LOCATION};
use reqwest::{Method, Response, StatusCode, Url};

use super::client::Call;
use super::{Registry, retry};
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::source::{Content, Publish};

impl Registry {
    /// Uploads a blob unless it is there.
    pub(in crate::source) async fn push_blob(&self, digest: &Digest, bytes: u64, content: &Content) -> Result<()> {
        if self.exists(digest).await? {
            return Ok(());
        }
        retry(self.tries, || async {
            let start = self.uploads_call(digest, &self.scope)?;
            let response = self.client.send(&start, |status| status == StatusCode::ACCEPTED).await?;
            let mut url = self.upload_url(&start.url, &response)?;
            url.query_pairs_mut().append_pair("digest", &digest.to_string());
            let mut put = Call::new(Method::PUT, url, format!("upload of blob {digest}"), &self.scope);
            put.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
            put.content = Some((content.clone(), bytes));
            self.client.send(&put, |status| status == StatusCode::CREATED).await.map(drop)
        })
        .await
    }

    /// Asks the registry to take a blob over from another of its repositories; says whether it did.
    pub(in crate::source) async fn mount_blob(&self, digest: &Digest, other: &Self) -> Result<bool> {
        if self.exists(digest).await? {
            return Ok(true);
        }
        if self.reference.host != other.reference.host {
            return Ok(false);
        }
        let from = &other.reference.repository;
        let mut call = self.uploads_call(digest, &format!("{} repository:{from}:pull", self.scope))?;
        call.url.query_pairs_mut().append_pair("mount", &digest.to_string()).append_pair("from", from);
        // 202 opens an ordinary upload instead, which the registry forgets when nothing comes.
        let accept = |status| matches!(status, StatusCode::CREATED | StatusCode::ACCEPTED);
        match self.client.send(&call, accept).await {
            Ok(response) => Ok(response.status() == StatusCode::CREATED),
            // Some registries answer with an error where they don't mount; pushing will tell what it is.
            Err(Error::Refused { .. } | Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Adds a manifest or an image index.
    pub(in crate::source) async fn push_manifest(
        &self,
        bytes: &[u8],
        media_type: &str,
        publish: Publish,
    ) -> Result<Digest> {
        let digest = Digest::of(bytes);
        if self.reference.digest.is_some_and(|expected| publish == Publish::Named && expected != digest) {
            return Err(Error::invalid(
                format!("destination {}", self.reference),
                format!("the image has the digest {digest}: name the destination by a tag"),
            ));
        }
        let manifest_name = match publish {
            Publish::Named => self.reference.manifest_name(),
            Publish::Listed => digest.to_string(),
        };
        let url = self.client.url(&format!("{}/manifests/{manifest_name}", self.reference.repository))?;
        let mut call = Call::new(Method::PUT, url, format!("manifest {manifest_name}"), &self.scope);
        let kind = HeaderValue::try_from(media_type);
        call.headers.insert(CONTENT_TYPE, kind.map_err(|error| Error::invalid("media type", error.to_string()))?);
        call.content = Some((Content::Bytes(Bytes::copy_from_slice(bytes)), bytes.len() as u64));
        let response = retry(self.tries, || self.client.send(&call, |status| status == StatusCode::CREATED)).await?;
        let stored = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        match stored {
            Some(stored) if stored != digest.to_string() => {
                Err(self.refused(format!("manifest {manifest_name}"), format!("it stored it as {stored:.100}")))
            }
            _ => Ok(digest),
        }
    }

    fn uploads_call(&self, digest: &Digest, scope: &str) -> Result<Call> {
        let url = self.client.url(&format!("{}/blobs/uploads/", self.reference.repository))?;
        let mut call = Call::new(Method::POST, url, format!("upload of blob {digest}"), scope);
        call.content = Some((Content::Bytes(Bytes::new()), 0));
        Ok(call)
    }

    fn upload_url(&self, start: &Url, response: &Response) -> Result<Url> {
        let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let url = location.and_then(|location| start.join(location).ok());
        url.filter(|url| url.scheme() == "https" || url.scheme() == start.scheme())
            .ok_or_else(|| self.refused("an upload".to_owned(), "it does not say where to upload to".to_owned()))
    }

    fn refused(&self, what: String, reason: String) -> Error {
        Error::Refused { source_name: self.name.clone(), what, reason }
    }
}
