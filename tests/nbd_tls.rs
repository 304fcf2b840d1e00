//! NBD over TLS: libnbd and QEMU with certificates; clients without TLS, or without the certificate that is asked for, get
//! nothing.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "common/file_device.rs"]
mod file_device;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use file_device::{FileDevice, write_reference};
use firstread::attach::nbd::proto::{self, option};
use firstread::attach::nbd::{Export, Exports, NbdListener, NbdOptions, Tls, serve};
use tokio::runtime::Runtime;

/// An authority, a certificate of a server and one of a client, each in the files that libnbd and QEMU look for.
struct Certificates {
    dir: tempfile::TempDir,
}

impl Certificates {
    fn make() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let openssl = |arguments: &[&str]| {
            let output = Command::new("openssl").args(arguments).current_dir(dir.path()).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        };
        let new_key = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
        openssl(
            &[
                &new_key[..],
                &["-x509", "-days", "30", "-subj", "/CN=authority", "-keyout", "ca-key.pem", "-out", "ca-cert.pem"],
            ]
            .concat(),
        );
        for (name, extensions) in [
            ("server", "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n"),
            ("client", "extendedKeyUsage=clientAuth\n"),
        ] {
            let (key, request, certificate) =
                (format!("{name}-key.pem"), format!("{name}.csr"), format!("{name}-cert.pem"));
            std::fs::write(dir.path().join("extensions"), extensions).unwrap();
            openssl(&[&new_key[..], &["-subj", &format!("/CN={name}"), "-keyout", &key, "-out", &request]].concat());
            openssl(&[
                "x509",
                "-req",
                "-in",
                &request,
                "-CA",
                "ca-cert.pem",
                "-CAkey",
                "ca-key.pem",
                "-CAcreateserial",
                "-days",
                "30",
                "-extfile",
                "extensions",
                "-out",
                &certificate,
            ]);
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn tls(&self, clients: Option<&str>) -> Tls {
        let clients = clients.map(|name| self.path(name));
        Tls::load(&self.path("server-cert.pem"), &self.path("server-key.pem"), clients.as_deref()).unwrap()
    }

    /// A directory with the authority only: a client that shows nothing of itself.
    fn anonymous(&self) -> PathBuf {
        let dir = self.path("anonymous");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::copy(self.path("ca-cert.pem"), dir.join("ca-cert.pem")).unwrap();
        dir
    }
}

struct Server {
    address: SocketAddr,
    disk: PathBuf,
    _dir: tempfile::TempDir,
    _runtime: Runtime,
}

fn start(tls: Tls) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let disk = write_reference(dir.path().join("disk"), 4096, |block| block % 100 > 70);
    let device = FileDevice::open(&disk);
    device.make_remote(1 << 20..3 << 20);
    let mut exports = Exports::new();
    exports.add(Export { name: "disk".to_owned(), description: String::new(), device }).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let listener = runtime.block_on(async { NbdListener::tcp("127.0.0.1:0".parse().unwrap()) }).unwrap();
    let address = listener.tcp_address().unwrap();
    let options = NbdOptions { handshake: Duration::from_secs(5), ..NbdOptions::default() };
    runtime.spawn(serve(listener.with_tls(tls), exports, options, std::future::pending()));
    Server { address, disk, _dir: dir, _runtime: runtime }
}

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new("timeout").arg("60").arg(program).args(arguments).output().unwrap()
}

fn uri(server: &Server, certificates: &Path) -> String {
    format!("nbds://localhost:{}/disk?tls-certificates={}", server.address.port(), certificates.display())
}

/// A client that writes what it likes.
struct Client {
    stream: TcpStream,
}

impl Client {
    fn greet(mut stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&[0, 0, 0, 3]).unwrap();
        Self { stream }
    }

    fn send_option(&mut self, number: u32, payload: &[u8]) {
        let mut bytes = proto::OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&number.to_be_bytes());
        bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        bytes.extend_from_slice(payload);
        self.stream.write_all(&bytes).unwrap();
    }

    /// Sends an option: the kind of the reply.
    fn option(&mut self, number: u32, payload: &[u8]) -> u32 {
        self.send_option(number, payload);
        let mut header = [0; 20];
        self.stream.read_exact(&mut header).unwrap();
        let [.., k0, k1, k2, k3, l0, l1, l2, l3] = header;
        let mut text = vec![0; u32::from_be_bytes([l0, l1, l2, l3]) as usize];
        self.stream.read_exact(&mut text).unwrap();
        u32::from_be_bytes([k0, k1, k2, k3])
    }
}

fn assert_copies(server: &Server, certificates: &Path) {
    let copy = server.disk.with_extension("copy");
    let output = run("nbdcopy", &[&uri(server, certificates), copy.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(&server.disk).unwrap(), "the copy differs");
}

#[test]
fn libnbd_and_qemu_read_over_tls_with_and_without_certificates_of_their_own() {
    let certificates = Certificates::make();
    for clients in [None, Some("ca-cert.pem")] {
        let server = start(certificates.tls(clients));
        assert_copies(&server, certificates.dir.path());
        let output = run("nbdinfo", &["--json", &uri(&server, certificates.dir.path())]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains("\"TLS\": true"), "{text}");
        assert!(text.contains("\"structured\": true"), "{text}");
        let credentials = format!("tls-creds-x509,id=tls,endpoint=client,dir={}", certificates.dir.path().display());
        let image = format!("driver=nbd,host=localhost,port={},export=disk,tls-creds=tls", server.address.port());
        let plain = format!("driver=raw,file.driver=file,file.filename={}", server.disk.display());
        let output = run("qemu-img", &["compare", "--object", &credentials, "--image-opts", &image, &plain]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn a_client_without_the_certificate_that_is_asked_for_gets_nothing() {
    let certificates = Certificates::make();
    let stranger = Certificates::make();
    let anonymous = certificates.anonymous();
    // Without the demand it is served.
    assert_copies(&start(certificates.tls(None)), &anonymous);
    let server = start(certificates.tls(Some("ca-cert.pem")));
    std::fs::copy(certificates.path("ca-cert.pem"), stranger.path("ca-cert.pem")).unwrap();
    for dir in [anonymous.as_path(), stranger.dir.path()] {
        assert!(!run("nbdinfo", &[&uri(&server, dir)]).status.success(), "{}", dir.display());
    }
    assert_copies(&server, certificates.dir.path());
}

/// A client that does not believe the server leaves; one that speaks no TLS is told that it has to.
#[test]
fn without_tls_nothing_is_told_of_the_exports() {
    let certificates = Certificates::make();
    let server = start(certificates.tls(None));
    assert!(!run("nbdinfo", &[&uri(&server, &Certificates::make().anonymous())]).status.success());
    let plain = format!("nbd://localhost:{}/disk", server.address.port());
    for arguments in [vec![plain.as_str()], vec!["--list", plain.as_str()]] {
        let output = run("nbdinfo", &arguments);
        assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    let output = run("qemu-img", &["info", &plain]);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && errors.contains("TLS"), "{errors}");

    const TLS_REQUIRED: u32 = 1 << 31 | 5;
    let mut client = Client::greet(TcpStream::connect(server.address).unwrap());
    for number in [option::LIST, option::GO, option::INFO, option::STRUCTURED_REPLY, option::SET_META_CONTEXT, 99] {
        assert_eq!(client.option(number, b"\0\0\0\x04disk\0\0"), TLS_REQUIRED, "option {number}");
    }
    // The old way to choose an export has no errors: the connection ends.
    client.send_option(option::EXPORT_NAME, b"disk");
    assert_eq!(client.stream.read(&mut [0; 64]).unwrap_or(0), 0);
}

/// What a client sends behind its wish for TLS, before TLS, is not taken for an option.
#[test]
fn options_before_tls_are_not_smuggled_into_it() {
    let certificates = Certificates::make();
    let server = start(certificates.tls(None));
    let mut client = Client::greet(TcpStream::connect(server.address).unwrap());
    client.send_option(option::STARTTLS, &[]);
    client.send_option(option::EXPORT_NAME, b"disk");
    let mut rest = Vec::new();
    let _ = client.stream.read_to_end(&mut rest);
    let acknowledged = 20;
    assert!(rest.len() < acknowledged + 64, "{} bytes were sent", rest.len());
    assert!(!rest.windows(8).any(|bytes| bytes == (16_u64 << 20).to_be_bytes()), "the size was told");
    // Half a handshake, and then silence: the server gives up and serves others.
    let mut silent = Client::greet(TcpStream::connect(server.address).unwrap());
    silent.send_option(option::STARTTLS, &[]);
    silent.stream.write_all(&[22, 3, 1, 2]).unwrap();
    assert_copies(&server, &certificates.anonymous());
    silent.stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut rest = Vec::new();
    silent.stream.read_to_end(&mut rest).unwrap();
}

#[test]
fn files_that_are_no_certificates_are_named() {
    let certificates = Certificates::make();
    let (certificate, key) = (certificates.path("server-cert.pem"), certificates.path("server-key.pem"));
    let absent = certificates.path("absent.pem");
    for (certificate, key, clients, named) in [
        (&absent, &key, None, "absent.pem"),
        (&certificate, &absent, None, "absent.pem"),
        (&key, &key, None, "server-key.pem"),
        (&certificate, &certificate, None, "server-cert.pem"),
        (&certificate, &certificates.path("client-key.pem"), None, "server-cert.pem"),
        (&certificate, &key, Some(&key), "server-key.pem"),
    ] {
        let error = Tls::load(certificate, key, clients.map(PathBuf::as_path)).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}
