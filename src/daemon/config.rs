//! Settings: flag, else environment, else file, else default.
//!
//! Each setting has a key (`pool.limit`) and an environment variable (`FIRSTREAD_POOL_LIMIT`). The file is TOML; a key that
//! does not exist is an error, since a mistyped limit must not be taken for no limit.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::control::{Kind, Problem};
use crate::attach::nbd::kernel::{CONNECTIONS_MAX, NbdDeviceOptions, TIMEOUT_MAX};
use crate::attach::ublk::{QUEUE_DEPTH_MAX, QUEUES_MAX, UblkOptions};
pub use crate::fetch::{Patience, Prefetch};
use crate::pool::Amount;
use crate::source::BlobPlace;

/// Where the configuration is when nobody says otherwise; it need not exist.
pub const DEFAULT_FILE: &str = "/etc/firstread/config.toml";

/// The environment variable that names the configuration file.
pub const FILE_VARIABLE: &str = "FIRSTREAD_CONFIG";

/// Where containerd keeps what is said of registries.
const DEFAULT_HOSTS_DIR: &str = "/etc/containerd/certs.d";

/// What the pool leaves to others of its disk when nobody says otherwise.
const DEFAULT_KEEP_FREE: Amount = Amount::Percent(5);

/// Bytes a second that are scrubbed when nobody says otherwise: 86 GB a day, four reads a second.
const DEFAULT_SCRUB_RATE: Size = Size(1 << 20);

/// What one layer (the flags, the environment, the file) sets. `None`: ask the next layer.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Layer {
    /// Directory of everything durable.
    pub root: Option<PathBuf>,
    /// Directory of the sockets, the pid file and the log.
    pub run: Option<PathBuf>,
    /// What is logged: `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `info,firstread::fetch=debug`.
    pub log: Option<String>,
    /// The pool.
    pub pool: PoolLayer,
    /// Fetching.
    pub fetch: FetchLayer,
    /// Registries.
    pub registry: RegistryLayer,
    /// The builder.
    pub build: BuildLayer,
    /// The transport ublk.
    pub ublk: UblkLayer,
    /// The transport nbd.
    pub nbd: NbdLayer,
}

/// The part `pool` of a [`Layer`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolLayer {
    /// Largest size of the pool.
    pub limit: Option<Amount>,
    /// What the pool leaves to others of its disk.
    pub keep_free: Option<Amount>,
    /// Bytes a second of the pool that are read in the background to find what rotted; 0: none.
    pub scrub_rate: Option<Size>,
}

/// The part `fetch` of a [`Layer`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FetchLayer {
    /// How long a read waits for a source that is unreachable.
    pub on_outage: Option<Patience>,
    /// Most bytes a second for work in the background.
    pub background_limit: Option<Size>,
    /// What is fetched of an image before anybody reads it: `all` (the start-up pack; everything of an image that has
    /// none), `startup` (start-up packs only), `none`.
    pub prefetch: Option<Prefetch>,
}

/// The part `registry` of a [`Layer`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryLayer {
    /// HTTP without TLS for every host.
    pub plain_http: Option<Switch>,
    /// The docker configuration with the credentials.
    pub docker_config: Option<PathBuf>,
    /// containerd's `certs.d`.
    pub hosts_dir: Option<PathBuf>,
    /// Further places of blobs.
    pub blobs: Option<Places>,
}

/// The part `build` of a [`Layer`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BuildLayer {
    /// Directory of what builds can use again.
    pub cache: Option<PathBuf>,
    /// Most bytes that stay in it.
    pub cache_limit: Option<Size>,
    /// What a source may ask of the builder.
    pub limit: BuildLimits,
}

/// The part `build.limit` of a [`Layer`]: bounds on what a source may ask of the builder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BuildLimits {
    /// Plain bytes of all layers together.
    pub plain_bytes: Option<Size>,
    /// Bytes of one file, holes included.
    pub file_bytes: Option<Size>,
    /// Entries of all layers together.
    pub entries: Option<Size>,
    /// Bytes of all names, link targets and extended attributes.
    pub name_bytes: Option<Size>,
    /// Bytes of one extended header of a tar.
    pub header_bytes: Option<Size>,
    /// Pieces of one sparse file.
    pub segments: Option<Size>,
    /// Directories below each other.
    pub depth: Option<Size>,
    /// Layers of one image.
    pub layers: Option<Size>,
}

/// The part `ublk` of a [`Layer`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UblkLayer {
    /// Queues of a device.
    pub queues: Option<Count<QUEUES_MAX>>,
    /// Requests in flight of a queue.
    pub queue_depth: Option<Count<QUEUE_DEPTH_MAX>>,
}

/// The part `nbd` of a [`Layer`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NbdLayer {
    /// Connections of a device.
    pub connections: Option<Count<CONNECTIONS_MAX>>,
    /// Seconds after which a request is sent again, over another connection.
    pub timeout: Option<Count<TIMEOUT_MAX>>,
}

/// The settings, resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Directory of everything durable: the pool, indexes, records.
    pub root: PathBuf,
    /// Directory of the sockets, the pid file and the log.
    pub run: PathBuf,
    /// What is logged.
    pub log: String,
    /// Largest size of the pool; `None`: unbounded.
    pub pool_limit: Option<Amount>,
    /// What the pool leaves to others of its disk.
    pub pool_keep_free: Amount,
    /// Bytes a second of the pool that are read in the background to find what rotted; 0: none.
    pub pool_scrub_rate: Size,
    /// How long a read waits for a source that is unreachable.
    pub on_outage: Patience,
    /// Most bytes a second for work in the background, such as pinning; 0: no limit.
    pub background_limit: Size,
    /// What is fetched of an image before anybody reads it.
    pub prefetch: Prefetch,
    /// HTTP without TLS for every host.
    pub plain_http: bool,
    /// The docker configuration with the credentials.
    pub docker_config: Option<PathBuf>,
    /// containerd's `certs.d`: mirrors, certificates and headers of registries.
    pub hosts_dir: PathBuf,
    /// Further places of blobs, which are asked before registries.
    pub blobs: Vec<BlobPlace>,
    /// The builder's settings; it has the defaults.
    pub build: BuildLayer,
    /// How ublk devices are set up.
    pub ublk: UblkOptions,
    /// How NBD devices are set up.
    pub nbd: NbdDeviceOptions,
}

/// Every key, its environment variable, and how it gets into a layer.
const KEYS: [(&str, &str, Setter); 27] = [
    ("root", "FIRSTREAD_ROOT", |layer, value| put_path(&mut layer.root, value)),
    ("run", "FIRSTREAD_RUN", |layer, value| put_path(&mut layer.run, value)),
    ("log", "FIRSTREAD_LOG", |layer, value| put(&mut layer.log, value)),
    ("pool.limit", "FIRSTREAD_POOL_LIMIT", |layer, value| put(&mut layer.pool.limit, value)),
    ("pool.keep_free", "FIRSTREAD_POOL_KEEP_FREE", |layer, value| put(&mut layer.pool.keep_free, value)),
    ("pool.scrub_rate", "FIRSTREAD_POOL_SCRUB_RATE", |layer, value| put(&mut layer.pool.scrub_rate, value)),
    ("fetch.on_outage", "FIRSTREAD_FETCH_ON_OUTAGE", |layer, value| put(&mut layer.fetch.on_outage, value)),
    ("fetch.background_limit", "FIRSTREAD_FETCH_BACKGROUND_LIMIT", |layer, value| {
        put(&mut layer.fetch.background_limit, value)
    }),
    ("fetch.prefetch", "FIRSTREAD_FETCH_PREFETCH", |layer, value| put(&mut layer.fetch.prefetch, value)),
    ("registry.plain_http", "FIRSTREAD_REGISTRY_PLAIN_HTTP", |layer, value| put(&mut layer.registry.plain_http, value)),
    ("registry.docker_config", "FIRSTREAD_REGISTRY_DOCKER_CONFIG", |layer, value| {
        put_path(&mut layer.registry.docker_config, value)
    }),
    ("registry.hosts_dir", "FIRSTREAD_REGISTRY_HOSTS_DIR", |layer, value| {
        put_path(&mut layer.registry.hosts_dir, value)
    }),
    ("registry.blobs", "FIRSTREAD_REGISTRY_BLOBS", |layer, value| put(&mut layer.registry.blobs, value)),
    ("build.cache", "FIRSTREAD_BUILD_CACHE", |layer, value| put_path(&mut layer.build.cache, value)),
    ("build.cache_limit", "FIRSTREAD_BUILD_CACHE_LIMIT", |layer, value| put(&mut layer.build.cache_limit, value)),
    ("build.limit.plain_bytes", "FIRSTREAD_BUILD_LIMIT_PLAIN_BYTES", |layer, value| {
        put(&mut layer.build.limit.plain_bytes, value)
    }),
    ("build.limit.file_bytes", "FIRSTREAD_BUILD_LIMIT_FILE_BYTES", |layer, value| {
        put(&mut layer.build.limit.file_bytes, value)
    }),
    ("build.limit.entries", "FIRSTREAD_BUILD_LIMIT_ENTRIES", |layer, value| put(&mut layer.build.limit.entries, value)),
    ("build.limit.name_bytes", "FIRSTREAD_BUILD_LIMIT_NAME_BYTES", |layer, value| {
        put(&mut layer.build.limit.name_bytes, value)
    }),
    ("build.limit.header_bytes", "FIRSTREAD_BUILD_LIMIT_HEADER_BYTES", |layer, value| {
        put(&mut layer.build.limit.header_bytes, value)
    }),
    ("build.limit.segments", "FIRSTREAD_BUILD_LIMIT_SEGMENTS", |layer, value| {
        put(&mut layer.build.limit.segments, value)
    }),
    ("build.limit.depth", "FIRSTREAD_BUILD_LIMIT_DEPTH", |layer, value| put(&mut layer.build.limit.depth, value)),
    ("build.limit.layers", "FIRSTREAD_BUILD_LIMIT_LAYERS", |layer, value| put(&mut layer.build.limit.layers, value)),
    ("ublk.queues", "FIRSTREAD_UBLK_QUEUES", |layer, value| put(&mut layer.ublk.queues, value)),
    ("ublk.queue_depth", "FIRSTREAD_UBLK_QUEUE_DEPTH", |layer, value| put(&mut layer.ublk.queue_depth, value)),
    ("nbd.connections", "FIRSTREAD_NBD_CONNECTIONS", |layer, value| put(&mut layer.nbd.connections, value)),
    ("nbd.timeout", "FIRSTREAD_NBD_TIMEOUT", |layer, value| put(&mut layer.nbd.timeout, value)),
];

type Setter = fn(&mut Layer, OsString) -> Result<(), String>;

fn put<T: FromStr<Err: std::fmt::Display>>(slot: &mut Option<T>, value: OsString) -> Result<(), String> {
    let text = value.into_string().map_err(|_| "it is not UTF-8".to_owned())?;
    *slot = Some(text.parse().map_err(|error: T::Err| error.to_string())?);
    Ok(())
}

// A function of its own since a path need not be UTF-8; it has the signature of the other setters.
#[allow(clippy::unnecessary_wraps)]
fn put_path(slot: &mut Option<PathBuf>, value: OsString) -> Result<(), String> {
    *slot = Some(value.into());
    Ok(())
}

impl Layer {
    /// What the environment sets; `variable` looks one up. Empty variables count as unset.
    ///
    /// # Errors
    /// A value that is malformed, with the variable's name.
    pub fn from_environment(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, Problem> {
        let mut layer = Self::default();
        for (key, name, set) in KEYS {
            if let Some(value) = variable(name).filter(|value| !value.is_empty()) {
                set(&mut layer, value).map_err(|reason| {
                    Problem::new(Kind::Usage, format!("the environment variable {name} (setting {key}): {reason}"))
                })?;
            }
        }
        Ok(layer)
    }

    /// What the configuration file at `path` sets.
    ///
    /// # Errors
    /// A file that can't be read or is malformed, with the place.
    pub fn from_file(path: &Path) -> Result<Self, Problem> {
        let failed = |reason: &dyn std::fmt::Display| {
            let reason = reason.to_string();
            Problem::new(Kind::Usage, format!("the configuration {}: {}", path.display(), reason.trim_end()))
        };
        let text = std::fs::read_to_string(path).map_err(|error| failed(&error))?;
        toml::from_str(&text).map_err(|error| failed(&error))
    }

    /// This layer, and `next` where it is silent.
    #[must_use]
    pub fn or(self, next: Self) -> Self {
        let (limit, more) = (self.build.limit, next.build.limit);
        Self {
            root: self.root.or(next.root),
            run: self.run.or(next.run),
            log: self.log.or(next.log),
            pool: PoolLayer {
                limit: self.pool.limit.or(next.pool.limit),
                keep_free: self.pool.keep_free.or(next.pool.keep_free),
                scrub_rate: self.pool.scrub_rate.or(next.pool.scrub_rate),
            },
            fetch: FetchLayer {
                on_outage: self.fetch.on_outage.or(next.fetch.on_outage),
                background_limit: self.fetch.background_limit.or(next.fetch.background_limit),
                prefetch: self.fetch.prefetch.or(next.fetch.prefetch),
            },
            registry: RegistryLayer {
                plain_http: self.registry.plain_http.or(next.registry.plain_http),
                docker_config: self.registry.docker_config.or(next.registry.docker_config),
                hosts_dir: self.registry.hosts_dir.or(next.registry.hosts_dir),
                blobs: self.registry.blobs.or(next.registry.blobs),
            },
            build: BuildLayer {
                cache: self.build.cache.or(next.build.cache),
                cache_limit: self.build.cache_limit.or(next.build.cache_limit),
                limit: BuildLimits {
                    plain_bytes: limit.plain_bytes.or(more.plain_bytes),
                    file_bytes: limit.file_bytes.or(more.file_bytes),
                    entries: limit.entries.or(more.entries),
                    name_bytes: limit.name_bytes.or(more.name_bytes),
                    header_bytes: limit.header_bytes.or(more.header_bytes),
                    segments: limit.segments.or(more.segments),
                    depth: limit.depth.or(more.depth),
                    layers: limit.layers.or(more.layers),
                },
            },
            ublk: UblkLayer {
                queues: self.ublk.queues.or(next.ublk.queues),
                queue_depth: self.ublk.queue_depth.or(next.ublk.queue_depth),
            },
            nbd: NbdLayer {
                connections: self.nbd.connections.or(next.nbd.connections),
                timeout: self.nbd.timeout.or(next.nbd.timeout),
            },
        }
    }

    /// The settings, with the defaults where the layer is silent.
    #[must_use]
    pub fn resolve(self) -> Config {
        Config {
            root: self.root.unwrap_or_else(|| "/var/lib/firstread".into()),
            run: self.run.unwrap_or_else(|| "/run/firstread".into()),
            log: self.log.unwrap_or_else(|| "info".to_owned()),
            pool_limit: self.pool.limit,
            pool_keep_free: self.pool.keep_free.unwrap_or(DEFAULT_KEEP_FREE),
            pool_scrub_rate: self.pool.scrub_rate.unwrap_or(DEFAULT_SCRUB_RATE),
            on_outage: self.fetch.on_outage.unwrap_or(Patience::For(Duration::from_secs(60))),
            prefetch: self.fetch.prefetch.unwrap_or_default(),
            plain_http: self.registry.plain_http.is_some_and(|switch| switch.0),
            docker_config: self.registry.docker_config,
            hosts_dir: self.registry.hosts_dir.unwrap_or_else(|| DEFAULT_HOSTS_DIR.into()),
            blobs: self.registry.blobs.unwrap_or_default().0,
            background_limit: self.fetch.background_limit.unwrap_or(Size(0)),
            build: self.build,
            ublk: UblkOptions {
                queues: self.ublk.queues.map_or(UblkOptions::default().queues, |count| count.0),
                queue_depth: self.ublk.queue_depth.map_or(UblkOptions::default().queue_depth, |count| count.0),
            },
            nbd: NbdDeviceOptions {
                connections: self
                    .nbd
                    .connections
                    .map_or(NbdDeviceOptions::default().connections, |count| usize::from(count.0)),
                timeout: self
                    .nbd
                    .timeout
                    .map_or(NbdDeviceOptions::default().timeout, |count| Duration::from_secs(u64::from(count.0))),
                ..NbdDeviceOptions::default()
            },
        }
    }
}

/// The settings of this process: `flags`, then the environment, then the file.
///
/// `file` is the `--config` flag; without it the file is [`FILE_VARIABLE`]'s, or [`DEFAULT_FILE`] if that exists.
///
/// # Errors
/// Malformed values, with the place; a file that was named and can't be read.
pub fn load(flags: Layer, file: Option<&Path>) -> Result<Config, Problem> {
    let environment = Layer::from_environment(|name| std::env::var_os(name))?;
    let named = file.map(Path::to_owned).or_else(|| std::env::var_os(FILE_VARIABLE).map(PathBuf::from));
    let file = match named {
        Some(path) => Layer::from_file(&path)?,
        None if Path::new(DEFAULT_FILE).exists() => Layer::from_file(Path::new(DEFAULT_FILE))?,
        None => Layer::default(),
    };
    let mut config = flags.or(environment).or(file).resolve();
    let mut paths = vec![&mut config.root, &mut config.run, &mut config.hosts_dir];
    paths.extend(config.docker_config.as_mut());
    paths.extend(config.build.cache.as_mut());
    for path in paths {
        *path = std::path::absolute(&*path)
            .map_err(|error| Problem::new(Kind::Usage, format!("the path {}: {error}", path.display())))?;
    }
    Ok(config)
}

/// A size in bytes, written as a number with an optional unit: `K`, `M`, `G`, `T`, each a power of 1024, also `KiB`, …
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            _ => return Err(format!("{text:?} is not a size: write bytes, or a number with K, M, G or T")),
        };
        let number: u64 = number.parse().map_err(|_| format!("{text:?} is not a size: it must start with a number"))?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(|| format!("{text:?} is too large"))
    }
}

/// A [`Size`], or a part of the disk: `20%`.
impl FromStr for Amount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(number) = text.strip_suffix('%') else { return text.parse().map(|Size(bytes)| Self::Bytes(bytes)) };
        match number.trim().parse() {
            Ok(percent @ 0..=100) => Ok(Self::Percent(percent)),
            _ => Err(format!("{text:?} is no part of a disk: write 0% to 100%")),
        }
    }
}

/// A number from 1 to `MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count<const MAX: u16>(pub u16);

impl<const MAX: u16> FromStr for Count<MAX> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim().parse() {
            Ok(number) if (1..=MAX).contains(&number) => Ok(Self(number)),
            _ => Err(format!("{text:?} is not a number from 1 to {MAX}")),
        }
    }
}

impl<'de, const MAX: u16> Deserialize<'de> for Count<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_toml(deserializer)
    }
}

/// Places of blobs, separated by spaces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places(pub Vec<BlobPlace>);

impl FromStr for Places {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split_whitespace().map(str::parse).collect::<Result<_, _>>().map(Self)
    }
}

/// Yes or no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Switch(pub bool);

impl FromStr for Switch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "1" | "true" | "yes" | "on" => Ok(Self(true)),
            "0" | "false" | "no" | "off" => Ok(Self(false)),
            _ => Err(format!("{text:?} is neither true nor false")),
        }
    }
}

/// In the file a value is its text, or the TOML type that says the same.
fn from_toml<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(deserializer: D) -> Result<T, D::Error> {
    let text = match toml::Value::deserialize(deserializer)? {
        toml::Value::String(text) => text,
        // A list is its parts, separated as in the environment.
        toml::Value::Array(parts) if parts.iter().all(toml::Value::is_str) => {
            parts.iter().filter_map(toml::Value::as_str).collect::<Vec<_>>().join(" ")
        }
        value @ (toml::Value::Integer(_) | toml::Value::Boolean(_)) => value.to_string(),
        value => return Err(de::Error::custom(format!("{value} is neither text, a number nor true or false"))),
    };
    text.parse().map_err(de::Error::custom)
}

macro_rules! deserialize_from_text {
    ($($type:ty),*) => {$(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                from_toml(deserializer)
            }
        }
    )*};
}
deserialize_from_text!(Amount, Patience, Places, Size, Switch);

impl Serialize for Patience {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> Result<Layer, Problem> {
        Layer::from_environment(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into()))
    }

    #[test]
    fn a_flag_wins_over_the_environment_and_that_over_the_file() {
        let file: Layer = toml::from_str("root = '/file'\nrun = '/file'\nlog = 'warn'\n[pool]\nlimit = '3G'").unwrap();
        let environment = environment(&[("FIRSTREAD_ROOT", "/env"), ("FIRSTREAD_RUN", "/env")]).unwrap();
        let flags = Layer { root: Some("/flag".into()), ..Layer::default() };
        let config = flags.or(environment).or(file).resolve();
        assert_eq!(config.root, Path::new("/flag"));
        assert_eq!(config.run, Path::new("/env"));
        assert_eq!(config.log, "warn");
        assert_eq!(config.pool_limit, Some(Amount::Bytes(3 << 30)));
        assert_eq!(config.pool_keep_free, Amount::Percent(5));
        assert_eq!(config.on_outage, Patience::For(Duration::from_secs(60)));
    }

    #[test]
    fn every_key_has_a_variable_named_after_it() {
        let values = [
            "/r",
            "/u",
            "debug",
            "5M",
            "20%",
            "3M",
            "wait",
            "2M",
            "startup",
            "true",
            "/d",
            "/h",
            "s3://b/p r.example=https://cdn.example",
            "/c",
            "1G",
            "1T",
            "2T",
            "3M",
            "4G",
            "5K",
            "6",
            "7",
            "8",
            "2",
            "128",
            "3",
            "30",
        ];
        assert_eq!(values.len(), KEYS.len());
        for ((key, name, set), value) in KEYS.into_iter().zip(values) {
            assert_eq!(name, format!("FIRSTREAD_{}", key.replace('.', "_").to_uppercase()));
            let mut by_variable = Layer::default();
            set(&mut by_variable, value.into()).unwrap();
            let line = match key.rsplit_once('.') {
                Some((table, key)) => format!("[{table}]\n{key} = {value:?}"),
                None => format!("{key} = {value:?}"),
            };
            assert_eq!(toml::from_str::<Layer>(&line).unwrap(), by_variable, "{key}");
            assert_ne!(by_variable, Layer::default());
        }
    }

    #[test]
    fn what_is_malformed_is_named() {
        let problem = environment(&[("FIRSTREAD_POOL_LIMIT", "lots")]).unwrap_err();
        assert!(problem.message.contains("FIRSTREAD_POOL_LIMIT"), "{problem}");
        let error = toml::from_str::<Layer>("[pool]\nlimt = 3").unwrap_err().to_string();
        assert!(error.contains("limt"), "{error}");
        assert!("99999999999T".parse::<Size>().is_err());
        assert!("101%".parse::<Amount>().is_err());
        assert_eq!("12%".parse(), Ok(Amount::Percent(12)));
        assert_eq!("0".parse(), Ok(Size(0)));
        assert_eq!("2 GiB".parse(), Ok(Size(2 << 30)));
        assert_eq!("5m".parse(), Ok(Patience::For(Duration::from_secs(300))));
        assert!("soon".parse::<Patience>().is_err());
        let list: Layer = toml::from_str("[registry]\nblobs = ['s3://b', 'r=gs://c']").unwrap();
        assert_eq!(list.registry.blobs, "s3://b r=gs://c".parse().ok());
    }
}
