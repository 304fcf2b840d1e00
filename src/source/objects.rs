//! Object stores: S3, Google Cloud Storage, Azure, and what speaks like them, holding a copy of an OCI layout.
//!
//! Credentials, endpoint and region are where the cloud's own tools look for them: environment variables (`AWS_…`,
//! `GOOGLE_…`, `AZURE_…`) and the machine's metadata service.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::path::Path;
use object_store::{ClientConfigKey, GetOptions, ObjectStore, RetryConfig};

use super::{Access, Body, Source, SourceFuture, blob_path};
use crate::error::{Error, Result};
use crate::index::Blob;

/// A bucket or container, and a path in it.
pub struct Objects {
    name: String,
    host: String,
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    answer: Duration,
    stall: Duration,
}

impl Objects {
    /// What `url` names; nothing is sent yet.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a URL or an environment that does not say what is needed.
    pub fn new(url: &str, access: &Access) -> Result<Self> {
        let invalid = |error: object_store::Error| Error::invalid(format!("object store {url}"), error.to_string());
        let (kind, rest) = url.split_once("://").unwrap_or_default();
        let (bucket, path) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = Path::parse(path.trim_matches('/'))
            .map_err(|error| Error::invalid(format!("object store {url}"), error.to_string()))?;
        // Tries are the fetcher's: it knows how long readers wait, and of other sources.
        let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let options = [
            (ClientConfigKey::ConnectTimeout, format!("{} ms", access.connect.as_millis())),
            // A timeout of the whole answer would cut off what is slow and moves.
            (ClientConfigKey::Timeout, "1 day".to_owned()),
        ];
        let store: Arc<dyn ObjectStore> = match kind {
            "s3" => {
                let builder = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(retry);
                let with =
                    |builder: AmazonS3Builder, (key, value)| builder.with_config(AmazonS3ConfigKey::Client(key), value);
                Arc::new(options.into_iter().fold(builder, with).build().map_err(invalid)?)
            }
            "gs" => {
                let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket).with_retry(retry);
                let with = |builder: GoogleCloudStorageBuilder, (key, value)| {
                    builder.with_config(GoogleConfigKey::Client(key), value)
                };
                Arc::new(options.into_iter().fold(builder, with).build().map_err(invalid)?)
            }
            _ => {
                let builder = MicrosoftAzureBuilder::from_env().with_container_name(bucket).with_retry(retry);
                let with = |builder: MicrosoftAzureBuilder, (key, value)| {
                    builder.with_config(AzureConfigKey::Client(key), value)
                };
                Arc::new(options.into_iter().fold(builder, with).build().map_err(invalid)?)
            }
        };
        Ok(Self {
            name: url.trim_end_matches('/').to_owned(),
            host: format!("{kind}://{bucket}"),
            store,
            prefix,
            answer: access.connect + access.stall,
            stall: access.stall,
        })
    }

    async fn range(&self, blob: &Blob, offset: u64, len: u64) -> Result<Body> {
        let end = offset.checked_add(len).filter(|&end| end <= blob.bytes);
        let end = end.ok_or_else(|| {
            let reason = format!("{len} bytes from {offset} are not inside a blob of {} bytes", blob.bytes);
            Error::invalid("range", reason)
        })?;
        let path: Path = self.prefix.parts().chain(Path::from(blob_path(&blob.digest)).parts()).collect();
        let what = format!("bytes {offset} to {} of blob {}", end.saturating_sub(1), blob.digest);
        let options = GetOptions { range: Some((offset..end).into()), ..GetOptions::default() };
        let answer = tokio::time::timeout(self.answer, self.store.get_opts(&path, options)).await;
        let answer = answer
            .map_err(|_| Error::unreachable(&self.name, format!("no answer within {:?}", self.answer)))?
            .map_err(|error| error_of(&error, &self.name, &what))?;
        if answer.range != (offset..end) || answer.meta.size != blob.bytes {
            let reason = format!("it answered with bytes {:?} of {}", answer.range, answer.meta.size);
            return Err(Error::Refused { source_name: self.name.clone(), what, reason });
        }
        let state = (answer.into_stream(), len, self.name.clone(), self.stall);
        Ok(Box::pin(futures_util::stream::try_unfold(state, |(mut pieces, left, name, stall)| async move {
            if left == 0 {
                return Ok(None);
            }
            let piece = match tokio::time::timeout(stall, pieces.next()).await {
                Err(_) => return Err(Error::unreachable(name, format!("nothing within {stall:?}: it has stalled"))),
                Ok(None) => return Err(Error::unreachable(name, format!("the answer ended {left} bytes early"))),
                Ok(Some(Err(error))) => return Err(error_of(&error, &name, "a blob")),
                Ok(Some(Ok(piece))) => piece,
            };
            let Some(left) = left.checked_sub(piece.len() as u64) else {
                let (what, reason) = ("a blob".to_owned(), "it answered with more bytes than asked for".to_owned());
                return Err(Error::Refused { source_name: name, what, reason });
            };
            Ok(Some((piece, (pieces, left, name, stall))))
        })))
    }
}

fn error_of(error: &object_store::Error, name: &str, what: &str) -> Error {
    let (source_name, what) = (name.to_owned(), what.to_owned());
    let reason: String = error.to_string().chars().filter(|c| !c.is_control()).take(300).collect();
    match error {
        object_store::Error::NotFound { .. } => Error::NotFound { source_name, what },
        object_store::Error::PermissionDenied { .. }
        | object_store::Error::Unauthenticated { .. }
        | object_store::Error::InvalidPath { .. } => Error::Refused { source_name, what, reason },
        _ => Error::Unreachable { source_name, reason },
    }
}

impl Source for Objects {
    fn name(&self) -> &str {
        &self.name
    }

    fn host(&self) -> &str {
        &self.host
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
