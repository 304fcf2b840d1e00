//! The snapshotter's options as settings of the file: flags win, and what is wrong is named.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/program.rs"]
mod program;

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use program::{Node, wait_until};

struct Running(Child);

impl Running {
    fn start(node: &Node, arguments: &[&str]) -> Self {
        let log = fs::File::create(node.path().join("log")).unwrap();
        Self(node.command(arguments).stdout(Stdio::null()).stderr(log).spawn().unwrap())
    }

    /// Waits until it listens, and ends it.
    fn listened_at(mut self, socket: &Path) {
        wait_until("the snapshotter listens", || UnixStream::connect(socket).is_ok());
        assert!(Command::new("kill").args(["-TERM", &self.0.id().to_string()]).status().unwrap().success());
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn settings_of_the_file_are_the_snapshotter_s_and_flags_win() {
    let node = Node::new();
    let (at, file) = (node.path().display().to_string(), node.path().join("config.toml"));
    let text = format!(
        "[snapshotter]\nlisten = '{at}/file.sock'\ncontainerd = '{at}/none.sock'\nmounts = 'block'\nsize = '20G'\nname = 'kata'\n\
         transport = 'loop'\n"
    );
    fs::write(&file, &text).unwrap();
    let config = file.to_str().unwrap();
    let state = |name: &str| node.root().join("snapshotter").join(name).exists();
    Running::start(&node, &["snapshotter", "--config", config]).listened_at(&node.path().join("file.sock"));
    assert!(state("kata") && !state("default"));

    let flag = node.path().join("flag.sock");
    let arguments = ["snapshotter", "--config", config, "--listen", flag.to_str().unwrap(), "--name", "other"];
    Running::start(&node, &arguments).listened_at(&flag);
    assert!(state("other") && !node.path().join("file.sock").exists());

    // Who speaks to containerd and the snapshotter has the settings as well.
    let checks = node.run(&["doctor", "--config", config]);
    let said = String::from_utf8_lossy(&checks.stdout).into_owned();
    assert!(said.contains(&format!("{at}/none.sock")) && said.contains(&format!("{at}/file.sock")), "{said}");
    let said = node.fails(1, &["pull", "--config", config, "127.0.0.1:1/x"]);
    assert!(said.contains("containerd"), "{said}");

    for (line, word) in [("mounts = 'both'", "neither overlay nor block"), ("mount = 'block'", "unknown field")] {
        fs::write(&file, format!("[snapshotter]\n{line}\n")).unwrap();
        let said = node.fails(2, &["snapshotter", "--config", config]);
        assert!(said.contains("config.toml") && said.contains(line) && said.contains(word), "{said}");
    }
    for flag in [["--mounts", "both"], ["--name", "../x"], ["--transport", "smoke"]] {
        let said = node.fails(2, &[&["snapshotter"], &flag[..]].concat());
        assert!(said.contains(flag[0]) && said.contains(flag[1]), "{said}");
    }
}
