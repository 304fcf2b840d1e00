//! Credentials: docker's config.json and its helpers, read anew for every token so that rotated ones are picked up.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use docker_credential::{CredentialRetrievalError, DockerCredential};

use crate::error::{Error, Result};

/// Largest config.json that is read, in bytes.
const MAX_CONFIG: u64 = 1 << 20;
/// Longest wait for a credential helper.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);

/// What the user has for a registry.
#[derive(Clone)]
pub(super) enum Credentials {
    /// Nothing: anonymous.
    None,
    /// User name and password.
    Password {
        /// User name.
        user: String,
        /// Password.
        password: String,
    },
    /// An OAuth2 refresh token.
    Identity(String),
}

/// The credentials for `host` (with its port, if any).
///
/// # Errors
/// [`Error::Io`] and [`Error::Invalid`] for a config that can't be read, [`Error::Refused`] for a helper that fails.
pub(super) async fn find(config: Option<PathBuf>, host: &str) -> Result<Credentials> {
    let server = match host {
        // docker keeps Docker Hub's credentials under this name.
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => "https://index.docker.io/v1/".to_owned(),
        host => host.to_owned(),
    };
    let name = server.clone();
    let work = tokio::task::spawn_blocking(move || look_up(config, &server));
    match tokio::time::timeout(HELPER_TIMEOUT, work).await {
        Ok(Ok(found)) => found,
        Ok(Err(_)) => Err(refused(&name, "the look-up was aborted")),
        Err(_) => Err(refused(&name, &format!("no answer within {} s", HELPER_TIMEOUT.as_secs()))),
    }
}

fn look_up(config: Option<PathBuf>, server: &str) -> Result<Credentials> {
    let (path, must_exist) = match config {
        Some(path) => (path, true),
        None => match default_path() {
            Some(path) => (path, false),
            None => return Ok(Credentials::None),
        },
    };
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if !must_exist && matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(Credentials::None);
        }
        Err(error) => return Err(Error::io(format!("reading credentials from {}", path.display()), error)),
    };
    match docker_credential::get_credential_from_reader(file.take(MAX_CONFIG), server) {
        Ok(DockerCredential::IdentityToken(token)) => Ok(Credentials::Identity(token)),
        Ok(DockerCredential::UsernamePassword(user, password)) => Ok(Credentials::Password { user, password }),
        Err(error) => absent_or_error(&path, server, &error),
    }
}

fn absent_or_error(path: &Path, server: &str, error: &CredentialRetrievalError) -> Result<Credentials> {
    match error {
        CredentialRetrievalError::NoCredentialConfigured => Ok(Credentials::None),
        // The protocol of docker-credential-helpers: a missing entry is this text and exit code 1.
        CredentialRetrievalError::HelperFailure { stdout, .. } if stdout.contains("credentials not found") => {
            Ok(Credentials::None)
        }
        CredentialRetrievalError::HelperFailure { helper, stderr, .. } => {
            let stderr: String = stderr.chars().filter(|c| !c.is_control()).take(200).collect();
            Err(refused(server, &format!("{helper} failed: {stderr}")))
        }
        other => Err(Error::invalid(
            format!("credentials in {}", path.display()),
            format!("{other} (for {server}); run `docker login` again"),
        )),
    }
}

fn default_path() -> Option<PathBuf> {
    let dir = std::env::var_os("DOCKER_CONFIG")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker")))?;
    Some(dir.join("config.json"))
}

fn refused(server: &str, reason: &str) -> Error {
    Error::Refused {
        source_name: "the credential helper".to_owned(),
        what: format!("credentials for {server}"),
        reason: reason.to_owned(),
    }
}
