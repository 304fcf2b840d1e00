//! One connection: requests in, honest answers from upstream, and the faults on the way back.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use crate::http::{self, Connection, Framing, Head, Request};
use crate::rules::Fault;
use crate::state::{CONTROL, Reply, State, add};
use crate::upstream::{Answer, byte_range};

/// Largest body of a control request.
const MAX_CONTROL: usize = 1 << 20;
/// Most bytes that a body is turned by.
const MAX_SHIFT: u64 = 16 << 20;

/// Whether a connection goes on after an answer.
#[derive(PartialEq)]
enum Next {
    Request,
    Close,
}

/// Serves a connection until it ends.
pub async fn serve(mut stream: Box<dyn Connection>, state: Arc<State>, scheme: &'static str) {
    add(&state.counters.connections, 1);
    let mut buffer = BytesMut::with_capacity(8 << 10);
    loop {
        match one(&mut *stream, &state, &mut buffer, scheme).await {
            Ok(Next::Request) => {}
            Ok(Next::Close) => return,
            Err(error) => return tracing::debug!(%error, "a connection ended"),
        }
    }
}

async fn one(
    stream: &mut dyn Connection,
    state: &State,
    buffer: &mut BytesMut,
    scheme: &'static str,
) -> io::Result<Next> {
    let Some(mut request) = http::read_head(stream, buffer).await? else { return Ok(Next::Close) };
    let framing = request.framing()?;
    if request.header("expect").is_some_and(|value| value.eq_ignore_ascii_case("100-continue")) {
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
    }
    if request.path().starts_with(CONTROL) {
        let body = collect(stream, buffer, framing).await?;
        let body = String::from_utf8_lossy(&body).into_owned();
        reply(stream, state.control(&request, &body)).await?;
        return Ok(Next::Request);
    }
    request.headers.retain(|(name, _)| name != "x-forwarded-proto");
    request.headers.push(("x-forwarded-proto".to_owned(), scheme.into()));
    add(&state.counters.requests, 1);
    add(&state.counters.ranges, u64::from(request.header("range").is_some()));
    let fault =
        state.rules.lock().decide(&request.method, &request.target, |fault| scheme == "http" || *fault != Fault::Tls);
    if let Some(fault) = &fault {
        state.counters.fault(fault);
        tracing::info!(?fault, method = request.method, target = request.target, "struck");
    }
    tokio::time::sleep(state.latency()).await;
    if let Some(next) = before_head(stream, state, buffer, &request, framing, fault.as_ref(), scheme).await? {
        return Ok(next);
    }
    if let Some(refusal) = state.unauthorized(&request, fault == Some(Fault::Expire)) {
        collect(stream, buffer, framing).await?;
        state.counters.status(refusal.0);
        reply(stream, refusal).await?;
        return Ok(Next::Request);
    }
    match &fault {
        Some(Fault::Whole) => request.headers.retain(|(name, _)| name != "range"),
        Some(Fault::Range(by)) => {
            for (_, value) in request.headers.iter_mut().filter(|(name, _)| name == "range") {
                if let Some((first, Some(last))) = std::str::from_utf8(value).ok().and_then(byte_range) {
                    *value = format!("bytes={}-{}", first.saturating_add(*by), last.saturating_add(*by)).into_bytes();
                }
            }
        }
        _ => {}
    }
    let (sender, receiver) = mpsc::channel(4);
    let feeding = http::read_body(stream, buffer, framing, sender);
    let (fed, answer) = tokio::join!(feeding, state.upstream.answer(&request, framing, receiver));
    fed?;
    match answer {
        Ok(answer) => {
            state.counters.status(answer.status);
            send(stream, state, &request, answer, fault).await
        }
        Err(error) => {
            tracing::warn!(error = format!("{error:#}"), "upstream");
            add(&state.counters.upstream_failed, 1);
            state.counters.status(502);
            reply(stream, (502, Vec::new(), format!("upstream: {error:#}\n"))).await?;
            Ok(Next::Request)
        }
    }
}

/// The faults that need no answer from upstream.
async fn before_head(
    stream: &mut dyn Connection,
    state: &State,
    buffer: &mut BytesMut,
    request: &Request,
    framing: Framing,
    fault: Option<&Fault>,
    scheme: &str,
) -> io::Result<Option<Next>> {
    let host = request.header("host").unwrap_or("localhost");
    let target = match fault {
        Some(Fault::Delay(time)) => {
            tokio::time::sleep(*time).await;
            return Ok(None);
        }
        Some(Fault::Stall(None)) => {
            stalled(state).await;
            return Ok(Some(Next::Close));
        }
        Some(Fault::Reset(None)) => {
            stream.reset_at_end()?;
            return Ok(Some(Next::Close));
        }
        Some(Fault::Status(code, retry_after)) => {
            collect(stream, buffer, framing).await?;
            state.counters.status(*code);
            let headers = retry_after.iter().map(|seconds| ("Retry-After", seconds.to_string())).collect();
            let body = r#"{"errors":[{"code":"FAULT","message":"an injected fault"}]}"#.to_owned();
            reply(stream, (*code, headers, body)).await?;
            return Ok(Some(Next::Request));
        }
        Some(Fault::Loop) => format!("{scheme}://{host}{}", request.target),
        Some(Fault::Dns) => format!("{scheme}://firstread-fault.invalid{}", request.target),
        Some(Fault::Tls) => format!("https://{host}{}", request.target),
        _ => return Ok(None),
    };
    collect(stream, buffer, framing).await?;
    state.counters.status(307);
    reply(stream, (307, vec![("Location", target)], String::new())).await?;
    Ok(Some(Next::Request))
}

/// Waits until all rules are healed: what stalled ends then.
async fn stalled(state: &State) {
    let mut healed = state.healed.subscribe();
    let _ = healed.changed().await;
}

/// Sends an answer, or what a fault makes of it.
async fn send(
    stream: &mut dyn Connection,
    state: &State,
    request: &Request,
    mut answer: Answer,
    fault: Option<Fault>,
) -> io::Result<Next> {
    let empty = request.method == "HEAD" || matches!(answer.status, 204 | 304);
    let mut head = Head::new(answer.status);
    for (name, value) in &answer.headers {
        head = head.header(name, value);
    }
    let lie = match fault {
        Some(Fault::Length(by)) => by,
        _ => 0,
    };
    let chunked = answer.length.is_none() && !empty;
    head = match answer.length {
        Some(length) => head.header("Content-Length", length.saturating_add_signed(lie).to_string()),
        None if chunked => head.header("Transfer-Encoding", "chunked"),
        None => head,
    };
    head.send(stream).await?;
    if empty {
        return Ok(Next::Request);
    }
    // Errors of the client's making are not counted against upstream.
    if let Some(Fault::Shift(by)) = fault {
        answer.body = turned(answer.body, by.min(MAX_SHIFT)).boxed();
    }
    let end = match fault {
        Some(Fault::Stall(Some(after)) | Fault::Reset(Some(after)) | Fault::Truncate(after)) => Some(after),
        _ => None,
    };
    let mut at = 0;
    while let Some(piece) = answer.body.next().await {
        let mut piece = piece?;
        while !piece.is_empty() {
            let most = match fault {
                // Ten times a second, so that it is a drip and no gush.
                Some(Fault::Drip(rate)) => (rate as usize / 10).max(1),
                _ => state.piece(),
            };
            let mut part = piece.split_to(piece.len().min(most));
            if let Some(end) = end {
                part.truncate(end.saturating_sub(at).min(part.len() as u64) as usize);
            }
            if let Some(Fault::Flip(place)) = fault
                && (at..at + part.len() as u64).contains(&place)
            {
                let mut bytes = part.to_vec();
                if let Some(byte) = bytes.get_mut((place - at) as usize) {
                    *byte ^= 1;
                }
                part = bytes.into();
            }
            if let Some(Fault::Drip(rate)) = fault {
                tokio::time::sleep(Duration::from_secs_f64(part.len() as f64 / rate as f64)).await;
            }
            state.transmit(part.len()).await;
            if chunked && !part.is_empty() {
                stream.write_all(format!("{:x}\r\n", part.len()).as_bytes()).await?;
            }
            stream.write_all(&part).await?;
            if chunked && !part.is_empty() {
                stream.write_all(b"\r\n").await?;
            }
            at += part.len() as u64;
            add(&state.counters.sent, part.len() as u64);
            if end.is_some_and(|end| at >= end) {
                stream.flush().await?;
                match fault {
                    Some(Fault::Stall(_)) => stalled(state).await,
                    Some(Fault::Reset(_)) => stream.reset_at_end()?,
                    _ => {}
                }
                return Ok(Next::Close);
            }
        }
    }
    if chunked {
        stream.write_all(b"0\r\n\r\n").await?;
    }
    stream.flush().await?;
    Ok(if lie == 0 { Next::Request } else { Next::Close })
}

/// The body, its first `by` bytes last.
fn turned(
    mut body: futures_util::stream::BoxStream<'static, io::Result<Bytes>>,
    by: u64,
) -> impl futures_util::Stream<Item = io::Result<Bytes>> + Send + 'static {
    let mut held = BytesMut::new();
    futures_util::stream::once(async move {
        let mut rest = Bytes::new();
        while (held.len() as u64) < by {
            let Some(piece) = body.next().await else { break };
            let mut piece = piece?;
            let missing = (by as usize - held.len()).min(piece.len());
            held.extend_from_slice(&piece.split_to(missing));
            rest = piece;
        }
        io::Result::Ok(
            futures_util::stream::iter([Ok(rest)]).chain(body).chain(futures_util::stream::iter([Ok(held.freeze())])),
        )
    })
    .flat_map(|stream| match stream {
        Ok(stream) => stream.boxed(),
        Err(error) => futures_util::stream::iter([Err(error)]).boxed(),
    })
    .filter(|piece| std::future::ready(piece.as_ref().map_or(true, |piece| !piece.is_empty())))
}

/// The whole body of a request.
async fn collect(stream: &mut dyn Connection, buffer: &mut BytesMut, framing: Framing) -> io::Result<Vec<u8>> {
    let (sender, mut receiver) = mpsc::channel(4);
    let collecting = async {
        let mut body = Vec::new();
        while let Some(piece) = receiver.recv().await {
            let piece: Bytes = piece?;
            // The rest of a large body is read and dropped, so that the answer is not lost in a reset.
            if body.len() + piece.len() <= MAX_CONTROL {
                body.extend_from_slice(&piece);
            }
        }
        io::Result::Ok(body)
    };
    let (read, body) = tokio::join!(http::read_body(stream, buffer, framing, sender), collecting);
    read?;
    body
}

async fn reply(stream: &mut dyn Connection, (status, headers, body): Reply) -> io::Result<()> {
    let head = headers.iter().fold(Head::new(status), |head, (name, value)| head.header(name, value));
    head.with_body(stream, body.as_bytes()).await
}
