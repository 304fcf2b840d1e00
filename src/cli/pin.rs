//! `firstread pin`: fetch all of an image and keep it.

use clap::Args;

use super::Outcome;
use super::connect::connect_or_start;
use super::options::{AccessOptions, Context};
use super::output::size;
use super::pool::follow;
use super::reference::image;
use crate::daemon::control::{Call, Pin as Request};
use crate::daemon::pins::Pinned;

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Pin {
    /// The image: HOST[:PORT]/REPO[:TAG][@DIGEST] or oci:DIR[:TAG]
    #[arg(value_name = "REF")]
    reference: String,
    #[command(flatten)]
    access: AccessOptions,
}

impl Pin {
    /// Runs the verb.
    ///
    /// # Errors
    /// An image that can't be fetched, or that the pool has no room for.
    pub fn run(&self, context: &Context) -> Outcome {
        let request = Request { reference: image(&self.reference)?.to_string(), access: context.access(&self.access)? };
        let mut client = connect_or_start(context)?;
        let pinned: Pinned = follow(context, "pinning", || client.call(Call::Pin(request.clone())))?;
        context.output.answer(&pinned, |pinned| {
            format!("{}: pinned; {} chunks ({}) are local", pinned.image, pinned.chunks, size(pinned.bytes))
        })
    }
}
