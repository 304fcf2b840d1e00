//! `firstread status`: what was read, fetched and waited for.

use std::time::SystemTime;

use clap::Args;

use super::Outcome;
use super::connect::connect;
use super::detach::{not_running, target_of};
use super::options::Context;
use super::output::{fields, size, table};
use crate::daemon::control::{Call, Health, HealthState, SourceStatus, State, Status as Numbers};
use crate::daemon::trace::StartupStatus;

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
                    ["id", "local", "read", "fetched", "requests", "waits", "waited", "errors", "health"],
                    all.iter().map(row),
                ),
            }),
        }
    }
}

fn row(status: &Numbers) -> [String; 9] {
    [
        status.id.clone(),
        format!("{}/{}", status.chunks.local, status.chunks.total),
        size(status.bytes.read),
        size(status.bytes.fetched),
        status.requests.to_string(),
        status.waits.count.to_string(),
        format!("{:.2} s", status.waits.total),
        (status.chunks.failed + status.verify_failures).to_string(),
        match status.health.state {
            HealthState::Healthy => "ok".to_owned(),
            _ => format!("no source, {}", ago(status.health.since)),
        },
    ]
}

fn health(health: &Health) -> String {
    match (health.state, health.on_outage) {
        (HealthState::Healthy, _) => "ok".to_owned(),
        (_, None) => format!("no source can be reached ({}): reads wait", ago(health.since)),
        (_, Some(seconds)) => {
            format!("no source can be reached ({}): reads wait {seconds} s, then fail", ago(health.since))
        }
    }
}

fn shown_source(source: &SourceStatus) -> String {
    match (source.state, &source.last_error) {
        (HealthState::Healthy, _) => source.name.clone(),
        (_, error) => format!("{}: fails ({}): {}", source.name, ago(source.since), error.as_deref().unwrap_or("")),
    }
}

/// How long ago a time was that is given in seconds since 1970.
fn ago(time: Option<u64>) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    match now.saturating_sub(time.unwrap_or(now)) {
        seconds @ 0..=119 => format!("{seconds} s ago"),
        seconds @ 120..=7199 => format!("{} min ago", seconds / 60),
        seconds => format!("{} h ago", seconds / 3600),
    }
}

fn details(status: &Numbers) -> String {
    let chunks = &status.chunks;
    let state = match status.state {
        State::Attached => "attached",
        State::Lost => "lost: its server died; unmount or detach it",
        State::Recovering => "recovering: its readers wait; the daemon's log says for what",
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
        (
            "fetched",
            format!("{} in {} requests, {} of them hedges", size(status.bytes.fetched), status.requests, status.hedges),
        ),
        ("start-up stream", size(status.bytes.startup)),
        ("start", start(&status.startup)),
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
        ("health", health(&status.health)),
    ];
    rows.extend(status.sources.iter().map(|source| ("source", shown_source(source))));
    if let Some(error) = &status.last_error {
        rows.push(("last error", format!("{error} ({})", ago(status.last_error_at))));
    }
    fields(rows)
}

fn start(startup: &StartupStatus) -> String {
    let ready = startup.ready.map_or_else(String::new, |seconds| format!("ready after {seconds:.3} s; "));
    let read_ahead = startup.read_ahead_kb.map_or_else(String::new, |kib| format!("; read-ahead {kib} KiB"));
    let stream = match (startup.chunks, startup.streaming) {
        (0, _) => "no start-up pack".to_owned(),
        (chunks, streaming) => format!(
            "{chunks} chunks in the start-up pack, {} {}{}; waited for {} of them",
            size(startup.planned_bytes),
            if streaming { "on their way" } else { "streamed" },
            match startup.laid_bytes {
                0 => String::new(),
                laid => format!(", {} laid into the page cache", size(laid)),
            },
            startup.missed_inside
        ),
    };
    format!("{ready}{stream}; waited for {} others{read_ahead}", startup.missed_outside)
}
