//! Blobs in containerd's content store.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use oci_spec::image::Descriptor;
use parking_lot::Mutex;
use tonic::{Code, Status};

use super::{Puller, Step, refused};
use crate::chunk::Digest;
use crate::daemon::control::Problem;
use crate::error::Error;
use crate::oci::{RegistryReference, descriptor_digest};
use crate::snapshot::wire::content::{self, WriteAction, WriteRequest, WriteResponse};
use crate::snapshot::wire::{FieldMask, Labels};
use crate::source::RawDocument;

/// How writing a blob ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Written {
    /// It was taken.
    Taken,
    /// It was there, and is the lease's as well from now on: nothing collects it meanwhile.
    There,
}

/// Why a blob was not written.
enum Unwritten {
    /// The registry's part.
    Source(Error),
    /// containerd's.
    Refused(Status),
}

impl Puller<'_> {
    /// Says in containerd where a blob came from, as its own client does.
    pub(super) fn source(&self) -> Labels {
        let RegistryReference { host, repository, .. } = &self.ask.pull.reference;
        let host = host.rsplit_once(':').map_or(host.as_str(), |(host, _)| host);
        [(format!("containerd.io/distribution.source.{host}"), repository.clone())].into()
    }

    pub(super) async fn keep(&self, document: &RawDocument, mut labels: Labels) -> Result<(), Problem> {
        labels.extend(self.source());
        self.write(&document.digest, Bytes::from(document.bytes.clone()), labels).await
    }

    /// Fetches a layer into containerd as it arrives.
    pub(super) async fn fetch(&self, layer: &Descriptor) -> Result<(), Problem> {
        let (digest, bytes) = (descriptor_digest(layer)?, layer.size());
        let failed = Mutex::new(None);
        let done = self.ask.patiently(|| async {
            match self.stream(&digest, bytes).await {
                Err(Unwritten::Refused(status)) => Err(status),
                Err(Unwritten::Source(error)) => {
                    *failed.lock() = Some(error);
                    Ok(())
                }
                Ok(()) => Ok(()),
            }
        });
        done.await.map_err(refused)?;
        match failed.into_inner() {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    async fn stream(&self, digest: &Digest, bytes: u64) -> Result<(), Unwritten> {
        let body = self.places.ask(|place| async move { place.blob(digest, bytes).await });
        let body = body.await.map_err(Unwritten::Source)?;
        let broken = Arc::new(Mutex::new(None));
        let whole = WriteRequest {
            r#ref: format!("firstread-{digest}"),
            total: i64::try_from(bytes).unwrap_or(i64::MAX),
            expected: digest.to_string(),
            ..WriteRequest::default()
        };
        let (piece, failed, tell) = (whole.clone(), Arc::clone(&broken), Arc::clone(self.ask.tell));
        let pieces = body.scan(0i64, move |offset, data| {
            let at = *offset;
            let next = match data {
                Ok(data) => {
                    *offset += i64::try_from(data.len()).unwrap_or_default();
                    tell(Step::Received(data.len() as u64));
                    let action = WriteAction::Write.into();
                    Some(WriteRequest { action, offset: at, data, ..piece.clone() })
                }
                Err(error) => {
                    *failed.lock() = Some(error);
                    None
                }
            };
            std::future::ready(next)
        });
        let (action, offset, labels) = (WriteAction::Commit.into(), whole.total, self.source());
        let commit = WriteRequest { action, offset, labels, ..whole };
        let sent = self.send(pieces.chain(futures_util::stream::iter([commit]))).await;
        if let Some(error) = broken.lock().take() {
            return Err(Unwritten::Source(error));
        }
        sent.map_err(Unwritten::Refused)?;
        self.received.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }

    /// Writes a small blob. Of one that is there the labels are changed.
    pub(super) async fn write(&self, digest: &Digest, data: Bytes, labels: Labels) -> Result<(), Problem> {
        let request = WriteRequest {
            action: WriteAction::Commit.into(),
            r#ref: format!("firstread-{digest}"),
            total: i64::try_from(data.len()).unwrap_or(i64::MAX),
            expected: digest.to_string(),
            data,
            labels: labels.clone(),
            ..WriteRequest::default()
        };
        let send = || self.send(futures_util::stream::iter([request.clone()]));
        match self.ask.patiently(send).await.map_err(refused)? {
            Written::Taken => Ok(()),
            Written::There => self.relabel(digest, labels).await,
        }
    }

    /// Sends requests of one blob.
    async fn send(
        &self,
        requests: impl futures_util::Stream<Item = WriteRequest> + Send + 'static,
    ) -> Result<Written, Status> {
        let sent = async {
            let mut answers = self.ask.api.talk::<_, WriteResponse>(content::SERVICE, "Write", requests).await?;
            while answers.message().await?.is_some() {}
            Ok(())
        };
        match sent.await {
            Ok(()) => Ok(Written::Taken),
            Err(status) if Status::code(&status) == Code::AlreadyExists => Ok(Written::There),
            Err(status) => Err(status),
        }
    }

    /// Whether containerd has a blob of so many bytes. It is asked as a writer asks, since only what it answers then is the
    /// lease's: what an earlier pull left could be collected at any moment.
    pub(super) async fn has(&self, digest: &Digest, bytes: u64) -> Result<bool, Problem> {
        let request = WriteRequest {
            action: WriteAction::Stat.into(),
            r#ref: format!("firstread-{digest}"),
            total: i64::try_from(bytes).unwrap_or(i64::MAX),
            expected: digest.to_string(),
            ..WriteRequest::default()
        };
        let send = || self.send(futures_util::stream::iter([request.clone()]));
        Ok(self.ask.patiently(send).await.map_err(refused)? == Written::There)
    }

    pub(super) async fn relabel(&self, digest: &Digest, labels: Labels) -> Result<(), Problem> {
        let paths = labels.keys().map(|name| format!("labels.{name}")).collect();
        let info = content::Info { digest: digest.to_string(), labels, ..content::Info::default() };
        let request = content::UpdateRequest { info: Some(info), update_mask: Some(FieldMask { paths }) };
        let done: Result<content::InfoResponse, _> = self.ask.api.call(content::SERVICE, "Update", request).await;
        done.map(drop).map_err(refused)
    }
}
