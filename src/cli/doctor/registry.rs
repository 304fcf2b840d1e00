//! Can an image's registry be reached?

use super::Check;
use crate::cli::{Outcome, reference};
use crate::daemon::control::SourceAccess;
use crate::daemon::images::source_access;
use crate::error::Error;
use crate::oci::{Document, Layers};
use crate::source::Repository;

/// Asks for the image's manifest, as an attach would.
///
/// # Errors
/// A reference that is none.
pub async fn check(text: &str, access: &SourceAccess) -> Outcome<Check> {
    let reference = reference::image(text)?;
    let name = "image";
    let asked = async {
        let mut last = Error::unreachable(text, "it has no source");
        for place in Repository::open_all(&reference, &source_access(access)).await? {
            match place.manifest().await {
                Ok(raw) => return Ok(raw),
                Err(error) => last = error,
            }
        }
        Err(last)
    };
    Ok(match asked.await.and_then(|raw| Document::parse(&raw.bytes, &raw.media_type)) {
        Ok(Document::Manifest(manifest)) if Layers::of(&manifest).is_err() => {
            let mend = format!("firstread build {text} {text}-firstread");
            Check::missing(name, format!("{text} is there, and not packed by firstread"), mend)
        }
        Ok(_) => Check::good(name, format!("{text} is there")),
        Err(error @ Error::Refused { .. }) => {
            Check::bad(name, error.to_string(), format!("docker login {}", text.split('/').next().unwrap_or_default()))
        }
        Err(error) => {
            let host = text.split('/').next().unwrap_or_default();
            Check::bad(name, error.to_string(), format!("curl -v https://{host}/v2/"))
        }
    })
}
