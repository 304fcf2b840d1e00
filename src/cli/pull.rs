//! `firstread pull`: an image into containerd's store, without its packs.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use serde::Serialize;

use super::options::{AccessOptions, Context, absolute};
use super::output::size;
use super::{Outcome, reference};
use crate::daemon::control::{Kind, Problem};
use crate::oci::Reference;
use crate::snapshot::api::Api;
use crate::snapshot::pull::{self, Pulled, refused};

/// Where containerd listens when nobody says otherwise.
pub const CONTAINERD: &str = "/run/containerd/containerd.sock";
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
    /// containerd's socket
    #[arg(long, value_name = "SOCK", default_value = CONTAINERD)]
    containerd: PathBuf,
    /// First remove the image from containerd and collect what only it needs: mends an image of which the snapshotter
    /// lost something ("not found", "already exists", damaged records)
    #[arg(long)]
    repair: bool,
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
        };
        let socket = absolute(&self.containerd)?;
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
                pull::forget(&api, &wanted).await?;
            }
            pull::pull(&api, &wanted).await
        })?;
        let answer = Answer { pulled, seconds: start.elapsed().as_secs_f64() };
        context.output.answer(&answer, |answer| {
            let Pulled { image, digest, received, left } = &answer.pulled;
            format!("{image} {digest}\nreceived {}, left {} in the registry", size(*received), size(*left))
        })
    }
}
