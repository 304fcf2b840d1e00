//! Registries.
use super::{Access, Body, Content, Purpose, RawDocument, Source, SourceFuture};
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::index::Blob;
use crate::oci::RegistryReference;
/// A repository in a registry.
pub struct Registry {
    name: String,
}
impl Registry {
    pub(super) fn new(reference: &RegistryReference, _access: &Access, _purpose: Purpose) -> Result<Self> {
        Ok(Self { name: reference.to_string() })
    }
    pub(super) async fn manifest(&self, _digest: Option<&Digest>) -> Result<RawDocument> {
        not_yet()
    }
    pub(super) async fn mount_blob(&self, _digest: &Digest, _other: &Self) -> Result<bool> {
        not_yet()
    }

    pub(super) async fn manifest_by_digest(&self, _digest: &Digest) -> Result<RawDocument> {
        not_yet()
    }
    pub(super) async fn exists(&self, _digest: &Digest) -> Result<bool> {
        not_yet()
    }
    pub(super) async fn push_blob(&self, _digest: &Digest, _bytes: u64, _content: &Content) -> Result<()> {
        not_yet()
    }
    pub(super) async fn push_manifest(&self, _bytes: &[u8], _media_type: &str, _tag: Option<&str>) -> Result<Digest> {
        not_yet()
    }
}
impl Source for Registry {
    fn name(&self) -> &str {
        &self.name
    }
    fn read_at<'a>(&'a self, _blob: &'a Blob, _offset: u64, _len: u64) -> SourceFuture<'a, Body> {
        Box::pin(async { not_yet() })
    }
}
fn not_yet<T>() -> Result<T> {
    Err(Error::Unsupported("not there yet".to_owned()))
}
