//! `firstread-build commit` and `diff`: what `firstread commit` and `firstread upper diff` run, once they know where what was
//! written is.

use std::io::Write;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::Args;
use comfy_table::{Table, presets};
use firstread::build::{Change, CommitRequest, DiffRequest, Difference, FileSystemState, commit, diff};
use firstread::device::upper::boot;
use firstread::oci::Reference;
use firstread::source::{Access, BlobPlace};
use indicatif::HumanBytes;
use rustix::process::{Signal, getppid, set_parent_process_death_signal};

use super::Common;

/// Arguments of `commit`.
#[derive(Args)]
pub struct CommitArgs {
    /// The directory of the upper; no device may have it.
    #[arg(long, value_name = "DIR")]
    upper: PathBuf,
    /// HOST/REPO[:TAG], oci:DIR[:TAG] or oci-archive:FILE[:TAG].
    #[arg(value_name = "DEST")]
    destination: Reference,
    /// The image that the upper lies over, when it is not where the upper says.
    #[arg(long, value_name = "REF")]
    parent: Option<Reference>,
    /// A further image whose packs may be listed (repeatable).
    #[arg(long, value_name = "REF")]
    reuse: Vec<Reference>,
    /// The file system was frozen when the upper was copied.
    #[arg(long)]
    frozen: bool,
    /// CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, USER, VOLUME or WORKDIR with its arguments (repeatable).
    #[arg(long, value_name = "INSTRUCTION")]
    change: Vec<Change>,
    /// What was done, for the image's history.
    #[arg(long, value_name = "TEXT")]
    message: Option<String>,
    /// Who did it.
    #[arg(long, value_name = "NAME")]
    author: Option<String>,
    /// zstd level of new chunks.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=22))]
    level: i32,
    /// When the image says it was created, in seconds since 1970 [default: now]
    #[arg(long, value_name = "SECONDS", env = "SOURCE_DATE_EPOCH", hide_env_values = true)]
    source_date: Option<u64>,
    #[command(flatten)]
    reach: Reach,
    #[command(flatten)]
    common: Common,
}

/// Arguments of `diff`.
#[derive(Args)]
pub struct DiffArgs {
    /// The directory of the upper; no device may have it.
    #[arg(long, value_name = "DIR")]
    upper: PathBuf,
    #[command(flatten)]
    reach: Reach,
    #[command(flatten)]
    common: Common,
}

/// How registries are reached, beside [`Common`].
#[derive(Args)]
struct Reach {
    /// Docker's config.json with the credentials.
    #[arg(long, value_name = "FILE")]
    docker_config: Option<PathBuf>,
    /// Directory of registries' mirrors and certificates (HOST/hosts.toml).
    #[arg(long, value_name = "DIR")]
    hosts_dir: Option<PathBuf>,
    /// Where blobs are as well (repeatable).
    #[arg(long, value_name = "[NAME=]URL")]
    blobs: Vec<BlobPlace>,
    /// The process that runs this one, which ends with it.
    #[arg(long, value_name = "PID", hide = true)]
    run_by: Option<u32>,
}

impl Reach {
    /// Has the kernel end this process when the one that runs it is gone. To be called first.
    fn end_with_parent(&self) -> anyhow::Result<()> {
        let Some(parent) = self.run_by else { return Ok(()) };
        set_parent_process_death_signal(Some(Signal::TERM)).context("ending with the process that runs this one")?;
        // It may be gone already; then there is no signal.
        let runs = getppid().is_some_and(|pid| u32::try_from(pid.as_raw_nonzero().get()) == Ok(parent));
        anyhow::ensure!(runs, "process {parent}, which ran this one, is gone");
        Ok(())
    }

    fn access(self, common: &Common) -> anyhow::Result<Access> {
        let config = common.settings()?;
        let default = Access::default();
        Ok(Access {
            plain_http: common.plain_http || config.plain_http,
            docker_config: self.docker_config.or(config.docker_config),
            hosts_dir: self.hosts_dir.unwrap_or(config.hosts_dir),
            blobs: self.blobs,
            ..default
        })
    }
}

impl CommitArgs {
    /// Runs the verb.
    pub fn run(self) -> anyhow::Result<()> {
        self.reach.end_with_parent()?;
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let request = CommitRequest {
            boot: boot(),
            parent: self.parent,
            reuse: self.reuse,
            state: if self.frozen { FileSystemState::Frozen } else { FileSystemState::AsItIs },
            changes: self.change,
            message: self.message,
            author: self.author,
            created: self.source_date.unwrap_or_else(now),
            level: self.level,
            temp: self.common.temp.clone(),
            access: self.reach.access(&self.common)?,
            ..CommitRequest::new(self.upper, self.destination)
        };
        let report = commit(&request, &self.common.progress())?;
        self.common.print(&report, &request.destination)
    }
}

impl DiffArgs {
    /// Runs the verb.
    pub fn run(self) -> anyhow::Result<()> {
        self.reach.end_with_parent()?;
        let access = self.reach.access(&self.common)?;
        let request = DiffRequest { upper: self.upper, boot: boot(), temp: self.common.temp.clone(), access };
        let difference = diff(&request, &self.common.progress())?;
        let mut out = std::io::stdout().lock();
        if self.common.json {
            serde_json::to_writer(&mut out, &difference)?;
            writeln!(out)?;
            return Ok(());
        }
        writeln!(out, "{}", table(&difference).trim_fmt())?;
        Ok(())
    }
}

fn table(difference: &Difference) -> Table {
    let size = |bytes: u64| if bytes == 0 { String::new() } else { HumanBytes(bytes).to_string() };
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for changed in &difference.changes {
        let kind = serde_json::to_value(changed.kind).ok().and_then(|kind| kind.as_str().map(str::to_owned));
        // A path may have anything in it; a terminal must not obey it.
        let path: String = changed.path.chars().flat_map(printable).collect();
        table.add_row([kind.unwrap_or_default(), path, size(changed.bytes)]);
    }
    table.add_row([String::new(), "(the file system's own)".to_owned(), size(difference.other_bytes)]);
    table
}

fn printable(character: char) -> Vec<char> {
    if character.is_control() { character.escape_default().collect() } else { vec![character] }
}
