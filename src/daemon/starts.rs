//! Starts: what the daemon knows of each device's, and what it makes of that.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::control::{Kind, Problem, ProfilePage, Ready, Until};
use super::devices::{Entry, Served};
use super::laying::Laying;
use super::node::{Node, blocking};
use super::trace::{Trace, trace};
use crate::attach::read_ahead::{self, READY_KB};
use crate::chunk::Digest;
use crate::device::{Device, ImageDevice};
use crate::error::Result;
use crate::ext4::{BLOCK_SIZE, Names, read_names};
use crate::fetch::Fetcher;
use crate::index::Index;
use crate::profile::{Profile, Recording, Touch, locate};

/// Bytes of a profile's text in one answer.
const PAGE: usize = 1 << 20;

/// How often a starting device is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// A start is over when nothing of the start-up pack was read for the first time for so long.
const QUIET: Duration = Duration::from_secs(3);

/// Longest start.
const LONGEST: Duration = Duration::from_secs(300);

/// Whether a start is laid into the page cache.
#[derive(Debug, Default)]
enum Laid {
    /// The device is not mounted yet, as far as is known.
    #[default]
    Not,
    /// It is being laid, or was.
    On(Laying),
    /// Somebody wanted the device to be let go.
    Over,
}

/// A device's start.
#[derive(Debug)]
pub struct Start {
    /// The block device.
    path: PathBuf,
    /// Its read-ahead in KiB while it starts.
    read_ahead_kb: u32,
    /// Its read-ahead in KiB afterwards, once that was set.
    raised: OnceLock<u32>,
    /// How long after its attach the program on it was ready.
    ready: OnceLock<Duration>,
    laying: Mutex<Laid>,
}

impl Start {
    /// The start of the block device at `path`, whose read-ahead was set.
    #[must_use]
    pub fn new(path: &Path, read_ahead_kb: u32) -> Self {
        Self {
            path: path.to_owned(),
            read_ahead_kb,
            raised: OnceLock::new(),
            ready: OnceLock::new(),
            laying: Mutex::default(),
        }
    }

    /// Read-ahead of the block device in KiB.
    #[must_use]
    pub fn read_ahead_kb(&self) -> u32 {
        self.raised.get().copied().unwrap_or(self.read_ahead_kb)
    }

    /// How long after its attach the program on it was ready.
    #[must_use]
    pub fn ready(&self) -> Option<Duration> {
        self.ready.get().copied()
    }

    /// Lays the start of `index` into the page cache; the device, whose file system can't be written, is mounted now.
    pub fn lay(&self, index: &Arc<Index>, fetcher: &Arc<Fetcher>) {
        let mut laid = self.laying.lock();
        if matches!(*laid, Laid::Not) {
            *laid = Laid::On(Laying::begin(&self.path, index, fetcher));
        }
    }

    /// Bytes that were laid into the page cache so far.
    #[must_use]
    pub fn laid_bytes(&self) -> u64 {
        match &*self.laying.lock() {
            Laid::On(laying) => laying.bytes(),
            Laid::Not | Laid::Over => 0,
        }
    }

    /// Nothing more is laid into the page cache, and nothing holds the device for that.
    pub async fn end_laying(&self) {
        let laid = std::mem::replace(&mut *self.laying.lock(), Laid::Over);
        if let Laid::On(laying) = laid {
            laying.end().await;
        }
    }

    /// The start is over: the device's read-ahead becomes that of any other. Blocks.
    fn raise(&self, id: &str) {
        self.raised.get_or_init(|| {
            let kib = self.read_ahead_kb.max(READY_KB);
            if kib != self.read_ahead_kb
                && let Err(error) = read_ahead::set(&self.path, kib)
            {
                tracing::warn!("{id}: {error}");
                return self.read_ahead_kb;
            }
            kib
        });
    }
}

/// Waits until a device's start is over: somebody said so, or nothing of the start-up pack is read any more. Raises its
/// read-ahead then.
pub async fn watch_start(entry: Weak<Entry>) {
    let Some(hot) = entry.upgrade().and_then(|entry| entry.served.as_ref().map(|served| Hot::new(&served.image.index)))
    else {
        return;
    };
    let (mut seen, mut last) = (0, Instant::now());
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(entry) = entry.upgrade() else { return };
        let Some(served) = &entry.served else { return };
        let touches = served.device.touches_from(seen);
        seen += touches.len();
        let (streaming, _) = served.image.origin.startup();
        if streaming || touches.iter().any(|touch| hot.has(&served.image.index, touch)) {
            last = Instant::now();
        }
        // Without a start-up pack nothing is hot, and silence says nothing: a recording keeps its read-ahead to its end.
        let packed = served.image.index.startup_order().len() > 0;
        let quiet = packed && seen > 0 && last.elapsed() >= QUIET;
        if served.start.ready().is_some() || quiet || served.device.started().elapsed() >= LONGEST {
            return raise(entry);
        }
    }
}

/// Raises the read-ahead of a device whose start is over. The kernel lets no read in meanwhile and waits for those that
/// are under way, which may wait for a source: so nobody waits for it.
fn raise(entry: Arc<Entry>) {
    drop(tokio::task::spawn_blocking(move || {
        if let Some(served) = &entry.served {
            served.start.raise(&entry.info().id);
        }
    }));
}

/// The blocks that a start-up pack has.
struct Hot {
    /// Chunks that are hot as a whole: they have no start-up extents.
    whole: HashSet<Digest>,
}

impl Hot {
    fn new(index: &Index) -> Self {
        Self {
            whole: index.startup_order().filter_map(|number| index.chunk(number)).map(|chunk| chunk.digest).collect(),
        }
    }

    fn has(&self, index: &Index, touch: &Touch) -> bool {
        let end = touch.block.saturating_add(touch.blocks);
        if index.startup_extents().at_or_after(touch.block).is_some_and(|extent| extent.block < end) {
            return true;
        }
        let ordinary = index.extents().at_or_after(touch.block).filter(|extent| extent.block < end);
        let chunk = ordinary.and_then(|extent| index.chunk(extent.chunk));
        chunk.is_some_and(|chunk| self.whole.contains(&chunk.digest))
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
        let id = entry.info().id;
        raise(entry);
        Ok(Ready { id, seconds: ready.as_secs_f64() })
    }

    /// What a device's start waited for.
    ///
    /// # Errors
    /// There is no such device, or nobody serves it.
    pub async fn trace(&self, target: &str) -> std::result::Result<Trace, Problem> {
        let entry = self.devices.find(target)?;
        entry.served()?;
        let info = entry.info();
        let found =
            blocking(move || Ok(entry.served.as_ref().map(|served| trace(served, info.id, info.image)))).await?;
        found.ok_or_else(|| Problem::new(Kind::NotFound, format!("{target} lost its server")))
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
        read_ahead_kb: Some(served.start.read_ahead_kb),
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
