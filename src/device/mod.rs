//! Devices: what a disk is.
