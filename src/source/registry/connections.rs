//! Connections: what all repositories of one host share, so that a node with many images keeps few connections, asks for
//! few tokens, and leaves a host alone that asked for it.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::header::HeaderMap;
use tokio::time::Instant;

use super::auth::Auth;
use super::hosts::Host;
use super::http::Http;
use super::wire::{self, Timeouts};
use crate::chunk::Digest;
use crate::error::Result;
use crate::source::Access;

/// How often a connection of many requests (HTTP/2) is asked whether it lives, and how long it may take to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// How long a host's clients are kept that nobody uses: the next start finds its connections and the system's certificates,
/// and certificates that are new on the system are found by then.
const KEPT: Duration = Duration::from_secs(3600);

/// Most hosts whose clients are kept that nobody uses.
const MOST_KEPT: usize = 16;

/// Everything by which connections differ.
#[derive(Clone, PartialEq, Eq, Hash)]
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
    links: Arc<Mutex<Links>>,
}

#[derive(Default)]
struct Links {
    used: HashMap<Key, Weak<Link>>,
    /// Clients and when they were made, oldest first. Authorizations are not kept: who mends credentials and tries again is
    /// asked for nothing else.
    kept: VecDeque<(Key, Instant, Arc<Http>)>,
}

impl Links {
    /// The clients that are kept for what has this key.
    fn kept(&mut self, key: &Key) -> Option<Arc<Http>> {
        self.kept.retain(|(_, made, _)| made.elapsed() < KEPT);
        self.kept.iter().find(|(kept, ..)| kept == key).map(|(.., http)| Arc::clone(http))
    }

    fn keep(&mut self, key: Key, http: &Arc<Http>) {
        if self.kept.len() == MOST_KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back((key, Instant::now(), Arc::clone(http)));
    }
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connections").field("links", &self.links.lock().used.len()).finish()
    }
}

/// How one host is spoken to.
pub(super) struct Link {
    pub http: Arc<Http>,
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
        // The client takes `*` for names only, not for addresses.
        let never =
            ["NO_PROXY", "no_proxy"].iter().any(|name| std::env::var(name).is_ok_and(|value| value.trim() == "*"));
        let builder = || {
            let builder = reqwest::Client::builder()
                .redirect(reqwest::redirect::Policy::none())
                .connect_timeout(access.connect)
                .http2_adaptive_window(true)
                // A peer that has gone away silently must not be found out by every request anew.
                .http2_keep_alive_interval(KEEP_ALIVE)
                .http2_keep_alive_timeout(KEEP_ALIVE)
                .tcp_keepalive(KEEP_ALIVE)
                .user_agent(concat!("firstread/", env!("CARGO_PKG_VERSION")));
            if never || wire::is_loopback(host.base.authority()) { builder.no_proxy() } else { builder }
        };
        let (secure, digest) = host.apply(builder())?;
        let (connect, stall) = (access.connect, access.stall);
        let key = Key { host: digest, docker_config: access.docker_config.clone(), connect, stall };
        let kept = {
            let mut links = self.links.lock();
            if let Some(link) = links.used.get(&key).and_then(Weak::upgrade) {
                return Ok(link);
            }
            links.kept(&key)
        };
        // Without the lock: it may read certificates. Of two that are made at once the first one stays.
        let http = match &kept {
            Some(http) => Arc::clone(http),
            None => Arc::new(Http::new(&host.name, &host.base, builder, secure)?),
        };
        let timeouts = Timeouts { connect, stall };
        let auth = Auth::new(&host.base, host.name.clone(), access.docker_config.clone(), Arc::clone(&http), timeouts);
        let link = Arc::new(Link {
            http: Arc::clone(&http),
            auth,
            headers: host.headers()?,
            timeouts,
            not_before: Mutex::new(None),
        });
        let mut links = self.links.lock();
        if let Some(link) = links.used.get(&key).and_then(Weak::upgrade) {
            return Ok(link);
        }
        links.used.retain(|_, link| link.strong_count() > 0);
        links.used.insert(key.clone(), Arc::downgrade(&link));
        if kept.is_none() {
            links.keep(key, &http);
        }
        Ok(link)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_bounded_number_of_hosts_keep_their_clients_after_their_last_user() {
        let dir = tempfile::tempdir().unwrap();
        let (connections, access) = (Connections::default(), Access::default());
        let link = |name: &str| {
            let (host, _) = Host::load(dir.path(), name, |_| "http").unwrap();
            connections.link(&host, &access).unwrap()
        };
        let first = link("r.example");
        assert!(Arc::ptr_eq(&first, &link("r.example")));
        let http = Arc::clone(&first.http);
        assert!(!Arc::ptr_eq(&http, &link("other.example").http));
        drop(first);
        assert!(Arc::ptr_eq(&http, &link("r.example").http));
        for number in 0..MOST_KEPT {
            link(&format!("r{number}.example"));
        }
        assert_eq!(connections.links.lock().kept.len(), MOST_KEPT);
        assert!(!Arc::ptr_eq(&http, &link("r.example").http));
    }
}
