//! `firstread pool`: the node's pool.

use clap::Subcommand;
use serde_json::Value;

use super::Outcome;
use super::connect::connect_or_start;
use super::options::Context;
use super::output::{fields, size};
use crate::daemon::control::Call;

/// What to do with the pool.
#[derive(Debug, Subcommand)]
pub enum Pool {
    /// Show its size and use
    Stat,
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
        }
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
