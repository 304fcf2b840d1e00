//! firstread exposes container images as block devices that can be used before they are downloaded.
//!
//! # The read path
//!
//! ```text
//! kernel request → attach → Device::read_at(offset, buf)
//!   → map.cover() → Zero | Chunk { chunk, skip, len }
//!   → Pool::read(chunk, skip) → hit: copy
//!                             → miss: fetch (single flight) → Source::read_at → verify → admit → copy
//!   → Ok, or errno
//! ```
//!
//! # Layers
//!
//! Each imports only downwards, which `tests/layers.rs` enforces:
//! cli → snapshot → daemon → attach → device → pool → fetch → source → profile → map | oci | ext4 → index, on the
//! foundation of chunk, error, media and sys.
//!
//! # Invariants
//!
//! * Nothing reaches a reader or the pool that did not pass [`chunk::verify`].
//! * Every request of a device is answered: with data, or with the errno of the [`error::Error`] that stopped it.
//! * No lock is held across I/O; but for the gate of an upper, which writers pass together, and which is closed while a commit
//!   copies it.

pub mod attach;
#[cfg(feature = "build")]
#[path = "../tools/build/mod.rs"]
pub mod build;
pub mod chunk;
#[cfg(feature = "programs")]
pub mod cli;
#[cfg(feature = "programs")]
pub mod daemon;
pub mod device;
pub mod error;
pub mod ext4;
pub mod fetch;
pub mod index;
pub mod map;
pub mod media;
pub mod oci;
pub mod pool;
pub mod profile;
#[cfg(feature = "programs")]
pub mod snapshot;
pub mod source;
pub mod sys;

pub use chunk::Digest;
pub use error::{Error, Result};
