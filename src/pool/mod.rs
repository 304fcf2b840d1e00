//! The pool: verified chunks kept locally, shared by all images of a node.

/// Placeholder.
pub struct Pool;
