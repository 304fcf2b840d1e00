//! `firstread upper`: what was written to devices and is kept.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;

use super::Outcome;
use super::build;
use super::commit::{access_arguments, finish, written};
use super::connect::connect;
use super::options::{AccessOptions, Context, absolute};
use super::output::{size, table};
use crate::daemon::control::{Call, DeviceInfo, Kind, Problem};
use crate::device::upper;

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Upper {
    /// List the uppers of the devices, and those in the named directories: what they belong to, how large they are
    List(List),
    /// Show which files changed, and how much was written: A added, C changed, D deleted
    Diff(Diff),
    /// Remove what was written, and the directory
    Discard(Discard),
}

/// Arguments of `upper diff`.
#[derive(Debug, Args)]
pub struct Diff {
    /// A writable device (id, device path or mountpoint), or the directory of an upper
    #[arg(value_name = "ID|DIR")]
    target: String,
    /// Directory for temporary files
    #[arg(long, value_name = "DIR", env = "TMPDIR", default_value = "/tmp")]
    temp: PathBuf,
    #[command(flatten)]
    access: AccessOptions,
}

/// Arguments of `upper list`.
#[derive(Debug, Args)]
pub struct List {
    /// Directories of uppers that no device may have
    #[arg(value_name = "DIR")]
    dirs: Vec<PathBuf>,
}

/// Arguments of `upper discard`.
#[derive(Debug, Args)]
pub struct Discard {
    /// The directory; no device may have it
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// An upper, as it is listed.
#[derive(Debug, Serialize)]
struct Listed {
    dir: PathBuf,
    /// The image that it belongs to, and the digest of its manifest.
    image: String,
    digest: String,
    /// Size of its device.
    device_bytes: u64,
    /// What it takes of its disk.
    used_bytes: u64,
    /// Which device has it.
    device: Option<String>,
}

impl Upper {
    /// Runs the verb.
    ///
    /// # Errors
    /// A directory without an upper, or with one that is damaged or in use.
    pub fn run(&self, context: &Context) -> Outcome {
        match self {
            Self::List(verb) => verb.run(context),
            Self::Diff(verb) => verb.run(context),
            Self::Discard(verb) => {
                let found = describe(&absolute(&verb.dir)?, None)?;
                upper::discard(&found.dir)?;
                context.output.answer(&found, |found| format!("{}: removed", found.dir.display()))
            }
        }
    }
}

impl Diff {
    fn run(&self, context: &Context) -> Outcome {
        let written = written(&self.target, context)?;
        let mut arguments: Vec<OsString> = vec!["--upper".into(), written.dir.as_os_str().to_owned()];
        arguments.extend(["--temp".into(), absolute(&self.temp)?.into()]);
        arguments.extend(access_arguments(&self.access, written.access.as_ref(), context)?);
        let status = build::run("diff", &arguments)?;
        finish(written, status)
    }
}

impl List {
    fn run(&self, context: &Context) -> Outcome {
        let devices: Vec<DeviceInfo> = match connect(context)? {
            Some(mut client) => client.call(Call::List)?,
            None => Vec::new(),
        };
        let mut found = Vec::new();
        for device in devices {
            if let Some(upper) = device.upper {
                found.push(describe(&upper.dir, Some(device.id))?);
            }
        }
        for dir in &self.dirs {
            let dir = absolute(dir)?;
            if !found.iter().any(|listed: &Listed| listed.dir == dir) {
                found.push(describe(&dir, None)?);
            }
        }
        let row = |listed: &Listed| {
            [
                listed.dir.display().to_string(),
                listed.device.clone().unwrap_or_else(|| "-".to_owned()),
                size(listed.used_bytes),
                size(listed.device_bytes),
                listed.image.clone(),
            ]
        };
        context.output.answer(&found, |found| match found.as_slice() {
            [] => String::new(),
            found => table(["directory", "device", "used", "size", "image"], found.iter().map(row)),
        })
    }
}

fn describe(dir: &Path, device: Option<String>) -> Outcome<Listed> {
    let Some((lower, device_bytes)) = upper::describe(dir)? else {
        return Err(Problem::new(Kind::NotFound, format!("there is no upper in {}", dir.display())));
    };
    let used = |entry: std::io::Result<fs::DirEntry>| Some(entry.ok()?.metadata().ok()?.blocks() * 512);
    let used_bytes = fs::read_dir(dir).map(|entries| entries.filter_map(used).sum()).unwrap_or_default();
    let (dir, digest) = (dir.to_owned(), lower.manifest.to_string());
    Ok(Listed { dir, image: lower.image, digest, device_bytes, used_bytes, device })
}
