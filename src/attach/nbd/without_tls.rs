//! In place of `tls` in a build without it.

/// There is none.
#[derive(Clone, Copy, Debug)]
pub enum Tls {}
