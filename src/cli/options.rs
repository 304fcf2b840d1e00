//! Options of all verbs, and of those that name an image.

use std::io::{self, IsTerminal};
use std::path::PathBuf;

use clap::Args;
use tracing_subscriber::EnvFilter;

use super::Outcome;
use super::output::Output;
use crate::daemon::config::{self, Config, Layer, RegistryLayer, Size, Switch};
use crate::daemon::control::{Kind, OrdinaryLayers, Problem, SourceAccess};
use crate::daemon::uppers::{Journal, Place, Writable};
use crate::source::BlobPlace;

/// Options of every verb.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Options for all verbs")]
pub struct Global {
    /// Directory of the pool and everything durable [default: /var/lib/firstread]
    #[arg(long, global = true, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Directory of the sockets, the pid file and the log [default: /run/firstread]
    #[arg(long, global = true, value_name = "DIR")]
    pub run: Option<PathBuf>,
    /// Configuration file [default: /etc/firstread/config.toml, if it exists]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What to log: error, warn, info, debug, trace, or a filter of modules
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log: Option<String>,
    /// Print one JSON document and nothing else
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress, no remarks
    #[arg(long, short, global = true)]
    pub quiet: bool,
}

impl Global {
    /// The layer of settings that these flags are.
    #[must_use]
    pub fn layer(&self) -> Layer {
        Layer { root: self.root.clone(), run: self.run.clone(), log: self.log.clone(), ..Layer::default() }
    }
}

/// How an image's source is reached.
#[derive(Debug, Clone, Default, Args)]
pub struct AccessOptions {
    /// Reach registries over HTTP without TLS (loopback hosts always are)
    #[arg(long)]
    pub plain_http: bool,
    /// Docker's config.json with the credentials
    #[arg(long, value_name = "FILE")]
    pub docker_config: Option<PathBuf>,
    /// Directory of registries' mirrors and certificates (HOST/hosts.toml) [default: /etc/containerd/certs.d]
    #[arg(long, value_name = "DIR")]
    pub hosts_dir: Option<PathBuf>,
    /// Where blobs are as well, asked before registries: http(s)://, s3://BUCKET/PATH, gs:// or azure://, holding
    /// blobs/sha256/HEX as an OCI layout does (repeatable; HOST/REPO=URL: only for these images)
    #[arg(long, value_name = "[NAME=]URL")]
    pub blobs: Vec<BlobPlace>,
}

/// Whether a device can be written.
#[derive(Debug, Clone, Default, Args)]
pub struct WriteOptions {
    /// Make the device writable; what is written is thrown away when it is detached, or the machine restarts
    #[arg(long, conflicts_with = "upper")]
    pub rw: bool,
    /// Make the device writable; what is written is kept in this directory, which belongs to this image from then on
    #[arg(long, value_name = "DIR")]
    pub upper: Option<PathBuf>,
    /// Make a writable device larger than its image, e.g. 20G: the room costs nothing until it is written
    #[arg(long, value_name = "SIZE")]
    pub size: Option<Size>,
    /// Whether a file system in an upper gets a journal, which it needs to be whole after a loss of power: `auto`, where
    /// firstread made it and there is room, or `none` [default: auto]
    #[arg(long, value_name = "WHICH", requires = "upper", conflicts_with = "rw")]
    pub journal: Option<Journal>,
}

impl WriteOptions {
    /// What the daemon is asked for; `None`: a device that can't be written.
    ///
    /// # Errors
    /// A size of a device that can't be written, or a path that can't be made absolute.
    pub fn writable(&self) -> Outcome<Option<Writable>> {
        let place = match &self.upper {
            Some(dir) => Place::Kept(absolute(dir)?),
            None if self.rw => Place::Private,
            None if self.size.is_some() => {
                return Err(Problem::new(Kind::Usage, "--size is for writable devices: give --rw or --upper as well"));
            }
            None => return Ok(None),
        };
        Ok(Some(Writable { place, size: self.size.map(|size| size.0), journal: self.journal.unwrap_or_default() }))
    }
}

/// What is shown of an image with ordinary layers.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct LayerOptions {
    /// Of an image with ordinary layers above firstread's, such as a container's commit makes, take what is below them
    #[arg(long)]
    pub base_only: bool,
}

impl LayerOptions {
    /// What the daemon is asked for.
    #[must_use]
    pub fn ordinary(self) -> OrdinaryLayers {
        match self.base_only {
            true => OrdinaryLayers::LeaveOut,
            false => OrdinaryLayers::Refuse,
        }
    }
}

/// What a verb works with.
#[derive(Debug)]
pub struct Context {
    /// The settings.
    pub config: Config,
    /// The configuration file that was named.
    pub config_file: Option<PathBuf>,
    /// Where answers go.
    pub output: Output,
}

impl Context {
    /// The context of a verb; starts its log, of warnings unless `--log` was given.
    ///
    /// # Errors
    /// Settings that are malformed.
    pub fn new(global: Global) -> Outcome<Self> {
        let flags = global.layer();
        Self::of(global, flags)
    }

    /// The context of a verb that has flags for settings of its own, all of which are in `flags`.
    ///
    /// # Errors
    /// As of [`new`](Self::new).
    pub fn of(global: Global, flags: Layer) -> Outcome<Self> {
        let config = config::load(flags, global.config.as_deref())?;
        start_log(global.log.as_deref().unwrap_or("warn"))?;
        let output = Output::new(global.json, global.quiet);
        Ok(Self { config, config_file: global.config, output })
    }

    /// How sources are reached: the verb's flags over the settings. Without either it is this process's environment
    /// that says where docker's configuration is, not the daemon's.
    ///
    /// # Errors
    /// A path that can't be made absolute.
    pub fn access(&self, options: &AccessOptions) -> Outcome<SourceAccess> {
        let flags = Layer {
            registry: RegistryLayer {
                plain_http: options.plain_http.then_some(Switch(true)),
                docker_config: options.docker_config.clone(),
                ..RegistryLayer::default()
            },
            ..Layer::default()
        };
        let flags = flags.resolve();
        let named = flags.docker_config.or_else(|| self.config.docker_config.clone());
        let docker_config = named.or_else(default_docker_config);
        Ok(SourceAccess {
            plain_http: flags.plain_http || self.config.plain_http,
            docker_config: docker_config.map(|path| absolute(&path)).transpose()?,
            blobs: if options.blobs.is_empty() { self.config.blobs.clone() } else { options.blobs.clone() },
            hosts_dir: Some(absolute(options.hosts_dir.as_deref().unwrap_or(&self.config.hosts_dir))?),
        })
    }
}

/// `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`, if it exists.
fn default_docker_config() -> Option<PathBuf> {
    let dir = match std::env::var_os("DOCKER_CONFIG").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(std::env::var_os("HOME")?).join(".docker"),
    };
    Some(dir.join("config.json")).filter(|file| file.exists())
}

/// `path` from the root directory; it need not exist.
///
/// # Errors
/// An empty path, or a working directory that is gone.
pub fn absolute(path: &std::path::Path) -> Outcome<PathBuf> {
    std::path::absolute(path)
        .map_err(|error| Problem::new(Kind::Usage, format!("the path {:?}: {error}", path.display().to_string())))
}

/// Sends the log to standard error.
///
/// # Errors
/// A filter that can't be parsed.
pub fn start_log(filter: &str) -> Outcome {
    let filter = EnvFilter::try_new(filter).map_err(|error| {
        Problem::new(Kind::Usage, format!("the log level {filter:?}: {error}"))
            .hint("write error, warn, info, debug or trace, or a filter such as info,firstread::fetch=debug")
    })?;
    // A second subscriber in one process is a test's; the first one stays.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .try_init();
    Ok(())
}
