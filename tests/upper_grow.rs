//! Writable devices that are larger than their image: the file system has the device's size. Needs root, FUSE and loop devices.
#![cfg(all(feature = "loop", feature = "nbd", feature = "programs"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/program.rs"]
mod program;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use program::{Node, same_files, wait_until};

const GIB: u64 = 1 << 30;

/// A node with an image of a small tree.
struct Bed {
    node: Node,
    tree: PathBuf,
    image: String,
}

impl Bed {
    fn new() -> Self {
        let node = Node::new();
        let tree = node.mount_point("tree");
        fs::write(tree.join("numbers"), (0..200_000u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>()).unwrap();
        (0..50).for_each(|number| fs::write(tree.join(format!("small-{number}")), format!("{number}")).unwrap());
        let image = format!("oci:{}:a", node.path().join("image").display());
        node.done(&["build", "--quiet", &format!("dir:{}", tree.display()), &image]);
        Self { node, tree, image }
    }

    fn upper(&self) -> String {
        self.node.path().join("upper").display().to_string()
    }

    fn options<'a>(upper: &'a str, size: &'a str) -> [&'a str; 6] {
        ["--transport", "loop", "--upper", upper, "--size", size]
    }

    /// Mounted with a size.
    fn mount(&self, size: &str) -> PathBuf {
        let dir = self.node.mount_point("mnt");
        let upper = self.upper();
        let options = Self::options(&upper, size);
        self.node.done(&[&["mount"], &options[..], &[&self.image, dir.to_str().unwrap()]].concat());
        dir
    }

    fn umount(&self, dir: &Path) {
        wait_until("nobody uses it any more", || self.node.run(&["umount", dir.to_str().unwrap()]).status.success());
    }

    /// The device is checked as it is.
    fn check(&self) {
        let upper = self.upper();
        let device = self.node.json(&["attach", "--transport", "loop", "--upper", &upper, &self.image]);
        let device = device["device"].as_str().unwrap();
        let checked = Command::new("e2fsck").args(["-fn", device]).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
        self.node.done(&["detach", device]);
    }
}

fn room(dir: &Path) -> u64 {
    let found = rustix::fs::statvfs(dir).unwrap();
    found.f_blocks * found.f_frsize
}

#[test]
fn the_file_system_has_the_size_of_the_device_and_grows_again() {
    let bed = Bed::new();
    let dir = bed.mount("3G");
    assert!(room(&dir) > 3 * GIB - GIB / 8, "{}", room(&dir));
    same_files(&bed.tree, &dir);
    let taken = fs::metadata(Path::new(&bed.upper()).join("data")).unwrap().blocks() * 512;
    assert!(taken < 200 << 10, "free space takes {taken} bytes");
    let big: Vec<u8> = (0..30_000_000u32).map(|at| (at % 251) as u8).collect();
    fs::write(dir.join("big"), &big).unwrap();
    bed.umount(&dir);
    bed.check();
    // Behind 16 GiB, where descriptors have no room in front.
    let dir = bed.mount("40G");
    assert!(room(&dir) > 40 * GIB - GIB / 2, "{}", room(&dir));
    assert!(fs::read(dir.join("big")).unwrap() == big);
    fs::write(dir.join("bigger"), &big).unwrap();
    bed.umount(&dir);
    bed.check();
    let dir = bed.mount("40G");
    assert!(fs::read(dir.join("bigger")).unwrap() == big);
    bed.umount(&dir);
}

#[test]
fn one_that_was_not_unmounted_keeps_its_size_and_it_is_said() {
    let bed = Bed::new();
    let dir = bed.mount("1G");
    fs::write(dir.join("new"), "new").unwrap();
    rustix::fs::syncfs(fs::File::open(&dir).unwrap()).unwrap();
    // A loop device goes with the daemon.
    bed.node.kill("-9");
    assert!(Command::new("umount").arg("-l").arg(&dir).status().unwrap().success());
    let upper = bed.upper();
    let attach = [&["attach"], &Bed::options(&upper, "2G")[..], &[&bed.image]].concat();
    let answer = bed.node.run(&attach);
    let said = String::from_utf8_lossy(&answer.stderr);
    assert!(answer.status.success() && said.contains("keeps its size") && said.contains("e2fsck"), "{said}");
    let device = String::from_utf8(answer.stdout).unwrap();
    let device = device.trim();
    assert_eq!(
        fs::read(format!("/sys/class/block/{}/size", &device[5..])).unwrap(),
        format!("{}\n", 2 * GIB / 512).as_bytes()
    );
    // Mended, and attached again, it is as large as its device.
    let mended = Command::new("e2fsck").args(["-fy", device]).output().unwrap();
    assert!(mended.status.code().is_some_and(|code| code < 4), "{}", String::from_utf8_lossy(&mended.stdout));
    bed.node.done(&["detach", device]);
    let dir = bed.mount("2G");
    assert!(room(&dir) > 2 * GIB - GIB / 16, "{}", room(&dir));
    bed.umount(&dir);
    bed.check();
}

#[test]
fn another_file_system_is_left_as_it_is() {
    let bed = Bed::new();
    let raw = bed.node.path().join("raw");
    fs::File::create(&raw).unwrap().set_len(64 << 20).unwrap();
    assert!(Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(&raw).arg("32M").status().unwrap().success());
    let image = format!("oci:{}:raw", bed.node.path().join("image").display());
    bed.node.done(&["build", "--quiet", &format!("raw:{}", raw.display()), &image]);
    let upper = bed.upper();
    let answer = bed.node.run(&[&["attach"], &Bed::options(&upper, "80M")[..], &[&image]].concat());
    let said = String::from_utf8_lossy(&answer.stderr);
    assert!(answer.status.success() && said.contains("not one that firstread made"), "{said}");
    let device = String::from_utf8(answer.stdout).unwrap();
    assert_eq!(fs::read(device.trim()).unwrap()[..64 << 20], fs::read(&raw).unwrap()[..]);
}
