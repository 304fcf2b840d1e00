//! Attaching: how a kernel or a VMM sees a device.
//!
//! Every transport asks [`Device::read_local`](crate::device::Device::read_local) on its own thread first and hands what
//! that can't answer to [`Device::read_at`](crate::device::Device::read_at) in a task of its own, so that a hit never
//! waits for a miss.

pub mod holders;
#[cfg(feature = "loop")]
pub mod loop_device;
#[cfg(feature = "nbd")]
pub mod nbd;
pub mod read_ahead;
#[cfg(any(feature = "nbd", feature = "vhost-user"))]
mod socket;
#[cfg(feature = "ublk")]
pub mod ublk;
#[cfg(feature = "vhost-user")]
pub mod vhost_user;
