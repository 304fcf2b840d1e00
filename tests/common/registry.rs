//! A real docker-registry on a free loopback port, with its data in a temporary directory. Ends with its value.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// User name and password that [`Registry::with_password`] accepts.
pub const USER: &str = "user";
pub const PASSWORD: &str = "secret";
/// bcrypt of [`PASSWORD`], at the lowest cost.
const PASSWORD_HASH: &str = "$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW";

pub struct Registry {
    child: Option<Child>,
    dir: tempfile::TempDir,
    port: u16,
}

impl Registry {
    /// A registry that lets everybody read and write.
    pub fn start() -> Self {
        Self::launch("")
    }

    /// A registry that asks for [`USER`] and [`PASSWORD`].
    pub fn with_password() -> Self {
        Self::launch("auth:\n  htpasswd:\n    realm: test\n    path: HTPASSWD\n")
    }

    /// A registry that speaks TLS with a certificate for 127.0.0.1 by an authority of its own, and asks for [`USER`] and
    /// [`PASSWORD`].
    pub fn with_tls() -> Self {
        Self::launch(
            "  tls:\n    certificate: DIR/cert.pem\n    key: DIR/key.pem\nauth:\n  htpasswd:\n    realm: test\n    path: HTPASSWD\n",
        )
    }

    /// The certificate of the authority of [`Registry::with_tls`].
    pub fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    fn make_certificates(dir: &Path) {
        let script = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=authority \
                      -keyout ca.key -out ca.pem -addext basicConstraints=critical,CA:TRUE
            openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=registry -keyout key.pem -out csr.pem
            printf 'subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n' > ext
            openssl x509 -req -in csr.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out cert.pem";
        let output = Command::new("sh").args(["-ec", script]).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn launch(more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let htpasswd = dir.path().join("htpasswd");
        std::fs::write(&htpasswd, format!("{USER}:{PASSWORD_HASH}\n")).unwrap();
        let config = format!(
            "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: false\nstorage:\n  filesystem:\n    \
             rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: 127.0.0.1:{port}\n{}",
            dir.path().join("data").display(),
            more.replace("HTPASSWD", &htpasswd.display().to_string()).replace("DIR", &dir.path().display().to_string()),
        );
        std::fs::write(dir.path().join("config.yml"), config).unwrap();
        if more.contains("tls:") {
            Self::make_certificates(dir.path());
        }
        let mut registry = Self { child: None, dir, port };
        registry.resume();
        registry
    }

    /// Starts it (again) on its port, with its data; returns when it answers.
    pub fn resume(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.log_path()).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(self.dir.path().join("config.yml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("docker-registry runs (Debian package docker-registry)");
        self.child = Some(child);
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(self.host()).is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends the process; the data stays.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// `HOST:PORT`.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The file that holds a blob, to look at or to damage; `hex` are the digest's digits.
    pub fn blob_path(&self, hex: &str) -> PathBuf {
        let blobs = self.dir.path().join("data/docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(hex).join("data")
    }

    /// The registry's own log, with one line a request (combined log format).
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// The log when nothing has been added to it for a while: a request is logged when it has ended, which its client may
    /// know before.
    pub fn settled_log(&self) -> String {
        let mut log = self.log();
        loop {
            std::thread::sleep(Duration::from_millis(300));
            let now = self.log();
            if now == log {
                return log;
            }
            log = now;
        }
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// A docker config.json with the credentials.
    pub fn docker_config(&self) -> PathBuf {
        let path = self.dir.path().join("docker-config.json");
        write_docker_config(&path, &self.host(), USER, PASSWORD);
        path
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Writes a config.json with a password for `host`.
pub fn write_docker_config(path: &Path, host: &str, user: &str, password: &str) {
    use base64::Engine;
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    std::fs::write(path, format!(r#"{{"auths":{{"{host}":{{"auth":"{auth}"}}}}}}"#)).unwrap();
}
