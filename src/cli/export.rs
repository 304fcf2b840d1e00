//! `firstread export`: serve an image to another program until stopped.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::connect::connect_or_start;
use super::options::{AccessOptions, Context, LayerOptions, WriteOptions, absolute};
use super::{Outcome, reference};
use crate::daemon::client::Closer;
use crate::daemon::config::Patience;
use crate::daemon::control::{self, Call, Exported, Kind, Problem, Serve, TlsFiles};

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Export {
    /// The image: HOST[:PORT]/REPO[:TAG][@DIGEST] or oci:DIR[:TAG]
    #[arg(value_name = "REF")]
    reference: String,
    #[command(flatten)]
    form: Form,
    #[command(flatten)]
    tls: TlsOptions,
    /// How long reads wait for unreachable sources: seconds, or `wait` for ever [default: the daemon's setting]
    #[arg(long, value_name = "TIME")]
    on_outage: Option<Patience>,
    #[command(flatten)]
    layers: LayerOptions,
    #[command(flatten)]
    write: WriteOptions,
    #[command(flatten)]
    access: AccessOptions,
}

/// How it is served.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Form {
    /// To NBD clients, at unix:PATH or tcp:HOST:PORT (port 0: any free one)
    #[arg(long, value_name = "ADDRESS")]
    nbd: Option<String>,
    /// To VMMs as vhost-user-blk, at this socket: QEMU, Cloud Hypervisor, Firecracker, Kata
    #[arg(long, value_name = "PATH")]
    vhost_user: Option<PathBuf>,
}

/// What NBD clients are met with.
#[derive(Debug, Args)]
struct TlsOptions {
    /// Demand TLS of NBD clients: the server's certificate with its chain, in PEM form
    #[arg(long, value_name = "FILE", requires = "tls_key", conflicts_with = "vhost_user")]
    tls_cert: Option<PathBuf>,
    /// The certificate's key, in PEM form
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Serve only clients with a certificate that an authority in this file has signed
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_ca: Option<PathBuf>,
}

impl TlsOptions {
    fn files(&self) -> Outcome<Option<TlsFiles>> {
        let (Some(certificate), Some(key)) = (&self.tls_cert, &self.tls_key) else { return Ok(None) };
        let clients = self.tls_ca.as_deref().map(absolute).transpose()?;
        Ok(Some(TlsFiles { certificate: absolute(certificate)?, key: absolute(key)?, clients }))
    }
}

impl Form {
    fn serve(&self, tls: &TlsOptions) -> Outcome<Serve> {
        match (&self.nbd, &self.vhost_user) {
            (Some(text), None) => Ok(Serve::Nbd { address: address(text)?, tls: tls.files()? }),
            (None, Some(path)) => absolute(path).map(Serve::VhostUser),
            _ => Err(Problem::new(Kind::Usage, "give one of --nbd and --vhost-user")),
        }
    }
}

impl Export {
    /// Runs the verb: prints where to connect, and returns when it is stopped.
    ///
    /// # Errors
    /// What the daemon says; also a daemon that stops first.
    pub fn run(&self, context: &Context) -> Outcome {
        let reference = reference::image(&self.reference)?.to_string();
        let serve = self.form.serve(&self.tls)?;
        let access = context.access(&self.access)?;
        let writable = self.write.writable()?;
        let mut client = connect_or_start(context)?;
        let failed = |error: std::io::Error| Problem::new(Kind::Failed, format!("waiting for signals: {error}"));
        let stopped = Arc::new(AtomicBool::new(false));
        // From here on a signal ends the export, not this process, which leaves when the export is gone.
        let closer = client.closer().map_err(failed)?;
        let signals = watch_signals(closer, Arc::clone(&stopped)).map_err(failed)?;
        let exported = client.call::<Exported>(Call::Export(control::Export {
            reference,
            access,
            on_outage: self.on_outage,
            writable,
            ordinary: self.layers.ordinary(),
            serve,
        }));
        let outcome = exported.and_then(|exported| {
            exported.remarks.iter().for_each(|remark| context.output.remark(remark));
            context.output.answer(&exported, |exported| exported.uri.clone())?;
            client.wait_for_end();
            Ok(())
        });
        drop(signals);
        if stopped.load(Ordering::SeqCst) {
            return Ok(());
        }
        outcome.and_then(|()| {
            Err(Problem::new(Kind::Failed, "the daemon stopped, and the export with it")
                .hint(format!("its log says why: {}", context.config.run.join("daemon.log").display())))
        })
    }
}

/// Ends the connection to the daemon on SIGINT, SIGTERM or SIGHUP.
fn watch_signals(closer: Closer, stopped: Arc<AtomicBool>) -> std::io::Result<tokio::runtime::Runtime> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let guard = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    drop(guard);
    runtime.spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
        stopped.store(true, Ordering::SeqCst);
        closer.finish();
    });
    Ok(runtime)
}

/// The address with an absolute path.
fn address(text: &str) -> Outcome<String> {
    match text.split_once(':') {
        Some(("unix", path)) if !path.is_empty() => Ok(format!("unix:{}", absolute(Path::new(path))?.display())),
        Some(("tcp", rest))
            if rest.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()) =>
        {
            Ok(text.to_owned())
        }
        _ => Err(Problem::new(Kind::Usage, format!("{text:?} is not an address: write unix:PATH or tcp:HOST:PORT"))),
    }
}
