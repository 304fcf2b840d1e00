//! Blobs from an object store: moto's S3 server (PyPI `moto[server]`, which scripts/setup installs below `target`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/fault.rs"]
mod fault;
#[path = "common/nginx.rs"]
mod nginx;
#[path = "common/packs.rs"]
mod packs;
#[path = "common/program.rs"]
mod program;
#[path = "common/registry.rs"]
mod registry;

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use fault::Fault;
use firstread::oci::Reference;
use firstread::source::{Access, Purpose, Repository};
use packs::{Lies, TestImage};
use registry::Registry;
use serde_json::Value;

struct Store {
    child: Child,
    port: u16,
}

impl Store {
    fn start() -> Self {
        let port = nginx::free_port();
        let packages = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/moto");
        assert!(packages.join("moto").is_dir(), "{} is missing: run scripts/setup", packages.display());
        let child = Command::new("python3")
            .args(["-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", &port.to_string()])
            .env("PYTHONPATH", packages)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        nginx::wait_for(port, String::new);
        Self { child, port }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn put(&self, path: &str, content: &[u8]) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("content");
        std::fs::write(&file, content).unwrap();
        let status = Command::new("curl")
            .args(["-sSf", "-o", "/dev/null", "--noproxy", "*", "-T"])
            .arg(file)
            .arg(format!("{}/{path}", self.url()))
            .status();
        assert!(status.unwrap().success(), "{path}");
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a verb in a node whose environment says where the store is.
fn run(node: &program::Node, endpoint: &str, arguments: &[&str]) -> Output {
    let settings = [
        ("AWS_ENDPOINT", endpoint),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "us-east-1"),
    ];
    node.command(arguments).envs(settings).output().unwrap()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn chunks_come_from_a_bucket_and_what_it_lacks_or_breaks_from_the_registry() {
    let (registry, store) = (Registry::start(), Store::start());
    let image = TestImage::build(1, 8, 64 << 10, Lies::default());
    let name = format!("{}/team/app:v1", registry.host());
    let reference: Reference = name.parse().unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        image.push(&Repository::open(&reference, &Access::default(), Purpose::Push).await.unwrap()).await;
    });
    store.put("bucket", b"");
    let proxy = Fault::start(&store.url(), &[]);
    let pack = format!("blobs/sha256/{}", image.pack.hex());
    let attach = |place: &str| {
        let node = program::Node::new();
        let attached = json(&run(&node, proxy.url(), &["--json", "attach", &name, "--blobs", place]));
        let device = attached["device"].as_str().unwrap();
        assert!(std::fs::read(device).unwrap() == image.plain.concat(), "{}", node.log());
        let status = node.json(&["status", attached["id"].as_str().unwrap()]);
        node.done(&["detach", device]);
        let status = status.as_array().map_or(status.clone(), |all| all[0].clone());
        status["sources"].clone()
    };
    let pulled =
        || registry.log().lines().filter(|line| line.contains(&image.pack.to_string()) && line.contains("GET")).count();

    // It is not there yet.
    attach("s3://bucket/copies/app");
    assert!(pulled() > 0 && proxy.requests() > 0);

    store.put(&format!("bucket/copies/app/{pack}"), &image.blobs[&image.pack]);
    let before = pulled();
    let sources = attach("s3://bucket/copies/app");
    assert_eq!(pulled(), before, "the bucket has all: {sources}");
    assert_eq!((&sources[0]["name"], &sources[0]["state"]), (&"s3://bucket/copies/app".into(), &"healthy".into()));
    assert_eq!(sources.as_array().unwrap().len(), 2);

    // What the store breaks, the registry mends.
    for fault in ["reset", "flip:at=700", "truncate:after=100", "status:code=403", "status:code=503", "range:by=5"] {
        proxy.arm(fault);
        let before = pulled();
        attach("s3://bucket/copies/app");
        assert!(pulled() > before, "{fault}");
        proxy.heal();
    }
    let verified = json(&run(
        &program::Node::new(),
        proxy.url(),
        &["--json", "verify", &name, "--blobs", "s3://bucket/copies/app"],
    ));
    assert_eq!((&verified["sound"], verified["sources"].as_array().unwrap().len()), (&true.into(), 2), "{verified}");
}
