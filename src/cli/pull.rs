//! `firstread pull`: an image into containerd's store, without its packs.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use parking_lot::Mutex;
use serde::Serialize;

use super::options::{AccessOptions, Context, absolute};
use super::output::{Output, size};
use super::progress::{Progress, Unit};
use super::{Outcome, reference};
use crate::daemon::control::{Kind, Problem};
use crate::oci::Reference;
use crate::snapshot::api::Api;
use crate::snapshot::pull::{self, Pulled, Step, Tell, refused};

/// What containerd's configuration calls the snapshotter when nobody says otherwise.
pub const SNAPSHOTTER: &str = "firstread";

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Pull {
    /// The image: HOST[:PORT]/REPO[:TAG][@DIGEST]
    #[arg(value_name = "REF")]
    reference: String,
    /// containerd's namespace; Kubernetes' is k8s.io
    #[arg(long, short, value_name = "NS", default_value = "default")]
    namespace: String,
    /// What containerd's configuration calls firstread's snapshotter
    #[arg(long, value_name = "NAME", default_value = SNAPSHOTTER)]
    snapshotter: String,
    /// containerd's socket [setting snapshotter.containerd; default: /run/containerd/containerd.sock]
    #[arg(long, value_name = "SOCK")]
    containerd: Option<PathBuf>,
    /// First remove the image from containerd and collect what only it needs: mends an image of which the snapshotter
    /// lost something ("not found", "already exists", damaged records)
    #[arg(long)]
    repair: bool,
    /// Seconds to wait for the snapshotter when containerd does not reach it: it was started a moment ago, or again
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    wait: u32,
    #[command(flatten)]
    access: AccessOptions,
}

#[derive(Serialize)]
struct Answer {
    #[serde(flatten)]
    pulled: Pulled,
    seconds: f64,
}

impl Pull {
    /// Runs the verb.
    ///
    /// # Errors
    /// What the registry or containerd says.
    pub fn run(&self, context: &Context) -> Outcome {
        let start = Instant::now();
        let Reference::Registry(reference) = reference::image(&self.reference)? else {
            let message = format!("{}: containerd's images are a registry's", self.reference);
            return Err(Problem::new(Kind::Usage, message).hint("push it with `skopeo copy`"));
        };
        let wanted = pull::Pull {
            reference,
            namespace: self.namespace.clone(),
            snapshotter: self.snapshotter.clone(),
            access: context.access(&self.access)?,
            patience: Duration::from_secs(self.wait.into()),
        };
        let shown = Mutex::new(Shown::new(context.output, &self.reference));
        let tell: Tell = Arc::new(move |step| shown.lock().show(step));
        let socket = absolute(self.containerd.as_deref().unwrap_or(&context.config.snapshotter.containerd))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(|error| Problem::new(Kind::Failed, format!("starting the runtime: {error}")))?;
        let pulled = runtime.block_on(async {
            let api = Api::new(&socket).map_err(refused)?;
            if self.repair {
                context.output.remark(format!(
                    "removing {} from containerd's namespace {}, and what no other image or container of it needs",
                    self.reference, self.namespace
                ));
                pull::forget(&api, &wanted, &tell).await?;
            }
            pull::pull(&api, &wanted, &tell).await
        });
        // The bar goes before anything else is said.
        drop(tell);
        let pulled = pulled?;
        let answer = Answer { pulled, seconds: start.elapsed().as_secs_f64() };
        context.output.answer(&answer, |answer| {
            let Pulled { image, digest, received, left } = &answer.pulled;
            format!("{image} {digest}\nreceived {}, left {} in the registry", size(*received), size(*left))
        })
    }
}

/// What is shown of a pull: first the bytes, then the snapshots, of which some are made while bytes still come.
struct Shown {
    output: Output,
    name: String,
    bytes: Part,
    snapshots: Part,
    bar: Option<(Unit, Progress)>,
}

/// How far one part of it is.
#[derive(Default)]
struct Part {
    done: u64,
    total: u64,
}

impl Shown {
    fn new(output: Output, name: &str) -> Self {
        Self { output, name: name.to_owned(), bytes: Part::default(), snapshots: Part::default(), bar: None }
    }

    fn show(&mut self, step: Step) {
        match step {
            Step::Resolved { digest, bytes, left, layers } => {
                let (fetched, left) = (size(bytes), size(left));
                let name = &self.name;
                self.output.remark(format!("{name} is {digest}: {fetched} to fetch, {left} stay in the registry"));
                (self.bytes.total, self.snapshots.total) = (bytes, layers as u64);
                self.draw(0, 0);
            }
            Step::Received(bytes) => self.draw(bytes, 0),
            Step::Prepared => self.draw(0, 1),
            Step::Waiting { reason } => {
                // A bar would be drawn over it.
                self.bar = None;
                self.output.remark(format!("waiting, containerd can't do it yet: {reason}"));
            }
        }
    }

    fn draw(&mut self, bytes: u64, snapshots: u64) {
        self.bytes.done += bytes;
        self.snapshots.done += snapshots;
        let (unit, what, part, more) = match self.bytes.done < self.bytes.total {
            true => (Unit::Bytes, "fetching", &self.bytes, bytes),
            false => (Unit::Pieces, "preparing snapshots", &self.snapshots, snapshots),
        };
        match &mut self.bar {
            Some((shown, bar)) if *shown == unit => bar.add(more),
            bar => {
                // The one before is taken away first.
                *bar = None;
                let mut new = Progress::of(&self.output, what, unit, part.total);
                new.add(part.done);
                *bar = Some((unit, new));
            }
        }
    }
}
