//! `firstread pool`: the node's pool.

use std::time::Duration;

use clap::Subcommand;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Outcome;
use super::connect::connect_or_start;
use super::options::Context;
use super::output::{fields, size};
use super::progress::Progress;
use crate::daemon::config::Size;
use crate::daemon::control::{Call, JobState, Kind, Problem, Trimmed};
use crate::pool::Scrubbed;

/// How often the daemon is asked how far it is.
const POLL: Duration = Duration::from_millis(100);

/// What to do with the pool.
#[derive(Debug, Subcommand)]
pub enum Pool {
    /// Show its size and use
    Stat,
    /// Check every chunk; what is damaged is dropped and fetched again when it is read
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
                let found: Scrubbed = follow(context, "scrubbing", || client.call(Call::PoolScrub))?;
                context.output.answer(&found, |found| {
                    format!("{} chunks ({}) are sound, {} were damaged", found.chunks, size(found.bytes), found.damaged)
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
    let number = |name: &str| stat.get(name).and_then(Value::as_u64);
    let count = |name: &str| number(name).map_or_else(|| "-".to_owned(), |number| number.to_string());
    fields([
        ("bytes", number("bytes").map_or_else(String::new, size)),
        ("limit", number("limit").map_or_else(|| "none".to_owned(), size)),
        ("chunks", count("chunks")),
        ("hits", count("hits")),
        ("misses", count("misses")),
        ("evicted", count("evicted")),
        ("quarantined", count("quarantined")),
    ])
}
