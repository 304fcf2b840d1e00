//! HTTP/1.1 by hand, since what is sent must be able to be wrong: heads in, heads and bodies out.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::server::TlsStream;

/// Largest head of a request in bytes.
const MAX_HEAD: usize = 64 << 10;
/// Most headers of a request.
const MAX_HEADERS: usize = 100;

/// A connection of a client, with TLS or without.
pub trait Connection: AsyncRead + AsyncWrite + Unpin + Send {
    /// Makes the connection end with a reset.
    fn reset_at_end(&self) -> io::Result<()>;
}

impl Connection for TcpStream {
    fn reset_at_end(&self) -> io::Result<()> {
        self.set_zero_linger()
    }
}

impl Connection for TlsStream<TcpStream> {
    fn reset_at_end(&self) -> io::Result<()> {
        self.get_ref().0.set_zero_linger()
    }
}

/// A request's head.
#[derive(Debug)]
pub struct Request {
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Names in lower case.
    pub headers: Vec<(String, Vec<u8>)>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).and_then(|(_, value)| std::str::from_utf8(value).ok())
    }

    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// How long its body is.
    pub fn framing(&self) -> io::Result<Framing> {
        if self.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
            return Ok(Framing::Chunked);
        }
        let length = self.header("content-length").map_or(Ok(0), str::parse);
        length.map(Framing::Length).map_err(|_| malformed("its Content-Length is no number"))
    }
}

/// How a body ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Framing {
    Length(u64),
    Chunked,
}

/// Reads one head; `None` when the client has closed the connection.
pub async fn read_head(stream: &mut dyn Connection, buffer: &mut BytesMut) -> io::Result<Option<Request>> {
    loop {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Request::new(&mut headers);
        match parsed.parse(buffer) {
            Err(error) => return Err(malformed(&error.to_string())),
            Ok(httparse::Status::Complete(len)) => {
                let request = Request {
                    method: parsed.method.unwrap_or_default().to_owned(),
                    target: parsed.path.unwrap_or_default().to_owned(),
                    headers: parsed
                        .headers
                        .iter()
                        .map(|header| (header.name.to_ascii_lowercase(), header.value.to_vec()))
                        .collect(),
                };
                buffer.advance(len);
                return Ok(Some(request));
            }
            Ok(httparse::Status::Partial) if buffer.len() > MAX_HEAD => return Err(malformed("it is too large")),
            Ok(httparse::Status::Partial) => {}
        }
        if stream.read_buf(buffer).await? == 0 {
            return if buffer.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
    }
}

/// Hands the body of a request on in pieces; an early end of the receiver is no error.
pub async fn read_body(
    stream: &mut dyn Connection,
    buffer: &mut BytesMut,
    framing: Framing,
    pieces: mpsc::Sender<io::Result<Bytes>>,
) -> io::Result<()> {
    let result = async {
        match framing {
            Framing::Length(length) => read_exactly(stream, buffer, length, &pieces).await,
            Framing::Chunked => loop {
                let line = read_line(stream, buffer).await?;
                let digits = line.split(';').next().unwrap_or_default().trim();
                let length = u64::from_str_radix(digits, 16).map_err(|_| malformed("a chunk's length is no number"))?;
                if length == 0 {
                    while !read_line(stream, buffer).await?.is_empty() {}
                    return Ok(());
                }
                read_exactly(stream, buffer, length, &pieces).await?;
                read_line(stream, buffer).await?;
            },
        }
    };
    let result: io::Result<()> = result.await;
    if let Err(error) = &result {
        // The upstream request must not be taken for complete.
        let _ = pieces.send(Err(io::Error::new(error.kind(), error.to_string()))).await;
    }
    result
}

async fn read_exactly(
    stream: &mut dyn Connection,
    buffer: &mut BytesMut,
    mut left: u64,
    pieces: &mpsc::Sender<io::Result<Bytes>>,
) -> io::Result<()> {
    while left > 0 {
        if buffer.is_empty() {
            buffer.reserve(64 << 10);
            if stream.read_buf(buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let piece = buffer.split_to(left.min(buffer.len() as u64) as usize).freeze();
        left -= piece.len() as u64;
        let _ = pieces.send(Ok(piece)).await;
    }
    Ok(())
}

async fn read_line(stream: &mut dyn Connection, buffer: &mut BytesMut) -> io::Result<String> {
    loop {
        if let Some(end) = buffer.windows(2).position(|pair| pair == b"\r\n") {
            let line = buffer.split_to(end);
            buffer.advance(2);
            return Ok(String::from_utf8_lossy(&line).into_owned());
        }
        if buffer.len() > MAX_HEAD {
            return Err(malformed("a line of a chunked body is too long"));
        }
        if stream.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// An answer's head, ready to be sent.
pub struct Head(Vec<u8>);

impl Head {
    pub fn new(status: u16) -> Self {
        let reason = reqwest::StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason());
        Self(format!("HTTP/1.1 {status} {}\r\n", reason.unwrap_or("Unknown")).into_bytes())
    }

    pub fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.0.extend_from_slice(name.as_bytes());
        self.0.extend_from_slice(b": ");
        self.0.extend_from_slice(value.as_ref());
        self.0.extend_from_slice(b"\r\n");
        self
    }

    pub async fn send(mut self, stream: &mut dyn Connection) -> io::Result<()> {
        self.0.extend_from_slice(b"\r\n");
        stream.write_all(&self.0).await?;
        stream.flush().await
    }

    /// Sends it with a whole body.
    pub async fn with_body(self, stream: &mut dyn Connection, body: &[u8]) -> io::Result<()> {
        let mut message = self.header("Content-Length", body.len().to_string()).0;
        message.extend_from_slice(b"\r\n");
        message.extend_from_slice(body);
        stream.write_all(&message).await?;
        stream.flush().await
    }
}

fn malformed(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed request: {reason}"))
}
