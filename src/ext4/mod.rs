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

mod checksum;
mod dir;
mod emit;
mod existing;
mod extent;
mod group;
mod grow;
mod hash;
mod htree;
mod inode;
mod journal;
mod layout;
mod read;
mod reader;
mod space;
mod superblock;
mod tree;
mod walk;
mod write;
mod xattr;

pub mod plan;

pub use existing::Obstacle;
pub use grow::{Growth, grow};
pub use hash::name_hash;
pub use journal::{Addition, NewJournal, Settled, add_journal, settle};
pub use layout::BLOCK_SIZE;
pub use plan::{ALIGN_MAX, Options, Plan, plan};
pub use read::{Names, ROOT, Run, Type, read_names};
pub use reader::ReadBlocks;
pub use space::{cleaned, read_free};
pub use tree::{Inode, InodeId, Kind, Segment, Time, Tree, Xattr};
pub use xattr::is_supported as is_supported_xattr;
