//! Blobs from plain web servers: a real nginx that has a copy of an OCI layout.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/nginx.rs"]
mod nginx;
#[path = "common/packs.rs"]
mod packs;
#[path = "common/program.rs"]
mod program;
#[path = "common/registry.rs"]
mod registry;

use firstread::oci::Reference;
use firstread::source::{Access, Purpose, Repository};
use nginx::Nginx;
use packs::{Lies, TestImage};
use registry::Registry;

#[test]
fn chunks_come_from_a_web_server_and_what_it_lacks_from_the_registry() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (registry, dir) = (Registry::start(), tempfile::tempdir().unwrap());
    let (here, gone) =
        (TestImage::build(1, 8, 64 << 10, Lies::default()), TestImage::build(2, 8, 64 << 10, Lies::default()));
    let layout = dir.path().join("layout");
    let push = |image: &TestImage, name: &str| {
        let reference: Reference = name.parse().unwrap();
        runtime.block_on(async {
            image.push(&Repository::open(&reference, &Access::default(), Purpose::Push).await.unwrap()).await
        });
    };
    push(&here, &format!("{}/team/here:v1", registry.host()));
    push(&gone, &format!("{}/team/gone:v1", registry.host()));
    push(&here, &format!("oci:{}:v1", layout.display()));
    let root = layout.display().to_string();
    let nginx = Nginx::start(&format!("server {{ listen 127.0.0.1:PORT; location /copies/ {{ alias {root}/; }} }}",));
    // Workers run as another user.
    assert!(std::process::Command::new("chmod").args(["-R", "a+rX"]).arg(dir.path()).status().unwrap().success());
    let place = format!("{}/team=http://{}/copies", registry.host(), nginx.host());
    for (name, image, from_web) in [("here", &here, true), ("gone", &gone, false)] {
        let node = program::Node::new();
        let before = (nginx.log().len(), registry.log().len());
        let reference = format!("{}/team/{name}:v1", registry.host());
        let attached = node.json(&["attach", &reference, "--blobs", &place]);
        let device = attached["device"].as_str().unwrap();
        assert!(std::fs::read(device).unwrap() == image.plain.concat(), "{name}");
        node.done(&["detach", device]);
        let blob = format!("sha256/{}", image.pack.hex());
        let web = nginx.log()[before.0..].matches(&format!("GET /copies/blobs/{blob} HTTP/1.1\" 206")).count();
        let pulled = registry.log()[before.1..].lines().filter(|line| line.contains(&blob.replace('/', ":"))).count();
        assert_eq!((web > 0, pulled == 0), (from_web, from_web), "{name}: {web} from the web, {pulled} pulled");
    }
    // Named in the configuration, for other images: the registry alone is asked.
    let node = program::Node::new();
    let config = dir.path().join("config.toml");
    std::fs::write(&config, format!("[registry]\nblobs = [\"other.example=http://{}/copies\"]\n", nginx.host()))
        .unwrap();
    let before = nginx.log().len();
    let reference = format!("{}/team/here:v1", registry.host());
    node.done(&["verify", &reference, "--config", config.to_str().unwrap()]);
    assert_eq!(nginx.log()[before..].lines().count(), 0);
    std::fs::write(&config, format!("[registry]\nblobs = [\"http://{}/copies\"]\n", nginx.host())).unwrap();
    node.done(&["verify", &reference, "--config", config.to_str().unwrap()]);
    assert!(nginx.log()[before..].lines().count() > 0);
    node.fails(2, &["verify", &reference, "--blobs", "ftp://x"]);
}
