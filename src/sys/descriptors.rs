//! Descriptors that a new program must not get.

use std::io;

/// Every descriptor of this process but standard input, output and error is closed in programs that it starts from now
/// on; here it stays open. Those that this process was started with are among them: a lock that a shell holds by one would
/// be held by a daemon as well.
///
/// # Errors
/// ENOSYS before Linux 5.11.
pub fn close_on_exec() -> io::Result<()> {
    // SAFETY: with CLOSE_RANGE_CLOEXEC nothing is closed here, and no memory is touched (close_range(2)).
    let done = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
