//! What went wrong, as a client is told.

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Kinds of problems that a client treats differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The command line or the settings make no sense.
    Usage,
    /// The request makes no sense to this daemon.
    Request,
    /// The thing is in use.
    Busy,
    /// There is no such thing.
    NotFound,
    /// This version or machine can't.
    Unsupported,
    /// The source can't be reached, or refuses.
    Source,
    /// Everything else, and what later versions add.
    #[serde(other)]
    Failed,
}

/// An error that crosses the socket, or ends a verb.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What failed, and where.
    pub message: String,
    /// Which kind of failure it is.
    pub kind: Kind,
    /// What to do about it.
    #[serde(default)]
    pub hint: Option<String>,
}

impl Problem {
    /// A problem without a hint.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { message: message.into(), kind, hint: None }
    }

    /// The same problem with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Problem {}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let (kind, hint) = match &error {
            Error::Busy(_) => (Kind::Busy, None),
            Error::NotFound { .. } => (Kind::NotFound, Some("check the reference")),
            Error::Unsupported(_) => (Kind::Unsupported, None),
            Error::Unreachable { .. } => (Kind::Source, Some("check the network, and the name of the host")),
            Error::Refused { .. } => (Kind::Source, Some("check the reference, and the credentials (`docker login`)")),
            Error::WrongBytes { .. } => (Kind::Source, Some("`firstread verify REF` lists what is damaged")),
            Error::Io { .. } | Error::Invalid { .. } | Error::Stopping(_) => (Kind::Failed, None),
        };
        Self { message: error.to_string(), kind, hint: hint.map(str::to_owned) }
    }
}
