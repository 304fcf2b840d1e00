//! A node as Kubernetes has it: a real containerd with firstread's snapshotter, a registry, images in it. Clean afterwards,
//! however the test ends.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use firstread::Digest;
use serde_json::{Value, json};

use crate::program::{Node, wait_until};
use crate::registry::Registry;
use crate::snapshotter::Snapshotter;

pub struct Cluster {
    // They end in this order.
    pub snapshotter: Snapshotter,
    pub node: Node,
    pub registry: Registry,
    containerd: Option<Child>,
}

impl Cluster {
    /// All of it, running; the snapshotter has more arguments.
    pub fn start(arguments: &[&str]) -> Self {
        let (registry, node) = (Registry::start(), Node::new());
        let sock = Self::socket_in(&node).display().to_string();
        let mut all = vec!["--containerd", &sock];
        all.extend(arguments);
        let snapshotter = Snapshotter::start(&node, &all);
        let mut new = Self { registry, node, snapshotter, containerd: None };
        new.write_config();
        new.start_containerd();
        new
    }

    fn dir_in(node: &Node) -> PathBuf {
        node.path().join("containerd")
    }

    fn socket_in(node: &Node) -> PathBuf {
        Self::dir_in(node).join("sock")
    }

    /// containerd's socket.
    pub fn socket(&self) -> PathBuf {
        Self::socket_in(&self.node)
    }

    fn write_config(&self) {
        let at = Self::dir_in(&self.node).display().to_string();
        fs::create_dir_all(&at).unwrap();
        let own = include_str!("containerd.toml").replace("@AT@", &at).replace("@MORE@", "");
        let config = format!(
            r#"{own}
[proxy_plugins.firstread]
type = "snapshot"
address = "{snapshotter}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{registry}/plain:1"
stream_server_port = "0"
enable_selinux = false
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "firstread"
[plugins."io.containerd.grpc.v1.cri".cni]
conf_dir = "{at}/cni"
"#,
            registry = self.registry.host(),
            snapshotter = self.snapshotter.socket().display(),
        );
        fs::write(self.node.path().join("containerd.toml"), config).unwrap();
    }

    /// Starts containerd (again); returns when it answers.
    pub fn start_containerd(&mut self) {
        let log = File::options().create(true).append(true).open(self.log_path()).unwrap();
        let child = Command::new("containerd")
            .arg("-c")
            .arg(self.node.path().join("containerd.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("containerd");
        self.containerd = Some(child);
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.ctr(&["version"]).status.success() {
            assert!(Instant::now() < deadline, "containerd does not answer: {}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Starts the snapshotter again; returns when containerd has found it, which waits a while between its tries.
    pub fn resume_snapshotter(&mut self) {
        self.snapshotter.resume(&self.node);
        let list = ["snapshot", "--snapshotter", "firstread", "ls"];
        wait_until("containerd finds the snapshotter", || self.ctr(&list).status.success());
    }

    /// Ends containerd with a signal; its containers go on.
    pub fn kill_containerd(&mut self, signal: &str) {
        if let Some(mut child) = self.containerd.take() {
            let _ = Command::new("kill").args([signal, &child.id().to_string()]).status();
            let _ = child.wait();
        }
    }

    fn log_path(&self) -> PathBuf {
        self.node.path().join("containerd.log")
    }

    /// containerd's log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// A `ctr` that is not started yet.
    pub fn ctr_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("-a").arg(self.socket()).args(arguments).stdin(Stdio::null());
        command
    }

    pub fn ctr(&self, arguments: &[&str]) -> Output {
        self.ctr_command(arguments).output().unwrap()
    }

    /// Runs `ctr`, which must succeed; its output.
    pub fn ctr_done(&self, arguments: &[&str]) -> String {
        let output = self.ctr(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ctr {arguments:?}: {stderr}\nsnapshotter: {}", self.snapshotter.log());
        String::from_utf8(output.stdout).unwrap()
    }

    /// `ctr run` of a script in a container of `image`, with more options; the container is removed afterwards. Not started yet.
    pub fn container(&self, image: &str, id: &str, script: &str, options: &[&str]) -> Command {
        let mut command = self.ctr_command(&["run", "--rm", "--net-host", "--snapshotter", "firstread"]);
        command.args(options).args([image, &self.id(id), "sh", "-c", script]);
        command
    }

    /// Runs a script in a container of `image`, which must succeed; what it printed.
    pub fn run(&self, image: &str, id: &str, script: &str) -> String {
        let output = self.container(image, id, script, &[]).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{id}, {script}: {stderr}\nsnapshotter: {}", self.snapshotter.log());
        String::from_utf8(output.stdout).unwrap()
    }

    /// Starts a container that stays, with a script that makes `/done` when it has done its work; returns when it has.
    pub fn run_until_done(&self, image: &str, id: &str, script: &str) {
        let (id, script) = (self.id(id), format!("{script}; touch /done; exec sleep 100000"));
        self.ctr_done(&["run", "-d", "--net-host", "--snapshotter", "firstread", image, &id, "sh", "-c", &script]);
        let looks = ["task", "exec", "--exec-id", "look", &id, "cat", "/done"];
        wait_until("the container has done its work", || self.ctr(&looks).status.success());
    }

    /// Pulls an image by `firstread pull`; its answer.
    pub fn pull(&self, name: &str) -> Value {
        let socket = self.socket();
        self.node.json(&["pull", "--containerd", socket.to_str().unwrap(), &self.image(name)])
    }

    /// A name in the registry.
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.registry.host())
    }

    /// Pushes an ordinary image `NAME:plain` (and `plain:1` when it is the first), and what `firstread build` makes of it,
    /// `NAME:1`. It has a shell, `cat`, `rm`, `sleep` and `touch`, `/data/N` of 700 000 random bytes each, and `/name`.
    pub fn publish(&self, name: &str, files: usize) {
        let layout = ordinary(self.node.path(), name, files);
        for tag in [format!("{name}:plain"), "plain:1".to_owned()] {
            let copied = Command::new("skopeo")
                .args(["copy", "--quiet", "--dest-tls-verify=false"])
                .arg(format!("oci:{}:1", layout.display()))
                .arg(format!("docker://{}", self.image(&tag)))
                .output()
                .unwrap();
            assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
        }
        self.build(&self.image(&format!("{name}:plain")), &self.image(&format!("{name}:1")));
        let _ = fs::remove_dir_all(layout);
    }

    /// Makes a firstread image.
    pub fn build(&self, source: &str, destination: &str) {
        let built = Command::new(env!("CARGO_BIN_EXE_firstread-build"))
            .args(["build", "--level", "1", "--no-cache", "--quiet", source, destination])
            .output()
            .unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    }

    /// A container's id that no other test has: runc keeps all of a machine's in one place.
    pub fn id(&self, name: &str) -> String {
        format!("{name}-{}", self.registry.host().rsplit(':').next().unwrap())
    }

    /// The manifest of an image in the registry.
    pub fn manifest(&self, name: &str) -> Value {
        let output = Command::new("skopeo")
            .args(["inspect", "--raw", "--tls-verify=false", &format!("docker://{}", self.image(name))])
            .output()
            .unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// What the registry was asked for since its log had `from` bytes: whole lines `GET /v2/… 200 BYTES`.
    pub fn fetched(&self, from: usize) -> Vec<(String, u64)> {
        let log = self.registry.log();
        let lines = log[from..].lines().filter_map(|line| {
            let (_, rest) = line.split_once("\"GET ")?;
            let (path, rest) = rest.split_once(' ')?;
            let mut fields = rest.split_once("\" ")?.1.split(' ');
            let (status, bytes) = (fields.next()?, fields.next()?);
            status.starts_with('2').then(|| (path.to_owned(), bytes.parse().unwrap_or(0)))
        });
        lines.collect()
    }

    /// How long the registry's log is.
    pub fn mark(&self) -> usize {
        self.registry.log().len()
    }

    /// What is left on this machine of snapshots: mounts, devices, directories.
    pub fn remains(&self) -> (Vec<String>, usize, usize) {
        let state = self.node.root().join("snapshotter/default");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let inside = |line: &&str| line.contains(&state.display().to_string());
        let mounts = mounts.lines().filter(inside).map(str::to_owned).collect();
        let devices = self.node.json(&["list"]).as_array().unwrap().len();
        let dirs = ["snapshots", "removed", "new"].map(|part| fs::read_dir(state.join(part)).unwrap().count());
        (mounts, devices, dirs.iter().sum())
    }

    /// Waits until nothing is left.
    pub fn nothing_remains(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.remains() != (Vec::new(), 0, 0) {
            assert!(Instant::now() < deadline, "left: {:?} {}", self.remains(), self.node.done(&["list"]));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Removes all containers, images and what they needed.
    pub fn remove_all(&self) {
        for namespace in ["default", "k8s.io"] {
            let ctr = |arguments: &[&str]| {
                let mut all = vec!["-n", namespace];
                all.extend(arguments);
                self.ctr_done(&all)
            };
            for id in ctr(&["task", "ls", "-q"]).lines() {
                let _ = self.ctr(&["-n", namespace, "task", "kill", "-s", "KILL", id]);
                let _ = self.ctr(&["-n", namespace, "task", "rm", "-f", id]);
            }
            for id in ctr(&["container", "ls", "-q"]).lines() {
                let _ = self.ctr(&["-n", namespace, "container", "rm", id]);
            }
            let snapshots = ctr(&["snapshot", "--snapshotter", "firstread", "ls"]);
            for key in snapshots.lines().filter(|line| line.ends_with("Active") || line.ends_with("View")) {
                let key = key.split_whitespace().next().unwrap();
                let _ = self.ctr(&["-n", namespace, "snapshot", "--snapshotter", "firstread", "rm", key]);
            }
            for name in ctr(&["image", "ls", "-q"]).lines() {
                ctr(&["image", "rm", "--sync", name]);
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let last: Vec<&str> = log.lines().filter(|line| line.contains("level=error")).collect();
            eprintln!("containerd's errors:\n{}", last.join("\n"));
        }
        for namespace in ["default", "k8s.io"] {
            let output = self.ctr(&["-n", namespace, "task", "ls", "-q"]);
            for id in String::from_utf8_lossy(&output.stdout).lines() {
                let _ = self.ctr(&["-n", namespace, "task", "kill", "-s", "KILL", id]);
                let _ = self.ctr(&["-n", namespace, "task", "rm", "-f", id]);
            }
        }
        self.kill_containerd("-TERM");
        // Shims of tasks that could not be asked any more: those whose command line has this directory.
        let dir = self.node.path().display().to_string();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            if line.contains("containerd-shim") && line.contains(&dir) {
                let pid = entry.file_name().into_string().unwrap();
                let _ = Command::new("kill").args(["-9", &pid]).status();
            }
        }
    }
}

/// An OCI layout with an ordinary image `1` of one layer.
fn ordinary(dir: &Path, name: &str, files: usize) -> PathBuf {
    let (tree, layout) = (dir.join(format!("{name}-tree")), dir.join(format!("{name}-layout")));
    for part in ["bin", "data", "etc", "proc", "sys", "dev", "tmp", "run"] {
        fs::create_dir_all(tree.join(part)).unwrap();
    }
    let mut libraries = BTreeSet::new();
    let programs = [("sh", "dash"), ("cat", "cat"), ("rm", "rm"), ("sleep", "sleep"), ("touch", "touch")];
    for (program, path) in programs.map(|(program, name)| (program, format!("/bin/{name}"))) {
        fs::copy(&path, tree.join("bin").join(program)).unwrap();
        let linked = Command::new("ldd").arg(&path).output().unwrap();
        let text = String::from_utf8(linked.stdout).unwrap();
        libraries.extend(text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned));
    }
    for library in libraries {
        let to = tree.join(library.trim_start_matches('/'));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(&library, to).unwrap();
    }
    fs::write(tree.join("name"), format!("{name}\n")).unwrap();
    fs::write(tree.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n").unwrap();
    fs::write(tree.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n").unwrap();
    let mut random = name.bytes().fold(0x9e37_79b9_7f4a_7c15u64, |hash, byte| hash.rotate_left(7) ^ u64::from(byte));
    for number in 0..files {
        let mut bytes = Vec::with_capacity(700_008);
        while bytes.len() < 700_000 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            bytes.extend_from_slice(&random.to_le_bytes());
        }
        fs::write(tree.join("data").join(number.to_string()), bytes).unwrap();
    }
    let tar = Command::new("tar")
        .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@1700000000", "-C"])
        .arg(&tree)
        .args(["-c", "."])
        .output()
        .unwrap();
    assert!(tar.status.success());
    fs::remove_dir_all(&tree).unwrap();
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(layout.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        (digest.to_string(), bytes.len())
    };
    let (layer, layer_bytes) = put(&tar.stdout);
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sh", "-c", "cat /name; echo ready; exec sleep 100000"]},
        "rootfs": {"type": "layers", "diff_ids": [layer]},
    });
    let (config, config_bytes) = put(config.to_string().as_bytes());
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_bytes},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer, "size": layer_bytes}],
    });
    let (manifest, manifest_bytes) = put(manifest.to_string().as_bytes());
    let index = json!({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest, "size": manifest_bytes,
        "annotations": {"org.opencontainers.image.ref.name": "1"},
    }]});
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    layout
}
