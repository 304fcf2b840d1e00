//! TLS for clients: certificates from files.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use crate::error::{Error, Result};

/// Largest file of certificates or keys in bytes.
const FILE_MAX: u64 = 1 << 20;

/// What a server shows to clients, and demands of them.
#[derive(Clone)]
pub struct Tls {
    pub(super) acceptor: TlsAcceptor,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let failed = |error| Error::io(format!("read {}", path.display()), error);
    if fs::metadata(path).map_err(failed)?.len() > FILE_MAX {
        return Err(Error::invalid("certificate file", format!("{} exceeds {FILE_MAX} bytes", path.display())));
    }
    fs::read(path).map_err(failed)
}

fn invalid(path: &Path, reason: impl std::fmt::Display) -> Error {
    Error::invalid("certificate file", format!("{}: {reason}", path.display()))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let found = CertificateDer::pem_slice_iter(&read(path)?).collect::<std::result::Result<Vec<_>, _>>();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(invalid(path, "it has no certificate in PEM form")),
        Err(error) => Err(invalid(path, error)),
    }
}

impl Tls {
    /// Reads the server's certificate with its chain, and its key, in PEM form. With `clients`, only those are served whose
    /// certificate an authority in that file has signed.
    ///
    /// # Errors
    /// A file that can't be read, or is not what it should be.
    pub fn load(certificate: &Path, key: &Path, clients: Option<&Path>) -> Result<Self> {
        let chain = certificates(certificate)?;
        let secret = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|error| invalid(key, error))?;
        let builder = ServerConfig::builder();
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for authority in certificates(path)? {
                    roots.add(authority).map_err(|error| invalid(path, error))?;
                }
                let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build();
                builder.with_client_cert_verifier(verifier.map_err(|error| invalid(path, error))?)
            }
        };
        let config = builder.with_single_cert(chain, secret).map_err(|error| invalid(certificate, error))?;
        Ok(Self { acceptor: TlsAcceptor::from(Arc::new(config)) })
    }
}

/// An error of the handshake, with what most likely is the reason.
pub(super) fn failed(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("TLS: {error}"))
}
