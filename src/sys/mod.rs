//! System calls that need `unsafe`; the only place where it is allowed.
#![allow(unsafe_code)]

pub mod mmap;
