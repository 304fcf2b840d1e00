//! The ext4 writer: a tree of inodes becomes a deterministic, read-optimised file system, described as metadata ranges
//! and a place for each file's data. It performs no I/O and never sees file contents.
