//! `firstread attach`: an image becomes a block device.

use clap::Args;

use super::connect::connect_or_start;
use super::options::{AccessOptions, Context, LayerOptions, WriteOptions};
use super::{Outcome, reference};
use crate::daemon::client::Client;
use crate::daemon::config::Patience;
use crate::daemon::control::{self, Attached, Call, Lifetime};

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Attach {
    /// The image: HOST[:PORT]/REPO[:TAG][@DIGEST] or oci:DIR[:TAG]
    #[arg(value_name = "REF")]
    reference: String,
    #[command(flatten)]
    options: AttachOptions,
}

/// Options of attaching, shared with `mount`.
#[derive(Debug, Clone, Args)]
pub struct AttachOptions {
    /// How the kernel sees the device
    #[arg(long, default_value = "auto", value_name = "TRANSPORT", value_parser = ["auto", "ublk", "nbd", "loop"])]
    transport: String,
    /// How long reads wait for unreachable sources: seconds, or `wait` for ever [default: the daemon's setting]
    #[arg(long, value_name = "TIME")]
    on_outage: Option<Patience>,
    /// Read-ahead of the device in KiB until its program is ready [default: what its start was recorded with, or 128]
    #[arg(long, value_name = "KIB", value_parser = clap::value_parser!(u32).range(0..=16384))]
    pub read_ahead: Option<u32>,
    #[command(flatten)]
    pub layers: LayerOptions,
    #[command(flatten)]
    pub write: WriteOptions,
    #[command(flatten)]
    pub access: AccessOptions,
}

impl Attach {
    /// Runs the verb.
    ///
    /// # Errors
    /// What the daemon says.
    pub fn run(&self, context: &Context) -> Outcome {
        let (_client, attached) = request(context, &self.reference, &self.options, Lifetime::Permanent)?;
        context.output.answer(&attached, |attached| attached.device.device.display().to_string())
    }
}

/// Asks the daemon for a device, and says why the better transports were passed over.
///
/// # Errors
/// What the daemon says.
pub fn request(
    context: &Context,
    image: &str,
    options: &AttachOptions,
    lifetime: Lifetime,
) -> Outcome<(Client, Attached)> {
    let reference = reference::image(image)?.to_string();
    let (transport, on_outage) = (options.transport.clone(), options.on_outage);
    let read_ahead_kb = options.read_ahead;
    let access = context.access(&options.access)?;
    let writable = options.write.writable()?;
    let mut client = connect_or_start(context)?;
    let attached: Attached = client.call(Call::Attach(control::Attach {
        reference,
        access,
        on_outage,
        transport,
        read_ahead_kb,
        writable,
        lifetime,
        ordinary: options.layers.ordinary(),
    }))?;
    if !attached.passed_over.is_empty() {
        let reasons = attached.passed_over.join("; ");
        context.output.remark(format!("transport {} ({reasons})", attached.device.transport));
    }
    attached.remarks.iter().for_each(|remark| context.output.remark(remark.clone()));
    Ok((client, attached))
}
