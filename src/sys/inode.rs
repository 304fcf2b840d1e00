//! Opening a file of a mounted file system by the number of its inode: open_by_handle_at(2).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use libc::{O_CLOEXEC, O_NOATIME, O_NOCTTY, O_NONBLOCK, O_RDONLY};

/// `FILEID_INO32_GEN` of include/linux/exportfs.h: inode and generation, 32 bits each.
const INODE_AND_GENERATION: i32 = 1;

/// `struct file_handle` of include/linux/fs.h with such a handle.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    inode: u32,
    /// ext4 takes 0 for any (`ext4_nfs_get_inode` in fs/ext4/super.c).
    generation: u32,
}

/// Opens a regular file of the ext4 that `root`, a directory, is in. For reading.
///
/// Of anything else but a regular file nothing is opened that would have an effect, as long as the mount is without
/// devices: nobody waits for a pipe's other end.
///
/// # Errors
/// EPERM without CAP_DAC_READ_SEARCH, ESTALE without such an inode, EINVAL for one that is no regular file.
pub fn open_file(root: &File, inode: u32) -> io::Result<File> {
    let mut handle = Handle { bytes: 8, kind: INODE_AND_GENERATION, inode, generation: 0 };
    let flags = O_RDONLY | O_CLOEXEC | O_NOATIME | O_NOCTTY | O_NONBLOCK;
    // SAFETY: the handle has the head of the structure and as many bytes behind it as the head says; the kernel does not
    // keep it.
    let opened = unsafe { libc::open_by_handle_at(root.as_raw_fd(), (&raw mut handle).cast(), flags) };
    if opened < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened, and nobody else knows it.
    let file = unsafe { File::from_raw_fd(opened) };
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(file)
}
