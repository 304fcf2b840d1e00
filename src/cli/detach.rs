//! `firstread detach`: undo an attach.

use std::path::Path;

use clap::Args;

use super::Outcome;
use super::connect::connect;
use super::options::{Context, absolute};
use crate::daemon::control::{Call, DeviceInfo, InUse, Kind, Problem};

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Detach {
    /// Its id, device path or mount point
    #[arg(value_name = "ID|DEVICE|DIR", required_unless_present = "all", conflicts_with = "all")]
    target: Option<String>,
    /// Detach every device that is not in use
    #[arg(long)]
    all: bool,
    /// Also when it is in use: whoever uses it gets errors
    #[arg(long)]
    force: bool,
}

impl Detach {
    /// Runs the verb.
    ///
    /// # Errors
    /// A device that is not there or in use; with `--all` the free ones are detached all the same.
    pub fn run(&self, context: &Context) -> Outcome {
        let client = connect(context)?;
        let in_use = if self.force { InUse::Abandon } else { InUse::Refuse };
        let Some(target) = &self.target else {
            let mut detached: Vec<DeviceInfo> = Vec::new();
            let mut failed: Vec<Problem> = Vec::new();
            if let Some(mut client) = client {
                for device in client.call::<Vec<DeviceInfo>>(Call::List)? {
                    match client.call(Call::Detach { target: device.id, in_use }) {
                        Ok(device) => detached.push(device),
                        // Somebody else was faster.
                        Err(problem) if problem.kind == Kind::NotFound => {}
                        Err(problem) => failed.push(problem),
                    }
                }
            }
            context.output.answer(&detached, |_| String::new())?;
            return many(failed);
        };
        let target = target_of(target)?;
        let mut client = client.ok_or_else(|| not_running(&target))?;
        let device: DeviceInfo = client.call(Call::Detach { target, in_use })?;
        context.output.answer(&device, |_| String::new())
    }
}

/// One problem out of several, each on a line.
fn many(problems: Vec<Problem>) -> Outcome {
    let hint = problems.first().and_then(|problem| problem.hint.clone());
    let message = problems.iter().map(|problem| problem.message.as_str()).collect::<Vec<_>>().join("\n  ");
    match problems.first() {
        Some(first) => Err(Problem { message, kind: first.kind, hint }),
        None => Ok(()),
    }
}

/// What the user named, as the daemon knows it: paths are absolute.
///
/// # Errors
/// A path that can't be made absolute.
pub fn target_of(text: &str) -> Outcome<String> {
    if !text.contains('/') && text != "." && text != ".." && !Path::new(text).is_dir() {
        return Ok(text.to_owned());
    }
    let path = absolute(Path::new(text))?;
    Ok(std::fs::canonicalize(&path).unwrap_or(path).display().to_string())
}

/// There can be no such device when no daemon runs.
#[must_use]
pub fn not_running(target: &str) -> Problem {
    Problem::new(Kind::NotFound, format!("there is no device {target}: no daemon runs"))
        .hint("`firstread attach` and `mount` start one; was it another --run directory?")
}
