//! An NBD server in the test's process.
#![allow(dead_code, clippy::unwrap_used)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use firstread::attach::nbd::{Export, Exports, NbdListener, NbdOptions, serve};
use firstread::device::Device;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

pub struct Server {
    pub path: PathBuf,
    pub tcp: SocketAddr,
    stop: Vec<oneshot::Sender<()>>,
    runtime: Option<Runtime>,
}

impl Server {
    /// Serves `device` as `disk`, on a unix socket in `dir` and on a TCP port.
    pub fn start(dir: &Path, device: Arc<dyn Device>, options: NbdOptions) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let path = dir.join("nbd.sock");
        let mut exports = Exports::new();
        exports.add(Export { name: "disk".to_owned(), description: "a test disk".to_owned(), device }).unwrap();
        let guard = runtime.enter();
        let unix = NbdListener::unix(&path).unwrap();
        let tcp_listener = NbdListener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let tcp = tcp_listener.tcp_address().unwrap();
        drop(guard);
        let mut stop = Vec::new();
        for listener in [unix, tcp_listener] {
            let (sender, receiver) = oneshot::channel::<()>();
            stop.push(sender);
            let exports = exports.clone();
            runtime.spawn(async move {
                serve(listener, exports, options, async {
                    let _ = receiver.await;
                })
                .await
                .unwrap();
            });
        }
        Self { path, tcp, stop, runtime: Some(runtime) }
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.path.display())
    }

    /// Stops serving and waits until the socket's file is gone.
    pub fn stop(&mut self) {
        self.stop.clear();
        for _ in 0..500 {
            if !self.path.exists() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(!self.path.exists(), "the socket's file outlives the server");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Runs a program that must succeed; its standard output.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new("timeout").arg("60").arg(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{text}\n{errors}", output.status);
    text
}

/// Runs a Python script with libnbd's module; `h` is a handle, `uri` and `sock` name the server.
pub fn libnbd(server: &Server, script: &str) -> String {
    let prelude = format!(
        "import nbd, errno, sys\nuri = {:?}\nsock = {:?}\nh = nbd.NBD()\n",
        server.uri(),
        server.path.display().to_string()
    );
    run("/usr/bin/python3", &["-c", &(prelude + script)])
}
