//! The node: its pool, its images, its devices, and what a client can ask for.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;

use super::attachment::{self, Attachment, Transport, Transports};
use super::config::{Config, Patience, Prefetch};
use super::control::{
    Attach, Attached, ByteCounts, ChunkCounts, DeviceInfo, Export, Exported, Health, HealthState, Hello, InUse, Kind,
    Problem, Serve, SourceStatus, State, Status, Stopped, Waits,
};
use super::devices::{Devices, Entry, Served, still_held};
use super::exports::Serving;
use super::images::{Images, index_cache};
use super::jobs::Jobs;
use super::keeping::Scrubbing;
use super::mending::Mender;
use super::pins::PinnedImages;
use super::records::{Record, Records, Reopen};
use super::server::Stopping;
use super::snapshots::ExportedUppers;
use super::starts::{Start, watch_start};
use super::trace::{StartupStatus, startup_status};
use super::uppers::{self, UpperInfo};
use crate::attach::read_ahead::READY_KB;
use crate::device::Device;
use crate::device::upper::Upper;
use crate::error::{Error, Result};
use crate::fetch::{FetchOptions, Fetcher, Origin, SourceReport};
use crate::oci::Reference;
use crate::pool::{Pool, PoolOptions};

/// What the daemon is made of.
pub struct Node {
    pub(super) config: Config,
    pub(super) pool: Arc<Pool>,
    pub(super) fetcher: Arc<Fetcher>,
    pub(super) images: Images,
    pub(super) pins: PinnedImages,
    pub(super) jobs: Jobs,
    pub(super) mender: Mender,
    pub(super) scrubbing: Scrubbing,
    pub(super) devices: Arc<Devices>,
    pub(super) transports: Arc<Transports>,
    pub(super) exported: ExportedUppers,
    stop: watch::Sender<bool>,
}

impl Node {
    /// Opens the pool. `earlier` are the devices of an earlier daemon that are to be recovered, or that it lost and
    /// somebody still holds. Must be called on the runtime.
    ///
    /// # Errors
    /// A pool that another process owns, or that can't be made.
    pub fn open(config: Config, records: Records, earlier: Vec<Record>) -> Result<Arc<Self>> {
        let options =
            PoolOptions { limit: config.pool_limit, keep_free: config.pool_keep_free, ..PoolOptions::default() };
        let pool = Arc::new(Pool::open(&config.root.join("pool"), &options)?);
        let fetcher = Fetcher::new(Arc::clone(&pool), options_of(&config));
        let images = Images::new(&index_cache(&config.root));
        let pins = PinnedImages::open(&config.root.join("pins"), &index_cache(&config.root), &pool)?;
        let (devices, jobs) = (Arc::new(Devices::new(records, earlier)), Jobs::default());
        let transports = Arc::new(Transports::new(&config, tokio::runtime::Handle::current()));
        let (mender, scrubbing, stop) = (Mender::default(), Scrubbing::default(), watch::Sender::new(false));
        let exported = ExportedUppers::default();
        Ok(Arc::new(Self {
            config,
            pool,
            fetcher,
            images,
            pins,
            jobs,
            mender,
            scrubbing,
            devices,
            transports,
            exported,
            stop,
        }))
    }

    /// Becomes true when the daemon stops.
    #[must_use]
    pub fn stopping(&self) -> Stopping {
        self.stop.subscribe()
    }

    /// Who this is.
    #[must_use]
    pub fn hello(&self) -> Hello {
        let program = env!("CARGO_PKG_VERSION").to_owned();
        Hello { program, pid: std::process::id(), root: self.config.root.clone() }
    }

    /// Exposes an image as a device.
    ///
    /// # Errors
    /// An image that can't be opened, or a transport that can't be had.
    pub async fn attach(&self, request: &Attach) -> std::result::Result<Attached, Problem> {
        self.accepting()?;
        let mut choice = attachment::choose(&request.transport, &self.transports)?;
        let Attach { reference, access, on_outage, ordinary, .. } = request;
        let (image, device) = self.open_shown(reference, access, *on_outage, *ordinary).await?;
        let reserved = self.devices.reserve(&name_of(&image.reference));
        let opened = match &request.writable {
            Some(writable) => Some(self.new_upper(&image, &device, writable, reserved.id()).await?),
            None => None,
        };
        let mut info = DeviceInfo {
            id: reserved.id().to_owned(),
            image: image.reference.to_string(),
            digest: image.manifest_digest.to_string(),
            device: PathBuf::new(),
            transport: String::new(),
            mountpoint: None,
            read_only: opened.is_none(),
            upper: opened.as_ref().map(|opened| opened.info.clone()),
            state: State::Attached,
        };
        let device_bytes = opened.as_ref().map_or(device.size(), |opened| opened.overlay.size());
        let file_system = image.index.file_system().to_owned();
        let recorded = image.index.startup_read_ahead_kb();
        let read_ahead_kb = request.read_ahead_kb.or(recorded).unwrap_or(READY_KB);
        // The start-up pack has all metadata that is needed; what is read beside it would only be waited for.
        let inode_readahead_blks = if image.index.startup_order().len() > 0 { 0 } else { 32 };
        let remarks = opened.as_ref().map_or_else(Vec::new, |opened| opened.remarks.clone());
        let reopen = Reopen {
            reference: request.reference.clone(),
            access: request.access.clone(),
            on_outage: request.on_outage,
        };
        let (transports, lifetime) = (Arc::clone(&self.transports), request.lifetime);
        let (info, passed_over) = blocking(move || {
            let lower = Arc::clone(&device) as Arc<dyn Device>;
            let dynamic = opened.as_ref().map_or(lower, |opened| Arc::clone(&opened.overlay) as Arc<dyn Device>);
            let upper = opened.map(|opened| Arc::clone(opened.overlay.upper()));
            let attached = Attachment::attach(&mut choice, &dynamic, read_ahead_kb, &transports);
            let attachment = attached.inspect_err(|_| give_up(upper.as_deref(), info.upper.as_ref()))?;
            info.device = attachment.path().to_owned();
            info.transport = attachment.transport().name().to_owned();
            let start = Start::new(attachment.path(), read_ahead_kb);
            let served = Served { image, device, upper: upper.clone(), start };
            let filled = reserved.fill(Record::new(info.clone(), Some(reopen), lifetime), served, attachment);
            filled.inspect_err(|_| give_up(upper.as_deref(), info.upper.as_ref()))?;
            Ok((info, choice.passed_over))
        })
        .await?;
        tracing::info!("{}: {} is {}", info.id, info.image, info.device.display());
        if let Ok(entry) = self.devices.find(&info.id) {
            tokio::spawn(watch_start(Arc::downgrade(&entry)));
        }
        Ok(Attached { inode_readahead_blks, device: info, file_system, device_bytes, passed_over, remarks })
    }

    /// Makes a device permanent, and remembers where it is mounted.
    ///
    /// # Errors
    /// There is no such device, or its record can't be written.
    pub async fn settle(&self, target: &str, mountpoint: Option<PathBuf>) -> std::result::Result<DeviceInfo, Problem> {
        let entry = self.devices.find(target)?;
        let (devices, settled) = (Arc::clone(&self.devices), Arc::clone(&entry));
        let info = blocking(move || devices.set_mountpoint(&settled, mountpoint)).await?;
        if let Some(served) = &entry.served
            && info.read_only
            && info.mountpoint.is_some()
            && self.config.prefetch != Prefetch::None
            && served.image.index.startup_reads().len() > 0
        {
            served.start.lay(&served.image.index, &self.fetcher);
        }
        Ok(info)
    }

    /// Detaches a device.
    ///
    /// # Errors
    /// There is no such device, or somebody uses it.
    pub async fn detach(&self, target: &str, in_use: InUse) -> std::result::Result<DeviceInfo, Problem> {
        let entry = self.devices.find(target)?;
        let (mut stopping, deadline) = (self.stopping(), Instant::now() + LEAVING);
        loop {
            let done = self.detach_entry(Arc::clone(&entry), in_use).await;
            let is_busy = done.as_ref().is_err_and(|problem| problem.kind == Kind::Busy);
            if !is_busy || in_use != InUse::Wait || Instant::now() >= deadline {
                return done;
            }
            if tokio::time::timeout(PAUSE, stopping.wait_for(|&stopping| stopping)).await.is_ok() {
                return done;
            }
        }
    }

    async fn detach_entry(&self, entry: Arc<Entry>, in_use: InUse) -> std::result::Result<DeviceInfo, Problem> {
        let (devices, config) = (Arc::clone(&self.devices), self.config.clone());
        let info = entry.info();
        if let Some(served) = &entry.served {
            served.start.end_laying().await;
        }
        let taken = entry.take()?;
        let done = blocking(move || {
            let info = entry.info();
            match taken {
                Some(mut attachment) => {
                    if let Err(error) = attachment.detach(in_use) {
                        entry.put_back(attachment);
                        return Err(error);
                    }
                }
                None => attachment::release_lost(&info, in_use, &config)?,
            }
            let upper = entry.served.as_ref().and_then(|served| served.upper.as_deref());
            let closed = info.upper.as_ref().map_or(Ok(()), |info| uppers::close(upper, info));
            // A record of a device that is gone helps nobody, however its upper ended.
            devices.forget(&info.id).and(closed)
        })
        .await;
        match done {
            Ok(()) => {
                tracing::info!("{}: detached {}", info.id, info.device.display());
                Ok(info)
            }
            Err(error) => {
                let hint = match (&error, &info.mountpoint) {
                    (Error::Busy(_), Some(dir)) => Some(format!("`firstread umount {}` first", dir.display())),
                    (Error::Busy(_), None) => {
                        Some("whoever holds it must let go first; `--force` takes it away".to_owned())
                    }
                    _ => None,
                };
                let problem = Problem::from(error);
                Err(Problem { message: format!("detaching {}: {}", info.id, problem.message), hint, ..problem })
            }
        }
    }

    /// The device with this id, device path or mountpoint.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, target: &str) -> std::result::Result<DeviceInfo, Problem> {
        Ok(self.devices.find(target)?.info())
    }

    /// All devices.
    #[must_use]
    pub fn list(&self) -> Vec<DeviceInfo> {
        let mut all: Vec<DeviceInfo> = self.devices.all().iter().map(|entry| entry.info()).collect();
        all.retain(|info| {
            let held = still_held(info);
            if !held {
                tracing::info!("{}: nobody holds the lost {} any more", info.id, info.device.display());
                let closed = info.upper.as_ref().map_or(Ok(()), |info| uppers::close(None, info));
                if let Err(error) = self.devices.forget(&info.id).and(closed) {
                    tracing::warn!("{}: {error}", info.id);
                }
            }
            held
        });
        all
    }

    /// The numbers of one device, or of all.
    ///
    /// # Errors
    /// There is no such device.
    pub async fn status(&self, target: Option<&str>) -> std::result::Result<Vec<Status>, Problem> {
        let entries = match target {
            Some(target) => vec![self.devices.find(target)?],
            None => self.devices.all(),
        };
        let (pool, patience) = (Arc::clone(&self.pool), self.config.on_outage);
        Ok(blocking(move || Ok(entries.iter().map(|entry| numbers(entry, &pool, patience)).collect())).await?)
    }

    /// Serves an image to other programs.
    ///
    /// # Errors
    /// An image that can't be opened, or an address that can't be bound.
    pub async fn export(&self, request: &Export) -> std::result::Result<(Exported, Serving), Problem> {
        self.accepting()?;
        let Export { reference, access, on_outage, ordinary, .. } = request;
        let (image, device) = self.open_shown(reference, access, *on_outage, *ordinary).await?;
        let name = image.reference.to_string();
        let digest = image.manifest_digest.to_string();
        let opened = match &request.writable {
            Some(writable) => Some(self.new_upper(&image, &device, writable, &self.export_upper()?).await?),
            None => None,
        };
        let remarks = opened.as_ref().map_or_else(Vec::new, |opened| opened.remarks.clone());
        let lower = device as Arc<dyn Device>;
        let device = opened.as_ref().map_or(lower, |opened| Arc::clone(&opened.overlay) as Arc<dyn Device>);
        let device_bytes = device.size();
        let serving = match &request.serve {
            Serve::Nbd { address, tls } => Serving::nbd(address, tls.as_ref(), name.clone(), device).await,
            Serve::VhostUser(path) => Serving::vhost_user(path, &digest, device),
        };
        let upper = opened.map(|opened| (Arc::clone(opened.overlay.upper()), opened.info));
        let serving = match serving {
            Ok(serving) => {
                if let Some((upper, info)) = &upper {
                    self.exported.add(upper, info, &request.access);
                }
                serving.with_upper(upper)
            }
            Err(error) => {
                give_up(upper.as_ref().map(|(upper, _)| upper.as_ref()), upper.as_ref().map(|(_, info)| info));
                return Err(error.into());
            }
        };
        tracing::info!("{name} is exported at {}", serving.uri);
        Ok((Exported { image: name, digest, uri: serving.uri.clone(), device_bytes, remarks }, serving))
    }

    /// Detaches what can be detached, and stops if nothing is left or `in_use` says so.
    pub async fn stop(&self, in_use: InUse) -> Stopped {
        let mut stopped = Stopped { detached: Vec::new(), left: Vec::new(), in_use: Vec::new(), stopping: false };
        for entry in self.devices.all() {
            let held = stopped.in_use.len();
            self.let_go(Arc::clone(&entry), InUse::Refuse, &mut stopped).await;
            let recovers = Transport::named(&entry.info().transport).is_some_and(Transport::recovers);
            // Its readers would wait for the next daemon.
            if in_use == InUse::Abandon && stopped.in_use.len() > held && recovers {
                self.let_go(entry, InUse::Abandon, &mut stopped).await;
            }
        }
        self.end(stopped, in_use)
    }

    /// Leaves the devices that the next daemon can take over, and detaches the others; stops if nothing else is left or
    /// `in_use` says so.
    pub async fn hand_over(&self, in_use: InUse) -> Stopped {
        let mut stopped = Stopped { detached: Vec::new(), left: Vec::new(), in_use: Vec::new(), stopping: false };
        for entry in self.devices.all() {
            let info = entry.info();
            match Transport::named(&info.transport) {
                Some(transport) if transport.recovers() && info.state != State::Lost => stopped.left.push(info.id),
                _ => self.let_go(entry, InUse::Refuse, &mut stopped).await,
            }
        }
        self.end(stopped, in_use)
    }

    async fn let_go(&self, entry: Arc<Entry>, in_use: InUse, stopped: &mut Stopped) {
        let info = entry.info();
        match self.detach_entry(entry, in_use).await {
            Ok(_) => stopped.detached.push(info.id),
            Err(problem) if problem.kind == Kind::NotFound => {}
            // It was lost before, and stopping changes nothing for it.
            Err(_) if info.state == State::Lost => {}
            Err(problem) => stopped.in_use.push(problem.message),
        }
    }

    fn end(&self, mut stopped: Stopped, in_use: InUse) -> Stopped {
        if stopped.in_use.is_empty() || in_use == InUse::Abandon {
            for message in &stopped.in_use {
                tracing::warn!("stopping all the same; readers get errors from now on: {message}");
            }
            stopped.stopping = true;
            self.stop.send_replace(true);
        }
        stopped
    }

    /// What is to be done before the process ends.
    pub async fn close(&self) {
        for entry in self.devices.all() {
            let Some(upper) = entry.served.as_ref().and_then(|served| served.upper.clone()) else { continue };
            if let Err(error) = upper.flush_soon().await {
                tracing::warn!("{}: {error}", entry.info().id);
            }
        }
        let pool = Arc::clone(&self.pool);
        if let Err(error) = blocking(move || pool.sync()).await {
            tracing::warn!("the pool: {error}");
        }
    }

    pub(super) fn accepting(&self) -> Result<()> {
        if *self.stop.borrow() { Err(Error::Stopping("the daemon".to_owned())) } else { Ok(()) }
    }
}

/// Closes the upper of a device that did not come about.
fn give_up(upper: Option<&Upper>, info: Option<&UpperInfo>) {
    if let Some(Err(error)) = info.map(|info| uppers::close(upper, info)) {
        tracing::warn!("{error}");
    }
}

fn options_of(config: &Config) -> FetchOptions {
    FetchOptions {
        on_outage: config.on_outage.limit(),
        background_limit: Some(config.background_limit.0).filter(|&limit| limit > 0),
        ..FetchOptions::default()
    }
}

fn numbers(entry: &Entry, pool: &Pool, node: Patience) -> Status {
    let info = entry.info();
    let mut status = Status {
        id: info.id,
        image: info.image,
        state: info.state,
        device_bytes: 0,
        chunks: ChunkCounts::default(),
        bytes: ByteCounts::default(),
        requests: 0,
        hedges: 0,
        hits: 0,
        misses: 0,
        verify_failures: 0,
        outage_seconds: 0.0,
        waits: Waits::default(),
        startup: StartupStatus::default(),
        health: Health::default(),
        sources: Vec::new(),
        last_error: None,
        last_error_at: None,
    };
    let Some(served) = &entry.served else { return status };
    let (index, origin) = (&served.image.index, &served.image.origin);
    let (fetched, read) = (origin.counters().snapshot(), served.device.counts());
    let local = index.chunks().filter(|chunk| pool.contains(&chunk.digest)).count();
    status.device_bytes = index.device_bytes();
    status.chunks = ChunkCounts {
        total: u64::from(index.chunk_count()),
        local: local as u64,
        fetched: fetched.chunks,
        failed: fetched.failed,
    };
    status.bytes = ByteCounts { read: read.bytes, fetched: fetched.bytes, startup: fetched.startup_bytes };
    status.startup = startup_status(served);
    (status.requests, status.hedges) = (fetched.requests, fetched.hedges);
    (status.hits, status.misses) = (read.hits, read.misses);
    status.verify_failures = fetched.verify_failures;
    status.outage_seconds = fetched.outage_seconds;
    status.waits = Waits { count: fetched.waits.count, total: fetched.waits.total, max: fetched.waits.max };
    show_health(&mut status, origin, node);
    status
}

/// What is known of the sources. `node` is the patience of devices that have none of their own.
fn show_health(status: &mut Status, origin: &Origin, node: Patience) {
    let unix = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let report = origin.health();
    let state = |since, trouble| if since { trouble } else { HealthState::Healthy };
    status.health = Health {
        state: state(report.waiting_since.is_some(), HealthState::Waiting),
        since: report.waiting_since.map(unix),
        on_outage: origin.patience().unwrap_or(node).limit().map(|time| time.as_secs()),
    };
    (status.last_error_at, status.last_error) =
        report.last_error.map(|(at, error)| (unix(at), error.to_string())).unzip();
    let source = |source: SourceReport| SourceStatus {
        name: source.name,
        state: state(source.failing_since.is_some(), HealthState::Failing),
        since: source.failing_since.map(unix),
        last_error: source.last_error.map(|error| error.to_string()),
    };
    status.sources = report.sources.into_iter().map(source).collect();
}

/// The last part of a repository or of a path.
fn name_of(reference: &Reference) -> String {
    match reference {
        Reference::Registry(reference) => reference.repository.rsplit('/').next().unwrap_or_default().to_owned(),
        Reference::Layout { dir, .. } => dir.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        _ => String::new(),
    }
}

/// Runs `work` on a thread where it may block.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => Err(Error::Unsupported(format!("a bug: {error}"))),
        Err(_) => Err(Error::Stopping("the daemon".to_owned())),
    }
}

/// How long it may take those to go who are leaving a device anyway, and how often that is looked at.
const LEAVING: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

/// How long the daemon waits for its clients when it stops.
pub const FAREWELL: Duration = Duration::from_secs(5);
