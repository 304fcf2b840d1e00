//! Taking over the devices of an earlier daemon. Their readers wait until it is done, so that it is tried until it works.

use std::sync::Arc;
use std::time::Duration;

use super::attachment::Attachment;
use super::control::InUse;
use super::devices::Served;
use super::node::{Node, blocking};
use super::records::{Record, Reopen};
use super::starts::Start;
use crate::attach::read_ahead::{self, READY_KB};
use crate::chunk::Digest;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::oci::Reference;

/// How long to wait before another try, at first and at most.
const AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

impl Node {
    /// Serves a device again, as soon as its image can be opened; ends when it is attached, gone or detached.
    pub async fn recover(self: Arc<Self>, record: Record) {
        let (mut pause, mut stopping) = (AGAIN.0, self.stopping());
        loop {
            match self.try_recover(&record).await {
                Ok(()) => return,
                Err(error) => {
                    let wait = pause.as_secs_f32();
                    tracing::warn!("{}: not recovered yet, again in {wait} s: {error}", record.device.id);
                }
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = stopping.wait_for(|&stopping| stopping) => return,
            }
            pause = (2 * pause).min(AGAIN.1);
        }
    }

    async fn try_recover(self: &Arc<Self>, record: &Record) -> Result<()> {
        let info = &record.device;
        let (Some(reopen), Ok(_)) = (&record.reopen, self.devices.find(&info.id)) else { return Ok(()) };
        let (image, device) = self.reopen_device(reopen, &info.digest).await?;
        let opened = match &info.upper {
            Some(upper) => Some(self.open_upper(&image, &device, upper.clone(), None).await?),
            None => None,
        };
        let (node, info) = (Arc::clone(self), info.clone());
        blocking(move || {
            let lower = Arc::clone(&device) as Arc<dyn Device>;
            let dynamic = opened.as_ref().map_or(lower, |opened| Arc::clone(&opened.overlay) as Arc<dyn Device>);
            let upper = opened.map(|opened| Arc::clone(opened.overlay.upper()));
            let Some(attachment) = Attachment::recover(&info, dynamic, &node.transports)? else {
                tracing::warn!("{}: {} is there no more; forgotten", info.id, info.device.display());
                return node.devices.forget(&info.id);
            };
            tracing::info!("{}: {} is served again", info.id, info.device.display());
            let start = Start::new(attachment.path(), read_ahead::get(attachment.path()).unwrap_or(READY_KB));
            match node.devices.restore(&info.id, Served { image, device, upper, start }, attachment) {
                Ok(()) => Ok(()),
                Err(mut unwanted) => unwanted.detach(InUse::Abandon),
            }
        })
        .await
    }

    /// The image as it was: by the digest of its manifest, whatever its tag means by now.
    async fn reopen_device(
        &self,
        reopen: &Reopen,
        digest: &str,
    ) -> Result<(Arc<crate::fetch::Image>, Arc<crate::device::ImageDevice>)> {
        let wanted: Digest = digest.parse().map_err(|_| Error::invalid("record", format!("digest {digest:?}")))?;
        let mut reference: Reference = reopen.reference.parse()?;
        if let Reference::Registry(registry) = &mut reference {
            registry.digest = Some(wanted);
        }
        let (image, device) = self.open_device(&reference.to_string(), &reopen.access, reopen.on_outage).await?;
        if image.manifest_digest != wanted {
            let found = image.manifest_digest;
            return Err(Error::invalid("image", format!("{reference} was {wanted} and is {found} now")));
        }
        Ok((image, device))
    }
}
