//! Mirrors as `hosts.toml` names them, in front of a real docker-registry, through a real nginx and a real forward proxy.
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
use std::process::{Command, Stdio};
use std::time::Duration;

use fault::Fault;
use firstread::Result;
use firstread::fetch::{Image, open_image};
use firstread::oci::{Platform, Reference};
use firstread::source::{Access, Purpose, Repository};
use futures_util::TryStreamExt;
use nginx::Nginx;
use packs::{Lies, TestImage};
use registry::Registry;

/// A registry with an image, and directories to say what mirrors it has.
struct Setup {
    registry: Registry,
    image: TestImage,
    dir: tempfile::TempDir,
}

async fn setup() -> Setup {
    let setup = Setup {
        registry: Registry::start(),
        image: TestImage::build(1, 8, 64 << 10, Lies::default()),
        dir: tempfile::tempdir().unwrap(),
    };
    let access = Access { hosts_dir: "/nonexistent".into(), ..setup.access() };
    let reference: Reference = setup.name().parse().unwrap();
    setup.image.push(&Repository::open(&reference, &access, Purpose::Push).await.unwrap()).await;
    setup
}

impl Setup {
    fn name(&self) -> String {
        format!("{}/app:v1", self.registry.host())
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn access(&self) -> Access {
        let config = self.path().join("config.json");
        if !config.exists() {
            std::fs::write(&config, "{}").unwrap();
        }
        let (connect, stall) = (Duration::from_secs(2), Duration::from_secs(2));
        Access {
            hosts_dir: self.path().join("certs.d"),
            docker_config: Some(config),
            connect,
            stall,
            ..Access::default()
        }
    }

    /// Says what mirrors `host` has; `host` none is the registry.
    fn configure(&self, text: &str) {
        let dir = self.path().join("certs.d").join(self.registry.host());
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("hosts.toml"), text).unwrap();
    }

    /// Opens the image as a node that has never seen it.
    async fn open(&self) -> Result<Image> {
        let cache = tempfile::tempdir().unwrap();
        open_image(&self.name().parse().unwrap(), &self.access(), &Platform::host(), cache.path()).await
    }

    /// Reads the whole pack from source number `number` of `image`; says whether that was right.
    async fn read(&self, image: &Image, number: usize) -> Result<()> {
        let blob = image.origin.blobs()[0];
        let source = &image.origin.sources()[number];
        let pieces: Vec<_> = source.read_at(&blob, 0, blob.bytes).await?.try_collect().await?;
        assert!(pieces.concat() == self.image.blobs[&self.image.pack]);
        Ok(())
    }

    fn upstream(&self) -> String {
        format!("http://{}", self.registry.host())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_are_asked_in_order_for_what_they_are_capable_of() {
    let setup = setup().await;
    let (first, second) = (Fault::start(&setup.upstream(), &[]), Fault::start(&setup.upstream(), &[]));
    setup.configure(&format!(
        "server = \"{}\"\n[host.\"{}\"]\ncapabilities = [\"pull\"]\n[host.\"{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n",
        setup.upstream(),
        first.url(),
        second.url(),
    ));
    let image = setup.open().await.unwrap();
    let names: Vec<_> = image.origin.sources().iter().map(|source| source.name().to_owned()).collect();
    assert_eq!(names, [first.host(), second.host(), &setup.registry.host()].map(|host| format!("{host}/app")));
    // The tag was resolved by the second, everything else came from the first.
    assert_eq!((first.requests(), second.requests()), (2, 1), "{} {}", first.counters(), second.counters());
    for number in 0..3 {
        setup.read(&image, number).await.unwrap();
    }

    // One that is away or wrong is passed over, for every document.
    for fault in ["reset", "status:code=404", "status:code=401", "status:code=500", "flip:at=20", "truncate:after=10"] {
        first.arm(fault);
        second.arm(fault);
        setup.open().await.unwrap_or_else(|error| panic!("{fault}: {error}"));
        first.heal();
        second.heal();
    }
    // A mirror that may not resolve is not asked what a tag stands for, whatever else happens.
    first.forget_counters();
    second.arm("reset");
    setup.open().await.unwrap();
    assert_eq!(first.requests(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_has_certificates_headers_and_a_path_of_its_own() {
    let setup = setup().await;
    let nginx = Nginx::start(&format!(
        "server {{ listen 127.0.0.1:PORT ssl http2; ssl_certificate DIR/cert.pem; ssl_certificate_key DIR/key.pem;
           ssl_client_certificate DIR/ca.pem; ssl_verify_client on;
           if ($http_x_team != one) {{ return 403; }}
           location /cache/ {{ proxy_pass {}/v2/; }} }}",
        setup.upstream(),
    ));
    let mirror = |settings: &str, header: &str| {
        let url = format!("https://{}/cache", nginx.host());
        setup.configure(&format!(
            "server = \"{}\"\n[host.\"{url}\"]\n{settings}\n[host.\"{url}\".header]\n{header}\n",
            setup.upstream(),
        ));
    };
    let dir = nginx.path().display();
    let ca = format!("ca = \"{}\"", nginx.ca().display());
    let client = format!("client = [[\"{dir}/client.pem\", \"{dir}/client.key\"]]");
    let header = "x-team = \"one\"";
    // All of it, and each without which it does not work.
    mirror(&format!("{ca}\n{client}\noverride_path = true"), header);
    setup.read(&setup.open().await.unwrap(), 0).await.unwrap();
    let log = nginx.log();
    assert!(log.contains("GET /cache/app/blobs/") && log.contains("HTTP/2.0"), "{log}");
    assert!(log.contains(&format!("ns={}", setup.registry.host().replace(':', "%3A"))), "{log}");
    mirror(&format!("skip_verify = true\n{client}\noverride_path = true"), header);
    setup.read(&setup.open().await.unwrap(), 0).await.unwrap();
    for (settings, header) in [
        (format!("{client}\noverride_path = true"), header),
        (format!("{ca}\noverride_path = true"), header),
        (format!("{ca}\n{client}"), header),
        (format!("{ca}\n{client}\noverride_path = true"), "x-team = \"two\""),
    ] {
        mirror(&settings, header);
        let image = setup.open().await.unwrap();
        assert!(setup.read(&image, 0).await.is_err(), "{settings} {header}");
        setup.read(&image, 1).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_of_one_host_share_its_connections() {
    let setup = setup().await;
    let nginx = Nginx::start(&format!(
        "log_format count '$connection $server_protocol';
         server {{ listen 127.0.0.1:PORT ssl http2; ssl_certificate DIR/cert.pem; ssl_certificate_key DIR/key.pem;
           access_log DIR/access.log count; location / {{ proxy_pass {}; }} }}",
        setup.upstream(),
    ));
    setup.configure(&format!("server = \"https://{}\"\nca = \"{}\"\n", nginx.host(), nginx.ca().display()));
    let access = setup.access();
    let mut images = Vec::new();
    for _ in 0..5 {
        let cache = tempfile::tempdir().unwrap();
        let reference = setup.name().parse().unwrap();
        images.push(open_image(&reference, &access, &Platform::host(), cache.path()).await.unwrap());
        setup.read(images.last().unwrap(), 0).await.unwrap();
    }
    let log = nginx.log();
    let connections: std::collections::HashSet<&str> = log.lines().collect();
    assert!(log.lines().count() >= 20 && connections.len() == 1, "{log}");
    assert!(log.contains("HTTP/2.0"), "{log}");
}

#[test]
fn the_daemon_reads_through_mirrors_and_a_setting_says_where_they_are_named() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let setup = runtime.block_on(setup());
    let mirror = Fault::start(&setup.upstream(), &[]);
    setup.configure(&format!("server = \"{}\"\n[host.\"{}\"]\n", setup.upstream(), mirror.url()));
    let hosts_dir = setup.path().join("certs.d");
    let hosts_dir = hosts_dir.to_str().unwrap();
    let inspect = |node: &program::Node, arguments: &[&str], variable: &str| {
        mirror.forget_counters();
        let mut all = vec!["inspect", "--quiet"];
        let name = setup.name();
        all.push(&name);
        all.extend(arguments);
        let output = node.command(&all).env("FIRSTREAD_REGISTRY_HOSTS_DIR", variable).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        mirror.requests()
    };
    assert!(inspect(&program::Node::new(), &["--hosts-dir", hosts_dir], "") > 0);
    assert!(inspect(&program::Node::new(), &[], hosts_dir) > 0);
    assert_eq!(inspect(&program::Node::new(), &[], "/nonexistent"), 0);
}

/// A tinyproxy on a port of its own.
struct Proxy {
    child: std::process::Child,
    dir: tempfile::TempDir,
    port: u16,
}

impl Proxy {
    fn start() -> Self {
        let (dir, port) = (tempfile::tempdir().unwrap(), nginx::free_port());
        let log = dir.path().join("log");
        let config =
            format!("Port {port}\nListen 127.0.0.1\nTimeout 60\nLogFile \"{}\"\nLogLevel Info\n", log.display());
        std::fs::write(dir.path().join("conf"), config).unwrap();
        let child = Command::new("tinyproxy")
            .args(["-d", "-c"])
            .arg(dir.path().join("conf"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("tinyproxy runs (Debian package tinyproxy)");
        nginx::wait_for(port, String::new);
        Self { child, dir, port }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_forward_proxy_is_used_but_not_for_what_no_proxy_names() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let setup = runtime.block_on(setup());
    let proxy = Proxy::start();
    // This machine by an address that is not a loopback one, for which no proxy would be asked.
    let name = setup.name().replace("127.0.0.1", "0.0.0.0");
    let nginx = Nginx::tls(&setup.upstream(), "");
    let secure = setup.name().replace(&setup.registry.host(), &nginx.host().replace("127.0.0.1", "0.0.0.0"));
    let dir = setup.path().join("proxied").join(nginx.host().replace("127.0.0.1", "0.0.0.0"));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("hosts.toml"), "skip_verify = true\n").unwrap();
    let hosts_dir = setup.path().join("proxied");
    let inspect = |name: &str, arguments: &[&str], no_proxy: &str| {
        let node = program::Node::new();
        let before = proxy.log().len();
        let hosts_dir = hosts_dir.to_str().unwrap();
        let mut all = vec!["inspect", "--quiet", name, "--hosts-dir", hosts_dir];
        all.extend(arguments);
        let url = format!("http://127.0.0.1:{}", proxy.port);
        let output = node
            .command(&all)
            .env("HTTP_PROXY", &url)
            .env("HTTPS_PROXY", &url)
            .env("NO_PROXY", no_proxy)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        proxy.log()[before..].to_owned()
    };
    let log = inspect(&name, &["--plain-http"], "");
    assert!(log.contains("/v2/app/manifests/v1"), "{log}");
    let log = inspect(&secure, &[], "");
    assert!(log.contains("CONNECT 0.0.0.0:"), "{log}");
    for name_of_host in ["0.0.0.0", "*"] {
        assert_eq!(inspect(&name, &["--plain-http"], name_of_host), "");
    }
}

#[test]
fn a_source_is_left_alone_as_long_as_it_asks_and_the_registry_answers_meanwhile() {
    use std::os::unix::fs::FileExt;
    const CHUNK: usize = 64 << 10;
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let setup = runtime.block_on(setup());
    let image = TestImage::build(2, 64, CHUNK, Lies::default());
    let (layout, reference) = (setup.path().join("layout"), format!("{}/large:v1", setup.registry.host()));
    for name in [reference.clone(), format!("oci:{}:v1", layout.display())] {
        runtime.block_on(async {
            let repository = Repository::open(&name.parse().unwrap(), &setup.access(), Purpose::Push).await;
            image.push(&repository.unwrap()).await
        });
    }
    let hosts_dir = setup.path().join("certs.d");
    let (mirror, copies) = (Fault::start(&setup.upstream(), &[]), Fault::start(layout.to_str().unwrap(), &[]));
    let place = format!("--blobs={}", copies.url());
    for (source, mirrors, options) in
        [(&mirror, format!("[host.\"{}\"]\n", mirror.url()), vec![]), (&copies, String::new(), vec![place.as_str()])]
    {
        setup.configure(&format!("server = \"{}\"\n{mirrors}", setup.upstream()));
        let node = program::Node::new();
        let mut arguments = vec!["attach", &reference, "--hosts-dir", hosts_dir.to_str().unwrap()];
        arguments.extend(options);
        let attached = node.json(&arguments);
        let (id, device) = (attached["id"].as_str().unwrap(), attached["device"].as_str().unwrap());
        let device = std::fs::File::open(device).unwrap();
        rustix::fs::fadvise(&device, 0, None, rustix::fs::Advice::Random).unwrap();
        // Far from each other: each is a request of its own.
        let read = |number: usize| {
            let mut found = vec![0; 4096];
            device.read_exact_at(&mut found, (number * CHUNK) as u64).unwrap();
            assert!(found == image.plain[number][..4096], "chunk {number}");
        };
        read(0);
        assert!(source.requests() > 0, "{}", source.counters());

        source.forget_counters();
        source.arm("status:code=429,retry_after=25,path=/blobs/,count=1");
        for number in [20, 40, 60] {
            read(number);
            // Longer than a source that says nothing is left alone for.
            std::thread::sleep(Duration::from_millis(1300));
        }
        let status = node.json(&["status", id]);
        assert_eq!(source.requests(), 1, "{status}");
        let error = status["sources"][0]["last_error"].as_str().unwrap();
        assert!(error.contains("to be left alone") && status["health"]["state"] == "healthy", "{status}");
        drop(device);
        node.done(&["stop"]);
    }
}

#[test]
fn a_mirror_that_stalls_is_overtaken_by_the_next_one_and_status_counts_that() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let setup = runtime.block_on(setup());
    let (first, second) = (Fault::start(&setup.upstream(), &[]), Fault::start(&setup.upstream(), &[]));
    setup.configure(&format!("[host.\"{}\"]\n[host.\"{}\"]\n", first.url(), second.url()));
    let (node, hosts_dir) = (program::Node::new(), setup.path().join("certs.d"));
    let attached = node.json(&["attach", &setup.name(), "--hosts-dir", hosts_dir.to_str().unwrap()]);
    first.arm("stall:path=/blobs/");
    assert!(std::fs::read(attached["device"].as_str().unwrap()).unwrap() == setup.image.plain.concat());
    let status = node.json(&["status", attached["id"].as_str().unwrap()]);
    let (requests, hedges) = (status["requests"].as_u64().unwrap(), status["hedges"].as_u64().unwrap());
    assert!(hedges >= 1 && requests > hedges && second.requests() >= hedges, "{status}");
    let shown = node.done(&["status", attached["id"].as_str().unwrap()]);
    assert!(shown.contains(&format!("{hedges} of them hedges")), "{shown}");
}
