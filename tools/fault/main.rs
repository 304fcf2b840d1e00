//! The program `firstread-fault`: a registry or a directory as it is on a bad day.
//!
//! A proxy that answers with scripted faults, for tests of what clients make of them. It speaks HTTP/1.1, with TLS when it
//! has a certificate; which requests are struck is said by rules on the command line, from a file, and at run time.

mod http;
mod rules;
mod serve;
mod state;
mod upstream;

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::rules::{Fault, Rule, Rules};
use crate::state::State;
use crate::upstream::{SkipVerify, Upstream};

/// Stands before a registry or a directory and answers with faults.
#[derive(Parser)]
#[command(name = "firstread-fault", version, after_help = rules::help())]
pub struct Settings {
    /// URL of a registry or another HTTP server, or a directory (an OCI layout is shown as a registry).
    #[arg(value_name = "UPSTREAM")]
    upstream: String,
    /// Address to listen on.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// A rule (repeatable).
    #[arg(long = "fault", value_name = "RULE")]
    faults: Vec<Rule>,
    /// A file of rules, one a line.
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// Added to every request, e.g. 20ms.
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = rules::duration)]
    latency: Duration,
    /// Bytes a second that all connections share, e.g. 12M; 0: no limit.
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = rules::size)]
    bandwidth: u64,
    /// Ask for bearer tokens that live so long.
    #[arg(long, value_name = "TIME", value_parser = rules::duration)]
    tokens: Option<Duration>,
    /// What tokens are given for.
    #[arg(long, value_name = "USER:PASSWORD", requires = "tokens")]
    user: Option<String>,
    /// Certificate chain to speak TLS with (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its key (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Believe the upstream's certificate whatever it is.
    #[arg(long)]
    upstream_skip_verify: bool,
    /// Start of the dice of `chance`.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// What to log: warn, info (every fault), debug.
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log: String,
}

fn main() -> ExitCode {
    let settings = Settings::parse();
    match run(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing can be done when stderr is gone.
            let _ = writeln!(std::io::stderr(), "firstread-fault: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(settings: Settings) -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_new(&settings.log)?)
        .with_writer(std::io::stderr)
        .init();
    let mut rules = settings.faults.clone();
    if let Some(path) = &settings.script {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        rules.extend(rules::parse(&text).with_context(|| format!("in {}", path.display()))?);
    }
    let skip_verify = if settings.upstream_skip_verify { SkipVerify::Yes } else { SkipVerify::No };
    let upstream = Upstream::open(&settings.upstream, skip_verify)?;
    let tls = match (&settings.tls_cert, &settings.tls_key) {
        (Some(certificate), Some(key)) => Some(acceptor(certificate, key)?),
        _ => None,
    };
    let state = Arc::new(State::new(upstream, Rules::new(rules, settings.seed), &settings));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(listen(settings.listen, state, tls))
}

fn acceptor(certificate: &Path, key: &Path) -> anyhow::Result<TlsAcceptor> {
    let reading = |path: &Path| format!("reading {}", path.display());
    let chain = CertificateDer::pem_file_iter(certificate).with_context(|| reading(certificate))?;
    let chain = chain.collect::<Result<Vec<_>, _>>().with_context(|| reading(certificate))?;
    let key = PrivateKeyDer::from_pem_file(key).with_context(|| reading(key))?;
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn listen(address: SocketAddr, state: Arc<State>, tls: Option<TlsAcceptor>) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))?;
    let scheme = if tls.is_some() { "https" } else { "http" };
    // The line that scripts wait for.
    writeln!(std::io::stdout(), "{scheme}://{}", listener.local_addr()?)?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = tokio::signal::ctrl_c() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
        };
        match accepted {
            Ok((stream, _)) => drop(tokio::spawn(connection(stream, Arc::clone(&state), tls.clone()))),
            Err(error) => {
                tracing::warn!(%error, "accepting a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, state: Arc<State>, tls: Option<TlsAcceptor>) {
    // Small answers must not wait for one another.
    let _ = stream.set_nodelay(true);
    match tls {
        Some(tls) => {
            let struck = state.rules.lock().decide("", "", |fault| *fault == Fault::Tls);
            if let Some(fault) = struck {
                return state.counters.fault(&fault);
            }
            match tls.accept(stream).await {
                Ok(stream) => serve::serve(Box::new(stream), state, "https").await,
                Err(error) => tracing::debug!(%error, "a handshake failed"),
            }
        }
        // What asks for TLS is no request: it ends at once, which is where the fault `tls` redirects to.
        None => serve::serve(Box::new(stream), state, "http").await,
    }
}
