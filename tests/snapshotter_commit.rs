//! What containers wrote becomes images: by containerd's own means from overlays, by `firstread commit` from block devices.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/cluster.rs"]
mod cluster;
#[path = "common/cri.rs"]
mod cri;
#[path = "common/program.rs"]
mod program;
#[path = "common/registry.rs"]
mod registry;
#[path = "common/snapshotter.rs"]
mod snapshotter;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use cluster::Cluster;
use cri::Kubelet;
use firstread::Digest;
use program::wait_until;
use serde_json::{Value, json};

/// Runs a program that must succeed, with what it reads; what it prints.
fn piped(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, input) = (child.stdin.take().unwrap(), input.to_vec());
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    writer.join().unwrap().unwrap();
    output.stdout
}

/// Pushes `NAME:committed`: the image `NAME:1` with a gzip layer on top, as `nerdctl commit` makes it of a diff.
fn push_with_layer(cluster: &Cluster, name: &str, layer: &[u8]) {
    let layout = cluster.node.mount_point("committed");
    let (from, to) = (cluster.image(&format!("{name}:1")), cluster.image(&format!("{name}:committed")));
    let at = format!("oci:{}:1", layout.display());
    let copy = ["copy", "--quiet", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false"];
    piped("skopeo", &[&copy[..], &[&format!("docker://{from}"), &at]].concat(), b"");
    let read = |digest: &Value| -> Value {
        let file = layout.join("blobs/sha256").join(digest.as_str().unwrap().trim_start_matches("sha256:"));
        serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
    };
    let write = |bytes: &[u8]| -> (String, usize) {
        let digest = Digest::of(bytes);
        fs::write(layout.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        (digest.to_string(), bytes.len())
    };
    let mut index: Value = serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    let mut manifest = read(&index["manifests"][0]["digest"]);
    let mut config = read(&manifest["config"]["digest"]);
    let (digest, size) = write(layer);
    let plain = Digest::of(&piped("gzip", &["-dc"], layer)).to_string();
    config["rootfs"]["diff_ids"].as_array_mut().unwrap().push(plain.into());
    if let Some(history) = config["history"].as_array_mut() {
        history.push(json!({"created_by": "commit"}));
    }
    let described = json!({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest, "size": size});
    manifest["layers"].as_array_mut().unwrap().push(described);
    let (digest, size) = write(config.to_string().as_bytes());
    manifest["config"]["digest"] = digest.into();
    manifest["config"]["size"] = size.into();
    let (digest, size) = write(manifest.to_string().as_bytes());
    index["manifests"][0]["digest"] = digest.into();
    index["manifests"][0]["size"] = size.into();
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    piped("skopeo", &[&copy[..], &[&at, &format!("docker://{to}")]].concat(), b"");
}

/// Panics if the registry sent a pack of the image since `from`.
fn no_pack(cluster: &Cluster, name: &str, from: usize) {
    let manifest = cluster.manifest(name);
    let layers = manifest["layers"].as_array().unwrap();
    let role =
        |layer: &Value| layer["annotations"]["containerd.io/snapshot/firstread/role"].as_str().map(str::to_owned);
    let packs = layers.iter().filter(|layer| role(layer).is_some_and(|role| role != "index"));
    let packs: BTreeSet<String> = packs.map(|layer| layer["digest"].as_str().unwrap().to_owned()).collect();
    assert!(!packs.is_empty());
    let fetched = cluster.fetched(from);
    assert!(!fetched.iter().any(|(path, _)| packs.iter().any(|pack| path.ends_with(pack))), "{fetched:?}");
}

fn unpack(layer: &[u8], dir: &Path) {
    piped("tar", &["-xz", "-C", dir.to_str().unwrap()], layer);
}

#[test]
fn a_running_container_s_changes_are_a_layer_and_an_image_with_it_is_as_lazy_as_before() {
    let cluster = Cluster::start(&[]);
    cluster.publish("app", 4);
    let image = cluster.image("app:1");
    cluster.pull("app:1");
    cluster.run_until_done(&image, "one", "echo new > /new; echo changed > /name; rm /data/0");
    // What nerdctl's commit asks for: containerd compares the container's mounts with a view of what they are based on.
    let layer = cluster.ctr(&["snapshots", "--snapshotter", "firstread", "diff", &cluster.id("one")]);
    assert!(layer.status.success(), "{}", String::from_utf8_lossy(&layer.stderr));
    let dir = cluster.node.mount_point("layer");
    unpack(&layer.stdout, &dir);
    let names = String::from_utf8(piped("tar", &["-tz"], &layer.stdout)).unwrap();
    let files: BTreeSet<&str> = names.lines().filter(|name| !name.ends_with('/')).collect();
    // Files that runc needs to mount something on are the container's as well.
    let written = files.iter().filter(|name| !name.starts_with("etc/")).copied().collect::<Vec<_>>();
    assert_eq!(written, ["data/.wh.0", "done", "name", "new"], "{files:?}");
    assert_eq!(fs::read_to_string(dir.join("new")).unwrap(), "new\n");
    assert_eq!(fs::read_to_string(dir.join("name")).unwrap(), "changed\n");
    push_with_layer(&cluster, "app", &layer.stdout);
    cluster.remove_all();
    cluster.nothing_remains();

    // A device would show nothing of the layer.
    let (name, at) = (cluster.image("app:committed"), cluster.node.mount_point("mnt"));
    let mount = ["mount", &name, at.to_str().unwrap()];
    for verb in [&mount[..], &["attach", &name], &["export", &name, "--nbd", "tcp:127.0.0.1:0"]] {
        let said = cluster.node.fails(1, verb);
        assert!(said.contains("an ordinary layer above") && said.contains("firstread pull"), "{verb:?}: {said}");
    }
    assert_eq!(cluster.node.json(&["list"]).as_array().unwrap().len(), 0);
    assert_eq!(cluster.node.json(&["inspect", &name])["ordinary_layers"], 1);
    cluster.node.done(&[&mount[..], &["--base-only"]].concat());
    assert_eq!(fs::read_to_string(at.join("name")).unwrap(), "app\n");
    let profile = cluster.node.path().join("profile").display().to_string();
    cluster.node.done(&["profile", at.to_str().unwrap(), "-o", &profile]);
    cluster.node.done(&["umount", at.to_str().unwrap()]);
    // A start-up pack leaves the layer where it is.
    let fast = cluster.image("app:fast");
    let optimized = Command::new(env!("CARGO_BIN_EXE_firstread"))
        .args(["optimize", &name, &fast, "--profile", &profile, "--quiet"])
        .output()
        .unwrap();
    assert!(optimized.status.success(), "{}", String::from_utf8_lossy(&optimized.stderr));

    let shows = "cat /new /name; cat /data/0 || echo gone; cat /data/1 > /copy";
    let from = cluster.mark();
    cluster.pull("app:committed");
    no_pack(&cluster, "app:committed", from);
    let image = cluster.image("app:committed");
    assert_eq!(cluster.run(&image, "two", shows), "new\nchanged\ngone\n");
    cluster.pull("app:fast");
    assert_eq!(cluster.run(&fast, "fast", shows), "new\nchanged\ngone\n");
    let devices = cluster.node.json(&["list"]);
    assert_eq!(devices.as_array().unwrap().len(), 2, "{devices}");
    cluster.remove_all();
    cluster.nothing_remains();

    let kubelet = Kubelet::new(&cluster.socket());
    let from = cluster.mark();
    kubelet.pull(&image).unwrap();
    no_pack(&cluster, "app:committed", from);
    let logs = cluster.node.mount_point("logs");
    let pod = kubelet.run_pod("pod", &logs).unwrap();
    kubelet.start(&pod, "three", &image, &["sh", "-c", &format!("{shows}; exec sleep 100000")]).unwrap();
    let log = || fs::read_to_string(logs.join("three.log")).unwrap_or_default();
    wait_until("the container has read", || log().contains("F gone\n"));
    assert!(log().contains("F new\n") && log().contains("F changed\n"), "{}", log());
    kubelet.remove_pod(&pod);
    for name in ["app:committed", "plain:1"] {
        kubelet.remove_image(&cluster.image(name));
    }
    cluster.remove_all();
    cluster.nothing_remains();
}

#[test]
fn a_container_on_a_block_device_is_committed_by_its_name() {
    let cluster = Cluster::start(&["--mounts", "block"]);
    cluster.publish("app", 2);
    let image = cluster.image("app:1");
    cluster.pull("app:1");
    cluster.run_until_done(&image, "one", "echo new > /new; rm /data/0");
    let id = cluster.id("one");
    let committed = format!("oci:{}:1", cluster.node.path().join("of-one").display());
    // While it runs, and after its end, by its snapshot's key.
    cluster.node.done(&["commit", &id, &committed, "--quiet"]);
    let snapshots = cluster.snapshotter.list(&[]).unwrap();
    let key = snapshots.into_iter().map(|info| info.name).find(|name| name.ends_with(&format!("/{id}"))).unwrap();
    let _ = cluster.ctr(&["task", "kill", "-s", "KILL", &id]);
    wait_until("the container has ended", || cluster.ctr(&["task", "rm", &id]).status.success());
    let again = format!("oci:{}:1", cluster.node.path().join("again").display());
    cluster.node.done(&["commit", &key, &again, "--quiet"]);
    for image in [&committed, &again] {
        let at = cluster.node.mount_point("committed");
        cluster.node.done(&["mount", image, at.to_str().unwrap()]);
        assert_eq!(fs::read_to_string(at.join("new")).unwrap(), "new\n");
        assert_eq!(fs::read_to_string(at.join("name")).unwrap(), "app\n");
        assert!(!at.join("data/0").exists() && at.join("data/1").exists());
        cluster.node.done(&["umount", at.to_str().unwrap()]);
    }

    // Another one of that name in another namespace; and one that has no device.
    let parent = cluster.snapshotter.stat(&key).unwrap().parent;
    let other = format!("k8s.io/1/{id}");
    cluster.snapshotter.prepare(&other, &parent).unwrap();
    let said = cluster.node.fails(2, &["commit", &id, &again]);
    assert!(said.contains(&key) && said.contains(&other), "{said}");
    cluster.snapshotter.remove(&other).unwrap();
    let overlay = [("containerd.io/snapshot/firstread/mount", "overlay")];
    cluster.snapshotter.prepare_labelled("default/99/runc", &parent, &overlay).unwrap();
    let said = cluster.node.fails(1, &["commit", "runc", &again]);
    assert!(said.contains("no container"), "{said}");
    cluster.snapshotter.remove("default/99/runc").unwrap();
    cluster.remove_all();
    cluster.nothing_remains();
}
