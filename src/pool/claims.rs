//! Claims: of all threads that want to check one chunk, one does it and the others wait for it.

use std::collections::HashSet;

use parking_lot::{Condvar, Mutex};

use crate::chunk::Digest;

/// The chunks that are being checked.
#[derive(Default)]
pub(super) struct Claims {
    taken: Mutex<HashSet<Digest>>,
    released: Condvar,
}

/// The right to check a chunk; dropping it wakes those who wait.
pub(super) struct Claim<'a> {
    claims: &'a Claims,
    digest: Digest,
}

impl Claims {
    /// Takes the claim, or waits until whoever has it is done and returns `None`.
    pub fn take(&self, digest: &Digest) -> Option<Claim<'_>> {
        let mut taken = self.taken.lock();
        if taken.insert(*digest) {
            return Some(Claim { claims: self, digest: *digest });
        }
        while taken.contains(digest) {
            self.released.wait(&mut taken);
        }
        None
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.claims.taken.lock().remove(&self.digest);
        self.claims.released.notify_all();
    }
}
