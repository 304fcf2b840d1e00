//! A private containerd that unpacks images with its overlayfs snapshotter: the reference for how layers are applied.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::nodes::{self, Nodes};

/// A running containerd; gone with all its state when dropped.
pub struct Containerd {
    dir: TempDir,
    child: Child,
}

impl Containerd {
    pub fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let at = dir.path().display().to_string();
        let without_cri = "\"io.containerd.grpc.v1.cri\", ";
        let config = include_str!("containerd.toml").replace("@AT@", &at).replace("@MORE@", without_cri);
        std::fs::write(dir.path().join("config.toml"), config).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = Command::new("containerd")
            .arg("-c")
            .arg(dir.path().join("config.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("containerd");
        let containerd = Self { dir, child };
        let deadline = Instant::now() + Duration::from_secs(30);
        while containerd.ctr(&["version"]).is_err() {
            let log = || std::fs::read_to_string(containerd.dir.path().join("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "containerd does not answer: {}", log());
            std::thread::sleep(Duration::from_millis(50));
        }
        containerd
    }

    fn ctr(&self, arguments: &[&str]) -> Result<(), String> {
        let output = Command::new("ctr").arg("-a").arg(self.dir.path().join("sock")).args(arguments).output().unwrap();
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }

    fn mount_point(&self) -> PathBuf {
        self.dir.path().join("unpacked")
    }

    /// The tree of the image that `tag` names in a layout, or what containerd says against it.
    pub fn unpack(&self, layout: &Path, tag: &str) -> Result<Nodes, String> {
        let tar = self.dir.path().join("image.tar");
        let packed = Command::new("tar").arg("-C").arg(layout).arg("-cf").arg(&tar).arg(".").status().unwrap();
        assert!(packed.success());
        self.ctr(&["image", "import", "--base-name", "test.example/image", tar.to_str().unwrap()])?;
        std::fs::create_dir_all(self.mount_point()).unwrap();
        let image = format!("test.example/image:{tag}");
        self.ctr(&["image", "mount", &image, self.mount_point().to_str().unwrap()])?;
        Ok(nodes::read(&self.mount_point()))
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.mount_point()).stderr(Stdio::null()).status();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
