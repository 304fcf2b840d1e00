//! `firstread ready`: the program on a device is ready.

use clap::Args;

use super::Outcome;
use super::connect::connect;
use super::detach::{not_running, target_of};
use super::options::Context;
use crate::daemon::control::{Call, Ready as Answer};

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Ready {
    /// The device: its id, device path or mount point
    #[arg(value_name = "ID|DEVICE|DIR")]
    target: String,
}

impl Ready {
    /// Runs the verb.
    ///
    /// # Errors
    /// What the daemon says.
    pub fn run(&self, context: &Context) -> Outcome {
        let target = target_of(&self.target)?;
        let mut client = connect(context)?.ok_or_else(|| not_running(&target))?;
        let ready: Answer = client.call(Call::Ready { target })?;
        context.output.answer(&ready, |ready| format!("{}: ready after {:.3} s", ready.id, ready.seconds))
    }
}
