//! `firstread daemon`: the node's daemon in the foreground.

use std::path::Path;
use std::time::Duration;

use clap::Args;

use super::Outcome;
use super::options::{Global, start_log};
use crate::daemon::client::Client;
use crate::daemon::config::{self, FetchLayer, Layer, Patience, PoolLayer, Prefetch, Size};
use crate::daemon::control::{Call, Kind, Problem, Stopped};
use crate::daemon::rundir::wait_until_free;
use crate::daemon::startup::{self, Start};
use crate::pool::Amount;

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Daemon {
    /// Largest size of the pool, e.g. 20G, or 10% of its disk [setting pool.limit; default: none]
    #[arg(long, value_name = "SIZE")]
    pool_limit: Option<Amount>,
    /// What the pool leaves free on its disk, e.g. 10G or 10% [setting pool.keep_free; default: 5%]
    #[arg(long, value_name = "SIZE")]
    pool_keep_free: Option<Amount>,
    /// How much of the pool is checked for rot in the background each second, e.g. 4M; 0: nothing [setting
    /// pool.scrub_rate; default: 1M]
    #[arg(long, value_name = "SIZE")]
    pool_scrub_rate: Option<Size>,
    /// How long a read waits for an unreachable source, e.g. 60s, or `wait` [setting fetch.on_outage; default: 60s]
    #[arg(long, value_name = "TIME")]
    on_outage: Option<Patience>,
    /// What is fetched before anybody reads it: `all` (start-up packs; everything of images that have none), `startup`,
    /// `none` [setting fetch.prefetch; default: all]
    #[arg(long, value_name = "WHAT")]
    prefetch: Option<Prefetch>,
    /// Take over from the daemon that runs: readers of its ublk and NBD devices wait for a moment and go on
    #[arg(long)]
    replace: bool,
    /// Started by a verb, which waits for a line on standard output
    #[arg(long, hide = true)]
    background: bool,
}

impl Daemon {
    /// Runs the verb until the daemon is stopped.
    ///
    /// # Errors
    /// What keeps it from starting.
    pub fn run(self, global: Global) -> Outcome {
        let flags = Layer {
            pool: PoolLayer {
                limit: self.pool_limit,
                keep_free: self.pool_keep_free,
                scrub_rate: self.pool_scrub_rate,
            },
            fetch: FetchLayer { on_outage: self.on_outage, prefetch: self.prefetch, ..FetchLayer::default() },
            ..global.layer()
        };
        let config = config::load(flags, global.config.as_deref())?;
        start_log(&config.log)?;
        if self.replace {
            replace(&config.run)?;
        }
        startup::run(config, if self.background { Start::Background } else { Start::Foreground })
    }
}

/// How long a daemon that hands over may take to end.
const LEAVING: Duration = Duration::from_secs(20);

/// Has the daemon of the run directory `run`, if there is one, stop and leave its devices.
fn replace(run: &Path) -> Outcome {
    let Some(mut client) = Client::connect(run)? else { return Ok(()) };
    let old = client.hello().pid;
    let stopped: Stopped = client.call(Call::HandOver)?;
    if !stopped.stopping {
        let message = format!("process {old} can't hand these devices over:\n  {}", stopped.in_use.join("\n  "));
        return Err(Problem::new(Kind::Busy, message)
            .hint("unmount them first; only ublk and NBD devices outlive their daemon"));
    }
    client.wait_for_end();
    if !wait_until_free(run, LEAVING) {
        let message = format!("process {old} does not end");
        return Err(Problem::new(Kind::Busy, message).hint("its log says why; end it by hand and start this one again"));
    }
    tracing::info!("process {old} handed over {} devices", stopped.left.len());
    Ok(())
}
