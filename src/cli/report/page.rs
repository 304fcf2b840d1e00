//! The page: one file that needs nothing else, and does nothing that it was not written to do.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

use super::start::Explained;
use crate::cli::Outcome;
use crate::daemon::control::{Kind, Problem};

const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The page about a start.
///
/// Names are the image's, so nothing of them is markup: they are in a JSON text without `<`, and the script sets them as
/// text. The policy lets no other script run, and nothing be loaded.
///
/// # Errors
/// Numbers that JSON can't hold.
pub fn page(explained: &Explained) -> Outcome<String> {
    let failed = |error| Problem::new(Kind::Failed, format!("writing the report: {error}"));
    let data = serde_json::to_string(explained).map_err(failed)?.replace('<', "\\u003c");
    let hash = STANDARD.encode(Sha256::digest(SCRIPT));
    let policy = format!(
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{hash}'; base-uri 'none'; form-action 'none'"
    );
    // The data comes last: nothing in it is taken for a place to fill.
    let page = PAGE.replace("{{POLICY}}", &policy).replace("{{STYLE}}", STYLE).replace("{{SCRIPT}}", SCRIPT);
    Ok(page.replacen("{{DATA}}", &data, 1))
}
