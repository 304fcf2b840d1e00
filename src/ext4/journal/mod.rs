//! Journals: giving one to a file system that this writer made without, and taking it away again.
//!
//! Images have none: who reads only needs none, and megabytes of it would be stored. A device that is to survive a loss of power gets
//! one when it is attached; what is published of it is the file system as it is after a replay, without the journal.
//! The journal's format is jbd2's (kernel `Documentation/filesystems/ext4/journal.rst`, `include/linux/jbd2.h`).

mod add;
mod allocation;
mod inode;
mod log;
mod settle;

pub use add::{Addition, NewJournal, add_journal};
pub use settle::{Settled, settle};
