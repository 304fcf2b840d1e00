//! Freezing a mounted file system: `FIFREEZE` and `FITHAW` of `include/uapi/linux/fs.h`.

use std::fs::File;
use std::io;

use rustix::ioctl::{NoArg, Opcode, ioctl};

const FIFREEZE: Opcode = 0xC004_5877;
const FITHAW: Opcode = 0xC004_5878;

/// Writes everything of the file system that `file` is in to its device, and holds up whoever changes it until
/// [`thaw`]. It stays frozen when this process ends.
///
/// # Errors
/// EBUSY when it is frozen already, EOPNOTSUPP when it can't be, EPERM, or what its device says.
pub fn freeze(file: &File) -> io::Result<()> {
    // SAFETY: the kernel ignores FIFREEZE's argument (`ioctl_fsfreeze` in fs/ioctl.c).
    Ok(unsafe { ioctl(file, NoArg::<FIFREEZE>::new()) }?)
}

/// Lets a frozen file system go on.
///
/// # Errors
/// EINVAL when it is not frozen, or what its device says.
pub fn thaw(file: &File) -> io::Result<()> {
    // SAFETY: the kernel ignores FITHAW's argument (`ioctl_fsthaw` in fs/ioctl.c).
    Ok(unsafe { ioctl(file, NoArg::<FITHAW>::new()) }?)
}
