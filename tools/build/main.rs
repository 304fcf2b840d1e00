//! The program `firstread-build`.

#[path = "main/commit.rs"]
mod commit;
mod show;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand};
use firstread::build::{
    CacheSettings, Limits, OptimizeRequest, Progress, Report, Request, Silent, Tree, build, optimize,
};
use firstread::daemon::config::{self, BuildLimits, Config, Layer, Size};
use firstread::oci::{Platform, Reference};
use firstread::profile::{MAX_PROFILE_BYTES, Profile};

/// Builds firstread images.
#[derive(Parser)]
#[command(name = "firstread-build", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Pack a file system or an image, write the index, publish.
    Build(BuildArgs),
    /// Add or replace an image's start-up pack; repack nothing else.
    Optimize(OptimizeArgs),
    /// Publish what an upper changed as a child image; `firstread commit` runs this.
    Commit(commit::CommitArgs),
    /// Show what an upper changed; `firstread upper diff` runs this.
    Diff(commit::DiffArgs),
}

#[derive(Args)]
struct OptimizeArgs {
    /// A firstread image: HOST/REPO[:TAG] or oci:DIR[:TAG].
    #[arg(value_name = "REF")]
    source: Reference,
    /// HOST/REPO[:TAG] or oci:DIR[:TAG]; may be the same.
    #[arg(value_name = "DEST")]
    destination: Reference,
    /// What a start reads, as `firstread profile` wrote it.
    #[arg(long, value_name = "FILE")]
    profile: PathBuf,
    /// An earlier version that has a start-up pack: hot chunks are formed as it has them, so that nodes that ran it fetch
    /// only what is new. May be given several times.
    #[arg(long, value_name = "REF")]
    reuse: Vec<Reference>,
    /// zstd level of the start-up pack.
    #[arg(long, default_value_t = 19, value_parser = clap::value_parser!(i32).range(1..=22))]
    level: i32,
    /// The platform whose start it is; otherwise this machine's.
    #[arg(long, value_name = "OS/ARCH")]
    platform: Option<Platform>,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct BuildArgs {
    /// HOST/REPO[:TAG], oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:TAG], dir:PATH, tar:FILE (- for
    /// standard input, also gzip and zstd) or raw:FILE (a disk image).
    #[arg(value_name = "SRC")]
    source: Reference,
    /// HOST/REPO[:TAG], oci:DIR[:TAG] or oci-archive:FILE[:TAG].
    #[arg(value_name = "DEST")]
    destination: Reference,
    /// zstd level: 3 is fast, 19 makes images an eighth smaller.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=22))]
    level: i32,
    /// Size of the device, with room to grow when it is attached writable (bytes, or with K, M, G, T).
    #[arg(long)]
    size: Option<Size>,
    /// An earlier firstread image whose packs may be listed again (repeatable).
    #[arg(long, value_name = "REF")]
    reuse: Vec<Reference>,
    /// What a start reads, as `firstread profile` wrote it: it comes first on the device, and gets a start-up pack.
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// Build for this platform only (repeatable); otherwise for all that the source has.
    #[arg(long, value_name = "OS/ARCH")]
    platform: Vec<Platform>,
    /// Put a dm-verity hash tree behind the file system; its root hash is in the manifest and in `firstread inspect`.
    #[arg(long)]
    verity: bool,
    /// When the image says it was created, in seconds since 1970; files of a directory are made no younger.
    #[arg(long, value_name = "SECONDS", env = "SOURCE_DATE_EPOCH", hide_env_values = true)]
    source_date: Option<u64>,
    /// Read and compress every layer, and keep nothing for later builds.
    #[arg(long)]
    no_cache: bool,
    /// Directory of the build cache: what was made of layers that did not change is taken from there [default:
    /// build-cache in the root directory; without root's rights in ~/.cache/firstread]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Most bytes that stay in the build cache; what was used least recently goes [default: 10G]
    #[arg(long, value_name = "SIZE")]
    cache_limit: Option<Size>,
    #[command(flatten)]
    common: Common,
}

/// What every verb takes.
#[derive(Args)]
struct Common {
    /// Directory of everything durable [default: /var/lib/firstread]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Configuration file [default: /etc/firstread/config.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory for temporary files; they need about the size of what is stored, and again for a registry.
    #[arg(long, value_name = "DIR", env = "TMPDIR", default_value = "/tmp")]
    temp: PathBuf,
    /// Speak http with all registries, not with those on loopback only.
    #[arg(long)]
    plain_http: bool,
    /// Print the result as one JSON document.
    #[arg(long)]
    json: bool,
    /// Show no progress.
    #[arg(long)]
    quiet: bool,
}

impl Common {
    /// The settings, and what the flags say in their place.
    fn settings(&self) -> anyhow::Result<Config> {
        let flags = Layer { root: self.root.clone(), ..Layer::default() };
        config::load(flags, self.config.as_deref()).map_err(|problem| anyhow::anyhow!("{problem}"))
    }

    /// Where progress is shown.
    fn progress(&self) -> Arc<dyn Progress> {
        if self.quiet {
            Arc::new(Silent)
        } else if std::io::stderr().is_terminal() {
            Arc::new(show::Bar::new())
        } else {
            Arc::new(show::Lines::default())
        }
    }

    fn print(&self, report: &Report, destination: &Reference) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        if self.json {
            serde_json::to_writer(&mut out, report)?;
            writeln!(out)?;
        } else if self.quiet {
            writeln!(out, "{}", report.digest)?;
        } else {
            writeln!(out, "{}", show::table(report, destination).trim_fmt())?;
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_env("FIRSTREAD_LOG").unwrap_or_else(|_| "warn".into()))
        .with_writer(std::io::stderr)
        .init();
    // Wrong usage ends in clap, with exit code 2.
    let done = match Cli::parse().verb {
        Verb::Build(args) => run(args),
        Verb::Optimize(args) => run_optimize(args),
        Verb::Commit(args) => args.run(),
        Verb::Diff(args) => args.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing can be done when stderr is gone.
            let _ = writeln!(std::io::stderr(), "firstread-build: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Most bytes that stay in the build cache when nobody says otherwise.
const CACHE_LIMIT: Size = Size(10 << 30);

/// The build cache: by flags, else by settings, else where the user may write.
fn cache(args: &BuildArgs, config: &Config) -> Option<CacheSettings> {
    if args.no_cache {
        return None;
    }
    let named = args.cache.clone().or_else(|| config.build.cache.clone());
    let dir = named.or_else(|| {
        if args.common.root.is_some() || rustix::process::geteuid().is_root() {
            return Some(config.root.join("build-cache"));
        }
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let user = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")))?;
        Some(user.join("firstread/build"))
    })?;
    let Size(limit) = args.cache_limit.or(config.build.cache_limit).unwrap_or(CACHE_LIMIT);
    Some(CacheSettings { dir, limit })
}

/// The limits, with the defaults where the settings are silent.
fn limits(settings: &BuildLimits) -> Limits {
    let mut limits = Limits::default();
    let number = |limit: &mut u64, setting: Option<Size>| *limit = setting.map_or(*limit, |Size(value)| value);
    let count = |limit: &mut usize, setting: Option<Size>| {
        *limit = setting.map_or(*limit, |Size(value)| usize::try_from(value).unwrap_or(usize::MAX));
    };
    number(&mut limits.plain_bytes, settings.plain_bytes);
    number(&mut limits.file_bytes, settings.file_bytes);
    number(&mut limits.entries, settings.entries);
    number(&mut limits.name_bytes, settings.name_bytes);
    number(&mut limits.header_bytes, settings.header_bytes);
    count(&mut limits.segments, settings.segments);
    count(&mut limits.depth, settings.depth);
    count(&mut limits.layers, settings.layers);
    limits
}

fn run(args: BuildArgs) -> anyhow::Result<()> {
    let config = args.common.settings()?;
    let cache = cache(&args, &config);
    let common = args.common;
    let mut request = Request::new(args.source, args.destination);
    request.level = args.level;
    request.size = args.size.map(|Size(bytes)| bytes);
    request.reuse = args.reuse;
    request.platforms = args.platform;
    request.temp = common.temp.clone();
    request.source_date = args.source_date;
    request.tree = if args.verity { Tree::Verity } else { Tree::None };
    request.cache = cache;
    request.profile = args.profile.as_deref().map(profile).transpose()?.map(Arc::new);
    request.limits = limits(&config.build.limit);
    request.access.plain_http = common.plain_http || config.plain_http;
    let report = build(&request, &common.progress())?;
    common.print(&report, &request.destination)
}

fn run_optimize(args: OptimizeArgs) -> anyhow::Result<()> {
    let common = args.common;
    let config = common.settings()?;
    let mut request = OptimizeRequest::new(args.source, args.destination, profile(&args.profile)?);
    request.level = args.level;
    request.reuse = args.reuse;
    request.platform = args.platform.unwrap_or(request.platform);
    request.temp = common.temp.clone();
    request.access.plain_http = common.plain_http || config.plain_http;
    let report = optimize(&request, &common.progress())?;
    common.print(&report, &request.destination)
}

/// Reads a profile from a file.
fn profile(path: &Path) -> anyhow::Result<Profile> {
    let read = || -> anyhow::Result<Profile> {
        let bytes = std::fs::metadata(path)?.len();
        anyhow::ensure!(bytes <= MAX_PROFILE_BYTES, "it has {bytes} bytes, more than {MAX_PROFILE_BYTES}");
        Ok(Profile::from_text(&std::fs::read_to_string(path)?)?)
    };
    read().map_err(|error| anyhow::anyhow!("the profile {}: {error}", path.display()))
}
