//! A guest's memory as a buffer to read a device into.

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Calls `fill` with the bytes of `slice`, which it may only write: the guest sees them, and may change them at any time,
/// so that what is read back from them says nothing.
///
/// This saves one copy of everything that a guest reads.
pub fn write_to<B: BitmapSlice, R>(slice: &VolatileSlice<'_, B>, fill: impl FnOnce(&mut [u8]) -> R) -> R {
    let guard = slice.ptr_guard_mut();
    // SAFETY: the pointer is valid for `len` bytes as long as `guard` lives, within one mapping that `slice` keeps, and
    // bytes of a mapping are always initialised. No Rust reference to this memory exists elsewhere: all others go
    // through volatile accesses. Guests do write to it meanwhile, but what they write can only become their own data:
    // `fill` is used with Device::read_local, which copies to the buffer and takes no decision by what is in it.
    let bytes = unsafe { std::slice::from_raw_parts_mut(guard.as_ptr(), guard.len()) };
    fill(bytes)
}
