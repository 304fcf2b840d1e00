//! Why a call is refused: containerd acts on the kind, people read the message.

use tonic::{Code, Status};

use crate::daemon::control::Problem;
use crate::error::Error;

/// Most bytes of a message: it goes into a header, and what exceeds a header takes the kind along. A name in it may be long.
const MESSAGE_MAX: usize = 2048;

/// A call's failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// There is no such thing.
    NotFound(String),
    /// There is one already.
    Exists(String),
    /// Not in this state: it has children, it is not active, ….
    Precondition(String),
    /// The request makes no sense.
    Argument(String),
    /// Something else that is needed does not answer now.
    Unavailable(String),
    /// Everything else.
    Failed(String),
}

impl Failure {
    /// The kind and the message.
    fn parts(self) -> (Code, String) {
        match self {
            Self::NotFound(message) => (Code::NotFound, message),
            Self::Exists(message) => (Code::AlreadyExists, message),
            Self::Precondition(message) => (Code::FailedPrecondition, message),
            Self::Argument(message) => (Code::InvalidArgument, message),
            Self::Unavailable(message) => (Code::Unavailable, message),
            Self::Failed(message) => (Code::Unknown, message),
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.clone().parts().1)
    }
}

impl std::error::Error for Failure {}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let (code, mut message) = failure.parts();
        if message.len() > MESSAGE_MAX {
            let end = (0..=MESSAGE_MAX).rev().find(|&at| message.is_char_boundary(at)).unwrap_or(0);
            message.truncate(end);
            message.push('…');
        }
        Self::new(code, message)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Unreachable { .. } => Self::Unavailable(error.to_string()),
            error => Self::Failed(error.to_string()),
        }
    }
}

impl From<Problem> for Failure {
    /// Never "not found" or "already exists", on which containerd would act as if its snapshot were meant.
    fn from(problem: Problem) -> Self {
        let hint = problem.hint.map(|hint| format!(" ({hint})")).unwrap_or_default();
        Self::Failed(format!("{}{hint}", problem.message))
    }
}
