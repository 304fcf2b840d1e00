//! References as the daemon needs them.

use super::Outcome;
use super::options::absolute;
use crate::daemon::control::{Kind, Problem};
use crate::oci::Reference;

/// Parses a reference of an image that is read; relative paths in it become absolute, since the daemon is elsewhere.
///
/// # Errors
/// What is wrong with it, and how to write it.
pub fn image(text: &str) -> Outcome<Reference> {
    let reference: Reference =
        text.parse().map_err(|error: crate::Error| Problem::new(Kind::Usage, error.to_string()))?;
    match reference {
        Reference::Registry(_) => Ok(reference),
        Reference::Layout { dir, tag } => Ok(Reference::Layout { dir: absolute(&dir)?, tag }),
        other => Err(Problem::new(Kind::Usage, format!("{other} is not a firstread image"))
            .hint("images are read from a registry or from oci:DIR; make one of this with `firstread build`")),
    }
}
