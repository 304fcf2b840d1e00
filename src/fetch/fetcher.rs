//! The fetcher.

use std::sync::Arc;
use std::time::Duration;

use super::Origin;
use crate::chunk::{ChunkRef, Verified};
use crate::error::{Error, Result};
use crate::pool::Pool;

/// Who wants a chunk; each is served before those below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// A reader waits for it.
    Demand,
    /// It belongs to the start-up pack.
    Startup,
    /// A sequential reader will want it soon.
    ReadAhead,
    /// It is fetched so that it is there one day.
    Background,
}

/// How the fetcher behaves.
#[derive(Clone, Copy, Debug)]
pub struct FetchOptions {
    /// How long readers wait while no source can be reached; `None` is for ever.
    pub on_outage: Option<Duration>,
    /// Most requests in flight for one origin.
    pub requests: usize,
    /// Largest gap in bytes between two chunks that are still read by one request; the gap's bytes are discarded.
    pub gap: u64,
    /// Most stored bytes that one request asks for.
    pub request_bytes: u64,
}

impl Default for FetchOptions {
    fn default() -> Self {
        Self { on_outage: Some(Duration::from_secs(60)), requests: 4, gap: 64 << 10, request_bytes: 4 << 20 }
    }
}

/// Turns misses into verified chunks; one for each process.
pub struct Fetcher {
    _pool: Arc<Pool>,
    _options: FetchOptions,
}

impl Fetcher {
    /// A fetcher that admits what it verified to `pool`.
    #[must_use]
    pub fn new(pool: Arc<Pool>, options: FetchOptions) -> Arc<Self> {
        Arc::new(Self { _pool: pool, _options: options })
    }

    /// Fetches `chunks` of `origin`; result i belongs to `chunks[i]`.
    ///
    /// Runs on a tokio runtime. When the returned future is dropped the fetch goes on for the others that wait for it.
    pub async fn fetch(
        &self,
        _origin: &Arc<Origin>,
        chunks: &[ChunkRef],
        _priority: Priority,
    ) -> Vec<Result<Arc<Verified>>> {
        chunks.iter().map(|_| Err(Error::Unsupported("fetch is not there yet".to_owned()))).collect()
    }
}
