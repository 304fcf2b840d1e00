//! Starts: what the daemon knows of each device's, and what it makes of that.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::runtime::Handle;

use super::control::{Problem, ProfilePage, Ready, Until};
use super::devices::{Entry, Served};
use super::node::{Node, blocking};
use crate::device::{Device, ImageDevice};
use crate::error::Result;
use crate::ext4::{BLOCK_SIZE, Names, read_names};
use crate::profile::{Profile, Recording, locate};

/// Bytes of a profile's text in one answer.
const PAGE: usize = 1 << 20;

/// A device's start.
#[derive(Debug, Default)]
pub struct Start {
    /// Read-ahead of the block device in KiB, where there is one.
    pub read_ahead_kb: Option<u32>,
    /// How long after its attach the program on it was ready.
    ready: OnceLock<Duration>,
}

impl Start {
    /// A start with the device's read-ahead.
    #[must_use]
    pub fn new(read_ahead_kb: Option<u32>) -> Self {
        Self { read_ahead_kb, ready: OnceLock::new() }
    }

    /// How long after its attach the program on it was ready.
    #[must_use]
    pub fn ready(&self) -> Option<Duration> {
        self.ready.get().copied()
    }
}

impl Node {
    /// The program on a device is ready: its start is over.
    ///
    /// # Errors
    /// There is no such device, or nobody serves it.
    pub fn ready(&self, target: &str) -> std::result::Result<Ready, Problem> {
        let entry = self.devices.find(target)?;
        let served = entry.served()?;
        let ready = *served.start.ready.get_or_init(|| served.device.started().elapsed());
        Ok(Ready { id: entry.info().id, seconds: ready.as_secs_f64() })
    }

    /// The profile of a device's start as text.
    ///
    /// # Errors
    /// There is no such device, nobody serves it, or its metadata can't be read.
    pub async fn profile(&self, target: &str, until: Until) -> std::result::Result<Arc<str>, Problem> {
        let entry = self.devices.find(target)?;
        entry.served()?;
        let runtime = Handle::current();
        Ok(blocking(move || {
            let text = match &entry.served {
                Some(served) => profile(&entry, served, until, &runtime)?.to_text()?,
                None => String::new(),
            };
            Ok(text.into())
        })
        .await?)
    }
}

/// What was read from the device so far, or until the program was ready. Blocks.
fn profile(entry: &Entry, served: &Served, until: Until, runtime: &Handle) -> Result<Profile> {
    let (image, device) = (&served.image, &served.device);
    let seconds = device.started().elapsed();
    let ready = served.start.ready();
    let (mut touches, complete) = device.touches();
    if let (Until::Ready, Some(ready)) = (until, ready) {
        touches.retain(|touch| Duration::from_micros(touch.microseconds) <= ready);
    }
    let recording = Recording {
        image: entry.info().image,
        digest: Some(image.manifest_digest.to_string()),
        device: Some(image.index.device_digest().to_string()),
        file_system: image.index.file_system().to_owned(),
        device_bytes: image.index.device_bytes(),
        read_ahead_kb: served.start.read_ahead_kb,
        seconds: seconds.as_secs_f64(),
        ready: ready.map(|ready| ready.as_secs_f64()),
        complete,
    };
    Ok(Profile { recording, runs: locate(&touches, names(device, runtime)?.as_ref()) })
}

/// The names on a device. What is read for that is no touch. Blocks.
pub(super) fn names(device: &ImageDevice, runtime: &Handle) -> Result<Option<Names>> {
    read_names(device.size(), &mut |block, buf| {
        runtime.block_on(device.inspect_at(u64::from(block) * BLOCK_SIZE as u64, buf))
    })
}

/// A part of a profile's text from byte `from` on.
#[must_use]
pub fn page(text: &str, from: u64) -> ProfilePage {
    let rest = usize::try_from(from).ok().and_then(|from| text.get(from..)).unwrap_or_default();
    // Lines are short of a page by far.
    let end = match rest.get(..PAGE.min(rest.len())) {
        Some(part) if part.len() == rest.len() => rest.len(),
        _ => (0..=PAGE).rev().find(|end| rest.is_char_boundary(*end)).unwrap_or(0),
    };
    let (part, rest) = rest.split_at(end);
    ProfilePage { text: part.to_owned(), next: (!rest.is_empty()).then_some(from + end as u64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_make_up_the_text() {
        let text = "añb\n".repeat(700_000);
        let (mut from, mut found) = (Some(0), String::new());
        while let Some(at) = from {
            let page = page(&text, at);
            assert!(page.text.len() <= PAGE);
            found.push_str(&page.text);
            from = page.next;
        }
        assert!(found == text);
        assert_eq!(page(&text, 1 << 40).text, "");
    }
}
