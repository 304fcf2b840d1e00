//! `firstread unpin`: an image's chunks may be evicted again.

use clap::Args;

use super::Outcome;
use super::connect::connect_or_start;
use super::options::Context;
use super::reference::image;
use crate::daemon::control::Call;
use crate::daemon::pins::Pinned;

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Unpin {
    /// The image, as it was pinned
    #[arg(value_name = "REF")]
    reference: String,
}

impl Unpin {
    /// Runs the verb.
    ///
    /// # Errors
    /// The image is not pinned.
    pub fn run(&self, context: &Context) -> Outcome {
        let reference = image(&self.reference)?.to_string();
        let pinned: Pinned = connect_or_start(context)?.call(Call::Unpin { reference })?;
        context.output.answer(&pinned, |pinned| format!("{}: not pinned any more", pinned.image))
    }
}
