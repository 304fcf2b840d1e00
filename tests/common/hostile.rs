//! An HTTP server that answers by script: what a registry, a token server, or an object store does on a bad day.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What to do with one request.
#[derive(Clone, Debug)]
pub enum Answer {
    /// What an honest server does: 200, 206, or 404.
    Honest,
    /// Honest, but the byte at this position of the body is flipped.
    Flip(usize),
    /// The right head, then another part of the blob.
    Shifted(usize),
    /// The right head, the connection closed after so many bytes of the body.
    Truncated(usize),
    /// The right head, so many bytes of the body, then nothing, with the connection open.
    Stalled(usize),
    /// Honest, so many bytes of the body at a time, with a pause before each.
    Slow(usize),
    /// Nothing at all, with the connection open.
    Silent,
    /// The connection is reset before the head.
    Reset,
    /// 200 with the whole blob.
    Whole,
    /// 206 with another range's Content-Range and as many bytes as were asked for.
    OtherRange,
    /// 206 without Content-Range.
    NoRange,
    /// 206 whose total length is not the blob's.
    OtherTotal,
    /// The right head without a length, then the body for ever (in chunks).
    Endless,
    /// 200 with these bytes, whatever was asked for.
    Body(Vec<u8>),
    /// A document of 2^40 bytes by its head, and bytes without end.
    HugeDocument,
    /// A status with header lines and a body.
    Status(u16, Vec<String>, String),
}

/// A request as it was received.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: HashMap<String, String>,
    pub body: String,
}

type Policy = Box<dyn Fn(&Request) -> Option<Answer> + Send>;

#[derive(Default)]
struct State {
    content: HashMap<String, Vec<u8>>,
    /// Answers for blob requests, in order; then `ever`.
    next: VecDeque<Answer>,
    ever: Option<Answer>,
    policy: Option<Policy>,
    requests: Vec<Request>,
    delay: Duration,
}

pub struct Hostile {
    state: Arc<Mutex<State>>,
    host: String,
    task: tokio::task::JoinHandle<()>,
}

impl Hostile {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = state.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, shared.clone()));
            }
        });
        Self { state, host, task }
    }

    pub fn host(&self) -> &str {
        &self.host
    }

    /// Serves `content` under `path`.
    pub fn put(&self, path: &str, content: Vec<u8>) {
        self.state.lock().unwrap().content.insert(path.to_owned(), content);
    }

    /// Answers the next requests so, one each.
    pub fn next(&self, answers: impl IntoIterator<Item = Answer>) {
        self.state.lock().unwrap().next.extend(answers);
    }

    /// Answers all further requests so; `None` is honest.
    pub fn ever(&self, answer: Option<Answer>) {
        self.state.lock().unwrap().ever = answer;
    }

    /// Decides first for every request; `None` leaves it to the script.
    pub fn policy(&self, policy: impl Fn(&Request) -> Option<Answer> + Send + 'static) {
        self.state.lock().unwrap().policy = Some(Box::new(policy));
    }

    /// Waits so long before every answer.
    pub fn delay(&self, delay: Duration) {
        self.state.lock().unwrap().delay = delay;
    }

    pub fn requests(&self) -> Vec<Request> {
        self.state.lock().unwrap().requests.clone()
    }

    /// How many requests were for this path.
    pub fn count(&self, path: &str) -> usize {
        self.state.lock().unwrap().requests.iter().filter(|request| request.path == path).count()
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut stream: TcpStream, state: Arc<Mutex<State>>) {
    while let Some(request) = read_request(&mut stream).await {
        let (answer, content, delay) = {
            let mut state = state.lock().unwrap();
            state.requests.push(request.clone());
            let by_policy = state.policy.as_ref().and_then(|policy| policy(&request));
            let scripted = by_policy.or_else(|| state.next.pop_front()).or_else(|| state.ever.clone());
            let path = request.path.split('?').next().unwrap().to_owned();
            (scripted.unwrap_or(Answer::Honest), state.content.get(&path).cloned(), state.delay)
        };
        tokio::time::sleep(delay).await;
        if reply(&mut stream, &request, answer, content).await.is_none() {
            return;
        }
    }
}

async fn read_request(stream: &mut TcpStream) -> Option<Request> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let mut first = lines.next()?.split(' ');
    let (method, path) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers: HashMap<_, _> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let mut body = vec![0; headers.get("content-length").map_or(0, |len| len.parse().unwrap())];
    stream.read_exact(&mut body).await.ok()?;
    Some(Request { method, path, headers, body: String::from_utf8_lossy(&body).into_owned() })
}

/// `None` when the connection ends.
async fn reply(stream: &mut TcpStream, request: &Request, answer: Answer, content: Option<Vec<u8>>) -> Option<()> {
    let status = |code: u16, headers: &[String], body: &str| {
        let headers: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
        format!("HTTP/1.1 {code} Some Reason\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len())
    };
    if let Answer::Status(code, headers, body) = &answer {
        return stream.write_all(status(*code, headers, body).as_bytes()).await.ok();
    }
    match &answer {
        Answer::Silent => std::future::pending().await,
        Answer::Reset => {
            let _ = stream.set_zero_linger();
            return None;
        }
        Answer::HugeDocument => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await.ok()?;
            return endless(stream).await;
        }
        Answer::Body(body) => {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            stream.write_all(head.as_bytes()).await.ok()?;
            return stream.write_all(body).await.ok();
        }
        _ => {}
    }
    let Some(content) = content else { return stream.write_all(status(404, &[], "").as_bytes()).await.ok() };
    let total = content.len();
    let range = request.headers.get("range").and_then(|range| {
        let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse::<usize>().ok()?, last.parse::<usize>().ok()?))
    });
    let (first, last) = range.unwrap_or((0, total - 1));
    let mut body = content[first..=last].to_vec();
    let mut code = if range.is_some() { 206 } else { 200 };
    let mut content_range = format!("Content-Range: bytes {first}-{last}/{total}\r\n");
    match answer {
        Answer::Flip(at) => body[at] ^= 1,
        Answer::Shifted(by) => body = content.iter().cycle().skip(first + by).take(body.len()).copied().collect(),
        Answer::Whole => (code, body, content_range) = (200, content.clone(), String::new()),
        Answer::OtherRange => content_range = format!("Content-Range: bytes {}-{}/{total}\r\n", first + 1, last + 1),
        Answer::NoRange => content_range = String::new(),
        Answer::OtherTotal => content_range = format!("Content-Range: bytes {first}-{last}/{}\r\n", total + 1),
        _ => {}
    }
    if code == 200 {
        content_range = String::new();
    }
    if let Answer::Endless = answer {
        let head = format!("HTTP/1.1 {code} OK\r\n{content_range}Transfer-Encoding: chunked\r\n\r\n");
        stream.write_all(head.as_bytes()).await.ok()?;
        return endless(stream).await;
    }
    let head = format!("HTTP/1.1 {code} OK\r\n{content_range}Content-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await.ok()?;
    if request.method == "HEAD" {
        return Some(());
    }
    match answer {
        Answer::Truncated(len) => {
            stream.write_all(&body[..len]).await.ok()?;
            None
        }
        Answer::Stalled(len) => {
            stream.write_all(&body[..len]).await.ok()?;
            std::future::pending().await
        }
        Answer::Slow(len) => {
            for piece in body.chunks(len) {
                tokio::time::sleep(Duration::from_millis(30)).await;
                stream.write_all(piece).await.ok()?;
            }
            Some(())
        }
        _ => stream.write_all(&body).await.ok(),
    }
}

async fn endless(stream: &mut TcpStream) -> Option<()> {
    let chunk = [b"1000\r\n", &[7; 4096][..], b"\r\n"].concat();
    loop {
        stream.write_all(&chunk).await.ok()?;
    }
}
