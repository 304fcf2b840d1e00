//! What the command line refuses, and how.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/program.rs"]
mod program;

use std::fs;
use std::process::Command;

use program::Node;
use serde_json::json;

#[test]
fn wrong_usage_is_exit_code_2_and_says_what_is_right() {
    let node = Node::new();
    for (arguments, expected) in [
        (&["frobnicate"][..], "frobnicate"),
        (&["attach"], "REF"),
        (&["attach", "localhost/a", "--transport", "pigeon"], "ublk, nbd, loop"),
        (&["attach", "debian:12"], "docker://"),
        (&["attach", "dir:/tree"], "firstread build"),
        (&["attach", "localhost/a", "--size", "1G"], "--rw or --upper"),
        (&["mount", "localhost/a"], "DIR"),
        (&["detach"], "ID|DEVICE|DIR"),
        (&["detach", "--all", "a-1"], "--all"),
        (&["export", "localhost/a", "--nbd", "pipe:x"], "unix:PATH or tcp:HOST:PORT"),
        (&["export", "localhost/a"], "--nbd"),
        (&["pool"], "stat"),
        (&["--log", "nonsense=x=y", "list"], "nonsense"),
        (&["daemon", "--pool-limit", "lots"], "lots"),
        (&["list", "--config", "/nowhere/config.toml"], "/nowhere/config.toml"),
    ] {
        let error = node.fails(2, arguments);
        assert!(error.contains(expected), "{arguments:?}: {error}");
    }
    assert!(node.pid().is_none(), "wrong usage starts no daemon");
}

#[test]
fn without_a_daemon_there_is_nothing_and_nothing_is_started() {
    let node = Node::new();
    assert_eq!(node.json(&["list"]), json!([]));
    assert_eq!(node.json(&["status"]), json!([]));
    assert_eq!(node.done(&["list"]), "");
    assert_eq!(node.json(&["stop"])["stopping"], false);
    assert_eq!(node.json(&["detach", "--all"]), json!([]));
    for target in ["status", "detach"] {
        let error = node.fails(1, &[target, "app-1"]);
        assert!(error.contains("app-1") && error.contains("no daemon"), "{error}");
    }
    assert!(!node.run_dir().exists() && !node.root().exists());
}

#[test]
fn help_and_version_go_to_standard_output() {
    let node = Node::new();
    let help = node.done(&["--help"]);
    for verb in [
        "build", "attach", "mount", "umount", "detach", "list", "status", "inspect", "verify", "export", "pool",
        "daemon", "stop", "optimize", "profile", "ready",
    ] {
        assert!(help.contains(&format!("\n  {verb} ")), "{verb} is not in {help}");
    }
    assert!(node.done(&["mount", "--help"]).contains("DIR"));
    assert!(node.done(&["--version"]).starts_with("firstread "));
}

#[test]
fn a_flag_wins_over_the_environment_and_that_over_the_file() {
    let node = Node::new();
    let file = node.path().join("config.toml");
    fs::write(&file, "[pool]\nlimit = '3M'\n[fetch]\non_outage = '5s'\n").unwrap();
    let limit = |environment: Option<&str>, flag: Option<&str>| {
        let mut arguments = vec!["daemon", "--config", file.to_str().unwrap()];
        arguments.extend(flag.map(|limit| ["--pool-limit", limit]).into_iter().flatten());
        let mut command = node.command(&arguments);
        if let Some(limit) = environment {
            command.env("FIRSTREAD_POOL_LIMIT", limit);
        }
        let mut daemon = command.stderr(std::process::Stdio::null()).spawn().unwrap();
        program::wait_until("the daemon answers", || node.run_dir().join("control.sock").exists());
        let limit = node.json(&["pool", "stat"])["limit"].clone();
        node.done(&["stop"]);
        assert!(daemon.wait().unwrap().success());
        limit
    };
    assert_eq!(limit(None, None), 3 << 20);
    assert_eq!(limit(Some("4M"), None), 4 << 20);
    assert_eq!(limit(Some("4M"), Some("5M")), 5 << 20);

    let mut command = node.command(&["list"]);
    let output = command.env("FIRSTREAD_POOL_LIMIT", "lots").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("FIRSTREAD_POOL_LIMIT"));
    fs::write(&file, "[pool]\nlimt = 3").unwrap();
    let error = node.fails(2, &["list", "--config", file.to_str().unwrap()]);
    assert!(error.contains("config.toml") && error.contains("limt"), "{error}");
}

#[test]
fn build_becomes_the_builder_beside_the_program() {
    let node = Node::new();
    let program = node.path().join("firstread");
    // Written by processes of their own: what another test forks meanwhile would hold this one's descriptors open for
    // writing, and a file that is open for writing can't be executed (ETXTBSY).
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_firstread")).arg(&program).status().unwrap();
    assert!(copied.success());
    let output = Command::new(&program).args(["build", "--json", "x"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("firstread-build"));
    let builder = node.path().join("firstread-build");
    let script = r#"printf '#!/bin/sh\necho "$@"\nexit 7\n' >"$0" && chmod 755 "$0""#;
    assert!(Command::new("sh").args(["-c", script]).arg(&builder).status().unwrap().success());
    let output = Command::new(&program).args(["build", "--json", "--help", "dir:x", "-q"]).output().unwrap();
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "build --json --help dir:x -q\n");
    let output = Command::new(&program).args(["--quiet", "build", "dir:x", "oci:y"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "build --quiet dir:x oci:y\n");
}
