//! Disk images are taken as they are: the device is the disk, whatever is on it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/built.rs"]
mod built;
#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;
#[path = "common/program.rs"]
mod program;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use built::{Layout, request, run, shell, tool, try_build};
use nodes::{Compare, assert_same};
use program::Node;
use tempfile::TempDir;

/// A disk of two partitions: the first with an ext4 that holds `tree`, the second with bytes that are no file system.
const DISK: &str = r#"
    mkdir -p tree/dir; head -c 3000000 /dev/urandom > tree/dir/large; echo small > tree/small; ln -s small tree/link
    find tree -exec touch -h -d @1600000000 {} +
    truncate -s 40M part; mke2fs -q -t ext4 -b 4096 -d tree part
    truncate -s 64M disk
    printf 'label: gpt\nstart=1MiB,size=40MiB\nstart=42MiB,size=1MiB\n' | sfdisk -q disk
    dd if=part of=disk bs=1M seek=1 conv=notrunc,sparse status=none
    head -c 70000 /dev/urandom | dd of=disk bs=1M seek=42 conv=notrunc iflag=fullblock status=none
"#;

/// A loop device over a part of another device; released when dropped.
struct Partition(String);

impl Partition {
    fn of(device: &str, offset: u64) -> Self {
        let args = ["--read-only", "--find", "--show", "--offset", &offset.to_string(), device];
        Self(String::from_utf8(tool("losetup", args)).unwrap().trim().to_owned())
    }
}

impl Drop for Partition {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

fn build(temp: &Path, disk: &str) -> (Layout, firstread::build::Report) {
    let layout = Layout(temp.join("layout"));
    let source = format!("raw:{}", temp.join(disk).display());
    let report = try_build(&source, &format!("oci:{}:t", layout.0.display())).unwrap();
    (layout, report)
}

#[test]
fn a_partition_of_an_attached_disk_mounts() {
    // Dropped after the node, which has the image open.
    let temp = TempDir::new().unwrap();
    let node = Node::new();
    shell(temp.path(), DISK);
    let (layout, _) = build(temp.path(), "disk");
    let reference = format!("oci:{}:t", layout.0.display());
    let inspected = node.json(&["inspect", &reference]);
    assert_eq!(inspected["file_system"], "raw");
    assert_eq!(inspected["device_bytes"], 64 << 20);
    assert_eq!(node.json(&["verify", "--deep", &reference])["sound"], true);
    let attached = node.json(&["attach", &reference]);
    let device = attached["device"].as_str().unwrap();
    shell(
        temp.path(),
        &format!(
            "cmp disk {device}; sfdisk -d disk | grep -o 'start=.*' > a; sfdisk -d {device} | grep -o 'start=.*' > b; cmp a b"
        ),
    );
    {
        let partition = Partition::of(device, 1 << 20);
        let mount = node.mount_point("partition");
        tool("mount", ["-t", "ext4", "-o", "ro,noload", &partition.0, mount.to_str().unwrap()]);
        let mut found = nodes::read(&mount);
        tool("umount", [&mount]);
        found.retain(|path, _| !path.starts_with(b"lost+found"));
        assert_same(&nodes::read(&temp.path().join("tree")), &found, Compare::AcrossFileSystems);
    }
    let error = node.fails(1, &["mount", &reference, node.mount_point("whole").to_str().unwrap()]);
    assert!(error.contains("raw"), "{error}");
    node.done(&["detach", attached["id"].as_str().unwrap()]);
}

/// The same disk for a client of the network: its partition table and the file system on it.
#[test]
fn a_partition_of_an_exported_disk_is_read() {
    let temp = TempDir::new().unwrap();
    let node = Node::new();
    shell(temp.path(), DISK);
    let (layout, _) = build(temp.path(), "disk");
    let socket = temp.path().join("nbd.sock");
    let (reference, listen) = (format!("oci:{}:t", layout.0.display()), format!("unix:{}", socket.display()));
    let mut server = node.command(&["export", &reference, "--nbd", &listen]).stdout(Stdio::null()).spawn().unwrap();
    for _ in 0..400 {
        if socket.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let copied = std::panic::catch_unwind(|| {
        shell(
            temp.path(),
            &format!("nbdcopy '{uri}' copy; cmp disk copy; nbdinfo --size '{uri}' | grep -qx {}", 64 << 20),
        );
        // A filter that finds the partition by itself serves it to a second client.
        shell(
            temp.path(),
            &format!(
                "nbdkit -r -U - --filter=partition nbd uri='{uri}' partition=1 --run 'nbdcopy \"$uri\" part-copy'; cmp part part-copy"
            ),
        );
    });
    server.kill().unwrap();
    server.wait().unwrap();
    copied.unwrap();
    let part = Partition::of(temp.path().join("copy").to_str().unwrap(), 1 << 20);
    let mount = node.mount_point("copied");
    tool("mount", ["-t", "ext4", "-o", "ro,noload", &part.0, mount.to_str().unwrap()]);
    let mut found = nodes::read(&mount);
    tool("umount", [&mount]);
    found.retain(|path, _| !path.starts_with(b"lost+found"));
    assert_same(&nodes::read(&temp.path().join("tree")), &found, Compare::AcrossFileSystems);
}

/// Neither holes nor zeros are stored, and chunks are cut at multiples of their size wherever the data begins.
#[test]
fn chunks_are_fixed_and_zeros_are_not_stored() {
    let temp = TempDir::new().unwrap();
    shell(
        temp.path(),
        "head -c 256K /dev/urandom > chunk; truncate -s 10M disk
        dd if=chunk of=disk bs=256K seek=3 conv=notrunc status=none; dd if=chunk of=disk bs=256K seek=9 conv=notrunc status=none
        dd if=/dev/zero of=disk bs=256K seek=20 count=4 conv=notrunc status=none
        printf x | dd of=disk bs=1 seek=5000001 conv=notrunc status=none",
    );
    let (layout, report) = build(temp.path(), "disk");
    assert_eq!(report.chunks, 2, "one stored once for two places, and one with a single byte");
    assert_eq!(report.plain_bytes, 2 * (256 << 10));
    let device = temp.path().join("device");
    layout.device(&report.digest.to_string(), &device);
    tool("cmp", [&temp.path().join("disk"), &device]);
}

#[test]
fn any_length_is_padded_to_blocks_and_may_grow() {
    let temp = TempDir::new().unwrap();
    shell(
        temp.path(),
        "head -c 300001 /dev/urandom > disk; cp disk padded; truncate -s 303104 padded; cp disk grown; truncate -s 1M grown",
    );
    let (layout, report) = build(temp.path(), "disk");
    assert_eq!(report.device_bytes, 303_104);
    let device = temp.path().join("device");
    layout.device(&report.digest.to_string(), &device);
    tool("cmp", [&temp.path().join("padded"), &device]);
    let disk = format!("raw:{}", temp.path().join("disk").display());
    let mut grown = request(&disk, &format!("oci:{}:t", layout.0.display()));
    grown.size = Some(1 << 20);
    layout.device(&run(&grown).unwrap().digest.to_string(), &device);
    tool("cmp", [&temp.path().join("grown"), &device]);
    grown.size = Some(4096);
    assert!(run(&grown).unwrap_err().to_string().contains("300001"));
}

#[test]
fn what_is_no_disk_is_refused() {
    let temp = TempDir::new().unwrap();
    shell(temp.path(), "mkdir dir; touch empty; mkfifo fifo; truncate -s 1T large");
    let destination = format!("oci:{}:t", temp.path().join("layout").display());
    for (name, reason) in [("dir", "neither"), ("empty", "empty"), ("missing", "missing")] {
        let error = try_build(&format!("raw:{}", temp.path().join(name).display()), &destination).unwrap_err();
        assert!(error.to_string().contains(reason), "{name}: {error}");
    }
    let mut large = request(&format!("raw:{}", temp.path().join("large").display()), &destination);
    large.limits.file_bytes = 1 << 39;
    assert!(run(&large).unwrap_err().to_string().contains("limit"));
}
