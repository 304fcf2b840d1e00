//! Reading a range of a blob by HTTP, and checking that the answer is that range.

use reqwest::header::{ACCEPT_ENCODING, CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, Response, StatusCode, Url};

use super::client::{Call, Client};
use super::wire;
use crate::error::{Error, Result};
use crate::index::Blob;
use crate::source::Body;

/// Reads `len` bytes from `offset` of `blob`, which is at `url`; `scope` is what a token must be for.
pub(super) async fn read(client: &Client, url: Url, scope: &str, blob: &Blob, offset: u64, len: u64) -> Result<Body> {
    if len == 0 {
        return Ok(Box::pin(futures_util::stream::empty()));
    }
    let last = offset.checked_add(len).filter(|&end| end <= blob.bytes).map(|end| end - 1);
    let last = last.ok_or_else(|| {
        let reason = format!("{len} bytes from {offset} are not inside blob {} of {} bytes", blob.digest, blob.bytes);
        Error::invalid("range", reason)
    })?;
    let what = format!("bytes {offset} to {last} of blob {}", blob.digest);
    let mut call = Call::new(Method::GET, url, what.clone(), scope);
    call.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    let range = HeaderValue::try_from(format!("bytes={offset}-{last}"));
    call.headers.insert(RANGE, range.map_err(|error| Error::invalid("range", error.to_string()))?);
    let response = client.send(&call, |status| status.is_success()).await?;
    check_answer(&response, blob, offset, len).map_err(|reason| {
        client.forget_redirect(&call);
        Error::Refused { source_name: client.name().to_owned(), what, reason }
    })?;
    Ok(wire::body(response, len, client.name().to_owned(), client.timeouts()))
}

/// Checks that the head of an answer promises exactly the range that was asked for (RFC 9110, section 15.3.7).
fn check_answer(response: &Response, blob: &Blob, offset: u64, len: u64) -> Result<(), String> {
    let headers = response.headers();
    match response.status() {
        StatusCode::PARTIAL_CONTENT => {
            let found = content_range(headers).ok_or("it answered 206 without a valid Content-Range")?;
            if found.first != offset || found.last.checked_sub(offset) != Some(len - 1) {
                return Err(format!("it answered with bytes {} to {}", found.first, found.last));
            }
            if found.total.is_some_and(|total| total != blob.bytes) {
                return Err(format!("its blob has {:?} bytes, not {}", found.total, blob.bytes));
            }
        }
        StatusCode::OK if offset == 0 && len == blob.bytes => {}
        StatusCode::OK => return Err("it ignores Range: it answered 200 with the whole blob".to_owned()),
        status => return Err(format!("it answered {status}")),
    }
    match wire::content_length(headers) {
        Some(bytes) if bytes != len => Err(format!("it announces {bytes} bytes where {len} were asked for")),
        _ => Ok(()),
    }
}

struct ContentRange {
    first: u64,
    last: u64,
    total: Option<u64>,
}

/// `Content-Range: bytes FIRST-LAST/TOTAL`, where the total may be `*`.
fn content_range(headers: &HeaderMap) -> Option<ContentRange> {
    let (range, total) = headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    Some(ContentRange { first: first.trim().parse().ok()?, last: last.trim().parse().ok()?, total })
}
