//! Attaching: how a kernel or a VMM sees a device.
