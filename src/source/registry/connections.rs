//! Connections: what all repositories of one host share, so that a node with many images keeps few connections, asks for
//! few tokens, and leaves a host alone that asked for it.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::header::HeaderMap;
use tokio::time::Instant;

use super::auth::Auth;
use super::hosts::Host;
use super::wire::{self, Timeouts};
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::source::Access;

/// How often a connection of many requests (HTTP/2) is asked whether it lives, and how long it may take to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Everything by which connections differ.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    /// URL, certificates and the like.
    host: Digest,
    docker_config: Option<PathBuf>,
    connect: Duration,
    stall: Duration,
}

/// The connections of a process, or of a part of it. Clones share them.
#[derive(Clone, Default)]
pub struct Connections {
    links: Arc<Mutex<HashMap<Key, Weak<Link>>>>,
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connections").field("links", &self.links.lock().len()).finish()
    }
}

/// How one host is spoken to.
pub(super) struct Link {
    pub http: reqwest::Client,
    pub auth: Auth,
    /// For the host alone.
    pub headers: HeaderMap,
    pub timeouts: Timeouts,
    /// The host asked to be left alone until then.
    pub not_before: Mutex<Option<Instant>>,
}

impl Connections {
    /// The link to `host`.
    ///
    /// # Errors
    /// Certificates or headers that are malformed.
    pub(super) fn link(&self, host: &Host, access: &Access) -> Result<Arc<Link>> {
        let mut builder = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(access.connect)
            .http2_adaptive_window(true)
            // A peer that has gone away silently must not be found out by every request anew.
            .http2_keep_alive_interval(KEEP_ALIVE)
            .http2_keep_alive_timeout(KEEP_ALIVE)
            .tcp_keepalive(KEEP_ALIVE)
            .user_agent(concat!("firstread/", env!("CARGO_PKG_VERSION")));
        // The client takes `*` for names only, not for addresses.
        let never =
            ["NO_PROXY", "no_proxy"].iter().any(|name| std::env::var(name).is_ok_and(|value| value.trim() == "*"));
        if never || wire::is_loopback(host.base.authority()) {
            builder = builder.no_proxy();
        }
        let (builder, digest) = host.apply(builder)?;
        let (connect, stall) = (access.connect, access.stall);
        let key = Key { host: digest, docker_config: access.docker_config.clone(), connect, stall };
        let mut links = self.links.lock();
        if let Some(link) = links.get(&key).and_then(Weak::upgrade) {
            return Ok(link);
        }
        let http = builder.build().map_err(|error| Error::unreachable(&host.name, wire::describe(&error)))?;
        let timeouts = Timeouts { connect, stall };
        let auth = Auth::new(&host.base, host.name.clone(), access.docker_config.clone(), http.clone(), timeouts);
        let link = Arc::new(Link { http, auth, headers: host.headers()?, timeouts, not_before: Mutex::new(None) });
        links.retain(|_, link| link.strong_count() > 0);
        links.insert(key, Arc::downgrade(&link));
        Ok(link)
    }
}
