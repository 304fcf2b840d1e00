//! `firstread stop`: detach all, stop the daemon.

use std::time::Duration;

use clap::Args;

use super::Outcome;
use super::connect::connect;
use super::options::Context;
use crate::daemon::control::{Call, InUse, Kind, Problem, Stopped};
use crate::daemon::rundir::wait_until_free;

/// How long the verb waits for the daemon to be gone.
const LEAVING: Duration = Duration::from_secs(20);

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Stop {
    /// Stop also when devices are in use; their readers get errors
    #[arg(long)]
    force: bool,
}

impl Stop {
    /// Runs the verb; it returns when the daemon is gone.
    ///
    /// # Errors
    /// Devices that are in use, by name.
    pub fn run(&self, context: &Context) -> Outcome {
        let in_use = if self.force { InUse::Abandon } else { InUse::Refuse };
        let Some(mut client) = connect(context)? else {
            let nothing = Stopped { detached: Vec::new(), left: Vec::new(), in_use: Vec::new(), stopping: false };
            context.output.remark("no daemon runs");
            return context.output.answer(&nothing, |_| String::new());
        };
        let stopped: Stopped = client.call(Call::Stop { in_use })?;
        if stopped.stopping {
            client.wait_for_end();
            if !wait_until_free(&context.config.run, LEAVING) {
                context.output.remark("the daemon stops, but takes its time");
            }
        }
        context.output.answer(&stopped, |_| String::new())?;
        if stopped.in_use.is_empty() || stopped.stopping {
            return Ok(());
        }
        let message = format!("devices are in use, the daemon goes on:\n  {}", stopped.in_use.join("\n  "));
        Err(Problem::new(Kind::Busy, message).hint("unmount them first, or `firstread stop --force`"))
    }
}
