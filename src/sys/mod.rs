//! System calls that need `unsafe`; the only place where it is allowed.
#![allow(unsafe_code)]

pub mod descriptors;
pub mod freeze;
#[cfg(feature = "vhost-user")]
pub mod guest_memory;
pub mod inode;
pub mod loop_ioctl;
pub mod mmap;
pub mod namespace;
#[cfg(feature = "ublk")]
pub mod ublk;
