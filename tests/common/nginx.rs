//! A real nginx with a configuration of the test's, and the certificates that it needs. Ends with its value.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub struct Nginx {
    child: Child,
    dir: tempfile::TempDir,
    port: u16,
}

impl Nginx {
    /// Runs with `servers` inside the block `http`; PORT and DIR are replaced.
    pub fn start(servers: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = free_port();
        make_certificates(dir.path());
        let path = dir.path().display().to_string();
        let config = format!(
            "daemon off; worker_processes 1; pid DIR/pid; error_log DIR/error.log; events {{}}\n\
             http {{ access_log DIR/access.log combined; client_body_temp_path DIR/t1; proxy_temp_path DIR/t2;\n\
             fastcgi_temp_path DIR/t3; uwsgi_temp_path DIR/t4; scgi_temp_path DIR/t5; client_max_body_size 0;\n{servers} }}"
        );
        let config = config.replace("DIR", &path).replace("PORT", &port.to_string());
        std::fs::write(dir.path().join("nginx.conf"), config).unwrap();
        let child = Command::new("nginx")
            .args(["-p", &path, "-c", &format!("{path}/nginx.conf"), "-e", &format!("{path}/error.log")])
            .env("PATH", format!("/usr/sbin:{}", std::env::var("PATH").unwrap()))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("nginx runs (Debian package nginx-light)");
        let nginx = Self { child, dir, port };
        wait_for(port, || std::fs::read_to_string(nginx.path().join("error.log")).unwrap_or_default());
        nginx
    }

    /// A TLS server in front of `upstream` (`http://HOST:PORT`), with more lines inside its block.
    pub fn tls(upstream: &str, more: &str) -> Self {
        Self::start(&format!(
            "server {{ listen 127.0.0.1:PORT ssl http2; ssl_certificate DIR/cert.pem; ssl_certificate_key DIR/key.pem;\n\
             {more}\nlocation / {{ proxy_pass {upstream}; proxy_set_header Host $http_host; }} }}"
        ))
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The certificate of the authority of its own certificate, and of those of clients.
    pub fn ca(&self) -> PathBuf {
        self.path().join("ca.pem")
    }

    /// One line a request, combined log format.
    pub fn log(&self) -> String {
        // It is written after the answer.
        std::thread::sleep(Duration::from_millis(100));
        std::fs::read_to_string(self.path().join("access.log")).unwrap_or_default()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // The master ends its workers when it is asked to; killed, it would leave them behind.
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let _ = self.child.wait();
    }
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Waits until somebody listens on `port`.
pub fn wait_for(port: u16, log: impl Fn() -> String) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "nobody listens on {port}: {}", log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// An authority (`ca.pem`), a certificate of a server on 127.0.0.1 (`cert.pem`, `key.pem`), and one of a client
/// (`client.pem`, `client.key`).
pub fn make_certificates(dir: &Path) {
    let script = "new='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes'
        openssl req -x509 $new -days 2 -subj /CN=authority -keyout ca.key -out ca.pem -addext basicConstraints=critical,CA:TRUE
        openssl req $new -subj /CN=server -keyout key.pem -out csr.pem
        printf 'subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n' > ext
        openssl x509 -req -in csr.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out cert.pem
        openssl req $new -subj /CN=node -keyout client.key -out client.csr
        openssl x509 -req -in client.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out client.pem";
    let output = Command::new("sh").args(["-ec", script]).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
