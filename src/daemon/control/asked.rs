//! What a call asks for.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::daemon::config::Patience;
use crate::daemon::uppers::Writable;
use crate::source::BlobPlace;

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

/// The arguments of [`Call::Attach`](super::Call::Attach).
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

/// The arguments of [`Call::Pin`](super::Call::Pin).
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

/// The arguments of [`Call::Export`](super::Call::Export).
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

/// The arguments of [`Call::Expect`](super::Call::Expect): those of the [`Attach`] that will follow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expect {
    /// The image; paths in it are absolute.
    pub reference: String,
    /// How its source is reached.
    #[serde(default)]
    pub access: SourceAccess,
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
