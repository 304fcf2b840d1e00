//! References: how a user names an image or a tree of files.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::chunk::Digest;
use crate::error::{Error, Result};

/// Longest reference that is read, in bytes.
const MAX_REFERENCE: usize = 4096;
/// Longest repository name in bytes (distribution's reference grammar).
const MAX_REPOSITORY: usize = 255;
/// Longest tag in bytes (distribution-spec, "Pulling manifests").
const MAX_TAG: usize = 128;

/// An image in a registry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RegistryReference {
    /// Host, with the port when one was given; an IPv6 address is in brackets.
    pub host: String,
    /// The repository, e.g. `library/debian`.
    pub repository: String,
    /// The tag; `latest` when the reference has neither tag nor digest.
    pub tag: Option<String>,
    /// The manifest's digest, which the answer must then have.
    pub digest: Option<Digest>,
}

/// What a command is pointed at.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reference {
    /// `HOST[:PORT]/REPO[:TAG][@DIGEST]` or `docker://…`.
    Registry(RegistryReference),
    /// `oci:DIR[:TAG]`: an OCI image layout.
    Layout {
        /// The layout's directory.
        dir: PathBuf,
        /// The image's name in it; without one the layout must have a single image.
        tag: Option<String>,
    },
    /// `oci-archive:FILE[:TAG]`: a tar of an OCI image layout.
    OciArchive {
        /// The tar file.
        file: PathBuf,
        /// The image's name in it.
        tag: Option<String>,
    },
    /// `docker-archive:FILE[:TAG]`: what `docker save` writes.
    DockerArchive {
        /// The tar file.
        file: PathBuf,
        /// The image's name in it, `NAME:TAG`.
        tag: Option<String>,
    },
    /// `dir:PATH`: a directory with a root file system.
    Dir(PathBuf),
    /// `tar:FILE`: a tar of a root file system, also gzip or zstd; `-` is standard input.
    Tar(PathBuf),
    /// `raw:FILE`: a disk image.
    Raw(PathBuf),
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.len() > MAX_REFERENCE {
            return Err(Error::invalid("reference", format!("it has {} bytes, more than {MAX_REFERENCE}", text.len())));
        }
        if text.chars().any(char::is_control) {
            return Err(invalid(text, "it contains control characters"));
        }
        let path = |rest: &str, form: &str| match rest {
            "" => Err(invalid(text, &format!("a path is missing: write {form}"))),
            path => Ok(PathBuf::from(path)),
        };
        match text.split_once(':') {
            Some(("oci", rest)) => {
                let (dir, tag) = split_tag(text, rest, "oci:DIR[:TAG]")?;
                Ok(Self::Layout { dir, tag })
            }
            Some(("oci-archive", rest)) => {
                let (file, tag) = split_tag(text, rest, "oci-archive:FILE[:TAG]")?;
                Ok(Self::OciArchive { file, tag })
            }
            Some(("docker-archive", rest)) => {
                let (file, tag) = split_tag(text, rest, "docker-archive:FILE[:TAG]")?;
                Ok(Self::DockerArchive { file, tag })
            }
            Some(("dir", rest)) => Ok(Self::Dir(path(rest, "dir:PATH")?)),
            Some(("tar", rest)) => Ok(Self::Tar(path(rest, "tar:FILE, or tar:- for standard input")?)),
            Some(("raw", rest)) => Ok(Self::Raw(path(rest, "raw:FILE")?)),
            Some(("docker", rest)) => match rest.strip_prefix("//") {
                Some(name) => Ok(Self::Registry(RegistryReference::parse(text, &hub_name(name))?)),
                None => Err(invalid(text, "write docker://HOST/REPO[:TAG]")),
            },
            _ => Ok(Self::Registry(RegistryReference::parse(text, text)?)),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (form, path, tag) = match self {
            Self::Registry(reference) => return reference.fmt(f),
            Self::Layout { dir, tag } => ("oci", dir, tag.as_ref()),
            Self::OciArchive { file, tag } => ("oci-archive", file, tag.as_ref()),
            Self::DockerArchive { file, tag } => ("docker-archive", file, tag.as_ref()),
            Self::Dir(path) => ("dir", path, None),
            Self::Tar(file) => ("tar", file, None),
            Self::Raw(file) => ("raw", file, None),
        };
        write!(f, "{form}:{}", path.display())?;
        tag.map_or(Ok(()), |tag| write!(f, ":{tag}"))
    }
}

impl fmt::Display for RegistryReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        self.digest.map_or(Ok(()), |digest| write!(f, "@{digest}"))
    }
}

impl RegistryReference {
    /// Parses `name`; `text` is what the user wrote, for the error.
    fn parse(text: &str, name: &str) -> Result<Self> {
        let (name, digest) =
            match name.split_once('@') {
                Some((name, digest)) => (
                    name,
                    Some(digest.parse().map_err(|_| {
                        invalid(text, "what follows @ is not a digest: sha256:<64 hexadecimal digits>")
                    })?),
                ),
                None => (name, None),
            };
        let (host, path) = name.split_once('/').filter(|(host, _)| looks_like_a_host(host)).ok_or_else(|| {
            invalid(
                text,
                "it does not begin with HOST[:PORT]/ (for Docker Hub write docker://NAME; for local files oci:, \
                 oci-archive:, docker-archive:, dir:, tar: or raw:)",
            )
        })?;
        check_host(host).map_err(|reason| invalid(text, reason))?;
        let (repository, tag) = match path.rsplit_once(':') {
            Some((repository, tag)) => (repository, Some(tag)),
            None => (path, None),
        };
        if repository.is_empty() || repository.len() > MAX_REPOSITORY || !repository.split('/').all(is_component) {
            return Err(invalid(
                text,
                "the repository must be lower-case letters, digits and . _ - in components separated by /",
            ));
        }
        if let Some(tag) = tag.filter(|tag| !is_tag(tag)) {
            return Err(invalid(text, &format!("{tag:?} is not a tag: up to 128 of A-Z a-z 0-9 _ . -")));
        }
        let tag = tag.or(if digest.is_none() { Some("latest") } else { None }).map(str::to_owned);
        Ok(Self { host: host.to_owned(), repository: repository.to_owned(), tag, digest })
    }

    /// What follows `/manifests/` in a registry's URL: the digest when there is one, else the tag.
    #[must_use]
    pub fn manifest_name(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }
}

/// Completes a name as docker does: `debian` is `docker.io/library/debian`.
fn hub_name(name: &str) -> String {
    match name.split_once('/') {
        Some((host, rest)) if looks_like_a_host(host) => match host {
            "docker.io" | "index.docker.io" if !rest.contains('/') => format!("docker.io/library/{rest}"),
            _ => name.to_owned(),
        },
        Some(_) => format!("docker.io/{name}"),
        None => format!("docker.io/library/{name}"),
    }
}

fn looks_like_a_host(host: &str) -> bool {
    host == "localhost" || host.contains(['.', ':', '['])
}

fn check_host(host: &str) -> Result<(), &'static str> {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or("the host's [ is not closed")?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_| "what is in [] is not an IPv6 address")?;
            match port.strip_prefix(':') {
                Some(port) => ("v6", Some(port)),
                None if port.is_empty() => ("v6", None),
                None => return Err("what follows ] is not a port"),
            }
        }
        None => match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        },
    };
    if let Some(port) = port {
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        port.parse::<u16>()
            .ok()
            .filter(|&port| port > 0 && digits)
            .ok_or("the port is not a number from 1 to 65535")?;
    }
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() <= 253 && name.split('.').all(label) { Ok(()) } else { Err("the host is not a host name") }
}

/// distribution's `path-component`: alphanumerics separated by `.`, `_`, `__` or dashes.
fn is_component(component: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = component.as_bytes();
    if !bytes.first().copied().is_some_and(alphanumeric) || !bytes.last().copied().is_some_and(alphanumeric) {
        return false;
    }
    bytes
        .split(|&byte| alphanumeric(byte))
        .all(|run| matches!(run, b"" | b"." | b"_" | b"__") || run.iter().all(|&byte| byte == b'-'))
}

fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|byte| word(byte) || byte == b'.' || byte == b'-')
}

/// Splits `PATH[:TAG]` at the first colon, as skopeo does: a path with a colon can't be named.
fn split_tag(text: &str, rest: &str, form: &str) -> Result<(PathBuf, Option<String>)> {
    let (path, tag) = match rest.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    if path.is_empty() {
        return Err(invalid(text, &format!("a path is missing: write {form}")));
    }
    match tag {
        Some(tag) if tag.is_empty() || tag.len() > MAX_REPOSITORY + MAX_TAG || tag.contains(char::is_whitespace) => {
            Err(invalid(text, &format!("{tag:?} is not a tag: write {form}")))
        }
        _ => Ok((PathBuf::from(path), tag.map(str::to_owned))),
    }
}

fn invalid(text: &str, reason: &str) -> Error {
    Error::invalid(format!("reference {text:?}"), reason)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    fn registry(text: &str) -> RegistryReference {
        match text.parse().unwrap() {
            Reference::Registry(reference) => reference,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn registry_references_are_taken_apart() {
        let digest = Digest::of(b"manifest");
        let reference = registry(&format!("127.0.0.1:5000/team/app_x/b--c:v1.2@{digest}"));
        assert_eq!((reference.host.as_str(), reference.repository.as_str()), ("127.0.0.1:5000", "team/app_x/b--c"));
        assert_eq!((reference.tag.as_deref(), reference.digest), (Some("v1.2"), Some(digest)));
        assert_eq!(registry("localhost/a").tag.as_deref(), Some("latest"));
        assert_eq!(registry(&format!("[::1]:5000/a@{digest}")).tag, None);
        assert_eq!(registry("docker://quay.io/a/b").to_string(), "quay.io/a/b:latest");
        assert_eq!(registry("docker://debian:12").to_string(), "docker.io/library/debian:12");
        assert_eq!(registry("docker://user/app").to_string(), "docker.io/user/app:latest");
        assert_eq!(registry("docker://docker.io/debian").to_string(), "docker.io/library/debian:latest");
    }

    #[test]
    fn every_form_round_trips() {
        for text in [
            "registry.example:443/a/b:tag",
            "[::1]:5000/a:tag",
            "oci:/a/dir",
            "oci:dir:tag",
            "oci-archive:file.tar:tag",
            "docker-archive:file.tar:debian:12",
            "dir:/a/b",
            "tar:-",
            "raw:/disk:1.img",
        ] {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn malformed_references_are_refused() {
        let long = format!("localhost/{}", "a".repeat(5000));
        let deep = format!("localhost/{}", "a".repeat(256));
        let tag = format!("localhost/a:{}", "t".repeat(129));
        for text in [
            "",
            "debian",
            "debian:12",
            "user/app",
            "localhost/",
            "localhost/A",
            "localhost/a/../b",
            "localhost/a//b",
            "localhost/a?b",
            "localhost/a:b/c",
            "localhost/a:",
            "localhost/a@sha256:00",
            "localhost/a@md5:0",
            "a:0/b",
            "a:70000/b",
            "a:+1/b",
            "[::1/b",
            "[::z]/b",
            "[::1]5000/b",
            "-a.b/c",
            "a..b/c",
            "user@host.example/a",
            "docker:debian",
            "docker://",
            "oci:",
            "oci::tag",
            "oci:dir:",
            "dir:",
            "tar:",
            "raw:",
            "localhost/a\n",
            "http://localhost/a",
            &long,
            &deep,
            &tag,
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_error_says_what_to_write() {
        let error = "debian:12".parse::<Reference>().unwrap_err().to_string();
        assert!(error.contains("docker://NAME") && error.contains("debian:12"), "{error}");
    }
}
