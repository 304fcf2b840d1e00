//! Many containers of many images at once, while what they need fails.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/cluster.rs"]
mod cluster;
#[path = "common/program.rs"]
mod program;
#[path = "common/registry.rs"]
mod registry;
#[path = "common/snapshotter.rs"]
mod snapshotter;

use std::process::{Child, Stdio};
use std::time::Duration;

use cluster::Cluster;

const IMAGES: usize = 10;
const CONTAINERS: usize = 50;

fn publish_and_pull(cluster: &Cluster) -> Vec<String> {
    let names: Vec<String> = (0..IMAGES).map(|number| format!("app{number}")).collect();
    for name in &names {
        cluster.publish(name, 2);
        cluster.pull(&format!("{name}:1"));
    }
    names
}

/// Starts all containers at once; each reads its whole image.
fn start(cluster: &Cluster, names: &[String], round: &str) -> Vec<(String, Child)> {
    let one = |number: usize| {
        let name = &names[number % IMAGES];
        let (image, id) = (cluster.image(&format!("{name}:1")), format!("{round}-{number}"));
        let mut run = cluster.container(&image, &id, "cat /data/* > /dev/null && cat /name", &[]);
        let child = run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        (name.clone(), child)
    };
    (0..CONTAINERS).map(one).collect()
}

/// Each either ran and read what it should, or says what is wrong; how many ran.
fn judge(started: Vec<(String, Child)>) -> usize {
    let mut ran = 0;
    for (name, child) in started {
        let output = child.wait_with_output().unwrap();
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        match output.status.success() {
            true => {
                assert_eq!(stdout, format!("{name}\n"));
                ran += 1;
            }
            false => {
                eprintln!("{:?} {stderr}", output.status);
                assert!(stderr.trim().len() > 10, "it failed without a word: {stdout:?} {stderr:?}")
            }
        }
    }
    ran
}

#[test]
fn fifty_containers_of_ten_images_start_at_once() {
    let cluster = Cluster::start(&[]);
    let names = publish_and_pull(&cluster);
    assert_eq!(judge(start(&cluster, &names, "a")), CONTAINERS);
    assert_eq!(cluster.node.json(&["list"]).as_array().unwrap().len(), IMAGES);
    cluster.remove_all();
    cluster.nothing_remains();
}

#[test]
fn fifty_containers_start_while_firstread_is_killed_and_the_registry_is_gone() {
    let mut cluster = Cluster::start(&[]);
    let names = publish_and_pull(&cluster);
    let started = start(&cluster, &names, "a");
    std::thread::sleep(Duration::from_millis(300));
    cluster.snapshotter.kill("-KILL");
    cluster.resume_snapshotter();
    cluster.node.kill("-KILL");
    judge(started);
    // The registry goes while others start; it comes back before readers give up.
    let started = start(&cluster, &names, "b");
    std::thread::sleep(Duration::from_millis(300));
    cluster.registry.stop();
    std::thread::sleep(Duration::from_secs(3));
    cluster.registry.resume();
    judge(started);
    // And all of it works again.
    assert_eq!(judge(start(&cluster, &names, "c")), CONTAINERS);
    cluster.remove_all();
    cluster.nothing_remains();
}
