//! Fetching: a miss becomes verified bytes.
//!
//! [`Fetcher::fetch`] joins or starts a flight for each chunk (`flight`); new ones wait in their origin's queue (`queue`),
//! from which neighbours are taken together, and what is likely to be read next (`ahead`); a request is cut into chunks as its body arrives (`request`), each of which is
//! decoded and verified (`decode`), delivered, and admitted to the pool. `startup` streams what a start needs before anybody
//! asks for it, `fill` fetches what has no start-up pack. Requests of all images pass their host's gate by priority (`gate`), work in the background is slowed down
//! (`throttle`), and when a source is slower than usual the next one is asked as well (`hedge`). When no source can be reached, one task probes
//! them while readers wait (`outage`); `health` knows which sources work and tells of every change once.

mod ahead;
mod decode;
mod fetcher;
mod fill;
mod flight;
mod gate;
mod health;
mod hedge;
mod image;
mod log;
mod order;
mod origin;
mod outage;
mod overtake;
mod patience;
mod places;
mod queue;
mod request;
mod speed;
mod startup;
mod throttle;
mod unpack;

pub use decode::decode;
pub use fetcher::{FetchOptions, Fetcher, Priority};
pub use fill::{Filling, Prefetch};
pub use health::{HealthReport, SourceReport};
pub use image::{Image, KnownImage, Parts, keep_image, open_image, open_known, sync_known};
pub use log::Fetched;
pub use origin::{CounterValues, Counters, Origin, Waits};
pub use patience::Patience;
pub(crate) use places::Places;
