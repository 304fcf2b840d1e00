//! What an administrator says of a registry: containerd's `certs.d/HOST/hosts.toml` (containerd's docs/hosts.md).
//!
//! The file names the registry's own server and mirrors of it (`[host."URL"]`), which are asked first, in their order,
//! for what their `capabilities` say. Each has `ca`, `client`, `skip_verify`, `header`, `override_path` of its own.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Certificate, ClientBuilder, Identity};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::chunk::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::source::files;

/// Largest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Most mirrors that are used.
const MAX_MIRRORS: usize = 32;

/// A `hosts.toml`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct File {
    server: Option<String>,
    #[serde(flatten)]
    settings: Settings,
    host: Mirrors,
}

/// What is said of one host.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
struct Settings {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany<PathBuf>>,
    client: Option<OneOrMany<Pair>>,
    skip_verify: bool,
    header: BTreeMap<String, OneOrMany<String>>,
    override_path: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

/// A client certificate, and its key unless that is in the same file.
#[derive(Debug, Clone, Deserialize)]
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

/// Mirrors in the order of the file, which says which one is asked first.
#[derive(Debug, Default)]
struct Mirrors(Vec<(String, Settings)>);

impl<'de> Deserialize<'de> for Mirrors {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Mirrors;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("tables of hosts")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Mirrors, A::Error> {
                let mut mirrors = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    mirrors.push(entry);
                }
                Ok(Mirrors(mirrors))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

/// A host that has a registry's images: the registry itself, or a mirror of it.
#[derive(Debug, Clone)]
pub(super) struct Host {
    /// Below it are `REPOSITORY/manifests/…` and `REPOSITORY/blobs/…`.
    pub base: Url,
    /// Host and port, by which credentials are found and by which people know it.
    pub name: String,
    /// What it is to the images that it has.
    pub role: Role,
    settings: Settings,
    /// Where relative paths start.
    dir: PathBuf,
}

/// What a host is to an image.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Role {
    /// Its registry: there may be no other source.
    Registry,
    /// A mirror of the registry of that name, which it is told with every request (`?ns=`).
    Mirror(String),
    /// A server that has copies of blobs.
    Copies,
}

/// What a host may be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Capability {
    /// Manifests and blobs by digest.
    Pull,
    /// The digest of a tag.
    Resolve,
}

impl Host {
    /// The registry `host` (with port), and its mirrors, best first, by what `dir` (a `certs.d`) says of it, or else of
    /// all (`_default`). `scheme` is that of what is not said with one.
    ///
    /// # Errors
    /// A file that is there and can't be read or understood; a URL that is none.
    pub(super) fn load(dir: &Path, host: &str, scheme: impl Fn(&str) -> &'static str) -> Result<(Self, Vec<Self>)> {
        let plausible = !host.is_empty() && !host.starts_with('.') && !host.contains('/');
        let underscored = host.rsplit_once(':').map(|(name, port)| format!("{name}_{port}_"));
        let names = [Some(host), underscored.as_deref(), Some("_default")];
        let mut found = (dir.to_owned(), File::default());
        for name in names.into_iter().flatten().filter(|_| plausible) {
            let dir = dir.join(name);
            let path = dir.join("hosts.toml");
            if let Some(content) = files::read_small(&path, MAX_FILE)? {
                let invalid = |reason: String| Error::invalid(format!("configuration {}", path.display()), reason);
                let text = std::str::from_utf8(&content).map_err(|error| invalid(error.to_string()))?;
                found = (dir, toml::from_str(text).map_err(|error| invalid(error.to_string()))?);
                break;
            }
        }
        let (dir, file) = found;
        let server = if host == "docker.io" { "registry-1.docker.io" } else { host };
        let server = file.server.unwrap_or_else(|| format!("{}://{server}", scheme(server)));
        let registry = Self::new(&server, host, Role::Registry, file.settings, &dir, &scheme)?;
        let mut mirrors = Vec::new();
        for (url, settings) in file.host.0.into_iter().take(MAX_MIRRORS) {
            mirrors.push(Self::new(&url, "", Role::Mirror(host.to_owned()), settings, &dir, &scheme)?);
        }
        Ok((registry, mirrors))
    }

    fn new(
        url: &str,
        name: &str,
        role: Role,
        settings: Settings,
        dir: &Path,
        scheme: &impl Fn(&str) -> &'static str,
    ) -> Result<Self> {
        let whole = if url.contains("://") { url.to_owned() } else { format!("{}://{url}", scheme(url)) };
        let path = if settings.override_path { "/" } else { "/v2/" };
        let base = Url::parse(&format!("{}{path}", whole.trim_end_matches('/')))
            .ok()
            .filter(|base| matches!(base.scheme(), "http" | "https") && base.has_host());
        let base = base.ok_or_else(|| {
            let of = match &role {
                Role::Mirror(of) => format!("mirror of {of:?}"),
                Role::Registry | Role::Copies => format!("registry {name:?}"),
            };
            Error::invalid(of, format!("{url:?} is not its URL"))
        })?;
        let port = base.port().map_or_else(String::new, |port| format!(":{port}"));
        let name =
            if name.is_empty() { format!("{}{port}", base.host_str().unwrap_or_default()) } else { name.to_owned() };
        Ok(Self { base, name, role, settings, dir: dir.to_owned() })
    }

    /// A server that is no registry, with what `dir` says of its host.
    ///
    /// # Errors
    /// As of [`load`](Self::load).
    pub(super) fn plain(dir: &Path, base: &Url) -> Result<Self> {
        let port = base.port().map_or_else(String::new, |port| format!(":{port}"));
        let name = format!("{}{port}", base.host_str().unwrap_or_default());
        let (host, _) = Self::load(dir, &name, |_| "https")?;
        Ok(Self { base: base.clone(), role: Role::Copies, ..host })
    }

    /// Whether it may be asked for something.
    pub(super) fn can(&self, capability: Capability) -> bool {
        let wanted = match capability {
            Capability::Pull => "pull",
            Capability::Resolve => "resolve",
        };
        let listed = self.settings.capabilities.as_deref();
        listed.is_none_or(|listed| listed.is_empty() || listed.iter().any(|one| one == wanted))
    }

    /// Adds the host's certificates. Returns a digest of all that makes a connection differ from others.
    ///
    /// # Errors
    /// A file that is malformed.
    pub(super) fn apply(&self, mut builder: ClientBuilder) -> Result<(ClientBuilder, Digest)> {
        let mut hasher = Hasher::new();
        hasher.update(format!("{:?} {:?} {:?}", self.base, self.role, self.settings).as_bytes());
        for path in self.settings.ca.iter().flat_map(OneOrMany::items) {
            let (path, content) = self.read(path)?;
            hasher.update(&content);
            let certificates = Certificate::from_pem_bundle(&content).map_err(|error| invalid(&path, &error))?;
            builder = certificates.into_iter().fold(builder, ClientBuilder::add_root_certificate);
        }
        if let Some(pair) = self.settings.client.as_ref().and_then(|pairs| pairs.items().first()) {
            let (path, content) = match pair {
                Pair::Both(path) => self.read(path)?,
                Pair::Apart([certificate, key]) => {
                    let (path, content) = self.read(certificate)?;
                    (path, [content, self.read(key)?.1].join(&b'\n'))
                }
            };
            hasher.update(&content);
            builder = builder.identity(Identity::from_pem(&content).map_err(|error| invalid(&path, &error))?);
        }
        Ok((builder.danger_accept_invalid_certs(self.settings.skip_verify), hasher.finish()))
    }

    /// The headers for the host's own requests; object storage must not see them.
    ///
    /// # Errors
    /// One that is malformed.
    pub(super) fn headers(&self) -> Result<HeaderMap> {
        let mut headers = HeaderMap::new();
        for (name, values) in &self.settings.header {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn load(name: &str, text: &str) -> Result<(Host, Vec<Host>)> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(name)).unwrap();
        std::fs::write(dir.path().join(name).join("hosts.toml"), text).unwrap();
        Host::load(dir.path(), "r.example:5000", |_| "https")
    }

    #[test]
    fn mirrors_keep_their_order_and_say_what_they_are_for() {
        let text = r#"
            server = "https://upstream.example"
            [host."https://z.example"]
              capabilities = ["pull"]
            [host."a.example:8443"]
              [host."a.example:8443".header]
                x-team = "one"
            [host."http://m.example/proxy"]
              override_path = true
              capabilities = ["resolve", "pull"]
        "#;
        for name in ["r.example:5000", "r.example_5000_", "_default"] {
            let (server, mirrors) = load(name, text).unwrap();
            assert_eq!((server.base.as_str(), &*server.name), ("https://upstream.example/v2/", "r.example:5000"));
            assert!(server.role == Role::Registry && server.can(Capability::Resolve));
            let bases: Vec<_> = mirrors.iter().map(|mirror| mirror.base.as_str()).collect();
            assert_eq!(bases, ["https://z.example/v2/", "https://a.example:8443/v2/", "http://m.example/proxy/"]);
            let resolves: Vec<_> = mirrors.iter().map(|mirror| mirror.can(Capability::Resolve)).collect();
            assert_eq!(resolves, [false, true, true]);
            assert_eq!(mirrors[1].headers().unwrap()["x-team"], "one");
            assert_eq!(mirrors[0].role, Role::Mirror("r.example:5000".to_owned()));
            assert_eq!(mirrors[2].name, "m.example");
        }
        assert!(load("other", text).unwrap().1.is_empty());
        assert!(load("_default", "[host.\"ftp://x\"]").is_err());
    }
}
