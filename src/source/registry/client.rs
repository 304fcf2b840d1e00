//! The client: one request with its authorization, redirects, and waits.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::TryStreamExt;
use reqwest::header::{AUTHORIZATION, CONTENT_LENGTH, DATE, HeaderMap, LOCATION, RANGE, RETRY_AFTER};
use reqwest::{Method, Response, StatusCode, Url};
use tokio::time::Instant;

use super::auth::Authorization;
use super::connections::Link;
use super::hosts::{Host, Role};
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

/// Speaks to one host on behalf of one repository.
pub(super) struct Client {
    link: Arc<Link>,
    base: Url,
    role: Role,
    name: String,
    redirects: Redirects,
}

impl Client {
    /// A client for `host`; `name` names the repository in errors.
    ///
    /// # Errors
    /// Certificates or headers that are malformed.
    pub(super) fn new(host: &Host, name: &str, access: &Access) -> Result<Self> {
        Ok(Self {
            link: access.connections.link(host, access)?,
            base: host.base.clone(),
            role: host.role.clone(),
            name: name.to_owned(),
            redirects: Redirects::default(),
        })
    }

    /// The source's name, for people.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Host and port.
    pub(super) fn host(&self) -> &str {
        self.base.authority()
    }

    pub(super) fn timeouts(&self) -> Timeouts {
        self.link.timeouts
    }

    /// `path` below `/v2/`.
    pub(super) fn url(&self, path: &str) -> Result<Url> {
        let mut url =
            self.base.join(path).map_err(|error| Error::invalid(format!("path {path:?}"), error.to_string()))?;
        if let Role::Mirror(namespace) = &self.role {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        Ok(url)
    }

    /// Sends `call` and returns the answer if `accept` takes its status, else the error that it means.
    pub(super) async fn send(&self, call: &Call, accept: impl Fn(StatusCode) -> bool) -> Result<Response> {
        if let Some(response) = self.shortcut(call, &accept).await {
            return Ok(response);
        }
        self.wait_until_welcome().await?;
        // Three tries: without authorization, with a grant that has meanwhile been revoked, with a new one.
        let mut tries = 3;
        loop {
            tries -= 1;
            let authorization = self.link.auth.authorization(&call.scope).await?;
            let (response, at_home) = self.follow(call, authorization.as_ref()).await?;
            if accept(response.status()) {
                if call.keeps_redirect() && !at_home {
                    self.redirects.keep(&call.url, response.url());
                }
                return Ok(response);
            }
            if response.status() == StatusCode::UNAUTHORIZED
                && at_home
                && self.link.auth.refused(authorization.as_ref(), response.headers())
                && tries > 0
            {
                continue;
            }
            self.note_retry_after(&response);
            return Err(wire::error_of(response, &self.name, &call.what, self.link.timeouts).await);
        }
    }

    /// Makes the next request of `call`'s URL start at the registry.
    pub(super) fn forget_redirect(&self, call: &Call) {
        self.redirects.forget(&call.url);
    }

    /// Asks where the registry redirected to before. Whatever goes wrong there, the registry is asked again.
    async fn shortcut(&self, call: &Call, accept: &impl Fn(StatusCode) -> bool) -> Option<Response> {
        let url = self.redirects.get(&call.url).filter(|_| call.keeps_redirect())?;
        let request = self.link.http.request(call.method.clone(), url).ok()?.headers(call.headers.clone());
        match wire::send(request, &self.name, self.link.timeouts).await {
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
            let mut request = self.link.http.request(call.method.clone(), url.clone())?.headers(call.headers.clone());
            if at_home {
                request = request.headers(self.link.headers.clone());
            }
            if let Some(authorization) = authorization.filter(|_| at_home) {
                request = request.header(AUTHORIZATION, authorization.header.clone());
            }
            let response = match &call.content {
                None => wire::send(request, &self.name, self.link.timeouts).await?,
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
            Content::Draft(file) => counted(files::stream_open(file.clone(), bytes), &sent),
        };
        let send = request.header(CONTENT_LENGTH, bytes).body(body).send();
        tokio::pin!(send);
        let (mut seen, mut waited) = (0, Duration::ZERO);
        loop {
            match tokio::time::timeout(self.link.timeouts.stall, &mut send).await {
                Ok(answer) => return answer.map_err(|error| Error::unreachable(&self.name, wire::describe(&error))),
                Err(_) => waited += self.link.timeouts.stall,
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

    /// Waits as long as a registry asked for. Others are not waited for: there is one to ask instead.
    async fn wait_until_welcome(&self) -> Result<()> {
        let until = *self.link.not_before.lock();
        let Some(until) = until.filter(|until| *until > Instant::now()) else { return Ok(()) };
        if self.role != Role::Registry {
            let seconds = (until - Instant::now()).as_secs() + 1;
            return Err(Error::unreachable(&self.name, format!("it asked to be left alone for {seconds} s more")));
        }
        tokio::time::sleep_until(until).await;
        Ok(())
    }

    fn note_retry_after(&self, response: &Response) {
        if !matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            return;
        }
        if let Some(pause) = retry_after(response.headers(), SystemTime::now()) {
            *self.link.not_before.lock() = Some(Instant::now() + pause.min(MAX_RETRY_AFTER));
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

/// What `Retry-After` says (RFC 9110, 10.2.3): seconds, or a date, which is compared with the answer's own.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = |text: &str| httpdate::parse_http_date(text).ok();
    let sent = headers.get(DATE).and_then(|value| date(value.to_str().ok()?)).unwrap_or(now);
    // A time that has passed is none.
    date(text)?.duration_since(sent).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let pause = |lines: &[(reqwest::header::HeaderName, &str)]| {
            let headers = lines.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect();
            retry_after(&headers, now).map(|pause| pause.as_secs())
        };
        assert_eq!(pause(&[(RETRY_AFTER, "7")]), Some(7));
        assert_eq!(pause(&[(RETRY_AFTER, "Sun, 06 Nov 1994 08:49:57 GMT")]), Some(20));
        // The server's clock is what its dates are of.
        let date = (DATE, "Sun, 06 Nov 1994 08:49:47 GMT");
        assert_eq!(pause(&[(RETRY_AFTER, "Sun, 06 Nov 1994 08:49:57 GMT"), date.clone()]), Some(10));
        assert_eq!(pause(&[(RETRY_AFTER, "Sun, 06 Nov 1994 08:49:07 GMT"), date]), None);
        for nonsense in ["", "soon", "-3", "1e9", "99999999999999999999", "Sun, 99 Nov 1994 08:49:57 GMT"] {
            assert_eq!(pause(&[(RETRY_AFTER, nonsense)]), None, "{nonsense}");
        }
        assert_eq!(pause(&[]), None);
    }
}
