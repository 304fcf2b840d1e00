//! The daemon.
pub mod client;
pub mod config;
pub mod control;
pub mod records;
pub mod rundir;
