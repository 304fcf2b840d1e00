//! System calls that need `unsafe`; the only place where it is allowed.
#![allow(unsafe_code)]

pub mod loop_ioctl;
pub mod mmap;
pub mod namespace;
