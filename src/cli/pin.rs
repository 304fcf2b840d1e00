//! `firstread pin`: fetch all of an image, or what a start reads, and keep it.

use std::path::PathBuf;

use clap::Args;

use super::Outcome;
use super::connect::connect_or_start;
use super::options::{AccessOptions, Context, absolute};
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
    /// Keep only what a start reads that `firstread profile` recorded, of this or an earlier version of the image
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    #[command(flatten)]
    access: AccessOptions,
}

impl Pin {
    /// Runs the verb.
    ///
    /// # Errors
    /// An image that can't be fetched, or that the pool has no room for.
    pub fn run(&self, context: &Context) -> Outcome {
        let profile = self.profile.as_deref().map(absolute).transpose()?;
        let (reference, access) = (image(&self.reference)?.to_string(), context.access(&self.access)?);
        let request = Request { reference, access, profile };
        let mut client = connect_or_start(context)?;
        let pinned: Pinned = follow(context, "pinning", || client.call(Call::Pin(request.clone())))?;
        context.output.answer(&pinned, |pinned| {
            let what = if pinned.profile.is_some() { "start-up set pinned" } else { "pinned" };
            format!("{}: {what}; {} chunks ({}) are local", pinned.image, pinned.chunks, size(pinned.bytes))
        })
    }
}
