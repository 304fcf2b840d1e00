//! `firstread snapshotter` of a node, and a client of it that speaks as containerd does.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use firstread::snapshot::api::Api;
use firstread::snapshot::wire::snapshots::{
    CleanupRequest, CommitRequest, Info, InfoResponse, KeyRequest, ListRequest, ListResponse, MountsResponse,
    PrepareRequest, SERVICE, UpdateRequest, UsageResponse,
};
use firstread::snapshot::wire::{Empty, FieldMask, Mount};
use tokio::runtime::Runtime;
use tonic::{Code, Status};

use crate::program::Node;

/// A running snapshotter and a client of it.
pub struct Snapshotter {
    child: Option<Child>,
    socket: PathBuf,
    log: PathBuf,
    arguments: Vec<String>,
    runtime: Runtime,
    api: Api,
}

pub type Answer<T> = Result<T, Status>;

impl Snapshotter {
    /// The snapshotter of `node`, started with more arguments.
    pub fn start(node: &Node, arguments: &[&str]) -> Self {
        let socket = node.path().join("snapshotter.sock");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let api = runtime.block_on(async { Api::new(&socket) }).unwrap();
        let arguments = arguments.iter().map(|&text| text.to_owned()).collect();
        let log = node.path().join("snapshotter.log");
        let mut new = Self { child: None, socket, log, arguments, runtime, api };
        new.resume(node);
        new
    }

    /// Starts it (again); returns when it answers.
    pub fn resume(&mut self, node: &Node) {
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        let mut command =
            node.command(&["snapshotter", "--log", "info,firstread=debug", "--listen", self.socket.to_str().unwrap()]);
        command.args(&self.arguments).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().unwrap());
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(&self.socket).is_err() {
            assert!(Instant::now() < deadline, "the snapshotter does not listen: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends it with a signal.
    pub fn kill(&mut self, signal: &str) {
        if let Some(mut child) = self.child.take() {
            let _ = Command::new("kill").args([signal, &child.id().to_string()]).status();
            let _ = child.wait();
        }
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its log.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn call<Q: prost::Message + 'static, A: prost::Message + Default + 'static>(
        &self,
        method: &str,
        request: Q,
    ) -> Answer<A> {
        self.runtime.block_on(self.api.call(SERVICE, method, request))
    }

    pub fn prepare(&self, key: &str, parent: &str) -> Answer<Vec<Mount>> {
        self.prepare_labelled(key, parent, &[])
    }

    pub fn prepare_labelled(&self, key: &str, parent: &str, labels: &[(&str, &str)]) -> Answer<Vec<Mount>> {
        let request = new_snapshot(key, parent, labels);
        self.call("Prepare", request).map(|answer: MountsResponse| answer.mounts)
    }

    pub fn view(&self, key: &str, parent: &str) -> Answer<Vec<Mount>> {
        self.call("View", new_snapshot(key, parent, &[])).map(|answer: MountsResponse| answer.mounts)
    }

    pub fn mounts(&self, key: &str) -> Answer<Vec<Mount>> {
        self.call("Mounts", of(key)).map(|answer: MountsResponse| answer.mounts)
    }

    pub fn commit(&self, name: &str, key: &str) -> Answer<()> {
        self.commit_labelled(name, key, &[])
    }

    pub fn commit_labelled(&self, name: &str, key: &str, labels: &[(&str, &str)]) -> Answer<()> {
        let (name, key) = (name.to_owned(), key.to_owned());
        let request = CommitRequest { snapshotter: String::new(), name, key, labels: map(labels) };
        self.call("Commit", request).map(|Empty {}| ())
    }

    pub fn remove(&self, key: &str) -> Answer<()> {
        self.call("Remove", of(key)).map(|Empty {}| ())
    }

    pub fn stat(&self, key: &str) -> Answer<Info> {
        self.call("Stat", of(key)).map(|answer: InfoResponse| answer.info.unwrap())
    }

    pub fn usage(&self, key: &str) -> Answer<UsageResponse> {
        self.call("Usage", of(key))
    }

    pub fn cleanup(&self) -> Answer<()> {
        self.call("Cleanup", CleanupRequest::default()).map(|Empty {}| ())
    }

    pub fn update(&self, info: Info, paths: &[&str]) -> Answer<Info> {
        let paths = paths.iter().map(|&path| path.to_owned()).collect();
        let request =
            UpdateRequest { snapshotter: String::new(), info: Some(info), update_mask: Some(FieldMask { paths }) };
        self.call("Update", request).map(|answer: InfoResponse| answer.info.unwrap())
    }

    pub fn list(&self, filters: &[&str]) -> Answer<Vec<Info>> {
        let filters = filters.iter().map(|&filter| filter.to_owned()).collect();
        let request = ListRequest { snapshotter: String::new(), filters };
        self.runtime.block_on(async {
            let mut pages = self.api.stream::<_, ListResponse>(SERVICE, "List", request).await?;
            let mut all = Vec::new();
            while let Some(page) = pages.message().await? {
                all.extend(page.info);
            }
            Ok(all)
        })
    }

    /// A snapshot with what `script` makes in it, based on `parent`, committed as `name`.
    pub fn layer(&self, dir: &Path, name: &str, parent: &str, script: &str) {
        let key = format!("making {name}");
        let mounts = self.prepare(&key, parent).unwrap();
        Mounted::new(&mounts, dir).run(script);
        self.commit(name, &key).unwrap();
    }

    /// Another connection.
    pub fn reconnect(&mut self) {
        self.api = self.runtime.block_on(async { Api::new(&self.socket) }).unwrap();
    }
}

impl Drop for Snapshotter {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the snapshotter's log:\n{}", self.log());
        }
        self.kill("-TERM");
    }
}

fn of(key: &str) -> KeyRequest {
    KeyRequest { snapshotter: String::new(), key: key.to_owned() }
}

fn map(labels: &[(&str, &str)]) -> HashMap<String, String> {
    labels.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
}

fn new_snapshot(key: &str, parent: &str, labels: &[(&str, &str)]) -> PrepareRequest {
    let (key, parent) = (key.to_owned(), parent.to_owned());
    PrepareRequest { snapshotter: String::new(), key, parent, labels: map(labels) }
}

/// Panics unless the call failed with `code`.
pub fn refused<T: std::fmt::Debug>(answer: Answer<T>, code: Code) {
    match answer {
        Err(status) if status.code() == code => {}
        other => panic!("{code:?} was expected, not {other:?}"),
    }
}

/// Mounts as containerd makes them; undone when dropped.
pub struct Mounted(PathBuf);

impl Mounted {
    /// Mounts all of `mounts` on `dir`.
    pub fn new(mounts: &[Mount], dir: &Path) -> Self {
        fs::create_dir_all(dir).unwrap();
        assert!(!mounts.is_empty(), "nothing to mount");
        for mount in mounts {
            let (options, at) = compact(&mount.options);
            let mut command = Command::new("mount");
            match mount.r#type.as_str() {
                "bind" => command.arg("--bind"),
                other => command.args(["-t", other]),
            };
            let options: Vec<String> = options.into_iter().filter(|option| option != "rbind").collect();
            command.arg("-o").arg(options.join(",")).arg(&mount.source).arg(dir).current_dir(at);
            let output = command.stdin(Stdio::null()).output().unwrap();
            assert!(output.status.success(), "{mount:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Self(dir.to_owned())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.path(name)).ok()
    }

    /// Runs a script in it, which must succeed.
    pub fn run(&self, script: &str) {
        let output = Command::new("sh").args(["-euc", script]).current_dir(&self.0).output().unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(&self.0).status();
        if !std::thread::panicking() {
            assert!(done.unwrap().success());
        }
    }
}

/// Options that exceed a page are shortened as containerd does: the lower directories become relative.
fn compact(options: &[String]) -> (Vec<String>, PathBuf) {
    let whole: usize = options.iter().map(|option| option.len() + 1).sum();
    let lowers = options.iter().find_map(|option| option.strip_prefix("lowerdir="));
    let (Some(lowers), true) = (lowers, whole > 4000) else { return (options.to_vec(), "/".into()) };
    let common = Path::new(lowers.split(':').next().unwrap()).ancestors().nth(2).unwrap().to_owned();
    let prefix = format!("{}/", common.display());
    let relative: Vec<&str> = lowers.split(':').map(|lower| lower.strip_prefix(&prefix).unwrap()).collect();
    let options = options.iter().map(|option| match option.starts_with("lowerdir=") {
        true => format!("lowerdir={}", relative.join(":")),
        false => option.clone(),
    });
    (options.collect(), common)
}
