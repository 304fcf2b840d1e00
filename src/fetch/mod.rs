//! Fetching: a miss becomes verified bytes.

mod fetcher;
mod image;
mod origin;
mod queue;

pub use fetcher::{FetchOptions, Fetcher, Priority};
pub use image::{Image, open_image};
pub use origin::{CounterValues, Counters, Origin, Waits};
