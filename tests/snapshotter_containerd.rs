//! firstread's images where containerd runs: a real containerd, runc and registry.
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

use cluster::Cluster;
use cri::Kubelet;
use program::wait_until;

/// The digests of the layers with a role.
fn layers(cluster: &Cluster, name: &str, role: &str) -> Vec<String> {
    let manifest = cluster.manifest(name);
    let layers = manifest["layers"].as_array().unwrap();
    let of_role = layers.iter().filter(|layer| layer["annotations"]["containerd.io/snapshot/firstread/role"] == role);
    of_role.map(|layer| layer["digest"].as_str().unwrap().to_owned()).collect()
}

/// Panics unless the registry was asked for manifest, configuration and index alone, once each.
fn only_the_index(cluster: &Cluster, name: &str, from: usize) {
    let manifest = cluster.manifest(name);
    let index = layers(cluster, name, "index").remove(0);
    let config = manifest["config"]["digest"].as_str().unwrap();
    let fetched = cluster.fetched(from);
    let blobs: Vec<&str> =
        fetched.iter().filter_map(|(path, _)| path.split_once("/blobs/").map(|(_, digest)| digest)).collect();
    assert!(blobs.iter().all(|digest| *digest == index || *digest == config), "{fetched:?}");
    assert!(blobs.contains(&index.as_str()) && blobs.contains(&config), "{fetched:?}");
}

#[test]
fn an_image_that_was_pulled_by_firstread_runs_and_leaves_nothing_behind() {
    let cluster = Cluster::start(&[]);
    cluster.publish("app", 12);
    let from = cluster.mark();
    let pulled = cluster.pull("app:1");
    let sent: u64 = cluster.fetched(from).iter().map(|(_, bytes)| bytes).sum();
    only_the_index(&cluster, "app:1", from);
    let manifest = cluster.manifest("app:1");
    let index = manifest["layers"].as_array().unwrap().last().unwrap()["size"].as_u64().unwrap();
    let packs: u64 =
        manifest["layers"].as_array().unwrap().iter().map(|l| l["size"].as_u64().unwrap()).sum::<u64>() - index;
    assert_eq!(pulled["left"], packs);
    let received = pulled["received"].as_u64().unwrap();
    assert!(received >= index && received < index + 16_384, "{pulled}");
    assert_eq!(sent, received);
    // Nothing is attached before it is needed.
    assert_eq!(cluster.node.json(&["list"]).as_array().unwrap().len(), 0);

    let image = cluster.image("app:1");
    let listed = cluster.ctr_done(&["image", "ls"]);
    assert!(listed.contains(&image), "{listed}");
    let script = "cat /name /data/3 > /tmp/copy; cat /name; echo x > /new; cat /new";
    assert_eq!(cluster.run(&image, "one", script), "app\nx\n");
    let devices = cluster.node.json(&["list"]);
    assert_eq!(devices.as_array().unwrap().len(), 1, "{devices}");
    // A second container shares the device, and sees nothing of the first.
    assert_eq!(cluster.run(&image, "two", "cat /new || echo no"), "no\n");
    assert_eq!(cluster.node.json(&["list"]), devices);
    let listed = cluster.ctr_done(&["snapshot", "--snapshotter", "firstread", "ls"]);
    assert_eq!(listed.matches("Committed").count(), manifest["layers"].as_array().unwrap().len(), "{listed}");
    cluster.ctr_done(&["snapshot", "--snapshotter", "firstread", "usage"]);
    // Again: all is there, and nothing but the manifest is asked for.
    let from = cluster.mark();
    cluster.pull("app:1");
    assert!(cluster.fetched(from).iter().all(|(path, _)| !path.contains("/blobs/") || path.contains(manifest["config"]["digest"].as_str().unwrap())));
    cluster.remove_all();
    cluster.nothing_remains();
}

#[test]
fn a_pod_starts_through_cri_without_a_change_to_any_client() {
    let cluster = Cluster::start(&[]);
    cluster.publish("app", 12);
    let kubelet = Kubelet::new(&cluster.socket());
    let logs = cluster.node.mount_point("logs");
    let image = cluster.image("app:1");
    let from = cluster.mark();
    kubelet.pull(&image).unwrap();
    let sent: u64 = cluster.fetched(from).iter().map(|(_, bytes)| bytes).sum();
    only_the_index(&cluster, "app:1", from);
    assert!(sent < 16_384, "{sent} bytes for a pull");
    // The pause container's image is an ordinary one.
    let pod = kubelet.run_pod("pod", &logs).unwrap();
    kubelet.start(&pod, "one", &image, &[]).unwrap();
    kubelet
        .start(&pod, "two", &image, &["sh", "-c", "cat /data/5 /name > /copy; echo copied; exec sleep 100000"])
        .unwrap();
    let log = |name: &str| std::fs::read_to_string(logs.join(format!("{name}.log"))).unwrap_or_default();
    wait_until("the containers are ready", || log("one").contains("ready") && log("two").contains("copied"));
    assert!(log("one").contains("F app\n"), "{}", log("one"));
    assert_eq!(cluster.node.json(&["list"]).as_array().unwrap().len(), 1);
    kubelet.remove_pod(&pod);
    for name in ["app:1", "plain:1"] {
        kubelet.remove_image(&cluster.image(name));
    }
    cluster.remove_all();
    cluster.nothing_remains();
}

#[test]
fn an_image_that_ctr_pulled_whole_runs_from_what_is_there() {
    let mut cluster = Cluster::start(&[]);
    cluster.publish("app", 6);
    let image = cluster.image("app:1");
    cluster.ctr_done(&["image", "pull", "--plain-http", "--snapshotter", "firstread", &image]);
    cluster.registry.stop();
    assert_eq!(cluster.run(&image, "one", "cat /name /data/* > /all; cat /name"), "app\n");
    cluster.remove_all();
    cluster.nothing_remains();
}

#[test]
fn ordinary_images_run_as_with_overlayfs() {
    let cluster = Cluster::start(&[]);
    cluster.publish("app", 2);
    let image = cluster.image("app:plain");
    cluster.ctr_done(&["image", "pull", "--plain-http", "--snapshotter", "firstread", &image]);
    assert_eq!(cluster.run(&image, "one", "cat /name; echo mine > /name"), "app\n");
    assert_eq!(cluster.run(&image, "two", "cat /name"), "app\n");
    assert_eq!(cluster.node.json(&["list"]).as_array().unwrap().len(), 0);
    cluster.remove_all();
    cluster.nothing_remains();
}

#[test]
fn the_doctor_finds_what_is_wrong_and_says_what_mends_it() {
    let mut cluster = Cluster::start(&[]);
    cluster.publish("app", 1);
    let (socket, image) = (cluster.socket().display().to_string(), cluster.image("app:1"));
    let config = cluster.node.path().join("containerd.toml").display().to_string();
    let listen = cluster.snapshotter.socket().display().to_string();
    let options = ["doctor", "--containerd-socket", &socket, "--containerd-config", &config, "--listen", &listen];
    let ask = |more: &[&str]| {
        let mut arguments = vec!["--json"];
        arguments.extend(options);
        arguments.extend(more);
        let output = cluster.node.run(&arguments);
        let checks: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let health = |name: &str| {
            let found = checks.as_array().unwrap().iter().find(|check| check["name"] == name);
            let found = found.unwrap_or_else(|| panic!("{name} in {checks}"));
            (found["health"].as_str().unwrap().to_owned(), found["mend"].as_str().unwrap_or_default().to_owned())
        };
        let names = ["ext4", "space", "snapshotter", "containerd", "proxy plugin", "CRI", "mount namespace"];
        (output.status.code(), names.map(health), more.first().map(|_| health("image")))
    };
    let (code, all, found) = ask(&[&image]);
    assert_eq!(code, Some(0));
    assert!(all.iter().all(|(health, mend)| health == "good" && mend.is_empty()), "{all:?}");
    assert_eq!(found.unwrap().0, "good");
    // An ordinary image, and one that is not there.
    let (code, _, found) = ask(&[&cluster.image("app:plain")]);
    assert_eq!((code, found.as_ref().unwrap().0.as_str()), (Some(0), "missing"));
    assert!(found.unwrap().1.starts_with("firstread build "));
    let (code, _, found) = ask(&[&cluster.image("other:1")]);
    assert_eq!((code, found.unwrap().0.as_str()), (Some(1), "bad"));
    let mut other = options.to_vec();
    other.extend(["--snapshotter", "other"]);
    let text = cluster.node.done(&other);
    assert!(text.contains("containerd has no snapshotter \"other\"") && text.contains("doctor --containerd"), "{text}");
    let mut lines = options.to_vec();
    lines.push("--containerd");
    let lines = cluster.node.done(&lines);
    assert!(lines.contains("version = 2") && lines.contains(&format!("address = \"{listen}\"")), "{lines}");
    cluster.registry.stop();
    cluster.kill_containerd("-TERM");
    let output = cluster.node.run(&options);
    assert!(String::from_utf8_lossy(&output.stdout).contains("systemctl start containerd"));
}
