//! Images are opened for devices and exports, and for starts that are to come.

use std::sync::Arc;
use std::time::Duration;

use super::config::{Patience, Prefetch};
use super::control::{Expect, Expected, Kind, OrdinaryLayers, Problem, SourceAccess};
use super::node::Node;
use crate::device::ImageDevice;
use crate::error::Result;
use crate::fetch::Image;
use crate::map::Map;

/// How long an image stays open for a start that is to come.
const COMING: Duration = Duration::from_secs(60);

impl Node {
    /// An image and what reads it, which fetches what the settings say.
    pub(super) async fn open_device(
        &self,
        reference: &str,
        access: &SourceAccess,
        on_outage: Option<Patience>,
    ) -> Result<(Arc<Image>, Arc<ImageDevice>)> {
        let image = self.images.open(&reference.parse()?, access, on_outage).await?;
        let device = self.device_of(&image);
        Ok((image, device))
    }

    /// The same for somebody who wants to see the image; one of which a device shows a part only is refused, unless that is
    /// what is wanted.
    pub(super) async fn open_shown(
        &self,
        reference: &str,
        access: &SourceAccess,
        on_outage: Option<Patience>,
        ordinary: OrdinaryLayers,
    ) -> std::result::Result<(Arc<Image>, Arc<ImageDevice>), Problem> {
        let image = self.images.open(&reference.parse()?, access, on_outage).await?;
        let layers = match (image.layers.ordinary, ordinary) {
            (0, _) | (_, OrdinaryLayers::LeaveOut) => {
                let device = self.device_of(&image);
                return Ok((image, device));
            }
            (1, OrdinaryLayers::Refuse) => "an ordinary layer".to_owned(),
            (count, OrdinaryLayers::Refuse) => format!("{count} ordinary layers"),
        };
        let reference = &image.reference;
        let message =
            format!("{reference} has {layers} above firstread's, as a container's commit makes, which no device shows");
        Err(Problem::new(Kind::Unsupported, message).hint(
            "containers show all of it: `firstread pull` it, then run it with containerd's snapshotter \"firstread\"; \
             --base-only takes the image without those layers",
        ))
    }

    fn device_of(&self, image: &Arc<Image>) -> Arc<ImageDevice> {
        let map = Map::new(Arc::clone(&image.index));
        let device =
            ImageDevice::new(map, Arc::clone(&image.origin), Arc::clone(&self.fetcher), Arc::clone(&self.pool));
        // Before the device has its first reader.
        device.prefetch(self.config.prefetch);
        device
    }

    /// Begins to fetch the start-up pack of an image that was pulled and is about to start, and waits for nothing of it. Of an image
    /// without one nothing is fetched.
    ///
    /// # Errors
    /// An image that can't be opened.
    pub async fn expect(&self, request: &Expect) -> std::result::Result<Expected, Problem> {
        self.accepting()?;
        let image = self.images.open(&request.reference.parse()?, &request.access, None).await?;
        match self.config.prefetch {
            Prefetch::All | Prefetch::Startup => self.fetcher.start_up(&image.origin, &image.index),
            Prefetch::None => {}
        }
        let expected = Expected { digest: image.manifest_digest.to_string() };
        // The device that comes finds it open, and so what was fetched for it is counted as its own.
        drop(tokio::spawn(async move {
            tokio::time::sleep(COMING).await;
            drop(image);
        }));
        Ok(expected)
    }
}
