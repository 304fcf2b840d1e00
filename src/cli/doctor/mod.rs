//! `firstread doctor`: what this machine lacks, and the command that mends it.

mod containerd;
mod machine;
mod registry;

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::Outcome;
use super::options::{AccessOptions, Context, absolute};
use super::output::table;
use super::pull::SNAPSHOTTER;
use crate::daemon::control::{Kind, Problem};

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Doctor {
    /// An image: can its registry be reached, with the credentials that are found?
    #[arg(value_name = "REF")]
    reference: Option<String>,
    /// Print the lines to add to containerd's configuration, and nothing else
    #[arg(long)]
    containerd: bool,
    /// containerd's socket [setting snapshotter.containerd; default: /run/containerd/containerd.sock]
    #[arg(long, value_name = "SOCK")]
    containerd_socket: Option<PathBuf>,
    /// containerd's configuration
    #[arg(long, value_name = "FILE", default_value = "/etc/containerd/config.toml")]
    containerd_config: PathBuf,
    /// What containerd's configuration calls firstread's snapshotter
    #[arg(long, value_name = "NAME", default_value = SNAPSHOTTER)]
    snapshotter: String,
    /// The snapshotter's socket [setting snapshotter.listen; default: snapshotter.sock in the run directory]
    #[arg(long, value_name = "SOCK")]
    listen: Option<PathBuf>,
    #[command(flatten)]
    access: AccessOptions,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Health {
    /// As it should be.
    Good,
    /// It works without.
    Missing,
    /// It does not work.
    Bad,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    /// What was looked at.
    name: String,
    /// How it is.
    health: Health,
    /// What was found.
    found: String,
    /// The command that mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
}

impl Check {
    fn good(name: &str, found: impl Into<String>) -> Self {
        Self { name: name.to_owned(), health: Health::Good, found: found.into(), mend: None }
    }

    fn missing(name: &str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name: name.to_owned(), health: Health::Missing, found: found.into(), mend: Some(mend.into()) }
    }

    fn bad(name: &str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { health: Health::Bad, ..Self::missing(name, found, mend) }
    }
}

impl Doctor {
    /// Runs the verb.
    ///
    /// # Errors
    /// When something is bad, after all was printed.
    pub fn run(&self, context: &Context) -> Outcome {
        let settings = &context.config.snapshotter;
        let socket = absolute(self.listen.as_deref().unwrap_or(&settings.listen))?;
        let node = containerd::Node {
            containerd: absolute(self.containerd_socket.as_deref().unwrap_or(&settings.containerd))?,
            config: self.containerd_config.clone(),
            name: self.snapshotter.clone(),
            socket,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Problem::new(Kind::Failed, format!("starting the runtime: {error}")))?;
        if self.containerd {
            let lines = runtime.block_on(node.lines());
            return context.output.answer(&lines, String::clone);
        }
        let mut checks = machine::checks(&context.config);
        checks.extend(runtime.block_on(node.checks(&context.config.root)));
        if let Some(reference) = &self.reference {
            checks.push(runtime.block_on(registry::check(reference, &context.access(&self.access)?))?);
        }
        context
            .output
            .answer(&checks, |checks| table(["", "what", "found", "mend it with"], checks.iter().map(row)))?;
        match checks.iter().filter(|check| check.health == Health::Bad).count() {
            0 => Ok(()),
            bad => Err(Problem::new(Kind::Failed, format!("{bad} of {} checks are bad", checks.len()))),
        }
    }
}

fn row(check: &Check) -> [String; 4] {
    let sign = match check.health {
        Health::Good => "ok",
        Health::Missing => "-",
        Health::Bad => "BAD",
    };
    [sign.to_owned(), check.name.clone(), check.found.clone(), check.mend.clone().unwrap_or_default()]
}
