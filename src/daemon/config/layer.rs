//! What one layer of the settings says: the flags, the environment, or the file.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;

use super::values::{Count, MountKind, Name, Places, Size, Switch, TransportChoice};
use super::{Patience, Prefetch};
use crate::attach::nbd::kernel::{CONNECTIONS_MAX, TIMEOUT_MAX};
use crate::attach::ublk::{QUEUE_DEPTH_MAX, QUEUES_MAX};
use crate::daemon::control::{Kind, Problem};
use crate::pool::Amount;

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
    /// containerd's snapshotter.
    pub snapshotter: SnapshotterLayer,
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

/// The part `snapshotter` of a [`Layer`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SnapshotterLayer {
    /// The socket that containerd's configuration names.
    pub listen: Option<PathBuf>,
    /// containerd's own socket.
    pub containerd: Option<PathBuf>,
    /// What containers get.
    pub mounts: Option<MountKind>,
    /// Size of containers' block devices, where it is larger than the image's.
    pub size: Option<Size>,
    /// Name of its state in the root directory.
    pub name: Option<Name>,
    /// How the kernel sees devices.
    pub transport: Option<TransportChoice>,
}

/// Every key, its environment variable, and how it gets into a layer.
pub(super) const KEYS: [(&str, &str, Setter); 33] = [
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
    ("snapshotter.listen", "FIRSTREAD_SNAPSHOTTER_LISTEN", |layer, value| {
        put_path(&mut layer.snapshotter.listen, value)
    }),
    ("snapshotter.containerd", "FIRSTREAD_SNAPSHOTTER_CONTAINERD", |layer, value| {
        put_path(&mut layer.snapshotter.containerd, value)
    }),
    ("snapshotter.mounts", "FIRSTREAD_SNAPSHOTTER_MOUNTS", |layer, value| put(&mut layer.snapshotter.mounts, value)),
    ("snapshotter.size", "FIRSTREAD_SNAPSHOTTER_SIZE", |layer, value| put(&mut layer.snapshotter.size, value)),
    ("snapshotter.name", "FIRSTREAD_SNAPSHOTTER_NAME", |layer, value| put(&mut layer.snapshotter.name, value)),
    ("snapshotter.transport", "FIRSTREAD_SNAPSHOTTER_TRANSPORT", |layer, value| {
        put(&mut layer.snapshotter.transport, value)
    }),
];

pub(super) type Setter = fn(&mut Layer, OsString) -> Result<(), String>;

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
            snapshotter: SnapshotterLayer {
                listen: self.snapshotter.listen.or(next.snapshotter.listen),
                containerd: self.snapshotter.containerd.or(next.snapshotter.containerd),
                mounts: self.snapshotter.mounts.or(next.snapshotter.mounts),
                size: self.snapshotter.size.or(next.snapshotter.size),
                name: self.snapshotter.name.or(next.snapshotter.name),
                transport: self.snapshotter.transport.or(next.snapshotter.transport),
            },
        }
    }
}
