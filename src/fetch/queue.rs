//! What waits to be requested from an origin.

/// The queue of an origin.
#[derive(Default)]
pub(super) struct Queue {}
