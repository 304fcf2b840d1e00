//! Serving without any privilege: an ordinary user's own daemon, pool and upper; clients over NBD.
#![cfg(all(feature = "nbd", feature = "programs"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/program.rs"]
mod program;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Stdio};

use program::{Node, wait_until};

const NOBODY: u32 = 65534;

/// The program as a user without capabilities, who can't get any.
fn as_nobody(program: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--no-new-privs"]);
    command.arg(program).args(arguments).stdin(Stdio::null());
    command
}

#[test]
fn an_ordinary_user_exports_an_image_and_writes_to_it() {
    let node = Node::new();
    let dir = node.path();
    // What cargo built may be where others can't go.
    for program in [env!("CARGO_BIN_EXE_firstread"), env!("CARGO_BIN_EXE_firstread-build")] {
        let done = Command::new("cp").arg(program).arg(dir).status().unwrap();
        assert!(done.success());
    }
    fs::create_dir(dir.join("tree")).unwrap();
    fs::write(dir.join("tree/hello"), "hello\n".repeat(100_000)).unwrap();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    chown(dir, Some(NOBODY), Some(NOBODY)).unwrap();
    let (root, run, image) = (node.root(), node.run_dir(), format!("oci:{}:a", dir.join("image").display()));
    let firstread = dir.join("firstread");
    let user = |arguments: &[&str]| {
        let mut all = vec!["--root", root.to_str().unwrap(), "--run", run.to_str().unwrap()];
        all.extend(arguments);
        as_nobody(&firstread, &all)
    };
    let built = user(&["build", "--quiet", &format!("dir:{}", dir.join("tree").display()), &image]).output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));

    // No device, with the reason and the way out.
    let refused = user(&["attach", &image]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("`firstread export`"), "{said}");

    let (socket, upper) = (dir.join("disk.sock"), dir.join("upper"));
    let mut export =
        user(&["export", &image, "--nbd", &format!("unix:{}", socket.display()), "--upper", upper.to_str().unwrap()])
            .spawn()
            .unwrap();
    wait_until("the export listens", || socket.exists());
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let script = "h.pwrite(b'x' * 4096, 0); h.flush(); assert h.pread(4096, 0) == b'x' * 4096; print(h.get_size())";
    let client = as_nobody(Path::new("nbdsh"), &["-u", &uri, "-c", script]).output().unwrap();
    assert!(client.status.success(), "{}", String::from_utf8_lossy(&client.stderr));
    let listed = user(&["upper", "list", upper.to_str().unwrap(), "--json"]).output().unwrap();
    let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(listed[0]["dir"], upper.to_str().unwrap(), "{listed}");
    assert!(Command::new("kill").arg(export.id().to_string()).status().unwrap().success());
    assert!(export.wait().is_ok());
    assert!(user(&["stop"]).status().unwrap().success());
    // Nothing of it needed root.
    for entry in fs::read_dir(&root).unwrap() {
        let entry = entry.unwrap().path();
        assert_eq!(std::os::unix::fs::MetadataExt::uid(&fs::metadata(&entry).unwrap()), NOBODY, "{}", entry.display());
    }
}
