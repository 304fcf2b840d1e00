//! `firstread profile`: what a start read, as a file that `firstread optimize` and `build --profile` take.

use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::Outcome;
use super::connect::connect;
use super::detach::{not_running, target_of};
use super::options::Context;
use super::output::size;
use crate::daemon::client::Client;
use crate::daemon::control::{Call, Kind, Problem, ProfilePage, Until};
use crate::profile::{BLOCK, MAX_PROFILE_BYTES, Place, Profile as Recorded, merge};

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Profile {
    /// The device: its id, device path or mount point
    #[arg(value_name = "ID|DEVICE|DIR", required_unless_present = "merge", conflicts_with = "merge")]
    target: Option<String>,
    /// Join these profiles instead: of several starts, or of several versions of an image
    #[arg(long, value_name = "FILE", num_args = 1..)]
    merge: Vec<PathBuf>,
    /// Where to write it; - for standard output
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Also what was read after the program was ready
    #[arg(long)]
    all: bool,
}

/// What was written. Sizes in bytes.
#[derive(Debug, Serialize)]
pub struct Written {
    /// Where.
    pub file: PathBuf,
    /// The image that was recorded.
    pub image: String,
    /// Runs of blocks.
    pub runs: usize,
    /// What the runs hold.
    pub bytes: u64,
    /// Files and directories that they are of.
    pub files: usize,
    /// Read-ahead of the device.
    pub read_ahead_kb: Option<u32>,
    /// Whether everything that was read is there.
    pub complete: bool,
}

impl Profile {
    /// Runs the verb.
    ///
    /// # Errors
    /// What the daemon says, profiles that are none, and a file that can't be written.
    pub fn run(&self, context: &Context) -> Outcome {
        let (text, profile) = match &self.target {
            Some(target) => {
                let text = self.recorded(context, target)?;
                let profile = Recorded::from_text(&text)?;
                (text, profile)
            }
            None => {
                let profiles = self.merge.iter().map(|path| read(path)).collect::<Outcome<Vec<_>>>()?;
                let profile = merge(&profiles)?;
                (profile.to_text()?, profile)
            }
        };
        let written = write_out(context, &self.output, &text, &profile)?;
        if self.output == Path::new("-") {
            return Ok(());
        }
        context.output.answer(&written, |written| {
            let Written { runs, files, file, .. } = written;
            format!("{}: {} in {runs} runs of {files} files and directories", file.display(), size(written.bytes))
        })
    }

    fn recorded(&self, context: &Context, target: &str) -> Outcome<String> {
        let target = target_of(target)?;
        let until = if self.all { Until::Now } else { Until::Ready };
        let mut client = connect(context)?.ok_or_else(|| not_running(&target))?;
        fetch(&mut client, target, until)
    }
}

/// The text of a device's profile from the daemon.
///
/// # Errors
/// What the daemon says.
pub fn fetch(client: &mut Client, target: String, until: Until) -> Outcome<String> {
    let mut page: ProfilePage = client.call(Call::Profile { target, until })?;
    let mut text = page.text;
    while let Some(from) = page.next {
        page = client.call(Call::ProfileMore { from })?;
        text.push_str(&page.text);
    }
    Ok(text)
}

/// Writes `profile`, whose text is `text`.
///
/// # Errors
/// A file that can't be written.
pub fn write_out(context: &Context, output: &Path, text: &str, profile: &Recorded) -> Outcome<Written> {
    write(output, text)?;
    let places = || profile.runs.iter().map(|run| &run.place);
    let named = places().filter_map(|place| match place {
        Place::Named { path, .. } => Some(path),
        Place::Metadata | Place::Data => None,
    });
    let written = Written {
        file: output.to_owned(),
        image: profile.recording.image.clone(),
        runs: profile.runs.len(),
        bytes: profile.runs.iter().map(|run| u64::from(run.blocks) * u64::from(BLOCK)).sum(),
        files: named.collect::<HashSet<_>>().len(),
        read_ahead_kb: profile.recording.read_ahead_kb,
        complete: profile.recording.complete,
    };
    if !written.complete {
        context.output.remark("more was read than a recording holds: the profile ends early");
    }
    Ok(written)
}

/// Reads a profile from a file.
fn read(path: &Path) -> Outcome<Recorded> {
    let failed = |error: &dyn std::fmt::Display| Problem::new(Kind::Failed, format!("{}: {error}", path.display()));
    let bytes = std::fs::metadata(path).map_err(|error| failed(&error))?.len();
    if bytes > MAX_PROFILE_BYTES {
        return Err(failed(&format!("it has {bytes} bytes, more than {MAX_PROFILE_BYTES}")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| failed(&error))?;
    Recorded::from_text(&text).map_err(|error| failed(&error))
}

fn write(path: &Path, text: &str) -> Outcome {
    let failed = |error| Problem::new(Kind::Failed, format!("writing {}: {error}", path.display()));
    if path == Path::new("-") {
        return match std::io::stdout().lock().write_all(text.as_bytes()) {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(failed(error)),
            _ => Ok(()),
        };
    }
    std::fs::write(path, text).map_err(failed)
}
