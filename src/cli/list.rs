//! `firstread list`: the devices.

use clap::Args;

use super::Outcome;
use super::connect::connect;
use super::options::Context;
use super::output::table;
use crate::daemon::control::{Call, DeviceInfo, State};

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct List {}

impl List {
    /// Runs the verb. Without a daemon there are no devices.
    ///
    /// # Errors
    /// What the daemon says.
    pub fn run(&self, context: &Context) -> Outcome {
        let devices: Vec<DeviceInfo> = match connect(context)? {
            Some(mut client) => client.call(Call::List)?,
            None => Vec::new(),
        };
        context.output.answer(&devices, |devices| match devices.as_slice() {
            [] => String::new(),
            devices => table(["id", "device", "transport", "mounted on", "image"], devices.iter().map(row)),
        })
    }
}

fn row(device: &DeviceInfo) -> [String; 5] {
    let transport = match device.state {
        State::Attached => device.transport.clone(),
        State::Lost => format!("{} (lost)", device.transport),
        State::Recovering => format!("{} (recovering)", device.transport),
    };
    let mountpoint = device.mountpoint.as_ref().map_or_else(|| "-".to_owned(), |dir| dir.display().to_string());
    [device.id.clone(), device.device.display().to_string(), transport, mountpoint, device.image.clone()]
}
