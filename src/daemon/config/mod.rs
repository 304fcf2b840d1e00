//! Settings: flag, else environment, else file, else default.
//!
//! Each setting has a key (`pool.limit`) and an environment variable (`FIRSTREAD_POOL_LIMIT`). The file is TOML; a key that
//! does not exist is an error, since a mistyped limit must not be taken for no limit.

mod layer;
mod values;

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::control::{Kind, Problem};
use crate::attach::nbd::kernel::NbdDeviceOptions;
use crate::attach::ublk::UblkOptions;
pub use crate::fetch::{Patience, Prefetch};
use crate::pool::Amount;
use crate::source::BlobPlace;

pub use layer::{
    BuildLayer, BuildLimits, FetchLayer, Layer, NbdLayer, PoolLayer, RegistryLayer, SnapshotterLayer, UblkLayer,
};
pub use values::{Count, MountKind, Name, Places, Size, Switch, TransportChoice};

/// Where the configuration is when nobody says otherwise; it need not exist.
pub const DEFAULT_FILE: &str = "/etc/firstread/config.toml";

/// The environment variable that names the configuration file.
pub const FILE_VARIABLE: &str = "FIRSTREAD_CONFIG";

/// Where containerd keeps what is said of registries.
const DEFAULT_HOSTS_DIR: &str = "/etc/containerd/certs.d";

/// Where containerd listens.
const DEFAULT_CONTAINERD: &str = "/run/containerd/containerd.sock";

/// What the pool leaves to others of its disk when nobody says otherwise.
const DEFAULT_KEEP_FREE: Amount = Amount::Percent(5);

/// Bytes a second that are scrubbed when nobody says otherwise: 86 GB a day, four reads a second.
const DEFAULT_SCRUB_RATE: Size = Size(1 << 20);

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
    /// containerd's snapshotter.
    pub snapshotter: SnapshotterConfig,
}

/// The settings of containerd's snapshotter.
#[derive(Debug, Clone, PartialEq)]
pub struct SnapshotterConfig {
    /// The socket that containerd's configuration names.
    pub listen: PathBuf,
    /// containerd's own socket.
    pub containerd: PathBuf,
    /// What containers get when no label says otherwise.
    pub mounts: MountKind,
    /// Bytes of containers' block devices, where that is more than the image's.
    pub size: Option<Size>,
    /// Name of its state in the root directory.
    pub name: String,
    /// How the kernel sees devices.
    pub transport: TransportChoice,
}

impl Layer {
    /// The settings, with the defaults where the layer is silent.
    #[must_use]
    pub fn resolve(self) -> Config {
        let (run, snapshotter) = (self.run.unwrap_or_else(|| "/run/firstread".into()), self.snapshotter);
        Config {
            root: self.root.unwrap_or_else(|| "/var/lib/firstread".into()),
            snapshotter: SnapshotterConfig {
                listen: snapshotter.listen.unwrap_or_else(|| run.join("snapshotter.sock")),
                containerd: snapshotter.containerd.unwrap_or_else(|| DEFAULT_CONTAINERD.into()),
                mounts: snapshotter.mounts.unwrap_or_default(),
                size: snapshotter.size,
                name: snapshotter.name.map_or_else(|| "default".to_owned(), |name| name.0),
                transport: snapshotter.transport.unwrap_or_default(),
            },
            run,
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
    let SnapshotterConfig { listen, containerd, .. } = &mut config.snapshotter;
    let mut paths = vec![&mut config.root, &mut config.run, &mut config.hosts_dir, listen, containerd];
    paths.extend(config.docker_config.as_mut());
    paths.extend(config.build.cache.as_mut());
    for path in paths {
        *path = std::path::absolute(&*path)
            .map_err(|error| Problem::new(Kind::Usage, format!("the path {}: {error}", path.display())))?;
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::layer::KEYS;
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
            "/l.sock",
            "/c.sock",
            "block",
            "20G",
            "kata",
            "loop",
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
        let error = toml::from_str::<Layer>("[snapshotter]\nmounts = 'both'").unwrap_err().to_string();
        assert!(error.contains("mounts = 'both'") && error.contains("neither overlay nor block"), "{error}");
        assert!("../x".parse::<Name>().is_err() && "".parse::<Name>().is_err());
        assert!("smoke".parse::<TransportChoice>().is_err());
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
