//! Layers import only downwards.
//!
//! Every `crate::…` and `firstread::…` path in a source file names a layer of a rank below the file's own (or the file's
//! own layer). The foundation is imported by all and imports itself only.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};

/// The layers from the top; layers on one line do not import each other.
const RANKS: [&[&str]; 14] = [
    &["main"],
    &["cli"],
    &["snapshot"],
    &["daemon"],
    &["attach"],
    &["build"],
    &["device"],
    &["pool"],
    &["fetch"],
    &["source"],
    &["profile"],
    &["map", "oci", "ext4"],
    &["index"],
    &["chunk", "error", "media", "sys"],
];

/// The one import against the ranks: what the fetcher verified it admits to the pool, which therefore knows nothing of it.
const TURNED: (&str, &str) = ("fetch", "pool");

/// Names at the crate's root that stand for a layer.
const REEXPORTS: [(&str, &str); 2] = [("Digest", "chunk"), ("Error", "error")];

fn rank(layer: &str) -> Option<usize> {
    RANKS.iter().position(|layers| layers.contains(&layer))
}

fn foundation(layer: &str) -> bool {
    RANKS[RANKS.len() - 1].contains(&layer)
}

fn allowed(from: &str, to: &str) -> bool {
    if (from, to) == TURNED || (to, from) == TURNED {
        return (from, to) == TURNED;
    }
    let (from_rank, to_rank) = (rank(from).unwrap(), rank(to).unwrap());
    from == to || to_rank > from_rank || (foundation(from) && foundation(to))
}

/// The source without comments and literals, line breaks kept.
fn code_of(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let raw = rest.strip_prefix('r').map(|tail| tail.bytes().take_while(|&byte| byte == b'#').count());
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |at| at + 2)
        } else if let Some(hashes) = raw.filter(|&hashes| rest[1 + hashes..].starts_with('"')) {
            let end = format!("\"{}", "#".repeat(hashes));
            rest[2 + hashes..].find(&end).map_or(rest.len(), |at| 2 + hashes + at + end.len())
        } else if first == '"' {
            string_end(rest)
        } else if rest.starts_with("'\"'") {
            3
        } else if rest.starts_with("'\\\"'") || rest.starts_with("'\\\\'") {
            4
        } else {
            // Whole words, so that an identifier that ends in r is not taken for the start of a raw string.
            let word =
                rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len()).max(first.len_utf8());
            code.push_str(&rest[..word]);
            rest = &rest[word..];
            continue;
        };
        code.extend(rest[..skipped].chars().filter(|&c| c == '\n'));
        rest = &rest[skipped..];
    }
    code
}

fn string_end(text: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The names that `code` takes from the crate's root, with their lines. `roots` are the paths that mean this crate.
fn imports(code: &str, roots: &[&str]) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for root in roots {
        let prefix = format!("{root}::");
        for (at, _) in code.match_indices(&prefix) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            let tail = &code[at + prefix.len()..];
            let names = if tail.starts_with('{') { group(tail) } else { vec![identifier(tail)] };
            let line = code[..at].matches('\n').count() + 1;
            found.extend(names.into_iter().map(|name| (line, name)));
        }
    }
    found
}

/// The first identifiers of a `{a::b, c, d::{…}}` group.
fn group(text: &str) -> Vec<String> {
    let (mut depth, mut names, mut start) = (0, Vec::new(), true);
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => {
                depth -= 1;
                if depth == 0 {
                    break;
                }
            }
            ',' if depth == 1 => start = true,
            c if start && depth == 1 && (c.is_alphabetic() || c == '_') => {
                names.push(identifier(&text[at..]));
                start = false;
            }
            _ => {}
        }
    }
    names
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// Upward imports of a file that belongs to `layer`.
fn violations(layer: &str, text: &str, roots: &[&str]) -> Vec<String> {
    let code = code_of(text);
    let mut found = Vec::new();
    for (line, name) in imports(&code, roots) {
        let to = REEXPORTS.iter().find(|(export, _)| *export == name).map_or(name.as_str(), |(_, layer)| layer);
        if to == "Result" {
            continue;
        }
        if rank(to).is_none() {
            found.push(format!("{line}: {name} is in no layer: add it to the ranks of tests/layers.rs"));
        } else if !allowed(layer, to) {
            found.push(format!("{line}: {layer} must not import {to}"));
        }
    }
    found
}

fn rust_files(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

#[test]
fn layers_import_only_downwards() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut checked = 0;
    for dir in ["src", "tools"] {
        let mut files = Vec::new();
        rust_files(&root.join(dir), &mut files);
        for file in files {
            let relative = file.strip_prefix(root.join(dir)).unwrap();
            let first = relative.components().next().unwrap().as_os_str().to_str().unwrap();
            let layer = match first.strip_suffix(".rs").unwrap_or(first) {
                // The crate root declares the layers and belongs to none.
                "lib" => continue,
                // The programs are above everything; so are tools that are no part of the library.
                _ if dir == "tools" && relative.ends_with("main.rs") => "main",
                tool if dir == "tools" && rank(tool).is_none() => "main",
                layer => layer,
            };
            assert!(rank(layer).is_some(), "{} is in no layer: add it to the ranks", file.display());
            let name = file.strip_prefix(root).unwrap().display();
            let text = fs::read_to_string(&file).unwrap();
            // A program's own modules are in no layer.
            let roots = if layer == "main" { &["firstread"][..] } else { &["crate", "firstread"] };
            let problems = violations(layer, &text, roots);
            found.extend(problems.iter().map(|problem| format!("{name}:{problem}")));
            checked += 1;
        }
    }
    assert!(checked > 10, "only {checked} files were found");
    assert!(found.is_empty(), "upward imports:\n{}", found.join("\n"));
}

#[test]
fn an_upward_import_is_found_in_every_form() {
    let roots = &["crate", "firstread"][..];
    for text in [
        "use crate::daemon::control;",
        "\nuse crate::{chunk, daemon::{control, state}};",
        "fn f() { crate::attach::serve() }",
        "use firstread::cli;",
        "use crate::chunk::Digest; // fine\nuse crate::cli;",
        "let r = \"a // b\"; crate::cli::run()",
        "use crate::nowhere::X;",
    ] {
        assert_eq!(violations("pool", text, roots).len(), 1, "{text}");
    }
    assert_eq!(violations("pool", "use crate::fetch::Fetcher;", roots).len(), 1);
    assert_eq!(violations("fetch", "use crate::pool::Pool;", roots).len(), 0);
    for text in [
        "use crate::source::Source;",
        "use crate::{Digest, Error, Result};",
        "// see crate::daemon",
        "/* crate::daemon */ fn f() {}",
        "let text = \"crate::daemon\"; let c = '\"'; let t = r#\"crate::cli\"#;",
        "pub(crate) fn f() {}",
        "use crate::pool::slab;",
    ] {
        assert_eq!(violations("pool", text, roots), Vec::<String>::new(), "{text}");
    }
    assert_eq!(violations("daemon", "\n\nuse crate::cli::x;", roots), ["3: daemon must not import cli"]);
}
