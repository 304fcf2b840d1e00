//! The daemon: many devices, one pool, and a control socket.
//!
//! `startup` takes the run directory, cleans up after a daemon that died, and serves; `server` is the control socket's
//! end here and `client` the one of the verbs; `node` does what they ask for. What must outlive the process is in
//! `records`.

pub mod attachment;
pub mod client;
pub mod config;
pub mod control;
pub mod devices;
pub mod explore;
pub mod exports;
mod growth;
pub mod images;
pub mod jobs;
pub mod journal;
pub mod keeping;
pub mod laying;
pub mod mending;
pub mod mounts;
pub mod node;
mod opening;
pub mod pins;
pub mod proof;
mod propagation;
pub mod records;
mod recovery;
pub mod rundir;
pub mod server;
pub mod sharing;
mod snapshots;
pub mod starts;
pub mod startset;
pub mod startup;
pub mod trace;
pub mod uppers;
