//! `firstread snapshotter`: containerd's proxy snapshotter.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::Outcome;
use super::connect::connect_or_start;
use super::options::{AccessOptions, Context, Global, start_log};
use crate::daemon::config::{self, Layer, MountKind, Name, Size, SnapshotterLayer, TransportChoice};
use crate::daemon::control::{Kind, Problem};
use crate::snapshot::{Daemon, Options, Snapshotter as Service, bind, serve};

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Snapshotter {
    /// The socket that containerd's configuration names [setting snapshotter.listen; default: snapshotter.sock in the run
    /// directory]
    #[arg(long, value_name = "SOCK")]
    listen: Option<PathBuf>,
    /// containerd's own socket: it is asked where images come from [setting snapshotter.containerd; default:
    /// /run/containerd/containerd.sock]
    #[arg(long, value_name = "SOCK")]
    containerd: Option<PathBuf>,
    /// What containers get: an `overlay` (runc), or a `block` device of their own (Kata); the label
    /// containerd.io/snapshot/firstread/mount of a container's snapshot says otherwise [setting snapshotter.mounts; default:
    /// overlay]
    #[arg(long, value_name = "KIND")]
    mounts: Option<MountKind>,
    /// Size of containers' block devices, where it is larger than the image's: room that costs nothing until it is written
    /// [setting snapshotter.size]
    #[arg(long, value_name = "SIZE")]
    size: Option<Size>,
    /// Name of its state in the root directory; each of several snapshotters needs its own [setting snapshotter.name;
    /// default: default]
    #[arg(long, value_name = "NAME")]
    name: Option<Name>,
    /// How the kernel sees devices: auto, ublk, nbd or loop [setting snapshotter.transport; default: auto]
    #[arg(long, value_name = "TRANSPORT")]
    transport: Option<TransportChoice>,
    #[command(flatten)]
    access: AccessOptions,
}

impl Snapshotter {
    /// Runs the verb until it is stopped. Devices and mounts stay as they are then.
    ///
    /// # Errors
    /// What keeps it from starting.
    pub fn run(self, global: Global) -> Outcome {
        // Unlike other verbs it is a service, with a log of its own.
        let Self { listen, containerd, mounts, size, name, transport, access } = self;
        let flags = SnapshotterLayer { listen, containerd, mounts, size, name, transport };
        let flags = Layer { snapshotter: flags, ..global.layer() };
        start_log(&config::load(flags.clone(), global.config.as_deref())?.log)?;
        let context = Context::of(global, flags)?;
        let settings = context.config.snapshotter.clone();
        let options = Options {
            state: context.config.root.join("snapshotter").join(&settings.name),
            containerd: settings.containerd,
            mounts: settings.mounts,
            size: settings.size.map(|size| size.0),
            access: context.access(&access)?,
            transport: settings.transport.0,
        };
        let socket = settings.listen;
        let run = context.config.run.clone();
        // A daemon that is started from here must outlive this process.
        let daemon = Daemon { run, start: Arc::new(move || connect_or_start(&context)) };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("snapshotter")
            .enable_all()
            .build()
            .map_err(|error| Problem::new(Kind::Failed, format!("starting the runtime: {error}")))?;
        runtime.block_on(async {
            let service = Service::open(options, daemon)?;
            let listener = bind(&socket)?;
            let failed = |error| Problem::new(Kind::Failed, format!("catching signals: {error}"));
            let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
            let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
            let keeper = tokio::spawn({
                let service = Arc::clone(&service);
                async move { service.keep().await }
            });
            tracing::info!("serving containerd at {}", socket.display());
            let end = async {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            };
            let served = serve(service, listener, end).await;
            keeper.abort();
            // The next one listens here; until then nobody does.
            let _ = std::fs::remove_file(&socket);
            Ok(served?)
        })
    }
}
