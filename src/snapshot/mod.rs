//! containerd's proxy snapshotter: its snapshots service (version 1) for firstread's images and for all others.
//!
//! A snapshotter is a process of its own and a client of the daemon, so that neither's end takes the other along: devices
//! are served by the daemon, mounts belong to the kernel, and what snapshots there are is on disk ([`record`]).
//!
//! Of a firstread image the packs are never downloaded: containerd is told that they are there already. The index is the
//! one layer that it applies; what is based on the index sees the image's device, which is attached and mounted when it
//! is first asked for. Everything else is what containerd's own overlayfs snapshotter does.

pub mod api;
pub mod failure;
mod filter;
mod lazy;
mod locate;
mod mounts;
pub mod pull;
mod record;
mod server;
mod service;
mod store;
mod usage;
pub mod wire;

pub use lazy::Daemon;
pub use record::{damaged, uppers};
pub use server::{bind, serve};
pub use service::{Options, Snapshotter};
