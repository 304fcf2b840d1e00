//! The client: one request with its authorization, redirects, and waits.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt;
use parking_lot::Mutex;
use reqwest::header::{AUTHORIZATION, CONTENT_LENGTH, HeaderMap, LOCATION, RANGE, RETRY_AFTER};
use reqwest::{Method, Response, StatusCode, Url};
use tokio::time::Instant;

use super::auth::{Auth, Authorization};
use super::hosts::Host;
use super::redirects::Redirects;
use super::wire::{self, Timeouts};
use crate::error::{Error, Result};
use crate::source::files;
use crate::source::{Access, Content};

/// Most redirects of one request.
const MAX_REDIRECTS: usize = 5;
/// Longest `Retry-After` that is respected; a longer one is cut to this.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30);
/// How long a registry may take to answer once it has all of an upload: it may hash or copy it first.
const COMMIT_WAIT: Duration = Duration::from_secs(300);

/// A request.
#[derive(Clone)]
pub(super) struct Call {
    pub method: Method,
    pub url: Url,
    /// What is asked for, for errors.
    pub what: String,
    /// The token's scope; several are separated by spaces.
    pub scope: String,
    pub headers: HeaderMap,
    pub content: Option<(Content, u64)>,
}

impl Call {
    pub(super) fn new(method: Method, url: Url, what: impl Into<String>, scope: &str) -> Self {
        Self { method, url, what: what.into(), scope: scope.to_owned(), headers: HeaderMap::new(), content: None }
    }

    /// Whether where it is redirected to is good for other requests of its URL: ranges of a blob are.
    fn keeps_redirect(&self) -> bool {
        self.method == Method::GET && self.headers.contains_key(RANGE)
    }
}

/// Speaks to one registry.
pub(super) struct Client {
    http: reqwest::Client,
    auth: Auth,
    base: Url,
    /// For the registry alone.
    headers: HeaderMap,
    name: String,
    timeouts: Timeouts,
    redirects: Redirects,
    /// The registry asked to be left alone until then.
    not_before: Mutex<Option<Instant>>,
}

impl Client {
    /// A client for the registry `host` (with port); `name` names the repository in errors.
    pub(super) fn new(host: &str, name: &str, access: &Access) -> Result<Self> {
        let loopback = is_loopback(host);
        let scheme = if loopback || access.plain_http { "http" } else { "https" };
        let server = if host == "docker.io" { "registry-1.docker.io" } else { host };
        let settings = Host::load(&access.hosts_dir, host)?;
        let server = settings.server.clone().unwrap_or_else(|| format!("{scheme}://{server}"));
        let path = if settings.override_path { "/" } else { "/v2/" };
        let base = Url::parse(&format!("{}{path}", server.trim_end_matches('/')))
            .ok()
            .filter(|base| matches!(base.scheme(), "http" | "https") && base.has_host())
            .ok_or_else(|| Error::invalid(format!("registry {host:?}"), format!("{server:?} is not its URL")))?;
        let timeouts = Timeouts { connect: access.connect, stall: access.stall };
        let mut builder = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(access.connect)
            .user_agent(concat!("firstread/", env!("CARGO_PKG_VERSION")));
        builder = settings.apply(builder)?;
        if loopback {
            builder = builder.no_proxy();
        }
        let http = builder.build().map_err(|error| Error::unreachable(name, wire::describe(&error)))?;
        let auth =
            Auth::new(name.to_owned(), &base, host.to_owned(), access.docker_config.clone(), http.clone(), timeouts);
        Ok(Self {
            headers: settings.headers()?,
            http,
            auth,
            base,
            name: name.to_owned(),
            timeouts,
            redirects: Redirects::default(),
            not_before: Mutex::new(None),
        })
    }

    pub(super) fn timeouts(&self) -> Timeouts {
        self.timeouts
    }

    /// `path` below `/v2/`.
    pub(super) fn url(&self, path: &str) -> Result<Url> {
        self.base.join(path).map_err(|error| Error::invalid(format!("path {path:?}"), error.to_string()))
    }

    /// Sends `call` and returns the answer if `accept` takes its status, else the error that it means.
    pub(super) async fn send(&self, call: &Call, accept: impl Fn(StatusCode) -> bool) -> Result<Response> {
        if let Some(response) = self.shortcut(call, &accept).await {
            return Ok(response);
        }
        self.wait_until_welcome().await;
        // Three tries: without authorization, with a grant that has meanwhile been revoked, with a new one.
        let mut tries = 3;
        loop {
            tries -= 1;
            let authorization = self.auth.authorization(&call.scope).await?;
            let (response, at_home) = self.follow(call, authorization.as_ref()).await?;
            if accept(response.status()) {
                if call.keeps_redirect() && !at_home {
                    self.redirects.keep(&call.url, response.url());
                }
                return Ok(response);
            }
            if response.status() == StatusCode::UNAUTHORIZED
                && at_home
                && self.auth.refused(authorization.as_ref(), response.headers())
                && tries > 0
            {
                continue;
            }
            self.note_retry_after(&response);
            return Err(wire::error_of(response, &self.name, &call.what, self.timeouts).await);
        }
    }

    /// Makes the next request of `call`'s URL start at the registry.
    pub(super) fn forget_redirect(&self, call: &Call) {
        self.redirects.forget(&call.url);
    }

    /// Asks where the registry redirected to before. Whatever goes wrong there, the registry is asked again.
    async fn shortcut(&self, call: &Call, accept: &impl Fn(StatusCode) -> bool) -> Option<Response> {
        let url = self.redirects.get(&call.url).filter(|_| call.keeps_redirect())?;
        let request = self.http.request(call.method.clone(), url).headers(call.headers.clone());
        match wire::send(request, &self.name, self.timeouts).await {
            Ok(response) if accept(response.status()) => Some(response),
            _ => {
                self.redirects.forget(&call.url);
                None
            }
        }
    }

    /// Follows redirects; says whether the answer is the registry's own. The authorization stays with the registry:
    /// once a redirect has left it, no later request of the chain carries it.
    async fn follow(&self, call: &Call, authorization: Option<&Authorization>) -> Result<(Response, bool)> {
        let mut url = call.url.clone();
        let mut at_home = url.origin() == self.base.origin();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.http.request(call.method.clone(), url.clone()).headers(call.headers.clone());
            if at_home {
                request = request.headers(self.headers.clone());
            }
            if let Some(authorization) = authorization.filter(|_| at_home) {
                request = request.header(AUTHORIZATION, authorization.header.clone());
            }
            let response = match &call.content {
                None => wire::send(request, &self.name, self.timeouts).await?,
                Some((content, bytes)) => self.upload(request, content, *bytes).await?,
            };
            if !response.status().is_redirection() || call.content.is_some() {
                return Ok((response, at_home));
            }
            let Some(target) = response.headers().get(LOCATION) else { return Ok((response, at_home)) };
            let target = target.to_str().ok().and_then(|target| url.join(target).ok());
            let target = target.ok_or_else(|| self.refused(call, "it redirects to a malformed URL".to_owned()))?;
            let downgrade = url.scheme() == "https" && target.scheme() != "https";
            if !matches!(target.scheme(), "http" | "https") || downgrade {
                return Err(self.refused(call, format!("it redirects to {}, without TLS", wire::shown(&target))));
            }
            at_home &= target.origin() == self.base.origin();
            url = target;
        }
        Err(self.refused(call, format!("it redirects more than {MAX_REDIRECTS} times")))
    }

    /// Sends a body and watches that it moves.
    async fn upload(&self, request: reqwest::RequestBuilder, content: &Content, bytes: u64) -> Result<Response> {
        let sent = Arc::new(AtomicU64::new(0));
        let body = match content {
            Content::Bytes(bytes) => counted(pieces(bytes.clone()), &sent),
            Content::File(path) => counted(files::stream(PathBuf::from(path), 0, bytes), &sent),
        };
        let send = request.header(CONTENT_LENGTH, bytes).body(body).send();
        tokio::pin!(send);
        let (mut seen, mut waited) = (0, Duration::ZERO);
        loop {
            match tokio::time::timeout(self.timeouts.stall, &mut send).await {
                Ok(answer) => return answer.map_err(|error| Error::unreachable(&self.name, wire::describe(&error))),
                Err(_) => waited += self.timeouts.stall,
            }
            let now = sent.load(Ordering::Relaxed);
            if now > seen {
                (seen, waited) = (now, Duration::ZERO);
            } else if now < bytes || waited >= COMMIT_WAIT {
                let reason = format!("the upload stalled after {now} of {bytes} bytes");
                return Err(Error::unreachable(&self.name, reason));
            }
        }
    }

    async fn wait_until_welcome(&self) {
        let until = *self.not_before.lock();
        if let Some(until) = until {
            tokio::time::sleep_until(until).await;
        }
    }

    fn note_retry_after(&self, response: &Response) {
        if !matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            return;
        }
        let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        if let Some(seconds) = seconds {
            *self.not_before.lock() = Some(Instant::now() + Duration::from_secs(seconds).min(MAX_RETRY_AFTER));
        }
    }

    fn refused(&self, call: &Call, reason: String) -> Error {
        Error::Refused { source_name: self.name.clone(), what: call.what.clone(), reason }
    }
}

/// `bytes` in pieces, so that their progress can be seen.
fn pieces(bytes: Bytes) -> impl futures_util::Stream<Item = Result<Bytes>> + Send + 'static {
    const PIECE: usize = 256 << 10;
    let starts = (0..bytes.len()).step_by(PIECE);
    futures_util::stream::iter(starts.map(move |start| Ok(bytes.slice(start..bytes.len().min(start + PIECE)))))
}

/// A request body that counts what was taken from it.
fn counted(
    stream: impl futures_util::Stream<Item = Result<Bytes>> + Send + 'static,
    sent: &Arc<AtomicU64>,
) -> reqwest::Body {
    let sent = sent.clone();
    reqwest::Body::wrap_stream(stream.inspect_ok(move |piece| {
        sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
    }))
}

/// Whether `host` (with an optional port) is this machine by its name: no TLS is asked for.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::is_loopback;

    #[test]
    fn loopback_hosts_are_recognised() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:1", "127.9.8.7", "[::1]", "[::1]:5000"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.example", "128.0.0.1", "[::2]:1", "127.0.0.1.example:5000", "10.0.0.1"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
