//! The one error type: what failed, where, and which errno a reader of the device sees.

use std::io;
use std::sync::Arc;

use crate::chunk::{Digest, Mismatch};

/// What went wrong. Cheap to clone: one failed fetch is reported to all of its waiters.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The operating system refused an operation on a local file, socket or device.
    #[error("{action}: {source}")]
    Io {
        /// What was tried, with the path.
        action: String,
        /// What the system said.
        source: Arc<io::Error>,
    },

    /// Bytes from a source that are not what the index promised. They were dropped.
    #[error("chunk {chunk} from {source_name} is corrupt: {reason}; the bytes were discarded")]
    WrongBytes {
        /// The chunk that was asked for.
        chunk: Digest,
        /// Which source sent the bytes.
        source_name: String,
        /// What is wrong with them, with the digest found where there is one.
        reason: String,
    },

    /// A source that can't be reached, or keeps failing, or is too slow: worth another try.
    #[error("{source_name} is unreachable: {reason}")]
    Unreachable {
        /// The source.
        source_name: String,
        /// The last failure.
        reason: String,
    },

    /// A source that answers, but does not give what was asked for: trying again alone won't help.
    #[error("{source_name} refused {what}: {reason}")]
    Refused {
        /// The source.
        source_name: String,
        /// What was asked for.
        what: String,
        /// What it answered.
        reason: String,
    },

    /// A source that does not have what was asked for.
    #[error("{what} was not found in {source_name}")]
    NotFound {
        /// The source.
        source_name: String,
        /// What was asked for.
        what: String,
    },

    /// Something from outside is malformed or out of bounds: an index, a manifest, a tar, a request.
    #[error("invalid {what}: {reason}")]
    Invalid {
        /// The kind of thing.
        what: String,
        /// What is wrong with it, and where.
        reason: String,
    },

    /// A valid thing that this version or this machine can't do.
    #[error("unsupported: {0}")]
    Unsupported(String),

    /// Something is in use by somebody; the text says by whom.
    #[error("{0}")]
    Busy(String),

    /// The daemon or the device is shutting down.
    #[error("{0} is shutting down")]
    Stopping(String),
}

impl Error {
    /// An [`Error::Io`]: `action` says what was tried on which path.
    pub fn io(action: impl Into<String>, source: io::Error) -> Self {
        Self::Io { action: action.into(), source: Arc::new(source) }
    }

    /// An [`Error::Invalid`].
    pub fn invalid(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { what: what.into(), reason: reason.into() }
    }

    /// An [`Error::Unreachable`].
    pub fn unreachable(source_name: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unreachable { source_name: source_name.into(), reason: reason.into() }
    }

    /// An [`Error::WrongBytes`] for a digest that does not match.
    pub fn mismatch(mismatch: &Mismatch, source_name: impl Into<String>) -> Self {
        Self::WrongBytes {
            chunk: mismatch.expected,
            source_name: source_name.into(),
            reason: format!("its bytes hash to {}", mismatch.found),
        }
    }

    /// The errno that the reader of a device gets: every failing path completes its request with one.
    #[must_use]
    pub fn errno(&self) -> i32 {
        use rustix::io::Errno;
        let errno = match self {
            Self::Io { source, .. } => return source.raw_os_error().unwrap_or(Errno::IO.raw_os_error()),
            Self::Invalid { .. } => Errno::INVAL,
            Self::Unsupported(_) => Errno::OPNOTSUPP,
            Self::Busy(_) => Errno::BUSY,
            Self::Stopping(_) => Errno::SHUTDOWN,
            Self::WrongBytes { .. } | Self::Unreachable { .. } | Self::Refused { .. } | Self::NotFound { .. } => {
                Errno::IO
            }
        };
        errno.raw_os_error()
    }
}

/// The library's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
