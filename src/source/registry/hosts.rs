//! What an administrator says of a registry: containerd's `certs.d/HOST/hosts.toml` (containerd's docs/hosts.md).
//!
//! Of it, what is said of the host itself: `server`, `ca`, `client`, `skip_verify`, `header`, `override_path`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Certificate, ClientBuilder, Identity};
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::source::files;

/// Largest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// The settings of one host.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Host {
    /// URL of the registry, in place of `https://HOST`.
    pub server: Option<String>,
    ca: Option<OneOrMany<PathBuf>>,
    client: Option<OneOrMany<Pair>>,
    skip_verify: bool,
    header: BTreeMap<String, OneOrMany<String>>,
    /// Whether the URL's path is used as it is, without `/v2`.
    pub override_path: bool,
    #[serde(skip)]
    dir: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

/// A client certificate, and its key unless that is in the same file.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Pair {
    Both(PathBuf),
    Apart([PathBuf; 2]),
}

impl<T> OneOrMany<T> {
    fn items(&self) -> &[T] {
        match self {
            Self::One(item) => std::slice::from_ref(item),
            Self::Many(items) => items,
        }
    }
}

impl Host {
    /// What `dir` (a `certs.d`) says of `host` (with port), or else of all (`_default`).
    ///
    /// # Errors
    /// A file that is there and can't be read or understood.
    pub(super) fn load(dir: &Path, host: &str) -> Result<Self> {
        let plausible = !host.is_empty() && !host.starts_with('.') && !host.contains('/');
        for name in [host, "_default"].into_iter().filter(|_| plausible) {
            let dir = dir.join(name);
            let path = dir.join("hosts.toml");
            if let Some(content) = files::read_small(&path, MAX_FILE)? {
                let invalid = |reason: String| Error::invalid(format!("configuration {}", path.display()), reason);
                let text = std::str::from_utf8(&content).map_err(|error| invalid(error.to_string()))?;
                let host: Self = toml::from_str(text).map_err(|error| invalid(error.to_string()))?;
                return Ok(Self { dir, ..host });
            }
        }
        Ok(Self::default())
    }

    /// Adds the host's certificates.
    ///
    /// # Errors
    /// A file that is malformed.
    pub(super) fn apply(&self, mut builder: ClientBuilder) -> Result<ClientBuilder> {
        for path in self.ca.iter().flat_map(OneOrMany::items) {
            let (path, content) = self.read(path)?;
            let certificates = Certificate::from_pem_bundle(&content).map_err(|error| invalid(&path, &error))?;
            builder = certificates.into_iter().fold(builder, ClientBuilder::add_root_certificate);
        }
        if let Some(pair) = self.client.as_ref().and_then(|pairs| pairs.items().first()) {
            let (path, content) = match pair {
                Pair::Both(path) => self.read(path)?,
                Pair::Apart([certificate, key]) => {
                    let (path, content) = self.read(certificate)?;
                    (path, [content, self.read(key)?.1].join(&b'\n'))
                }
            };
            builder = builder.identity(Identity::from_pem(&content).map_err(|error| invalid(&path, &error))?);
        }
        Ok(builder.danger_accept_invalid_certs(self.skip_verify))
    }

    /// The headers for the registry's own requests; object storage must not see them.
    ///
    /// # Errors
    /// One that is malformed.
    pub(super) fn headers(&self) -> Result<HeaderMap> {
        let mut headers = HeaderMap::new();
        for (name, values) in &self.header {
            for value in values.items() {
                let malformed =
                    || Error::invalid(format!("header {name} in {}", self.dir.display()), "it is malformed");
                let name = HeaderName::try_from(name).map_err(|_| malformed())?;
                let mut value = HeaderValue::try_from(value).map_err(|_| malformed())?;
                value.set_sensitive(true);
                headers.append(name, value);
            }
        }
        Ok(headers)
    }

    fn read(&self, path: &Path) -> Result<(PathBuf, Vec<u8>)> {
        let path = self.dir.join(path);
        let content = files::read_small(&path, MAX_FILE)?;
        let missing = || Error::invalid(format!("certificate {}", path.display()), "there is no such file");
        let content = content.ok_or_else(missing)?;
        Ok((path, content))
    }
}

fn invalid(path: &Path, error: &reqwest::Error) -> Error {
    Error::invalid(format!("certificate {}", path.display()), super::wire::describe(error))
}
