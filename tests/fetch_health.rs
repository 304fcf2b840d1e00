//! What `status` and the log say while a device's source is away, and how long readers wait.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/hostile.rs"]
mod hostile;
#[path = "common/packs.rs"]
mod packs;
#[path = "common/program.rs"]
mod program;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use firstread::chunk::Digest;
use hostile::{Answer, Hostile};
use packs::{Lies, TestImage};
use program::Node;
use serde_json::Value;

const CHUNK: usize = 256 << 10;

/// A server that has an image.
async fn serve(image: &TestImage) -> Hostile {
    let server = Hostile::start().await;
    for (digest, bytes) in &image.blobs {
        server.put(&format!("/v2/app/blobs/{digest}"), bytes.clone());
    }
    let digest = Digest::of(&image.manifest);
    for name in ["v1".to_owned(), digest.to_string()] {
        server.put(&format!("/v2/app/manifests/{name}"), image.manifest.clone());
    }
    server
}

/// Attaches the image and returns the device's id and file.
fn attach(node: &Node, server: &Hostile, options: &[&str]) -> (String, File) {
    let name = format!("{}/app:v1", server.host());
    let mut arguments = vec!["attach", &name];
    arguments.extend(options);
    let attached = node.json(&arguments);
    (attached["id"].as_str().unwrap().to_owned(), File::open(attached["device"].as_str().unwrap()).unwrap())
}

fn read(device: &File, image: &TestImage, chunk: usize) -> io::Result<()> {
    let mut found = vec![0; 4096];
    device.read_exact_at(&mut found, (chunk * CHUNK) as u64)?;
    assert!(found == image.plain[chunk][..4096], "chunk {chunk}");
    Ok(())
}

/// Stops waiting for readahead that the kernel does on its own behalf.
fn without_kernel_read_ahead(device: &File) {
    rustix::fs::fadvise(device, 0, None, rustix::fs::Advice::Random).unwrap();
}

fn lines(node: &Node, text: &str) -> usize {
    node.log().lines().filter(|line| line.contains(text)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_is_shown_and_told_of_once() {
    let node = Node::new();
    let image = TestImage::build(5, 24, CHUNK, Lies::default());
    let server = serve(&image).await;
    let (id, device) = attach(&node, &server, &["--on-outage", "1"]);
    without_kernel_read_ahead(&device);
    read(&device, &image, 0).unwrap();
    let status = node.json(&["status", &id]);
    assert_eq!((&status["health"]["state"], &status["health"]["on_outage"]), (&"healthy".into(), &1.into()));
    assert_eq!((&status["last_error"], &status["sources"][0]["state"]), (&Value::Null, &"healthy".into()));

    for outage in 1..=2 {
        server.ever(Some(Answer::Status(503, vec![], "down for tea".into())));
        for chunk in [20, 21, 22] {
            let started = Instant::now();
            assert!(read(&device, &image, chunk).is_err());
            let took = started.elapsed();
            assert!((Duration::from_millis(900)..Duration::from_secs(4)).contains(&took), "{took:?}");
        }
        let status = node.json(&["status", &id]);
        assert_eq!(status["health"]["state"], "waiting", "{status}");
        assert!(status["health"]["since"].as_u64() > Some(1_600_000_000), "{status}");
        assert!(status["last_error"].as_str().unwrap().contains("down for tea"), "{status}");
        assert!(status["sources"][0]["last_error"].as_str().unwrap().contains("503"), "{status}");
        assert_eq!(status["sources"][0]["state"], "failing");
        let shown = node.done(&["status", &id]);
        assert!(shown.contains("no source can be reached") && shown.contains("down for tea"), "{shown}");

        server.ever(None);
        read(&device, &image, 3 + outage).unwrap();
        let status = node.json(&["status", &id]);
        assert_eq!(status["health"]["state"], "healthy", "{status}");
        assert_eq!(status["sources"][0]["state"], "healthy", "{status}");
        assert!(status["last_error"].as_str().unwrap().contains("down for tea"), "{status}");
        assert_eq!(lines(&node, "no source can be reached"), outage, "{}", node.log());
        assert_eq!(lines(&node, "sources can be reached again"), outage, "{}", node.log());
    }
    drop(device);
    node.done(&["stop"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_device_has_its_own_patience() {
    let node = Node::new();
    let image = TestImage::build(6, 8, CHUNK, Lies::default());
    let server = serve(&image).await;
    let (_, brief) = attach(&node, &server, &["--on-outage", "1"]);
    let (id, endless) = attach(&node, &server, &["--on-outage", "wait"]);
    let (ordinary, _device) = attach(&node, &server, &[]);
    for device in [&brief, &endless] {
        without_kernel_read_ahead(device);
    }
    assert_eq!(node.json(&["status", &id])["health"]["on_outage"], Value::Null);
    assert_eq!(node.json(&["status", &ordinary])["health"]["on_outage"], 60);
    server.ever(Some(Answer::Reset));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| read(&endless, &image, 5));
        assert!(read(&brief, &image, 5).is_err());
        assert!(read(&brief, &image, 6).is_err());
        assert!(!waiting.is_finished());
        server.ever(None);
        waiting.join().unwrap().unwrap();
    });
    read(&brief, &image, 6).unwrap();
    node.fails(2, &["attach", "oci:x", "--on-outage", "soon"]);
    drop((brief, endless, _device));
    node.done(&["stop"]);
}
