//! A registry behind an nginx slice cache: what one node has fetched, the next ones get from the cache.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/fault.rs"]
mod fault;
#[path = "common/networks.rs"]
mod networks;
#[path = "common/nginx.rs"]
mod nginx;
#[path = "common/packs.rs"]
mod packs;
#[path = "common/program.rs"]
mod program;
#[path = "common/published.rs"]
mod published;
#[path = "common/registry.rs"]
mod registry;

use std::collections::BTreeSet;
use std::path::PathBuf;

use fault::Fault;
use networks::{Networks, SERVER};
use nginx::Nginx;
use packs::TestImage;
use program::Node;
use published::published;
use registry::Registry;

const NODES: usize = 20;

struct Setup {
    /// Counts what leaves the registry.
    origin: Fault,
    cache: Nginx,
    /// `HOST:PORT` of the cache, as nodes see it.
    mirror: String,
    image: TestImage,
    dir: tempfile::TempDir,
    _registry: Registry,
}

/// Servers at `address` of this machine; nodes have the cache as a mirror of the registry.
fn setup(seed: u64, address: &str) -> Setup {
    let (registry, image) = published(seed, 48, 256 << 10);
    let origin = Fault::start(&format!("http://{}", registry.host()), &["--listen", &format!("{address}:0")]);
    let url = origin.url();
    let listen = if address == "127.0.0.1" { String::new() } else { format!("listen {address}:PORT;") };
    let cache = Nginx::start(&format!(
        "proxy_cache_path DIR/cache keys_zone=blobs:10m max_size=1g;
         server {{ listen 127.0.0.1:PORT; {listen} proxy_http_version 1.1;
           location / {{ proxy_pass {url}; }}
           location ~ ^/v2/.*/blobs/ {{
             slice 1m; proxy_cache blobs; proxy_cache_key $uri$slice_range; proxy_set_header Range $slice_range;
             proxy_cache_valid 200 206 1h; proxy_cache_lock on; proxy_pass {url}; }} }}"
    ));
    let mirror = cache.host().replace("127.0.0.1", address);
    let dir = tempfile::tempdir().unwrap();
    let hosts = dir.path().join("certs.d").join(origin.host());
    std::fs::create_dir_all(&hosts).unwrap();
    std::fs::write(hosts.join("hosts.toml"), format!("server = \"{url}\"\n[host.\"http://{mirror}\"]\n")).unwrap();
    Setup { origin, cache, mirror, image, dir, _registry: registry }
}

impl Setup {
    fn hosts_dir(&self) -> PathBuf {
        self.dir.path().join("certs.d")
    }

    /// A node that has never seen the image reads all of it; the bytes that it received.
    fn read(&self) -> u64 {
        let node = Node::new();
        let name = format!("{}/app:v1", self.origin.host());
        let hosts_dir = self.hosts_dir();
        let attached = node.json(&["attach", &name, "--hosts-dir", hosts_dir.to_str().unwrap()]);
        let device = attached["device"].as_str().unwrap();
        assert!(std::fs::read(device).unwrap() == self.image.plain.concat());
        let status = node.json(&["status", attached["id"].as_str().unwrap()]);
        let status = status.as_array().map_or(status.clone(), |all| all[0].clone());
        node.done(&["detach", device]);
        status["bytes"]["fetched"].as_u64().unwrap()
    }

    /// Bytes that left the registry.
    fn egress(&self) -> u64 {
        self.origin.counters()["sent_bytes"].as_u64().unwrap()
    }
}

#[test]
fn the_second_node_gets_its_bytes_from_the_cache() {
    let setup = setup(1, "127.0.0.1");
    let fetched = setup.read();
    let first = setup.egress();
    assert!(first >= fetched, "{first} left the registry, {fetched} arrived");
    let again = setup.read();
    let second = setup.egress() - first;
    // The manifest alone is asked for again.
    assert!(second < again / 50, "{second} bytes of {again} came from the registry: {}", setup.cache.log());
}

/// Each node is on a network of its own, and reaches the servers over a cable.
#[test]
fn twenty_nodes_that_start_at_once_cost_the_registry_what_one_does() {
    let networks = Networks::new(NODES);
    networks.enter_server();
    let setup = setup(2, SERVER);
    let fetched: Vec<u64> = std::thread::scope(|scope| {
        let start = |number| {
            let (networks, setup) = (&networks, &setup);
            scope.spawn(move || {
                networks.enter_node(number);
                setup.read()
            })
        };
        let nodes: Vec<_> = (0..NODES).map(start).collect();
        nodes.into_iter().map(|node| node.join().unwrap()).collect()
    });
    let log = setup.cache.log();
    let addresses: BTreeSet<&str> = log.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(addresses.len(), NODES, "{} was asked by {addresses:?}", setup.mirror);
    let (one, egress) = (*fetched.iter().max().unwrap(), setup.egress());
    println!("{egress} bytes left the registry for {NODES} nodes of {one}: {:.3}", egress as f64 / one as f64);
    assert!(egress as f64 <= 1.1 * one as f64, "{egress} bytes left the registry, one node needs {one}");
}
