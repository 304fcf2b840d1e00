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

use serde::{Deserialize, Serialize};

mod answers;
mod asked;
mod problem;
mod status;

pub use answers::{
    Attached, DeviceInfo, Expected, Exported, Hello, JobState, ProfilePage, Ready, ScrubAnswer, Snapshotted, State,
    Stopped, Trimmed,
};
pub use asked::{Attach, Expect, Export, InUse, Lifetime, OrdinaryLayers, Pin, Serve, SourceAccess, TlsFiles, Until};
pub use problem::{Kind, Problem};
pub use status::{ByteCounts, ChunkCounts, Health, HealthState, SourceStatus, Status, Waits};

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
