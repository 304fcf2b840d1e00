//! The control protocol: what the verbs and the daemon say to each other.
//!
//! Newline-delimited JSON over the unix socket `control.sock` in the run directory. A client sends [`Request`] lines, the
//! daemon answers each with one [`Response`] line of the same id; answers may overtake each other. Fields that a side
//! does not know are ignored; a line longer than [`LINE_MAX`] ends the connection. The socket accepts root and the
//! daemon's own user only.
//!
//! Two things live as long as the connection that asked for them: a tentative device (until [`Call::Settle`]) and an
//! export. So a client that dies halfway leaves nothing behind.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::config::Patience;
use super::trace::StartupStatus;
use super::uppers::{UpperInfo, Writable};
use crate::error::Error;
use crate::pool::Scrubbed;
use crate::source::BlobPlace;

/// Version of the protocol. A daemon answers requests of its own version only.
pub const VERSION: u32 = 1;

/// Longest line in bytes, either way.
pub const LINE_MAX: usize = 4 << 20;

/// Name of the control socket in the run directory.
pub const SOCKET: &str = "control.sock";

/// What every request starts with, whatever its version and call.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Envelope {
    /// [`VERSION`] of the client.
    pub version: u32,
    /// Chosen by the client; the response repeats it.
    pub id: u64,
}

/// One line of a client.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// Version and id.
    #[serde(flatten)]
    pub envelope: Envelope,
    /// What the daemon shall do.
    #[serde(flatten)]
    pub call: Call,
}

/// What a daemon can be asked for; the answer's type is named beside each call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "snake_case")]
pub enum Call {
    /// Who are you? → [`Hello`]
    Hello,
    /// Expose an image as a device. → [`Attached`]
    Attach(Attach),
    /// Have what a start of an image reads fetched: it was pulled, and its device will be asked for. → [`Expected`]
    Expect(Expect),
    /// Make a tentative device permanent. → [`DeviceInfo`]
    Settle {
        /// The device's id.
        target: String,
        /// Where the caller mounted it, if it did.
        mountpoint: Option<PathBuf>,
    },
    /// Undo an attach. → [`DeviceInfo`] of what was detached
    Detach {
        /// The device: its id, device path or mountpoint.
        target: String,
        /// What to do when it is in use.
        #[serde(default)]
        in_use: InUse,
    },
    /// Which device is that? → [`DeviceInfo`]
    Find {
        /// An id, device path or mountpoint.
        target: String,
    },
    /// All devices. → `Vec<`[`DeviceInfo`]`>`
    List,
    /// What was read, fetched and waited for. → `Vec<`[`Status`]`>`
    Status {
        /// One device (id, device path or mountpoint), or all.
        target: Option<String>,
    },
    /// The program on a device is ready: its start is over. → [`Ready`]
    Ready {
        /// The device: its id, device path or mountpoint.
        target: String,
    },
    /// How much of a device is local. → [`Filling`](super::explore::Filling)
    Filling {
        /// The device: its id, device path or mountpoint.
        target: String,
        /// In how many parts, at most [`CELLS_MAX`](super::explore::CELLS_MAX).
        cells: u32,
    },
    /// What blocks hold. → [`ProfilePage`], the first one; [`Call::ProfileMore`] has the others
    Locate {
        /// The device: its id, device path or mountpoint.
        target: String,
        /// First block and length.
        ranges: Vec<(u32, u32)>,
    },
    /// What a device's start waited for, chunk by chunk. → [`Trace`](super::trace::Trace)
    Trace {
        /// The device: its id, device path or mountpoint.
        target: String,
    },
    /// What was read from a device, in the order of first touch. → [`ProfilePage`], the first one
    Profile {
        /// The device: its id, device path or mountpoint.
        target: String,
        /// How much of it.
        #[serde(default)]
        until: Until,
    },
    /// More of the profile that this connection asked for last. → [`ProfilePage`]
    ProfileMore {
        /// What the page before named.
        from: u64,
    },
    /// Serve an image to another program until this connection ends. → [`Exported`]
    Export(Export),
    /// Copy what was written to a device, as it is at this moment, until this connection ends. → [`Snapshotted`]
    Snapshot {
        /// An id, device path, mountpoint, or the directory of an upper that a device or an export has.
        target: String,
    },
    /// The node's pool. → a `PoolReport`
    PoolStat,
    /// Evict from the pool. → [`Trimmed`]
    PoolTrim {
        /// Down to so many bytes; otherwise to the pool's limit.
        bytes: Option<u64>,
    },
    /// Check every chunk of the pool, or ask how far that is. → [`JobState`], its answer a [`ScrubAnswer`]
    PoolScrub,
    /// Fetch all of an image and keep it, or ask how far that is. → [`JobState`], its answer a `Pinned`
    Pin(Pin),
    /// Prove what is local of an image, or ask how far that is. → [`JobState`], its answer a `Proof`
    Prove {
        /// The image; paths in it are absolute.
        reference: String,
    },
    /// Let an image's chunks be evicted again. → `Pinned`
    Unpin {
        /// The image as it was pinned.
        reference: String,
    },
    /// Stop, and leave the devices to the next daemon; refused when some can't be left. → [`Stopped`]
    HandOver,
    /// Detach every device and stop. → [`Stopped`]
    Stop {
        /// What to do about devices that are in use.
        in_use: InUse,
    },
}

/// How much of what was read belongs to a profile.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Until {
    /// What was read before the program was ready; all when nobody said that it is.
    #[default]
    Ready,
    /// All.
    Now,
}

/// A part of a profile's text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfilePage {
    /// The part.
    pub text: String,
    /// Where the next one begins, if there is one.
    pub next: Option<u64>,
}

/// The answer to [`Call::Ready`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ready {
    /// The device.
    pub id: String,
    /// Seconds from its attach until it was first said to be ready.
    pub seconds: f64,
}

/// What to do about devices that are in use and shall go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InUse {
    /// Keep them.
    #[default]
    Refuse,
    /// Keep them if they are in use for long: what is ending, and copies of a mount in other namespaces, go by themselves.
    Wait,
    /// Take them away all the same: their readers get errors.
    Abandon,
}

/// How an image's source is reached; what the client knows and the daemon does not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SourceAccess {
    /// HTTP without TLS, also for hosts other than loopback.
    #[serde(default)]
    pub plain_http: bool,
    /// The docker configuration with the credentials.
    #[serde(default)]
    pub docker_config: Option<PathBuf>,
    /// containerd's `certs.d`; without it the usual one.
    #[serde(default)]
    pub hosts_dir: Option<PathBuf>,
    /// Further places of blobs.
    #[serde(default)]
    pub blobs: Vec<BlobPlace>,
}

/// The arguments of [`Call::Attach`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// The image; paths in it are absolute.
    pub reference: String,
    /// How its source is reached.
    #[serde(default)]
    pub access: SourceAccess,
    /// How long its readers wait for unreachable sources; `None`: as the node's setting says.
    #[serde(default)]
    pub on_outage: Option<Patience>,
    /// `auto` or the name of a transport.
    pub transport: String,
    /// Read-ahead of the block device in KiB until its program is ready; `None`: the recording's of an image with a
    /// start-up pack, and the kernel's default of others.
    #[serde(default)]
    pub read_ahead_kb: Option<u32>,
    /// A device that can be written; otherwise it can't.
    #[serde(default)]
    pub writable: Option<Writable>,
    /// Who keeps the device.
    pub lifetime: Lifetime,
    /// What to do about ordinary layers.
    #[serde(default)]
    pub ordinary: OrdinaryLayers,
}

/// The arguments of [`Call::Expect`]: those of the [`Attach`] that will follow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expect {
    /// The image; paths in it are absolute.
    pub reference: String,
    /// How its source is reached.
    #[serde(default)]
    pub access: SourceAccess,
}

/// The answer to [`Call::Expect`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expected {
    /// Digest of the image's manifest.
    pub digest: String,
}

/// What to do about an image's ordinary layers, of which a device shows nothing: a container's commit puts one on top.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OrdinaryLayers {
    /// The image is refused.
    #[default]
    Refuse,
    /// The device has what is below them.
    LeaveOut,
}

/// How long a device stays attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lifetime {
    /// Until it is detached.
    #[default]
    Permanent,
    /// Until this connection ends, unless it is settled before.
    Tentative,
}

/// The arguments of [`Call::Pin`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The image; paths in it are absolute.
    pub reference: String,
    /// How its source is reached.
    #[serde(default)]
    pub access: SourceAccess,
    /// Only what the start recorded in this profile reads; absolute.
    #[serde(default)]
    pub profile: Option<PathBuf>,
}

/// How far a piece of long work is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobState {
    /// Bytes done.
    pub done: u64,
    /// Bytes in all; 0 when that is not known yet.
    pub total: u64,
    /// The answer, when the work has ended.
    pub answer: Option<serde_json::Value>,
}

/// The answer to [`Call::PoolTrim`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trimmed {
    /// Bytes that were freed.
    pub freed: u64,
}

/// The answer to [`Call::PoolScrub`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubAnswer {
    /// What was found.
    #[serde(flatten)]
    pub found: Scrubbed,
    /// Chunks that were fetched again: what was dropped, or is missing of a pinned image.
    #[serde(default)]
    pub refetched: u64,
}

/// The arguments of [`Call::Export`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// The image; paths in it are absolute.
    pub reference: String,
    /// How its source is reached.
    #[serde(default)]
    pub access: SourceAccess,
    /// How long its readers wait for unreachable sources; `None`: as the node's setting says.
    #[serde(default)]
    pub on_outage: Option<Patience>,
    /// A device that can be written; otherwise it can't.
    #[serde(default)]
    pub writable: Option<Writable>,
    /// What to do about ordinary layers.
    #[serde(default)]
    pub ordinary: OrdinaryLayers,
    /// How and where.
    #[serde(flatten)]
    pub serve: Serve,
}

/// The forms in which an image is served to other programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Serve {
    /// NBD.
    Nbd {
        /// `unix:PATH` (absolute) or `tcp:HOST:PORT`.
        address: String,
        /// Demands TLS of clients.
        tls: Option<TlsFiles>,
    },
    /// vhost-user-blk at this socket; the path is absolute.
    VhostUser(PathBuf),
}

/// Files in PEM form; the paths are absolute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsFiles {
    /// The server's certificate and its chain.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Authorities; clients need a certificate that one of them has signed.
    pub clients: Option<PathBuf>,
}

/// The answer to [`Call::Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The program's version.
    pub program: String,
    /// The daemon's process.
    pub pid: u32,
    /// The root directory that it owns.
    pub root: PathBuf,
}

/// How a device is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Served.
    Attached,
    /// Its server died; somebody still holds it and gets errors. It goes away with `umount` or `detach`.
    Lost,
    /// Its server died, and this daemon is about to take it over; its readers wait.
    Recovering,
}

/// One device, as `list`, `attach` and `mount` show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Short and readable; what `detach` and `status` take.
    pub id: String,
    /// The image's reference.
    pub image: String,
    /// Digest of the image's manifest.
    pub digest: String,
    /// Path of the block device.
    pub device: PathBuf,
    /// Which transport serves it.
    pub transport: String,
    /// Where `mount` mounted it.
    pub mountpoint: Option<PathBuf>,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Where what is written goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upper: Option<UpperInfo>,
    /// How it is doing.
    pub state: State,
}

/// The answer to [`Call::Attach`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The new device.
    #[serde(flatten)]
    pub device: DeviceInfo,
    /// What is on it: `ext4`, or something else or empty for disk images.
    pub file_system: String,
    /// Size of the device in bytes.
    pub device_bytes: u64,
    /// Blocks of the inode table that ext4 should read ahead (its mount option): none where a start-up pack has all
    /// that is needed.
    #[serde(default = "inode_readahead")]
    pub inode_readahead_blks: u32,
    /// Why the transports before the chosen one were not possible.
    pub passed_over: Vec<String>,
    /// What the user should know of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remarks: Vec<String>,
}

/// The kernel's own default.
fn inode_readahead() -> u32 {
    32
}

/// The answer to [`Call::Export`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exported {
    /// The image's reference.
    pub image: String,
    /// Digest of the image's manifest.
    pub digest: String,
    /// What NBD clients connect to; for vhost-user-blk the socket's path.
    pub uri: String,
    /// Size of the device in bytes.
    pub device_bytes: u64,
    /// What the user should know of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remarks: Vec<String>,
}

/// The answer to [`Call::Snapshot`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshotted {
    /// The copy: the directory of an upper that nobody has.
    pub dir: PathBuf,
    /// The image that it lies over.
    pub image: String,
    /// Digest of that image's manifest.
    pub digest: String,
    /// How that image's source is reached.
    pub access: SourceAccess,
    /// Bytes that were changed.
    pub bytes: u64,
}

/// The answer to [`Call::Stop`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopped {
    /// The devices that were detached.
    pub detached: Vec<String>,
    /// The devices that the next daemon takes over.
    #[serde(default)]
    pub left: Vec<String>,
    /// The devices that could not be detached, and why.
    pub in_use: Vec<String>,
    /// Whether the daemon stops.
    pub stopping: bool,
}

/// The numbers of one device. Sizes in bytes, times in seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The device.
    pub id: String,
    /// The image's reference.
    pub image: String,
    /// How the device is doing.
    pub state: State,
    /// Size of the device.
    pub device_bytes: u64,
    /// Chunks of the image.
    pub chunks: ChunkCounts,
    /// Bytes that went somewhere.
    pub bytes: ByteCounts,
    /// Requests made to sources for this image.
    pub requests: u64,
    /// Of these, second ones to a further source, since the first was slower than usual.
    #[serde(default)]
    pub hedges: u64,
    /// Chunk reads that the pool answered.
    pub hits: u64,
    /// Chunk reads that needed a source.
    pub misses: u64,
    /// Chunks that came with wrong bytes.
    pub verify_failures: u64,
    /// How long sources were unreachable.
    pub outage_seconds: f64,
    /// Reads that waited for a source.
    pub waits: Waits,
    /// The device's start.
    #[serde(default)]
    pub startup: StartupStatus,
    /// Whether sources can be reached.
    #[serde(default)]
    pub health: Health,
    /// The sources, best first.
    #[serde(default)]
    pub sources: Vec<SourceStatus>,
    /// The last thing that went wrong with a source, whether or not it has passed.
    #[serde(default)]
    pub last_error: Option<String>,
    /// When that was, in seconds since 1970.
    #[serde(default)]
    pub last_error_at: Option<u64>,
}

/// Whether a device's sources can be reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// The state.
    pub state: HealthState,
    /// Since when nothing can be reached, in seconds since 1970.
    pub since: Option<u64>,
    /// How long readers wait for sources in seconds; `None`: for ever.
    pub on_outage: Option<u64>,
}

/// A state of a device's sources, or of one source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthState {
    /// What was asked for last came, or nothing was asked for yet.
    #[default]
    Healthy,
    /// No source can be reached: readers wait, as long as `on_outage` says.
    Waiting,
    /// This source fails; others are asked first.
    Failing,
}

/// A source of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceStatus {
    /// Its name.
    pub name: String,
    /// How it is doing.
    pub state: HealthState,
    /// Since when it fails, in seconds since 1970.
    pub since: Option<u64>,
    /// The last thing that went wrong with it, whether or not it has passed.
    pub last_error: Option<String>,
}

/// Chunks of an image, counted by digest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkCounts {
    /// In the index.
    pub total: u64,
    /// In the pool.
    pub local: u64,
    /// Fetched since the image was opened.
    pub fetched: u64,
    /// Fetches that failed.
    pub failed: u64,
}

/// Bytes of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByteCounts {
    /// Read from the device.
    pub read: u64,
    /// Fetched from sources, as stored.
    pub fetched: u64,
    /// Of these, in the start-up stream.
    pub startup: u64,
}

/// Times that readers waited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Waits {
    /// How often.
    pub count: u64,
    /// All of them together.
    pub total: f64,
    /// The longest.
    pub max: f64,
}

impl Waits {
    /// Waits from whole durations.
    #[must_use]
    pub fn new(count: u64, total: Duration, max: Duration) -> Self {
        Self { count, total: total.as_secs_f64(), max: max.as_secs_f64() }
    }
}

/// One line of the daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Response {
    /// The request's id.
    pub id: u64,
    /// The answer, or why there is none.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// How a request ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Done; the type depends on the call.
    Result(serde_json::Value),
    /// Not done.
    Error(Problem),
}

/// Kinds of problems that a client treats differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The command line or the settings make no sense.
    Usage,
    /// The request makes no sense to this daemon.
    Request,
    /// The thing is in use.
    Busy,
    /// There is no such thing.
    NotFound,
    /// This version or machine can't.
    Unsupported,
    /// The source can't be reached, or refuses.
    Source,
    /// Everything else, and what later versions add.
    #[serde(other)]
    Failed,
}

/// An error that crosses the socket, or ends a verb.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What failed, and where.
    pub message: String,
    /// Which kind of failure it is.
    pub kind: Kind,
    /// What to do about it.
    #[serde(default)]
    pub hint: Option<String>,
}

impl Problem {
    /// A problem without a hint.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { message: message.into(), kind, hint: None }
    }

    /// The same problem with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Problem {}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let (kind, hint) = match &error {
            Error::Busy(_) => (Kind::Busy, None),
            Error::NotFound { .. } => (Kind::NotFound, Some("check the reference")),
            Error::Unsupported(_) => (Kind::Unsupported, None),
            Error::Unreachable { .. } => (Kind::Source, Some("check the network, and the name of the host")),
            Error::Refused { .. } => (Kind::Source, Some("check the reference, and the credentials (`docker login`)")),
            Error::WrongBytes { .. } => (Kind::Source, Some("`firstread verify REF` lists what is damaged")),
            Error::Io { .. } | Error::Invalid { .. } | Error::Stopping(_) => (Kind::Failed, None),
        };
        Self { message: error.to_string(), kind, hint: hint.map(str::to_owned) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn requests_and_responses_are_flat_and_ignore_what_they_do_not_know() {
        let call = Call::Settle { target: "python-1".into(), mountpoint: Some("/mnt".into()) };
        let request = Request { envelope: Envelope { version: VERSION, id: 7 }, call };
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(text, r#"{"version":1,"id":7,"call":"settle","target":"python-1","mountpoint":"/mnt"}"#);
        let text = r#"{"version":1,"id":7,"call":"list","later":[1]}"#;
        assert_eq!(serde_json::from_str::<Request>(text).unwrap().call, Call::List);
        let text = r#"{"id":7,"error":{"message":"m","kind":"invented later"}}"#;
        let Outcome::Error(problem) = serde_json::from_str::<Response>(text).unwrap().outcome else { unreachable!() };
        assert_eq!(problem, Problem::new(Kind::Failed, "m"));
    }
}
