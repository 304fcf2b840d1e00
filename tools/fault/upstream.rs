//! What is behind the proxy: a registry, any other HTTP server, or a directory.

use std::io::{self, SeekFrom};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, bail};
use bytes::Bytes;
use firstread::Digest;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use reqwest::Url;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::mpsc;

use crate::http::{Framing, Request};

/// Bytes of a file that are read at once.
const PIECE: u64 = 64 << 10;
/// Largest `index.json` of a layout.
const MAX_INDEX: u64 = 4 << 20;
/// Headers that belong to a connection (RFC 9110, section 7.6.1).
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "content-length",
    "expect",
];

/// Where answers come from.
pub enum Upstream {
    Server { base: Url, client: reqwest::Client },
    Directory(PathBuf),
}

/// An honest answer.
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, Vec<u8>)>,
    /// Of the body, as far as it is known.
    pub length: Option<u64>,
    pub body: BoxStream<'static, io::Result<Bytes>>,
}

impl Answer {
    fn plain(status: u16, text: &str) -> Self {
        let body = Bytes::copy_from_slice(text.as_bytes());
        let length = Some(body.len() as u64);
        Self { status, headers: Vec::new(), length, body: futures_util::stream::iter([Ok(body)]).boxed() }
    }
}

impl Upstream {
    /// `text` is a URL or a directory.
    pub fn open(text: &str, skip_verify: SkipVerify) -> anyhow::Result<Self> {
        if text.starts_with("http://") || text.starts_with("https://") {
            let base = Url::parse(text).with_context(|| format!("{text:?} is no URL"))?;
            let client = reqwest::Client::builder()
                .redirect(reqwest::redirect::Policy::none())
                .danger_accept_invalid_certs(skip_verify == SkipVerify::Yes)
                .no_proxy()
                .build()?;
            return Ok(Self::Server { base, client });
        }
        let dir = PathBuf::from(text);
        if !dir.is_dir() {
            bail!("{text:?} is neither a URL (http://HOST:PORT) nor a directory");
        }
        Ok(Self::Directory(dir))
    }

    /// The honest answer to `request`.
    pub async fn answer(
        &self,
        request: &Request,
        framing: Framing,
        body: mpsc::Receiver<io::Result<Bytes>>,
    ) -> anyhow::Result<Answer> {
        match self {
            Self::Server { base, client } => forward(base, client, request, framing, body).await,
            Self::Directory(dir) => read(dir, request).await,
        }
    }
}

/// Whether the upstream's certificate is believed whatever it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum SkipVerify {
    Yes,
    No,
}

async fn forward(
    base: &Url,
    client: &reqwest::Client,
    request: &Request,
    framing: Framing,
    body: mpsc::Receiver<io::Result<Bytes>>,
) -> anyhow::Result<Answer> {
    let url = Url::parse(&format!("{}{}", base.as_str().trim_end_matches('/'), request.target))?;
    let mut forwarded = client.request(reqwest::Method::from_bytes(request.method.as_bytes())?, url);
    for (name, value) in &request.headers {
        if !HOP_BY_HOP.contains(&name.as_str()) {
            forwarded = forwarded.header(name, value.as_slice());
        }
    }
    if framing != Framing::Length(0) || matches!(request.method.as_str(), "POST" | "PUT" | "PATCH") {
        let pieces = futures_util::stream::unfold(body, |mut body| async move { Some((body.recv().await?, body)) });
        forwarded = forwarded.body(reqwest::Body::wrap_stream(pieces));
        if let Framing::Length(length) = framing {
            forwarded = forwarded.header("content-length", length);
        }
    }
    let response = forwarded.send().await?;
    let length = response.headers().get("content-length").and_then(|value| value.to_str().ok()?.parse().ok());
    let headers = response
        .headers()
        .iter()
        .filter(|(name, _)| !HOP_BY_HOP.contains(&name.as_str()))
        .map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()))
        .collect();
    let status = response.status().as_u16();
    let body = response.bytes_stream().map(|piece| piece.map_err(io::Error::other)).boxed();
    Ok(Answer { status, headers, length, body })
}

/// A file of a directory: by its path, and those of an OCI layout also as a registry shows them.
async fn read(dir: &Path, request: &Request) -> anyhow::Result<Answer> {
    if !matches!(request.method.as_str(), "GET" | "HEAD") {
        return Ok(Answer::plain(405, "a directory is only read\n"));
    }
    let path = request.path();
    if path == "/v2/" {
        return Ok(Answer::plain(200, "{}"));
    }
    let relative = path.trim_start_matches('/');
    let (file, kind) = match relative.strip_prefix("v2/").and_then(|rest| rest.rsplit_once('/')) {
        Some((repository, name)) if repository.ends_with("/blobs") => (blob(dir, name), None),
        Some((repository, name)) if repository.ends_with("/manifests") => manifest(dir, name).await?,
        _ => {
            let plain = Path::new(relative).components().all(|part| matches!(part, Component::Normal(_)));
            (plain.then(|| dir.join(relative)), None)
        }
    };
    let opened = match &file {
        Some(file) => File::open(file).await.ok(),
        None => None,
    };
    let Some(mut file) = opened else { return Ok(Answer::plain(404, "not found\n")) };
    let metadata = file.metadata().await?;
    if !metadata.is_file() {
        return Ok(Answer::plain(404, "not a file\n"));
    }
    let total = metadata.len();
    let mut headers = vec![("Accept-Ranges".to_owned(), b"bytes".to_vec())];
    if let Some(kind) = kind {
        headers.push(("Content-Type".to_owned(), kind.into_bytes()));
    }
    let (first, last) = match request.header("range").and_then(byte_range) {
        None => (0, total),
        Some((first, _)) if first >= total => {
            let mut answer = Answer::plain(416, "");
            answer.headers.push(("Content-Range".to_owned(), format!("bytes */{total}").into_bytes()));
            return Ok(answer);
        }
        Some((first, last)) => {
            let end = last.map_or(total, |last| total.min(last.saturating_add(1)));
            let range = format!("bytes {first}-{}/{total}", end - 1);
            headers.push(("Content-Range".to_owned(), range.into_bytes()));
            (first, end)
        }
    };
    let status = if headers.iter().any(|(name, _)| name == "Content-Range") { 206 } else { 200 };
    file.seek(SeekFrom::Start(first)).await?;
    let length = last.saturating_sub(first);
    let body = futures_util::stream::try_unfold((file, length), |(mut file, left)| async move {
        if left == 0 {
            return Ok(None);
        }
        let mut piece = vec![0; left.min(PIECE) as usize];
        file.read_exact(&mut piece).await?;
        let left = left - piece.len() as u64;
        Ok(Some((Bytes::from(piece), (file, left))))
    });
    Ok(Answer { status, headers, length: Some(length), body: body.boxed() })
}

fn blob(dir: &Path, digest: &str) -> Option<PathBuf> {
    let digest: Digest = digest.parse().ok()?;
    Some(dir.join("blobs/sha256").join(digest.hex()))
}

/// The manifest that a layout lists by a name, or has by a digest, with its media type.
async fn manifest(dir: &Path, name: &str) -> anyhow::Result<(Option<PathBuf>, Option<String>)> {
    let Ok(file) = File::open(dir.join("index.json")).await else { return Ok((None, None)) };
    let mut text = Vec::new();
    file.take(MAX_INDEX).read_to_end(&mut text).await?;
    let index: serde_json::Value = serde_json::from_slice(&text).context("the layout's index.json")?;
    let listed = index["manifests"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found = listed
        .iter()
        .find(|entry| entry["annotations"]["org.opencontainers.image.ref.name"] == name || entry["digest"] == name);
    let text = |key: &str| found.and_then(|entry| entry[key].as_str()).map(str::to_owned);
    let media_type = || "application/vnd.oci.image.manifest.v1+json".to_owned();
    match text("digest") {
        Some(digest) => Ok((blob(dir, &digest), Some(text("mediaType").unwrap_or_else(media_type)))),
        None => Ok((blob(dir, name), Some(media_type()))),
    }
}

/// `bytes=FIRST-[LAST]`.
pub fn byte_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let last = if last.is_empty() { None } else { Some(last.parse().ok()?) };
    Some((first.parse().ok()?, last))
}
