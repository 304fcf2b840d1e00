//! The ext4 writer: a tree of inodes becomes a deterministic, read-optimised file system, described as metadata ranges
//! and a place for each file's data. It performs no I/O and never sees file contents.
//!
//! # Use
//!
//! Fill a [`Tree`], call [`plan`], put each file's blocks at [`Plan::data_start`], and stream the rest with
//! [`Plan::write_metadata`]. The same tree and [`Options`] give the same bytes, in whatever order names were linked.
//!
//! # Layout
//!
//! ```text
//! superblock | group descriptors | blocks of the root and of hot inodes | inode tables, hot inodes first |
//! blocks of the other inodes | bitmaps | pad | file data | tables never stored | uninitialised groups
//! ```
//!
//! Everything before the pad is what [`Plan::write_metadata`] emits; everything after the data is zeros.

mod tree;

pub mod plan;

pub use plan::{Options, Plan, plan};
pub use tree::{Inode, InodeId, Kind, Segment, Time, Tree};

/// The size of a block in bytes, the only one written.
pub const BLOCK_SIZE: usize = 4096;
