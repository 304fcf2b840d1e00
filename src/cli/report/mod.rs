//! `firstread report`: a start explained on one page.

mod cells;
mod facts;
mod names;
mod page;
mod ranges;
mod start;
mod totals;
mod wait;

use std::path::{Path, PathBuf};

use clap::Args;

use super::Outcome;
use super::connect::connect;
use super::detach::{not_running, target_of};
use super::inspect::{open, runtime};
use super::options::{AccessOptions, Context};
use super::output::size;
use super::profile::fetch;
use crate::daemon::client::Client;
use crate::daemon::control::{Call, DeviceInfo, Kind, Problem, ProfilePage, Until};
use crate::daemon::explore::{CELLS_MAX, Filling};
use crate::daemon::trace::Trace;
use crate::oci::Reference;
use crate::profile::Profile;
use facts::Facts;
use start::{Explained, explain};

/// Ranges that one call asks the names of.
const RANGES: usize = 50_000;

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Report {
    /// The device: its id, device path or mount point
    #[arg(value_name = "ID|DEVICE|DIR")]
    target: String,
    /// Where to write the page
    #[arg(short, long, value_name = "FILE.html")]
    output: Option<PathBuf>,
    #[command(flatten)]
    access: AccessOptions,
}

impl Report {
    /// Runs the verb: writes the page, and with `--json` prints what is on it.
    ///
    /// # Errors
    /// What the daemon says, an index that can't be read, and a file that can't be written.
    pub fn run(&self, context: &Context) -> Outcome {
        if self.output.is_none() && !context.output.is_json() {
            let problem = Problem::new(Kind::Usage, "there is no file to write the report to");
            return Err(problem.hint("name one with --output FILE.html, or ask for --json"));
        }
        let target = target_of(&self.target)?;
        let mut client = connect(context)?.ok_or_else(|| not_running(&target))?;
        let explained = self.explain(context, &mut client, target)?;
        if let Some(file) = &self.output {
            write(file, &page::page(&explained)?)?;
        }
        context.output.answer(&explained, |explained| {
            let file = self.output.as_deref().unwrap_or(Path::new("")).display();
            let start = &explained.start;
            let (fetched, requests) = (size(start.fetched_bytes), start.requests);
            format!(
                "{file}: {:.2} s, of which {:.2} s waited; {fetched} in {requests} requests",
                start.seconds, start.waited
            )
        })
    }

    fn explain(&self, context: &Context, client: &mut Client, target: String) -> Outcome<Explained> {
        let info: DeviceInfo = client.call(Call::Find { target })?;
        let id = info.id.clone();
        let trace: Trace = client.call(Call::Trace { target: id.clone() })?;
        let profile = Profile::from_text(&fetch(client, id.clone(), Until::Now)?)?;
        let image = runtime()?.block_on(open(context, &pinned(&info), &self.access))?;
        let facts = Facts::new(trace, profile, &image.index);
        let wanted = facts.unnamed();
        let mut named = Vec::new();
        for ranges in wanted.chunks(RANGES) {
            let mut page: ProfilePage = client.call(Call::Locate { target: id.clone(), ranges: ranges.to_vec() })?;
            let mut text = page.text;
            while let Some(from) = page.next {
                page = client.call(Call::ProfileMore { from })?;
                text.push_str(&page.text);
            }
            named.extend(Profile::from_text(&text)?.runs);
        }
        let cells = facts.cells().min(CELLS_MAX);
        let filling: Filling = client.call(Call::Filling { target: id, cells })?;
        Ok(explain(&info, &facts, &named, &filling, &image))
    }
}

/// The image as it is attached: by digest, so that nothing needs to be asked of a registry.
fn pinned(info: &DeviceInfo) -> String {
    match info.image.parse::<Reference>() {
        Ok(Reference::Registry(_)) if !info.image.contains('@') => format!("{}@{}", info.image, info.digest),
        _ => info.image.clone(),
    }
}

fn write(file: &Path, text: &str) -> Outcome {
    std::fs::write(file, text)
        .map_err(|error| Problem::new(Kind::Failed, format!("writing {}: {error}", file.display())))
}
