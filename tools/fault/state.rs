//! What connections share: rules, settings, tokens, counters; and the requests that look at them and change them.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use base64::Engine;
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::watch;

use crate::http::Request;
use crate::rules::{self, Fault, Rules};
use crate::upstream::Upstream;

/// The paths that are not forwarded.
pub const CONTROL: &str = "/_fault/";
/// Most tokens that are remembered.
const MAX_TOKENS: usize = 100_000;

/// Everything that the proxy knows.
pub struct State {
    pub upstream: Upstream,
    pub rules: Mutex<Rules>,
    /// Added to every request.
    latency: Mutex<Duration>,
    /// Bytes a second over all connections; 0: no limit.
    bandwidth: AtomicU64,
    /// When the link is free again.
    busy_until: Mutex<Option<Instant>>,
    /// How long tokens live; `None`: none are asked for.
    token_life: Option<Duration>,
    /// `USER:PASSWORD` that tokens are given for; empty: for nothing.
    user: Mutex<String>,
    tokens: Mutex<HashMap<String, Instant>>,
    issued: AtomicU64,
    pub counters: Counters,
    /// Changes when stalled connections are to end.
    pub healed: watch::Sender<u64>,
}

/// What was asked, sent and done.
#[derive(Default)]
pub struct Counters {
    pub connections: AtomicU64,
    pub requests: AtomicU64,
    pub ranges: AtomicU64,
    /// Bytes of bodies that were sent to clients.
    pub sent: AtomicU64,
    pub upstream_failed: AtomicU64,
    pub tokens_issued: AtomicU64,
    pub tokens_refused: AtomicU64,
    pub faults: Mutex<BTreeMap<String, u64>>,
    pub statuses: Mutex<BTreeMap<u16, u64>>,
}

pub fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}

impl Counters {
    pub fn fault(&self, fault: &Fault) {
        let text = format!("{fault:?}");
        let name = text.split(['(', ' ']).next().unwrap_or_default().to_ascii_lowercase();
        *self.faults.lock().entry(name).or_default() += 1;
    }

    pub fn status(&self, status: u16) {
        *self.statuses.lock().entry(status).or_default() += 1;
    }

    fn zero(&self) {
        for counter in [
            &self.connections,
            &self.requests,
            &self.ranges,
            &self.sent,
            &self.upstream_failed,
            &self.tokens_issued,
            &self.tokens_refused,
        ] {
            counter.store(0, Ordering::Relaxed);
        }
        self.faults.lock().clear();
        self.statuses.lock().clear();
    }
}

/// An answer to a control request: status, further headers, body.
pub type Reply = (u16, Vec<(&'static str, String)>, String);

impl State {
    pub fn new(upstream: Upstream, rules: Rules, settings: &crate::Settings) -> Self {
        Self {
            upstream,
            rules: Mutex::new(rules),
            latency: Mutex::new(settings.latency),
            bandwidth: AtomicU64::new(settings.bandwidth),
            busy_until: Mutex::new(None),
            token_life: settings.tokens,
            user: Mutex::new(settings.user.clone().unwrap_or_default()),
            tokens: Mutex::default(),
            issued: AtomicU64::new(0),
            counters: Counters::default(),
            healed: watch::Sender::new(0),
        }
    }

    pub fn latency(&self) -> Duration {
        *self.latency.lock()
    }

    /// Most bytes that are sent at once, so that connections share the link.
    pub fn piece(&self) -> usize {
        match self.bandwidth.load(Ordering::Relaxed) {
            0 => usize::MAX,
            bandwidth => (bandwidth / 200).clamp(1024, 64 << 10) as usize,
        }
    }

    /// Waits until the link has taken `bytes`.
    pub async fn transmit(&self, bytes: usize) {
        let bandwidth = self.bandwidth.load(Ordering::Relaxed);
        if bandwidth == 0 {
            return;
        }
        let time = Duration::from_secs_f64(bytes as f64 / bandwidth as f64);
        let until = {
            let mut busy = self.busy_until.lock();
            let until = busy.unwrap_or_else(Instant::now).max(Instant::now()) + time;
            *busy = Some(until);
            until
        };
        tokio::time::sleep_until(until.into()).await;
    }

    /// What stands in the way of a request's authorization: the answer that asks for a token.
    pub fn unauthorized(&self, request: &Request, expired: bool) -> Option<Reply> {
        let life = self.token_life;
        let token = request.header("authorization").and_then(|value| value.strip_prefix("Bearer "));
        let valid = || {
            let tokens = self.tokens.lock();
            token.and_then(|token| tokens.get(token).copied()).is_some_and(|until| Instant::now() < until)
        };
        if !expired && (life.is_none() || valid()) {
            return None;
        }
        if let Some(token) = token {
            add(&self.counters.tokens_refused, 1);
            self.tokens.lock().remove(token);
        }
        let host = request.header("host").unwrap_or("localhost");
        let scheme = request.header("x-forwarded-proto").unwrap_or("http");
        let mut headers = Vec::new();
        if life.is_some() {
            let challenge = format!("Bearer realm=\"{scheme}://{host}{CONTROL}token\",service=\"firstread-fault\"");
            headers.push(("WWW-Authenticate", challenge));
        }
        let body = json!({"errors": [{"code": "UNAUTHORIZED", "message": "authentication required"}]});
        Some((401, headers, body.to_string()))
    }

    /// Answers a request below [`CONTROL`].
    pub fn control(&self, request: &Request, body: &str) -> Reply {
        let path = request.path().strip_prefix(CONTROL).unwrap_or_default();
        let done = || (200, Vec::new(), "{}\n".to_owned());
        let result = match (request.method.as_str(), path) {
            ("GET", "token") => return self.token(request),
            ("GET", "counters") => return (200, Vec::new(), format!("{:#}\n", self.report())),
            ("DELETE", "counters") => {
                self.counters.zero();
                Ok(())
            }
            ("GET", "rules") => {
                return (200, Vec::new(), format!("{:#}\n", json!(self.rules.lock().report())));
            }
            ("POST", "rules") => self.rules.lock().arm(body),
            ("DELETE", "rules") => {
                self.rules.lock().heal();
                self.healed.send_modify(|number| *number += 1);
                Ok(())
            }
            ("PUT", "latency") => rules::duration(body.trim()).map(|latency| *self.latency.lock() = latency),
            ("PUT", "bandwidth") => {
                rules::size(body.trim()).map(|bandwidth| self.bandwidth.store(bandwidth, Ordering::Relaxed))
            }
            ("PUT", "user") => {
                body.trim().clone_into(&mut self.user.lock());
                Ok(())
            }
            (method, _) => Err(anyhow::anyhow!("there is no {method} {}: see --help", request.path())),
        };
        match result {
            Ok(()) => done(),
            Err(error) => (400, Vec::new(), format!("{:#}\n", json!({"error": format!("{error:#}")}))),
        }
    }

    fn report(&self) -> serde_json::Value {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "connections": get(&self.counters.connections),
            "requests": get(&self.counters.requests),
            "ranges": get(&self.counters.ranges),
            "sent_bytes": get(&self.counters.sent),
            "upstream_failed": get(&self.counters.upstream_failed),
            "tokens": {"issued": get(&self.counters.tokens_issued), "refused": get(&self.counters.tokens_refused)},
            "faults": *self.counters.faults.lock(),
            "statuses": *self.counters.statuses.lock(),
            "rules": self.rules.lock().report(),
        })
    }

    fn token(&self, request: &Request) -> Reply {
        let user = self.user.lock().clone();
        let wanted = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(&user));
        if !user.is_empty() && request.header("authorization") != Some(wanted.as_str()) {
            add(&self.counters.tokens_refused, 1);
            let body = json!({"errors": [{"code": "UNAUTHORIZED", "message": "wrong user or password"}]});
            return (401, Vec::new(), body.to_string());
        }
        let life = self.token_life.unwrap_or(Duration::from_secs(60));
        let token = format!("token-{}", self.issued.fetch_add(1, Ordering::Relaxed));
        add(&self.counters.tokens_issued, 1);
        let mut tokens = self.tokens.lock();
        if tokens.len() >= MAX_TOKENS {
            let now = Instant::now();
            tokens.retain(|_, until| now < *until);
        }
        tokens.insert(token.clone(), Instant::now() + life);
        // Lives of less than a second can't be said.
        let body = json!({"token": token, "expires_in": life.as_secs().max(1)});
        (200, vec![("Content-Type", "application/json".to_owned())], body.to_string())
    }
}
