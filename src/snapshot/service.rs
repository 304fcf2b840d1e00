//! What each call of containerd does.

use std::collections::{BTreeMap, HashSet};
use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use super::failure::Failure;
use super::filter::Filters;
use super::lazy::{Daemon, Devices};
use super::locate::{is_named, locate};
use super::mounts::{Parts, block};
use super::record::{Found, Kind, Role, Snapshot, Unfinished, Wanted};
use super::store::Store;
use super::usage::{self, Usage};
use super::wire::snapshots::{
    CleanupRequest, CommitRequest, Info, InfoResponse, KeyRequest, Kind as WireKind, ListRequest, ListResponse,
    MountsResponse, PrepareRequest, UpdateRequest, UsageResponse,
};
use super::wire::{Labels, Mount};
use crate::chunk::Digest;
use crate::daemon::config::MountKind;
use crate::daemon::control::SourceAccess;
use crate::error::Result;
use crate::fetch;
use crate::oci::annotation;

/// The label that says what a skipped layer is to be called: the name of its chain.
pub(super) const REF: &str = "containerd.io/snapshot.ref";
/// The label that chooses a [`MountKind`] for one container: `overlay` or `block`.
const MOUNT: &str = "containerd.io/snapshot/firstread/mount";
/// Snapshots in one message of List.
const PAGE: usize = 100;
/// How long a device that was in use is left alone before it is tried to be detached again.
const AGAIN: Duration = Duration::from_secs(5);

/// A snapshotter's settings.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory of its state.
    pub state: PathBuf,
    /// containerd's socket.
    pub containerd: PathBuf,
    /// What containers get when no label says otherwise.
    pub mounts: MountKind,
    /// Bytes of a container's block device, where that is more than its image's.
    pub size: Option<u64>,
    /// How sources are reached.
    pub access: SourceAccess,
    /// How the kernel sees devices: `auto` or a transport's name.
    pub transport: String,
}

/// The snapshotter.
pub struct Snapshotter {
    store: Arc<Store>,
    devices: Arc<Devices>,
    options: Options,
    /// Something may be left to detach.
    left: Notify,
}

/// What a new snapshot is put on.
struct Below {
    /// Directories, the topmost first.
    lowers: Vec<PathBuf>,
    /// The image, when nothing but its device is below.
    only: Option<Found>,
}

impl Snapshotter {
    /// Opens the state. Damaged records are logged and left where they are.
    ///
    /// # Errors
    /// A state that another process uses, or what the system says.
    pub fn open(options: Options, daemon: Daemon) -> Result<Arc<Self>> {
        let (store, damaged) = Store::open(&options.state)?;
        for (dir, reason) in damaged {
            tracing::error!("the snapshot in {} is lost, its record is damaged: {reason}", dir.display());
        }
        let devices = Devices::new(daemon, options.access.clone(), options.transport.clone(), store.snapshots());
        if let Err(failure) = devices.reap(|id| store.knows(id)) {
            tracing::warn!("looking for what an earlier process left: {failure}");
        }
        store.sweep(Unfinished::Delete);
        let (store, devices, left) = (Arc::new(store), Arc::new(devices), Notify::new());
        left.notify_one();
        Ok(Arc::new(Self { store, devices, options, left }))
    }

    /// Detaches what nobody needs any more, as soon as it is free; for ever.
    pub async fn keep(&self) {
        loop {
            self.left.notified().await;
            let (store, devices) = (Arc::clone(&self.store), Arc::clone(&self.devices));
            match blocking(move || devices.reap(|id| store.knows(id))).await {
                Ok(0) => continue,
                Ok(left) => tracing::debug!("{left} devices of removed snapshots are still in use"),
                Err(failure) => tracing::warn!("looking for devices of removed snapshots: {failure}"),
            }
            tokio::time::sleep(AGAIN).await;
            self.left.notify_one();
        }
    }

    /// A new active snapshot; or none, for a pack that need not be downloaded.
    pub(super) async fn prepare(&self, request: PrepareRequest) -> Result<MountsResponse, Failure> {
        if let Some(name) = skipped(&request) {
            let devices = Arc::clone(&self.devices);
            // The index comes next, and then the daemon is needed.
            drop(tokio::task::spawn_blocking(move || devices.wake()));
            let store = Arc::clone(&self.store);
            let wanted = Wanted {
                key: name.clone(),
                kind: Kind::Committed,
                parent: Some(request.parent).filter(|parent| !parent.is_empty()),
                labels: request.labels.into_iter().collect(),
                role: Role::Pack,
            };
            return match blocking(move || store.create(wanted, |dir| fill(dir, Kind::Committed, None))).await {
                // What is there must be on the disk before containerd acts on this answer, and is.
                Ok(_) | Err(Failure::Exists(_)) => Err(Failure::Exists(format!("the pack {name} need not be applied"))),
                Err(failure) => Err(failure),
            };
        }
        self.make(request, Kind::Active).await
    }

    /// A new snapshot to look at another one.
    pub(super) async fn view(&self, request: PrepareRequest) -> Result<MountsResponse, Failure> {
        self.make(request, Kind::View).await
    }

    async fn make(&self, request: PrepareRequest, kind: Kind) -> Result<MountsResponse, Failure> {
        if self.store.stat(&request.key).is_ok() {
            return Err(Failure::Exists(format!("the snapshot {:?} exists already", request.key)));
        }
        let parent = Some(request.parent).filter(|parent| !parent.is_empty());
        // First, since it takes longest: a snapshot that can't be mounted is not made.
        let below = self.below(parent.as_deref()).await?;
        let (store, key) = (Arc::clone(&self.store), request.key);
        let wanted = Wanted { key, kind, parent, labels: request.labels.into_iter().collect(), role: Role::Ordinary };
        let like = below.lowers.first().cloned();
        let snapshot = blocking(move || store.create(wanted, |dir| fill(dir, kind, like.as_deref()))).await?;
        let mounts = self.mounts_of(&snapshot, below).await;
        if mounts.is_err() {
            let key = snapshot.key.clone();
            self.remove(KeyRequest { key, ..KeyRequest::default() }).await?;
        }
        Ok(MountsResponse { mounts: mounts? })
    }

    pub(super) async fn mounts(&self, request: KeyRequest) -> Result<MountsResponse, Failure> {
        let snapshot = self.store.stat(&request.key)?;
        if snapshot.kind == Kind::Committed {
            return Err(Failure::Precondition(format!("the snapshot {:?} is neither active nor a view", request.key)));
        }
        let below = self.below(snapshot.parent.as_deref()).await?;
        Ok(MountsResponse { mounts: self.mounts_of(&snapshot, below).await? })
    }

    async fn mounts_of(&self, snapshot: &Arc<Snapshot>, below: Below) -> Result<Vec<Mount>, Failure> {
        let dir = self.store.dir(snapshot);
        let wanted = match snapshot.label(MOUNT) {
            Some(name) => {
                name.parse().map_err(|reason| Failure::Argument(format!("the label {MOUNT}={name}: {reason}")))?
            }
            None => self.options.mounts,
        };
        if let (MountKind::Block, Kind::Active, Some(found)) = (wanted, snapshot.kind, below.only) {
            let (devices, size) = (Arc::clone(&self.devices), self.options.size);
            return block(&blocking(move || devices.block(&dir, &found, size)).await?);
        }
        Parts { kind: snapshot.kind, dir, lowers: below.lowers }.mounts()
    }

    /// What lies below a child of `parent`. An image's device is attached and mounted for it.
    async fn below(&self, parent: Option<&str>) -> Result<Below, Failure> {
        let mut below = Below { lowers: Vec::new(), only: None };
        let Some(parent) = parent else { return Ok(below) };
        let first = self.store.stat(parent)?;
        let mut chain = vec![Arc::clone(&first)];
        chain.extend(self.store.parents(&first)?);
        for (at, snapshot) in chain.iter().enumerate() {
            let dir = self.store.dir(snapshot);
            match snapshot.role {
                Role::Pack => {}
                Role::Ordinary => below.lowers.push(dir.join("fs")),
                Role::Index => match self.found(snapshot, chain.len() - at - 1).await? {
                    None => below.lowers.push(dir.join("fs")),
                    Some(found) => {
                        let (devices, image) = (Arc::clone(&self.devices), found.clone());
                        let point = blocking(move || devices.lower(&dir, &image)).await?;
                        below.only = below.lowers.is_empty().then_some(found);
                        below.lowers.push(point);
                        break;
                    }
                },
            }
        }
        Ok(below)
    }

    /// The image of an index; `None` for what only looks like one.
    async fn found(&self, index: &Arc<Snapshot>, depth: usize) -> Result<Option<Found>, Failure> {
        if let Some(found) = &index.found {
            return Ok(Some(found.clone()));
        }
        let located = match locate(&self.options.containerd, index, depth).await {
            Ok(located) => located,
            // An ordinary image may have files of these names.
            Err(Failure::NotFound(_)) if index.label(annotation::ROLE).is_none() => return Ok(None),
            Err(Failure::NotFound(message)) => return Err(Failure::Failed(message)),
            Err(failure) => return Err(failure),
        };
        let found = Found { reference: located.reference.clone(), blobs: located.blobs.clone() };
        tracing::info!("the bytes of {} are at {}", index.key, found.reference);
        let file = self.store.dir(index).join("fs").join(annotation::INDEX_PATH);
        let (devices, store, key, image) =
            (Arc::clone(&self.devices), Arc::clone(&self.store), index.key.clone(), found.clone());
        blocking(move || {
            let parts = fetch::Parts { manifest: &located.manifest, config: &located.config, index: &file };
            devices.keep(&parts).or_else(|failure| {
                // The daemon asks the registry for what is missing.
                tracing::warn!("what containerd has of {}: {failure}", located.reference);
                Ok::<_, Failure>(())
            })?;
            store.update(&key, |snapshot| {
                snapshot.found = Some(image);
                Ok(())
            })
        })
        .await?;
        Ok(Some(found))
    }

    pub(super) async fn commit(self: &Arc<Self>, request: CommitRequest) -> Result<(), Failure> {
        let store = Arc::clone(&self.store);
        let name = request.name.clone();
        blocking(move || {
            let CommitRequest { key, name, labels, .. } = request;
            let is_index = labels.get(annotation::ROLE).is_some_and(|role| role == annotation::ROLE_INDEX);
            store.commit(&key, &name, labels.into_iter().collect(), |snapshot| {
                let dir = store.dir(snapshot);
                if dir.join("upper").exists() {
                    return Err(Failure::Precondition(format!(
                        "the snapshot {key:?} is a block device, which can't be made a layer of"
                    )));
                }
                let fs = dir.join("fs");
                let index = std::fs::symlink_metadata(fs.join(annotation::INDEX_PATH));
                let role = match index.is_ok_and(|metadata| metadata.is_file()) || is_index {
                    true => Role::Index,
                    false => Role::Ordinary,
                };
                Ok((measure(&fs)?, role))
            })
        })
        .await?;
        drop(tokio::spawn(Arc::clone(self).look_ahead(name)));
        Ok(())
    }

    /// Asks where the bytes of a new index are, and has the daemon fetch what a start reads: who pulls an image starts it next, and
    /// while containerd makes the container nothing else is asked of the network. Nothing is attached, and what fails is tried
    /// again when there is a container.
    async fn look_ahead(self: Arc<Self>, name: String) {
        let Ok(index) = self.store.stat(&name) else { return };
        // Without a label it is the image's record that says where it is from, and that is made last.
        if index.role != Role::Index || !is_named(&index) {
            return;
        }
        let found = match self.store.parents(&index) {
            Ok(parents) => self.found(&index, parents.len()).await,
            Err(failure) => Err(failure),
        };
        let devices = Arc::clone(&self.devices);
        let expected = match found {
            Ok(Some(found)) => blocking(move || devices.expect(&found)).await,
            other => other.map(drop),
        };
        if let Err(failure) = expected {
            tracing::debug!("ahead of {name}: {failure}");
        }
    }

    pub(super) async fn remove(&self, request: KeyRequest) -> Result<(), Failure> {
        let (store, devices) = (Arc::clone(&self.store), Arc::clone(&self.devices));
        blocking(move || {
            store.remove(&request.key, |snapshot| {
                let dir = store.dir(snapshot);
                match ["mnt", "upper"].iter().any(|part| dir.join(part).exists()) {
                    true => devices.release(&dir),
                    false => Ok(()),
                }
            })
        })
        .await?;
        let store = Arc::clone(&self.store);
        // To delete many files takes long, and nobody waits for it.
        drop(tokio::task::spawn_blocking(move || store.sweep(Unfinished::Keep)));
        self.left.notify_one();
        Ok(())
    }

    pub(super) fn stat(&self, request: &KeyRequest) -> Result<InfoResponse, Failure> {
        Ok(InfoResponse { info: Some(info(&*self.store.stat(&request.key)?)) })
    }

    pub(super) async fn update(&self, request: UpdateRequest) -> Result<InfoResponse, Failure> {
        let wanted = request.info.ok_or_else(|| Failure::Argument("an update without values".to_owned()))?;
        let paths = request.update_mask.map(|mask| mask.paths).unwrap_or_default();
        let store = Arc::clone(&self.store);
        let changed = blocking(move || {
            store.update(&wanted.name, |snapshot| {
                snapshot.labels = relabelled(&snapshot.labels, &wanted.labels, &paths)?;
                snapshot.updated = std::time::SystemTime::now();
                Ok(())
            })
        });
        Ok(InfoResponse { info: Some(info(&*changed.await?)) })
    }

    pub(super) fn list(&self, request: &ListRequest) -> Result<Vec<ListResponse>, Failure> {
        let filters = Filters::parse(&request.filters).map_err(Failure::Argument)?;
        let all = self.store.list();
        let keys: HashSet<&str> = all.iter().map(|snapshot| snapshot.key.as_str()).collect();
        let mut listed = Vec::new();
        for snapshot in all.iter().filter(|snapshot| filters.matches(|path| field(snapshot, path))) {
            let mut info = info(snapshot);
            // containerd collects garbage from the roots on: a child of a damaged snapshot would never be found.
            if !keys.contains(info.parent.as_str()) {
                info.parent.clear();
            }
            listed.push(info);
        }
        Ok(listed.chunks(PAGE).map(|page| ListResponse { info: page.to_vec() }).collect())
    }

    pub(super) async fn usage(&self, request: KeyRequest) -> Result<UsageResponse, Failure> {
        let snapshot = self.store.stat(&request.key)?;
        let usage = match snapshot.usage {
            Some(usage) => usage,
            None => {
                let dir = self.store.dir(&snapshot);
                blocking(move || {
                    let (files, upper) = (measure(&dir.join("fs"))?, measure(&dir.join("upper"))?);
                    Ok(Usage { bytes: files.bytes + upper.bytes, inodes: files.inodes + upper.inodes })
                })
                .await?
            }
        };
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        Ok(UsageResponse { size: number(usage.bytes), inodes: number(usage.inodes) })
    }

    pub(super) async fn cleanup(&self, _: CleanupRequest) -> Result<(), Failure> {
        let (store, devices) = (Arc::clone(&self.store), Arc::clone(&self.devices));
        blocking(move || {
            store.sweep(Unfinished::Keep);
            devices.reap(|id| store.knows(id)).map(drop)
        })
        .await
    }
}

/// The name of the committed snapshot that stands for a layer which is not downloaded: one for each chain and parent, as
/// containerd looks for it by both.
fn skipped(request: &PrepareRequest) -> Option<String> {
    let label = |name: &str| request.labels.get(name).map(String::as_str);
    let chain = label(REF)?;
    let is_pack = matches!(label(annotation::ROLE)?, annotation::ROLE_PACK | annotation::ROLE_STARTUP);
    if !is_pack || label(annotation::VERSION)? != annotation::VERSION_1 {
        return None;
    }
    let parent = Digest::of(request.parent.as_bytes()).hex();
    Some(format!("firstread/{}/{chain}", parent.get(..16).unwrap_or_default()))
}

/// Makes what is in a new snapshot's directory; its root looks like that of what it is put on.
fn fill(dir: &Path, kind: Kind, like: Option<&Path>) -> io::Result<()> {
    let fs = dir.join("fs");
    DirBuilder::new().create(&fs)?;
    std::fs::set_permissions(&fs, Permissions::from_mode(0o755))?;
    if let Some(like) = like {
        let metadata = std::fs::metadata(like)?;
        lchown(&fs, Some(metadata.uid()), Some(metadata.gid()))?;
        std::fs::set_permissions(&fs, Permissions::from_mode(metadata.mode() & 0o7777))?;
    }
    match kind {
        Kind::Active => DirBuilder::new().create(dir.join("work")),
        Kind::View | Kind::Committed => Ok(()),
    }
}

/// The labels after an update of the fields `paths`; without any of all labels.
fn relabelled(
    old: &BTreeMap<String, String>,
    wanted: &Labels,
    paths: &[String],
) -> Result<BTreeMap<String, String>, Failure> {
    let all = || wanted.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    if paths.is_empty() {
        return Ok(all());
    }
    let mut labels = old.clone();
    for path in paths {
        match (path.as_str(), path.strip_prefix("labels.")) {
            ("labels", _) => labels = all(),
            (_, Some(name)) => match wanted.get(name).filter(|value| !value.is_empty()) {
                Some(value) => drop(labels.insert(name.to_owned(), value.clone())),
                None => drop(labels.remove(name)),
            },
            _ => return Err(Failure::Argument(format!("the field {path:?} of a snapshot can't be changed"))),
        }
    }
    Ok(labels)
}

fn field(snapshot: &Snapshot, path: &[String]) -> Option<String> {
    let (first, rest) = path.split_first()?;
    match first.as_str() {
        "name" => Some(snapshot.key.clone()),
        "parent" => Some(snapshot.parent.clone().unwrap_or_default()),
        "kind" => Some(
            match snapshot.kind {
                Kind::View => "view",
                Kind::Active => "active",
                Kind::Committed => "committed",
            }
            .to_owned(),
        ),
        "labels" => snapshot.labels.get(&rest.join(".")).cloned(),
        _ => None,
    }
}

fn info(snapshot: &Snapshot) -> Info {
    let kind = match snapshot.kind {
        Kind::View => WireKind::View,
        Kind::Active => WireKind::Active,
        Kind::Committed => WireKind::Committed,
    };
    Info {
        name: snapshot.key.clone(),
        parent: snapshot.parent.clone().unwrap_or_default(),
        kind: kind.into(),
        created_at: Some(snapshot.created.into()),
        updated_at: Some(snapshot.updated.into()),
        labels: snapshot.labels.clone().into_iter().collect(),
    }
}

fn measure(dir: &Path) -> Result<Usage, Failure> {
    match usage::of(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Usage::default()),
        other => other.map_err(|error| Failure::Failed(format!("measuring {}: {error}", dir.display()))),
    }
}

/// Runs `work` where it may block, to its end, also when the caller is gone.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(Failure::Failed(format!("a bug: {error}"))),
    }
}
