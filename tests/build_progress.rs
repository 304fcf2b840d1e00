//! What a build shows: a bar on a terminal, lines elsewhere, nothing with `--quiet`, and a summary at the end.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/terminal.rs"]
mod terminal;

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;
use terminal::{contains, on_a_terminal};

/// An image of two layers, so that there is something to count.
const IMAGE: &str = r#"
    umoci init --layout source; umoci new --image source:t
    for layer in one two; do
        mkdir $layer; head -c 3000000 /dev/urandom > $layer/$layer; tar -C $layer -cf $layer.tar $layer
        umoci raw add-layer --image source:t $layer.tar
    done
"#;

fn image() -> TempDir {
    let temp = TempDir::new().unwrap();
    let made = Command::new("bash").args(["-euc", IMAGE]).current_dir(temp.path()).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    temp
}

/// Builds the image into the layout `to`.
fn command(dir: &Path, to: &str, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_firstread-build"));
    command.args(["build", "oci:source:t", &format!("oci:{to}:t"), "--cache", "cache"]).args(more).current_dir(dir);
    command
}

fn build(dir: &Path, to: &str, more: &[&str]) -> Output {
    let output = command(dir, to, more).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

#[test]
fn a_bar_and_a_table_on_a_terminal() {
    let temp = image();
    let shown = on_a_terminal(&command(temp.path(), "to", &[]));
    // The bar is drawn over itself.
    contains(
        &shown,
        &["\r", "reading", "layer 1 of 2 (sha256:", "layer 2 of 2 (sha256:", "packing", "chunks, 0 reused"],
    );
    contains(&shown, &["publishing [", "image", "oci:to:t", "3 inodes", "layers", "2, ", "stored", "0 B reused"]);
    let again = on_a_terminal(&command(temp.path(), "again", &["--reuse", "oci:to:t"]));
    contains(&again, &["layer 2 of 2 (sha256:", "from the cache", "2, 2 from the cache, 0 B read", "0 B new"]);
}

#[test]
fn lines_and_a_table_elsewhere() {
    let temp = image();
    let output = build(temp.path(), "to", &[]);
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(!out.contains('\r') && !err.contains('\r') && !err.contains('\x1b'), "{err}");
    assert_eq!(err.lines().filter(|line| line.starts_with("reading sha256:")).count(), 2, "{err}");
    contains(&err, &["2 layers, ", "packing ", "(0 reused)", "publishing sha256:"]);
    for row in ["image", "digest", "platforms", "device", "layers", "chunks", "stored", "index", "time"] {
        assert_eq!(out.lines().filter(|line| line.trim_start().starts_with(row)).count(), 1, "{row} in {out}");
    }
}

#[test]
fn one_document_or_one_digest_and_nothing_else() {
    let temp = image();
    let quiet = build(temp.path(), "to", &["--quiet"]);
    let json = build(temp.path(), "too", &["--quiet", "--json"]);
    assert!(quiet.stderr.is_empty() && json.stderr.is_empty(), "{quiet:?} {json:?}");
    let report: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(String::from_utf8(quiet.stdout).unwrap().trim_end(), report["digest"].as_str().unwrap());
    let shown = on_a_terminal(&command(temp.path(), "three", &["--quiet"]));
    assert_eq!(shown.trim_end(), report["digest"].as_str().unwrap());
}
