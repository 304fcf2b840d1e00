//! `firstread status`: what was read, fetched and waited for.

use clap::Args;

use super::Outcome;
use super::connect::connect;
use super::detach::{not_running, target_of};
use super::options::Context;
use super::output::{fields, size, table};
use crate::daemon::control::{Call, State, Status as Numbers};

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Status {
    /// One device: its id, device path or mount point
    #[arg(value_name = "ID")]
    target: Option<String>,
}

impl Status {
    /// Runs the verb.
    ///
    /// # Errors
    /// A device that is not there.
    pub fn run(&self, context: &Context) -> Outcome {
        let target = self.target.as_deref().map(target_of).transpose()?;
        let client = connect(context)?;
        let all: Vec<Numbers> = match (client, &target) {
            (Some(mut client), _) => client.call(Call::Status { target: target.clone() })?,
            (None, Some(target)) => return Err(not_running(target)),
            (None, None) => Vec::new(),
        };
        match (target, all.as_slice()) {
            (Some(_), [one]) => context.output.answer(one, details),
            _ => context.output.answer(&all, |all| match all.as_slice() {
                [] => String::new(),
                all => table(
                    ["id", "local", "read", "fetched", "requests", "waits", "waited", "errors"],
                    all.iter().map(row),
                ),
            }),
        }
    }
}

fn row(status: &Numbers) -> [String; 8] {
    [
        status.id.clone(),
        format!("{}/{}", status.chunks.local, status.chunks.total),
        size(status.bytes.read),
        size(status.bytes.fetched),
        status.requests.to_string(),
        status.waits.count.to_string(),
        format!("{:.2} s", status.waits.total),
        (status.chunks.failed + status.verify_failures).to_string(),
    ]
}

fn details(status: &Numbers) -> String {
    let chunks = &status.chunks;
    let state = match status.state {
        State::Attached => "attached",
        State::Lost => "lost: its server died; unmount or detach it",
    };
    let mut rows = vec![
        ("id", status.id.clone()),
        ("image", status.image.clone()),
        ("state", state.to_owned()),
        ("device", size(status.device_bytes)),
        (
            "chunks",
            format!("{} local of {}; {} fetched, {} failed", chunks.local, chunks.total, chunks.fetched, chunks.failed),
        ),
        ("read", size(status.bytes.read)),
        ("fetched", format!("{} in {} requests", size(status.bytes.fetched), status.requests)),
        ("start-up stream", size(status.bytes.startup)),
        ("hits, misses", format!("{}, {}", status.hits, status.misses)),
        (
            "waits",
            format!(
                "{}; {:.3} s in all, {:.3} s the longest",
                status.waits.count, status.waits.total, status.waits.max
            ),
        ),
        ("wrong bytes", format!("{} chunks", status.verify_failures)),
        ("outage", format!("{:.1} s", status.outage_seconds)),
        ("sources", status.sources.join(", ")),
    ];
    if let Some(error) = &status.last_error {
        rows.push(("last error", error.clone()));
    }
    fields(rows)
}
