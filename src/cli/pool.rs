//! `firstread pool`: the node's pool.

use std::time::Duration;

use clap::Subcommand;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Outcome;
use super::connect::connect_or_start;
use super::options::Context;
use super::output::{fields, size, table};
use super::progress::Progress;
use crate::daemon::config::Size;
use crate::daemon::control::{Call, JobState, Kind, Problem, ScrubAnswer, Trimmed};
use crate::pool::Scrubbed;

/// How often the daemon is asked how far it is.
const POLL: Duration = Duration::from_millis(50);

/// What to do with the pool.
#[derive(Debug, Subcommand)]
pub enum Pool {
    /// Show its size and use, and what sharing saves
    Stat,
    /// Check every chunk on the disk; what is damaged is dropped, and fetched again at once for images in use
    Scrub,
    /// Evict what was not used for long
    Trim {
        /// Down to this size, e.g. 5G; otherwise to the pool's limit
        #[arg(value_name = "SIZE")]
        size: Option<Size>,
    },
}

impl Pool {
    /// Runs the verb.
    ///
    /// # Errors
    /// What the daemon says.
    pub fn run(&self, context: &Context) -> Outcome {
        match self {
            Self::Stat => {
                let stat: Value = connect_or_start(context)?.call(Call::PoolStat)?;
                context.output.answer(&stat, text)
            }
            Self::Scrub => {
                let mut client = connect_or_start(context)?;
                let answer: ScrubAnswer = follow(context, "scrubbing", || client.call(Call::PoolScrub))?;
                context.output.answer(&answer, |ScrubAnswer { found, refetched }| {
                    let Scrubbed { chunks, bytes, damaged, unreadable } = found;
                    let sound = format!("{chunks} chunks ({}) are sound", size(*bytes));
                    format!(
                        "{sound}, {damaged} were damaged, {unreadable} could not be read; {refetched} were fetched again"
                    )
                })
            }
            Self::Trim { size: to } => {
                let bytes = to.map(|Size(bytes)| bytes);
                let trimmed: Trimmed = connect_or_start(context)?.call(Call::PoolTrim { bytes })?;
                context.output.answer(&trimmed, |trimmed| format!("{} freed", size(trimmed.freed)))
            }
        }
    }
}

/// Starts long work by `call` and repeats that, with a progress bar, until there is an answer.
///
/// # Errors
/// The work's.
pub fn follow<T: DeserializeOwned>(
    context: &Context,
    what: &'static str,
    mut call: impl FnMut() -> Outcome<JobState>,
) -> Outcome<T> {
    let mut shown: Option<(Progress, u64)> = None;
    loop {
        let state = call()?;
        if let Some(answer) = state.answer {
            return serde_json::from_value(answer)
                .map_err(|error| Problem::new(Kind::Request, format!("the daemon's answer: {error}")));
        }
        if state.total > 0 {
            let (progress, done) = shown.get_or_insert_with(|| (Progress::new(&context.output, what, state.total), 0));
            progress.add(state.done.saturating_sub(*done));
            *done = state.done;
        }
        std::thread::sleep(POLL);
    }
}

fn text(stat: &Value) -> String {
    let at = |path: &str| stat.pointer(path).and_then(Value::as_u64);
    let count = |path: &str| at(path).map_or_else(|| "-".to_owned(), |number| number.to_string());
    let bytes = |path: &str| at(path).map_or_else(|| "-".to_owned(), size);
    let scrubbed = match at("/scrub/rate") {
        Some(0) | None => "off".to_owned(),
        Some(rate) => format!("{} a second, {} passes", size(rate), count("/scrub/passes")),
    };
    let mut text = fields([
        ("bytes", bytes("/bytes")),
        ("limit", at("/limit").map_or_else(|| "none".to_owned(), size)),
        ("chunks", count("/chunks")),
        ("hits", count("/hits")),
        ("misses", count("/misses")),
        ("evicted", count("/evicted")),
        ("quarantined", count("/quarantined")),
        ("unreadable", count("/unreadable")),
        ("refetched", count("/refetched")),
        ("background scrub", scrubbed),
        ("saved by sharing", format!("{} of {}", bytes("/sharing/saved_bytes"), bytes("/sharing/referenced_bytes"))),
    ]);
    let images = stat.get("images").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    if !images.is_empty() {
        let row = |image: &Value| {
            let bytes = |name: &str| image.get(name).and_then(Value::as_u64).map_or_else(String::new, size);
            let name = image.get("image").and_then(Value::as_str).unwrap_or_default().to_owned();
            [name, bytes("bytes"), bytes("local_bytes"), bytes("unique_bytes"), bytes("shared_bytes")]
        };
        text.push('\n');
        text.push_str(&table(["image", "size", "local", "of its own", "shared"], images.iter().map(row)));
    }
    text
}
