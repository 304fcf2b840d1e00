//! Documents: manifests, image indexes and configs, size-checked and parsed.

use std::fmt;
use std::str::FromStr;

use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest};
use serde::Serialize;

use crate::chunk::Digest;
use crate::error::{Error, Result};

/// Largest manifest or image index that is read, in bytes (distribution-spec: registries accept at least 4 MiB).
pub const MAX_DOCUMENT_BYTES: u64 = 4 << 20;
/// Largest config that is read, in bytes.
pub const MAX_CONFIG_BYTES: u64 = 8 << 20;
/// Most descriptors in one document.
const MAX_DESCRIPTORS: usize = 10_000;

/// Media types by their names on the wire.
pub mod media_type {
    /// OCI image manifest.
    pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// OCI image index.
    pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// Docker image manifest, version 2 schema 2.
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    /// Docker manifest list.
    pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    /// OCI image config.
    pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    /// OCI layer, zstd.
    pub const LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
}

/// A parsed manifest or image index.
#[derive(Clone, Debug)]
pub enum Document {
    /// One image.
    Manifest(Box<ImageManifest>),
    /// Several images, one for each platform.
    Index(Box<ImageIndex>),
}

impl Document {
    /// Parses `bytes`, which a source calls a `media_type`; when it says nothing useful, the document decides.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is too large, malformed, or neither a manifest nor an index of OCI or docker v2.
    pub fn parse(bytes: &[u8], media_type: &str) -> Result<Self> {
        check_size("manifest", bytes, MAX_DOCUMENT_BYTES)?;
        let (is_manifest, is_index) = match media_type {
            media_type::MANIFEST | media_type::DOCKER_MANIFEST => (true, false),
            media_type::INDEX | media_type::DOCKER_INDEX => (false, true),
            _ => Self::guess(bytes)?,
        };
        let invalid = |error: serde_json::Error| Error::invalid("manifest", error.to_string());
        if is_index {
            let index: ImageIndex = serde_json::from_slice(bytes).map_err(invalid)?;
            check_count(index.manifests().len())?;
            return Ok(Self::Index(Box::new(index)));
        }
        if is_manifest {
            let manifest: ImageManifest = serde_json::from_slice(bytes).map_err(invalid)?;
            check_count(manifest.layers().len())?;
            return Ok(Self::Manifest(Box::new(manifest)));
        }
        Err(Error::Unsupported(format!(
            "a manifest of type {media_type:?}: firstread reads OCI and docker version 2 images"
        )))
    }

    fn guess(bytes: &[u8]) -> Result<(bool, bool)> {
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Shape {
            media_type: Option<String>,
            config: Option<serde::de::IgnoredAny>,
            manifests: Option<serde::de::IgnoredAny>,
        }
        let shape: Shape =
            serde_json::from_slice(bytes).map_err(|error| Error::invalid("manifest", error.to_string()))?;
        Ok(match shape.media_type.as_deref() {
            Some(media_type::MANIFEST | media_type::DOCKER_MANIFEST) => (true, false),
            Some(media_type::INDEX | media_type::DOCKER_INDEX) => (false, true),
            _ => (shape.config.is_some() && shape.manifests.is_none(), shape.manifests.is_some()),
        })
    }

    /// The entry of an image index for `platform`. An index with a single image and no platforms is taken as it is.
    ///
    /// # Errors
    /// [`Error::NotFound`] that lists the platforms there are.
    pub fn pick<'a>(index: &'a ImageIndex, platform: &Platform, source_name: &str) -> Result<&'a Descriptor> {
        let of = |descriptor: &Descriptor| descriptor.platform().as_ref().map(Platform::from);
        let images = || {
            // Attestations of buildkit are listed as platform unknown/unknown.
            index.manifests().iter().filter(|entry| of(entry).is_none_or(|platform| platform.os != "unknown"))
        };
        let exact = images().find(|entry| of(entry).is_some_and(|found| found == *platform));
        let close = || images().find(|entry| of(entry).is_some_and(|found| found.runs(platform)));
        let only = || match (images().next(), images().nth(1)) {
            (Some(entry), None) if entry.platform().is_none() => Some(entry),
            _ => None,
        };
        exact.or_else(close).or_else(only).ok_or_else(|| {
            let there: Vec<String> = images().take(32).filter_map(|entry| of(entry).map(|p| p.to_string())).collect();
            Error::NotFound {
                source_name: source_name.to_owned(),
                what: format!("an image for {platform} (there are: {})", there.join(", ")),
            }
        })
    }
}

/// A platform, written `OS/ARCHITECTURE[/VARIANT]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Platform {
    /// GOOS.
    pub os: String,
    /// GOARCH.
    pub architecture: String,
    /// E.g. `v7` for arm.
    pub variant: Option<String>,
}

impl Platform {
    /// The platform that this program runs on.
    #[must_use]
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            "loongarch64" => "loong64",
            "x86" => "386",
            other => other,
        };
        Self { os: "linux".to_owned(), architecture: architecture.to_owned(), variant: None }
    }

    /// Whether an image for this platform is acceptable where `wanted` was asked for: equal except for a variant that
    /// was not asked for, or is the architecture's only one (arm64 is arm64/v8).
    fn runs(&self, wanted: &Self) -> bool {
        let variant = wanted.variant.is_none()
            || (self.architecture == "arm64" && self.variant.is_none() && wanted.variant.as_deref() == Some("v8"));
        self.os == wanted.os && self.architecture == wanted.architecture && variant
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

impl FromStr for Platform {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let word = |part: &&str| {
            !part.is_empty()
                && part.len() <= 32
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'.')
        };
        let parts: Vec<&str> = text.splitn(4, '/').collect();
        match parts.as_slice() {
            [os, architecture, variant @ ..] if variant.len() <= 1 && parts.iter().all(word) => Ok(Self {
                os: (*os).to_owned(),
                architecture: (*architecture).to_owned(),
                variant: variant.first().map(|&variant| variant.to_owned()),
            }),
            _ => {
                Err(Error::invalid("platform", format!("{text:?} is not OS/ARCHITECTURE[/VARIANT], e.g. linux/amd64")))
            }
        }
    }
}

impl From<&oci_spec::image::Platform> for Platform {
    fn from(platform: &oci_spec::image::Platform) -> Self {
        Self {
            os: platform.os().to_string(),
            architecture: platform.architecture().to_string(),
            variant: platform.variant().clone().filter(|variant| !variant.is_empty()),
        }
    }
}

/// An image's config: the document as it is, and what a runtime needs of it.
#[derive(Clone, Debug)]
pub struct Config {
    /// The document's bytes.
    pub raw: Vec<u8>,
    /// The document, parsed.
    pub parsed: ImageConfiguration,
}

impl Config {
    /// Parses a config.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is too large or malformed.
    pub fn parse(raw: Vec<u8>) -> Result<Self> {
        check_size("image config", &raw, MAX_CONFIG_BYTES)?;
        let parsed = serde_json::from_slice(&raw).map_err(|error| Error::invalid("image config", error.to_string()))?;
        Ok(Self { raw, parsed })
    }

    /// `NAME=VALUE` strings.
    #[must_use]
    pub fn env(&self) -> &[String] {
        self.list(|config| config.env().as_deref())
    }

    /// The entry point; empty without one.
    #[must_use]
    pub fn entrypoint(&self) -> &[String] {
        self.list(|config| config.entrypoint().as_deref())
    }

    /// The default arguments; empty without any.
    #[must_use]
    pub fn cmd(&self) -> &[String] {
        self.list(|config| config.cmd().as_deref())
    }

    /// `USER[:GROUP]`, if set.
    #[must_use]
    pub fn user(&self) -> Option<&str> {
        self.parsed.config().as_ref()?.user().as_deref().filter(|user| !user.is_empty())
    }

    /// The working directory, if set.
    #[must_use]
    pub fn working_dir(&self) -> Option<&str> {
        self.parsed.config().as_ref()?.working_dir().as_deref().filter(|dir| !dir.is_empty())
    }

    fn list<'a>(&'a self, field: impl Fn(&'a oci_spec::image::Config) -> Option<&'a [String]>) -> &'a [String] {
        self.parsed.config().as_ref().and_then(field).unwrap_or_default()
    }
}

/// The sha256 that `descriptor` names.
///
/// # Errors
/// [`Error::Unsupported`] for other algorithms.
pub fn descriptor_digest(descriptor: &Descriptor) -> Result<Digest> {
    let text = descriptor.digest().as_ref();
    text.parse().map_err(|_| Error::Unsupported(format!("digest {text}: firstread reads sha256 only")))
}

/// JSON with sorted keys: equal documents have equal bytes (annotations are kept in maps without an order).
///
/// # Errors
/// [`Error::Invalid`] for what JSON can't hold.
pub fn canonical_json(document: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_value(document)
        .and_then(|value| serde_json::to_vec(&value))
        .map_err(|error| Error::invalid("document", error.to_string()))
}

fn check_size(what: &str, bytes: &[u8], max: u64) -> Result<()> {
    if bytes.len() as u64 > max {
        return Err(Error::invalid(what, format!("it has {} bytes, more than {max}", bytes.len())));
    }
    Ok(())
}

fn check_count(count: usize) -> Result<()> {
    if count > MAX_DESCRIPTORS {
        return Err(Error::invalid("manifest", format!("it lists {count} entries, more than {MAX_DESCRIPTORS}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    fn index(platforms: &[Option<&str>]) -> ImageIndex {
        let entries: Vec<_> = platforms
            .iter()
            .enumerate()
            .map(|(number, platform)| {
                let digest = Digest::of(&[number as u8]).to_string();
                let mut entry =
                    serde_json::json!({"mediaType": media_type::MANIFEST, "digest": digest, "size": number});
                if let Some(platform) = platform {
                    let platform: Platform = platform.parse().unwrap();
                    entry["platform"] = serde_json::json!({"os": platform.os, "architecture": platform.architecture});
                    if let Some(variant) = platform.variant {
                        entry["platform"]["variant"] = variant.into();
                    }
                }
                entry
            })
            .collect();
        let text = serde_json::json!({"schemaVersion": 2, "manifests": entries}).to_string();
        match Document::parse(text.as_bytes(), "") {
            Ok(Document::Index(index)) => *index,
            other => panic!("{other:?}"),
        }
    }

    fn picked(platforms: &[Option<&str>], wanted: &str) -> Option<u64> {
        Document::pick(&index(platforms), &wanted.parse().unwrap(), "here").ok().map(Descriptor::size)
    }

    #[test]
    fn the_entry_for_a_platform_is_picked() {
        let arms = [Some("linux/arm/v6"), Some("linux/arm/v7"), Some("unknown/unknown"), Some("linux/arm64")];
        assert_eq!(picked(&arms, "linux/arm/v7"), Some(1));
        assert_eq!(picked(&arms, "linux/arm"), Some(0));
        assert_eq!(picked(&arms, "linux/arm64/v8"), Some(3));
        assert_eq!(picked(&arms, "linux/arm/v5"), None);
        assert_eq!(picked(&arms, "linux/amd64"), None);
        assert_eq!(picked(&[None], "linux/amd64"), Some(0));
        assert_eq!(picked(&[None, None], "linux/amd64"), None);
        assert_eq!(picked(&[None, Some("unknown/unknown")], "linux/amd64"), Some(0));
    }

    #[test]
    fn documents_are_told_apart_and_bounded() {
        let config = serde_json::json!({"mediaType": "x", "digest": Digest::of(b"").to_string(), "size": 0});
        let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": []}).to_string();
        for kind in [media_type::MANIFEST, media_type::DOCKER_MANIFEST, "", "text/plain"] {
            assert!(matches!(Document::parse(manifest.as_bytes(), kind), Ok(Document::Manifest(_))), "{kind}");
        }
        assert!(matches!(Document::parse(manifest.as_bytes(), media_type::INDEX), Err(Error::Invalid { .. })));
        assert!(matches!(Document::parse(br#"{"schemaVersion":1}"#, ""), Err(Error::Unsupported(_))));
        for bytes in [&b""[..], b"[", b"{\"config\":", &vec![b' '; 5 << 20]] {
            assert!(matches!(Document::parse(bytes, ""), Err(Error::Invalid { .. })));
        }
        let deep = "[".repeat(1 << 20);
        assert!(Document::parse(deep.as_bytes(), "").is_err());
    }

    #[test]
    fn platforms_are_parsed() {
        assert_eq!("linux/arm/v7".parse::<Platform>().unwrap().to_string(), "linux/arm/v7");
        for text in ["", "linux", "/", "linux/", "a/b/c/d", "linux/amd64/", "li nux/amd64"] {
            assert!(text.parse::<Platform>().is_err(), "{text}");
        }
    }
}
