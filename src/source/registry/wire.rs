//! What all requests have in common: timeouts, bounded bodies, errors in the user's words.

use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{CONTENT_LENGTH, HeaderMap};
use reqwest::{RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;
use tokio::time::Instant;

use crate::error::{Error, Result};
use crate::source::Body;

/// Most bytes of an error's body that are read.
const MAX_ERROR_BODY: u64 = 16 << 10;
/// Longest message of a registry that is repeated, in characters.
const MAX_MESSAGE: usize = 300;
/// A body that brings fewer bytes than this in [`Timeouts::stall`] has stalled: a drip is no progress.
const MIN_PROGRESS: u64 = 4096;

/// How long to wait.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timeouts {
    /// For a connection.
    pub connect: Duration,
    /// For an answer to begin, and without progress in it.
    pub stall: Duration,
}

/// Sends a request without a large body and waits for the head of the answer.
pub(super) async fn send(request: RequestBuilder, name: &str, timeouts: Timeouts) -> Result<Response> {
    match tokio::time::timeout(timeouts.connect + timeouts.stall, request.send()).await {
        Ok(answer) => answer.map_err(|error| Error::unreachable(name, describe(&error))),
        Err(_) => Err(Error::unreachable(name, format!("no answer within {:?}", timeouts.connect + timeouts.stall))),
    }
}

/// The causes of a failed request in one line, without URLs: those of object storage hold signatures.
pub(super) fn describe(error: &reqwest::Error) -> String {
    let mut text = match error {
        error if error.is_connect() => "no connection".to_owned(),
        error if error.is_timeout() => "timed out".to_owned(),
        error if error.is_body() || error.is_decode() => "the answer broke off".to_owned(),
        _ => "the request failed".to_owned(),
    };
    let mut cause = std::error::Error::source(error);
    for _ in 0..8 {
        let Some(error) = cause else { break };
        let part = error.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.extend(part.chars().filter(|c| !c.is_control()).take(MAX_MESSAGE));
        }
        cause = error.source();
    }
    text
}

/// A URL without its query, which may hold signatures.
pub(super) fn shown(url: &Url) -> String {
    let port = url.port().map_or_else(String::new, |port| format!(":{port}"));
    format!("{}://{}{port}{}", url.scheme(), url.host_str().unwrap_or_default(), url.path())
}

/// Bounds the time that a body may take to bring the next bytes.
struct Pace {
    stall: Duration,
    until: Instant,
    bytes: u64,
}

impl Pace {
    fn new(stall: Duration) -> Self {
        Self { stall, until: Instant::now() + stall, bytes: 0 }
    }

    async fn next(&mut self, response: &mut Response, name: &str) -> Result<Option<Bytes>> {
        let piece = match tokio::time::timeout_at(self.until, response.chunk()).await {
            Ok(piece) => piece.map_err(|error| Error::unreachable(name, describe(&error)))?,
            Err(_) => {
                let reason = format!("{} bytes within {:?}: it has stalled", self.bytes, self.stall);
                return Err(Error::unreachable(name, reason));
            }
        };
        self.bytes += piece.as_ref().map_or(0, |piece| piece.len() as u64);
        if self.bytes >= MIN_PROGRESS {
            *self = Self::new(self.stall);
        }
        Ok(piece)
    }
}

/// The whole body, which must not have more than `max` bytes.
pub(super) async fn read_bounded(mut response: Response, max: u64, name: &str, timeouts: Timeouts) -> Result<Vec<u8>> {
    let too_long = || Error::Refused {
        source_name: name.to_owned(),
        what: "a document".to_owned(),
        reason: format!("it answered with more than {max} bytes"),
    };
    if content_length(response.headers()).is_some_and(|bytes| bytes > max) {
        return Err(too_long());
    }
    let mut pace = Pace::new(timeouts.stall);
    let mut body = Vec::new();
    while let Some(piece) = pace.next(&mut response, name).await? {
        if (body.len() + piece.len()) as u64 > max {
            return Err(too_long());
        }
        body.extend_from_slice(&piece);
    }
    Ok(body)
}

/// The body of `response` as pieces that add up to exactly `len` bytes.
pub(super) fn body(response: Response, len: u64, name: String, timeouts: Timeouts) -> Body {
    struct State {
        response: Response,
        left: u64,
        len: u64,
        name: String,
        pace: Pace,
    }
    let pace = Pace::new(timeouts.stall);
    let state = State { response, left: len, len, name, pace };
    Box::pin(futures_util::stream::try_unfold(state, |mut state| async move {
        while state.left > 0 {
            let Some(piece) = state.pace.next(&mut state.response, &state.name).await? else {
                let reason = format!("the answer ended after {} of {} bytes", state.len - state.left, state.len);
                return Err(Error::unreachable(state.name, reason));
            };
            if piece.len() as u64 > state.left {
                return Err(Error::Refused {
                    what: format!("{} bytes of a blob", state.len),
                    reason: "it answered with more bytes than asked for".to_owned(),
                    source_name: state.name,
                });
            }
            if !piece.is_empty() {
                state.left -= piece.len() as u64;
                return Ok(Some((piece, state)));
            }
        }
        Ok(None)
    }))
}

/// The error for an unexpected answer: its status, and the registry's message from the body, bounded.
pub(super) async fn error_of(response: Response, name: &str, what: &str, timeouts: Timeouts) -> Error {
    let status = response.status();
    let brief = Timeouts { stall: timeouts.stall.min(Duration::from_secs(5)), ..timeouts };
    let body = read_bounded(response, MAX_ERROR_BODY, name, brief).await.unwrap_or_default();
    status_error(status, &body, name, what)
}

/// The error for `status` and the body that came with it.
pub(super) fn status_error(status: StatusCode, body: &[u8], name: &str, what: &str) -> Error {
    let mut reason = format!("it answered {status}");
    if let Some(message) = message(body) {
        reason = format!("{reason}: {message}");
    }
    let (source_name, what) = (name.to_owned(), what.to_owned());
    match status {
        StatusCode::NOT_FOUND => Error::NotFound { source_name, what },
        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => Error::Unreachable { source_name, reason },
        status if status.is_server_error() => Error::Unreachable { source_name, reason },
        _ => Error::Refused { source_name, what, reason },
    }
}

/// The message in an error document (distribution-spec, "Error Codes"), or the start of a plain text.
fn message(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let text = match serde_json::from_slice::<Errors>(body) {
        Ok(document) => {
            let first = document.errors.into_iter().next()?;
            format!("{} {}", first.code, first.message)
        }
        Err(_) => String::from_utf8_lossy(body.get(..MAX_MESSAGE).unwrap_or(body)).into_owned(),
    };
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_MESSAGE).collect();
    Some(text.trim().to_owned()).filter(|text| !text.is_empty() && !text.starts_with('<'))
}

/// The `Content-Length`, if it is a number.
pub(super) fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Whether `host` (with an optional port) is this machine by its name: no TLS is asked for.
pub(super) fn is_loopback(host: &str) -> bool {
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
