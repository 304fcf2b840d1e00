//! The index: a device's description on disk.
