//! Keeping the daemon's mount namespace free of its own devices: mounts that users make arrive in it.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::node::Node;
use crate::error::{Error, Result};
use crate::sys::namespace::detach_mounts_of;

/// Starts a thread that detaches mounts of the daemon's devices from its mount namespace, whenever mounts change. Only for
/// a daemon in a namespace of its own. The thread ends with the process, or at the first change after the node is gone.
///
/// # Errors
/// What the system says.
pub fn watch(node: &Arc<Node>) -> Result<()> {
    let table = File::open("/proc/self/mountinfo").map_err(|error| Error::io("open /proc/self/mountinfo", error))?;
    let node = Arc::downgrade(node);
    let body = move || {
        if let Err(error) = watch_table(&table, &node) {
            tracing::warn!("mounts of the daemon's devices may stay in its namespace: {error}");
        }
    };
    let started = std::thread::Builder::new().name("mounts".to_owned()).spawn(body);
    started.map(drop).map_err(|error| Error::io("start a thread", error))
}

fn watch_table(table: &File, node: &Weak<Node>) -> Result<()> {
    loop {
        // proc_pid_mounts(5): the file has POLLPRI when mounts have changed since it was polled last.
        match poll(&mut [PollFd::new(table, PollFlags::PRI)], None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::io("watch /proc/self/mountinfo", errno.into())),
        }
        let Some(node) = node.upgrade() else { return Ok(()) };
        let devices: Vec<PathBuf> = node.devices.all().iter().map(|entry| entry.info().device).collect();
        drop(node);
        if !devices.is_empty() {
            detach_mounts_of(&devices)?;
        }
    }
}
