//! The registry client against a real docker-registry, and against servers that ask for tokens, redirect, or lie.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/hostile.rs"]
mod hostile;
#[path = "common/packs.rs"]
mod packs;
#[path = "common/registry.rs"]
mod registry;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use firstread::chunk::Digest;
use firstread::index::{Blob, Role};
use firstread::oci::{Reference, media_type};
use firstread::source::{Access, Content, Publish, Purpose, Repository, Source};
use firstread::{Error, Result};
use futures_util::TryStreamExt;
use hostile::{Answer, Hostile};
use registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn open(name: &str, access: &Access, purpose: Purpose) -> Repository {
    Repository::open(&name.parse::<Reference>().unwrap(), access, purpose).await.unwrap()
}

/// Credentials come from nowhere but the test.
fn access(dir: &tempfile::TempDir) -> Access {
    let config = dir.path().join("config.json");
    if !config.exists() {
        std::fs::write(&config, "{}").unwrap();
    }
    let (stall, connect) = (Duration::from_secs(2), Duration::from_secs(2));
    Access { docker_config: Some(config), stall, connect, ..Access::default() }
}

async fn read(repository: &Repository, blob: &Blob, offset: u64, len: u64) -> Result<Vec<u8>> {
    let pieces: Vec<_> = repository.read_at(blob, offset, len).await?.try_collect().await?;
    Ok(pieces.concat())
}

fn blob(bytes: &[u8]) -> Blob {
    Blob { digest: Digest::of(bytes), bytes: bytes.len() as u64, role: Role::Pack }
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_and_manifests_go_to_a_real_registry_and_come_back() {
    let (registry, dir) = (Registry::start(), tempfile::tempdir().unwrap());
    let name = format!("{}/team/app:v1", registry.host());
    let repository = open(&name, &access(&dir), Purpose::Push).await;
    let bytes = packs::content(1, 3_000_000);
    let blob = blob(&bytes);
    let file = dir.path().join("blob");
    std::fs::write(&file, &bytes).unwrap();

    assert!(!repository.exists(&blob.digest).await.unwrap());
    repository.push_blob(&blob.digest, blob.bytes, &Content::File(file.clone())).await.unwrap();
    assert!(repository.exists(&blob.digest).await.unwrap());
    for (offset, len) in [(0, blob.bytes), (0, 1), (blob.bytes - 1, 1), (1_000_000, 1_500_000), (5, 0)] {
        let expected = &bytes[offset as usize..(offset + len) as usize];
        assert_eq!(read(&repository, &blob, offset, len).await.unwrap(), expected);
    }
    assert!(matches!(read(&repository, &blob, blob.bytes, 1).await, Err(Error::Invalid { .. })));
    assert!(matches!(read(&repository, &blob, u64::MAX, 2).await, Err(Error::Invalid { .. })));

    let config = Content::Bytes(b"{}".to_vec().into());
    repository.push_blob(&Digest::of(b"{}"), 2, &config).await.unwrap();
    let descriptor = |kind: &str, digest: &Digest, size: u64| serde_json::json!({"mediaType": kind, "digest": digest.to_string(), "size": size});
    let manifest = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2, "mediaType": media_type::MANIFEST,
        "config": descriptor(media_type::CONFIG, &Digest::of(b"{}"), 2),
        "layers": [descriptor(media_type::LAYER_ZSTD, &blob.digest, blob.bytes)],
    }))
    .unwrap();
    let digest = repository.push_manifest(&manifest, media_type::MANIFEST, Publish::Named).await.unwrap();
    let found = repository.manifest().await.unwrap();
    assert_eq!((found.bytes, found.digest, found.media_type.as_str()), (manifest, digest, media_type::MANIFEST));

    let other = open(&format!("{}/other:v1", registry.host()), &access(&dir), Purpose::Push).await;
    assert!(!other.exists(&blob.digest).await.unwrap());
    assert!(other.mount_blob(&blob.digest, &repository).await.unwrap());
    assert_eq!(read(&other, &blob, 10, 10).await.unwrap(), bytes[10..20]);

    let absent = open(&format!("{}/team/app:v2", registry.host()), &access(&dir), Purpose::Read).await;
    assert!(matches!(absent.manifest().await, Err(Error::NotFound { .. })));
    let text = read(&absent, &self::blob(b"absent"), 0, 6).await.unwrap_err().to_string();
    assert!(text.contains("was not found in") && text.contains("team/app"), "{text}");

    let pinned = open(&format!("{}/team/app@{}", registry.host(), digest), &access(&dir), Purpose::Read).await;
    assert_eq!(pinned.manifest().await.unwrap().digest, digest);
    let lie = repository.push_blob(&Digest::of(b"other"), blob.bytes, &Content::File(file)).await.unwrap_err();
    assert!(matches!(&lie, Error::Refused { .. }) && lie.to_string().contains("DIGEST"), "{lie}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_taken_from_docker_config() {
    let (registry, dir) = (Registry::with_password(), tempfile::tempdir().unwrap());
    let name = format!("{}/app:v1", registry.host());
    let error = open(&name, &access(&dir), Purpose::Read).await.manifest().await.unwrap_err();
    assert!(matches!(&error, Error::Refused { .. }) && error.to_string().contains("docker login"), "{error}");

    let with_config = Access { docker_config: Some(registry.docker_config()), ..access(&dir) };
    let repository = open(&name, &with_config, Purpose::Push).await;
    let bytes = packs::content(2, 100_000);
    repository.push_blob(&Digest::of(&bytes), 100_000, &Content::Bytes(bytes.clone().into())).await.unwrap();
    assert_eq!(read(&repository, &blob(&bytes), 7, 70).await.unwrap(), bytes[7..77]);

    // A password that was changed meanwhile is picked up.
    let config = dir.path().join("rotated.json");
    registry::write_docker_config(&config, &registry.host(), registry::USER, "wrong");
    let rotated = Access { docker_config: Some(config.clone()), ..access(&dir) };
    let repository = open(&name, &rotated, Purpose::Read).await;
    assert!(matches!(read(&repository, &blob(&bytes), 7, 70).await, Err(Error::Refused { .. })));
    registry::write_docker_config(&config, &registry.host(), registry::USER, registry::PASSWORD);
    assert_eq!(read(&repository, &blob(&bytes), 7, 70).await.unwrap(), bytes[7..77]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_or_broken_docker_config_is_an_error_when_it_is_needed() {
    let (registry, dir) = (Registry::with_password(), tempfile::tempdir().unwrap());
    for (content, wanted) in [(None, "No such file"), (Some("{"), "docker login")] {
        let config = dir.path().join("broken.json");
        if let Some(content) = content {
            std::fs::write(&config, content).unwrap();
        }
        let access = Access { docker_config: Some(config), ..access(&dir) };
        let name = format!("{}/app:v1", registry.host());
        let error = open(&name, &access, Purpose::Read).await.manifest().await.unwrap_err().to_string();
        assert!(error.contains(wanted) && error.contains("broken.json"), "{error}");
    }
}

/// A registry with a token server in one. Token `N` is valid while `valid` is N.
struct Tokens {
    server: Hostile,
    valid: Arc<AtomicU32>,
    issued: Arc<AtomicU32>,
}

async fn tokens(life: &'static str) -> Tokens {
    let server = Hostile::start().await;
    let (valid, issued) = (Arc::new(AtomicU32::new(1)), Arc::new(AtomicU32::new(0)));
    let (host, accepted, given) = (server.host().to_owned(), valid.clone(), issued.clone());
    server.policy(move |request| {
        if request.path.starts_with("/token") {
            given.fetch_add(1, Ordering::SeqCst);
            let token = accepted.load(Ordering::SeqCst);
            return Some(Answer::Body(format!(r#"{{"token":"T{token}"{life}}}"#).into_bytes()));
        }
        let wanted = format!("Bearer T{}", accepted.load(Ordering::SeqCst));
        if request.headers.get("authorization") == Some(&wanted) {
            return None;
        }
        let challenge = format!(r#"WWW-Authenticate: Bearer realm="http://{host}/token?a=b",service="s",scope="x""#);
        Some(Answer::Status(401, vec![challenge], String::new()))
    });
    Tokens { server, valid, issued }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_token_serves_all_and_is_renewed_once() {
    let (tokens, dir) = (tokens(r#","expires_in":300"#).await, tempfile::tempdir().unwrap());
    let bytes = packs::content(3, 100_000);
    tokens.server.put(&format!("/v2/a/app/blobs/{}", Digest::of(&bytes)), bytes.clone());
    tokens.server.delay(Duration::from_millis(20));
    let access = access(&dir);
    registry::write_docker_config(access.docker_config.as_ref().unwrap(), tokens.server.host(), "me", "pass");
    let repository = Arc::new(open(&format!("{}/a/app", tokens.server.host()), &access, Purpose::Read).await);
    for round in 1..=3 {
        tokens.valid.store(round, Ordering::SeqCst);
        let mut readers = tokio::task::JoinSet::new();
        for _ in 0..16 {
            let (repository, bytes) = (repository.clone(), bytes.clone());
            readers.spawn(async move {
                assert_eq!(read(&repository, &blob(&bytes), 100, 1000).await.unwrap(), bytes[100..1100]);
            });
        }
        while let Some(reader) = readers.join_next().await {
            reader.unwrap();
        }
        assert_eq!(tokens.issued.load(Ordering::SeqCst), round);
    }
    let request = tokens.server.requests().into_iter().find(|request| request.path.starts_with("/token")).unwrap();
    assert_eq!(request.path, "/token?a=b&service=s&scope=repository%3Aa%2Fapp%3Apull");
    assert!(request.headers["authorization"].starts_with("Basic "));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_token_is_changed_for_tokens_and_sent_nowhere_else() {
    let (tokens, dir) = (tokens(r#","expires_in":300"#).await, tempfile::tempdir().unwrap());
    let bytes = packs::content(3, 1000);
    tokens.server.put(&format!("/v2/app/blobs/{}", Digest::of(&bytes)), bytes.clone());
    let (access, host) = (access(&dir), tokens.server.host());
    let config = format!(r#"{{"auths":{{"{host}":{{"auth":"","identitytoken":"to&fro=1"}}}}}}"#);
    std::fs::write(access.docker_config.as_ref().unwrap(), config).unwrap();
    let repository = open(&format!("{host}/app"), &access, Purpose::Read).await;
    assert_eq!(read(&repository, &blob(&bytes), 5, 10).await.unwrap(), bytes[5..15]);
    let requests = tokens.server.requests();
    let (grants, others): (Vec<_>, Vec<_>) = requests.iter().partition(|request| request.path.starts_with("/token"));
    let [grant] = grants[..] else { panic!("{requests:?}") };
    assert_eq!((grant.method.as_str(), grant.headers.get("authorization")), ("POST", None));
    let form: std::collections::HashMap<_, _> =
        reqwest::Url::parse(&format!("http://form/?{}", grant.body)).unwrap().query_pairs().into_owned().collect();
    let field = |name: &str| form.get(name).map(String::as_str);
    assert_eq!((field("grant_type"), field("refresh_token")), (Some("refresh_token"), Some("to&fro=1")));
    assert_eq!((field("service"), field("scope")), (Some("s"), Some("repository:app:pull")));
    assert!(others.iter().all(|request| !format!("{request:?}").contains("fro=1")), "{others:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_renewed_before_it_expires() {
    let (tokens, dir) = (tokens(r#","expires_in":1"#).await, tempfile::tempdir().unwrap());
    let bytes = packs::content(3, 1000);
    tokens.server.put(&format!("/v2/app/blobs/{}", Digest::of(&bytes)), bytes.clone());
    let repository = open(&format!("{}/app", tokens.server.host()), &access(&dir), Purpose::Push).await;
    read(&repository, &blob(&bytes), 0, 10).await.unwrap();
    tokio::time::sleep(Duration::from_millis(950)).await;
    tokens.valid.store(2, Ordering::SeqCst);
    let before = tokens.server.requests().len();
    read(&repository, &blob(&bytes), 0, 10).await.unwrap();
    // The token server and the blob: nothing was sent with the old token.
    let after = tokens.server.requests();
    assert_eq!(after.len(), before + 2);
    assert!(after[before].path.ends_with("scope=repository%3Aapp%3Apull%2Cpush"), "{}", after[before].path);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_never_accepted_is_refused() {
    let (tokens, dir) = (tokens("").await, tempfile::tempdir().unwrap());
    let repository = open(&format!("{}/app", tokens.server.host()), &access(&dir), Purpose::Read).await;
    let host = tokens.server.host().to_owned();
    tokens.server.policy(move |request| {
        let challenge = format!(r#"WWW-Authenticate: Bearer realm="http://{host}/token""#);
        Some(match request.path.starts_with("/token") {
            true => Answer::Body(br#"{"access_token":"T"}"#.to_vec()),
            false => Answer::Status(401, vec![challenge], r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#.into()),
        })
    });
    let error = read(&repository, &blob(b"x"), 0, 1).await.unwrap_err();
    assert!(matches!(&error, Error::Refused { .. }) && error.to_string().contains("UNAUTHORIZED"), "{error}");
    assert!(tokens.server.requests().len() <= 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_token_server_answers_is_bounded_and_checked() {
    let answers: [(Answer, &str); 5] = [
        (Answer::HugeDocument, "more than"),
        (Answer::Body(b"{}".to_vec()), "without a token"),
        (Answer::Body(b"<html>".to_vec()), "did not answer with a token"),
        (Answer::Body(br#"{"token":"a\nb"}"#.to_vec()), "forbidden characters"),
        (Answer::Status(403, vec![], r#"{"errors":[{"code":"DENIED","message":"no\u0007"}]}"#.into()), "DENIED no"),
    ];
    for (answer, wanted) in answers {
        let (tokens, dir) = (tokens("").await, tempfile::tempdir().unwrap());
        let host = tokens.server.host().to_owned();
        tokens.server.policy(move |request| match request.path.starts_with("/token") {
            true => Some(answer.clone()),
            false => {
                let challenge = format!(r#"WWW-Authenticate: Bearer realm="http://{host}/token""#);
                Some(Answer::Status(401, vec![challenge], String::new()))
            }
        });
        let repository = open(&format!("{}/app", tokens.server.host()), &access(&dir), Purpose::Read).await;
        let error = repository.manifest().await.unwrap_err();
        assert!(error.to_string().contains(wanted), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_is_kept_until_it_expires_or_fails() {
    let (registry, storage) = (Hostile::start().await, Hostile::start().await);
    let dir = tempfile::tempdir().unwrap();
    let bytes = packs::content(9, 100_000);
    storage.put("/b", bytes.clone());
    let path = format!("/v2/app/blobs/{}", Digest::of(&bytes));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let config = dir.path().join("config.json");
    registry::write_docker_config(&config, registry.host(), "user", "secret");
    let repository = open(&format!("{}/app:v1", registry.host()), &access(&dir), Purpose::Read).await;
    let redirect = |life: u64| {
        let target = format!("http://{}/b?Expires={}&Signature=s", storage.host(), now + life);
        registry.policy(move |request| {
            Some(match request.headers.contains_key("authorization") {
                true => Answer::Status(307, vec![format!("Location: {target}")], String::new()),
                false => Answer::Status(401, vec!["WWW-Authenticate: Basic realm=x".into()], String::new()),
            })
        });
    };
    let check = async |offset: u64| {
        let found = read(&repository, &blob(&bytes), offset, 50).await.unwrap();
        assert_eq!(found, bytes[offset as usize..][..50]);
    };
    redirect(600);
    for at in 0..5 {
        check(at * 1000).await;
    }
    assert_eq!(registry.count(&path), 2, "once without and once with authorization");

    // What storage refuses, answers wrong or not at all is asked of the registry again.
    let mut asked = 2;
    for fault in [Answer::Status(403, vec![], String::new()), Answer::Reset, Answer::Status(500, vec![], String::new())]
    {
        storage.next([fault]);
        check(70).await;
        asked += 1;
        assert_eq!(registry.count(&path), asked);
        check(80).await;
        assert_eq!(registry.count(&path), asked);
    }
    storage.next([Answer::Whole]);
    assert!(matches!(read(&repository, &blob(&bytes), 7, 70).await, Err(Error::Refused { .. })));
    redirect(16);
    check(90).await;
    assert_eq!(registry.count(&path), asked + 1);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    check(95).await;
    assert_eq!(registry.count(&path), asked + 2, "it had expired, less a margin");
    assert!(storage.requests().iter().all(|request| !request.headers.contains_key("authorization")));
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_do_not_follow_a_redirect_to_another_host() {
    let (tokens, storage, dir) = (tokens("").await, Hostile::start().await, tempfile::tempdir().unwrap());
    let bytes = packs::content(4, 50_000);
    storage.put("/bucket/object", bytes.clone());
    let path = format!("/v2/app/blobs/{}", Digest::of(&bytes));
    let target = format!("Location: http://{}/bucket/object?signature=secret", storage.host());
    let repository = open(&format!("{}/app", tokens.server.host()), &access(&dir), Purpose::Read).await;
    let host = tokens.server.host().to_owned();
    tokens.server.policy(move |request| {
        if request.path.starts_with("/token") {
            return Some(Answer::Body(br#"{"token":"T"}"#.to_vec()));
        }
        assert_eq!(request.path, path);
        Some(match request.headers.contains_key("authorization") {
            true => Answer::Status(307, vec![target.clone()], String::new()),
            false => {
                let challenge = format!(r#"WWW-Authenticate: Bearer realm="http://{host}/token""#);
                Answer::Status(401, vec![challenge], String::new())
            }
        })
    });
    assert_eq!(read(&repository, &blob(&bytes), 300, 400).await.unwrap(), bytes[300..700]);
    assert!(storage.requests().iter().all(|request| !request.headers.contains_key("authorization")));
    assert_eq!(storage.requests()[0].headers["range"], "bytes=300-699");

    storage.ever(Some(Answer::Status(403, vec![], "<Error/>".into())));
    let error = read(&repository, &blob(&bytes), 300, 400).await.unwrap_err().to_string();
    assert!(!error.contains("secret"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_is_left_alone_for_as_long_as_it_asks() {
    let (server, dir) = (Hostile::start().await, tempfile::tempdir().unwrap());
    let bytes = packs::content(5, 1000);
    server.put(&format!("/v2/app/blobs/{}", Digest::of(&bytes)), bytes.clone());
    let repository = open(&format!("{}/app", server.host()), &access(&dir), Purpose::Read).await;
    server.next([Answer::Status(429, vec!["Retry-After: 1".into()], String::new())]);
    assert!(matches!(read(&repository, &blob(&bytes), 0, 10).await, Err(Error::Unreachable { .. })));
    let started = Instant::now();
    read(&repository, &blob(&bytes), 0, 10).await.unwrap();
    assert!((900..1900).contains(&started.elapsed().as_millis()), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_and_messages_are_bounded() {
    let (server, dir) = (Hostile::start().await, tempfile::tempdir().unwrap());
    let repository = open(&format!("{}/app:v1", server.host()), &access(&dir), Purpose::Read).await;
    server.next([Answer::HugeDocument]);
    let error = repository.manifest().await.unwrap_err();
    assert!(matches!(&error, Error::Refused { .. }) && error.to_string().contains("more than 4194304"), "{error}");
    let long = format!(r#"{{"errors":[{{"code":"X","message":"{}\u001b[2J"}}]}}"#, "m".repeat(5000));
    server.next([Answer::Status(400, vec![], long)]);
    let text = repository.manifest().await.unwrap_err().to_string();
    assert!(text.len() < 500 && !text.contains('\u{1b}'), "{text}");
    server.put("/v2/app/manifests/v1", b"{}".to_vec());
    let pinned = format!("{}/app@{}", server.host(), Digest::of(b"other"));
    server.put(&format!("/v2/app/manifests/{}", Digest::of(b"other")), b"{}".to_vec());
    let error = open(&pinned, &access(&dir), Purpose::Read).await.manifest().await.unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_passing_failure_of_the_control_plane_is_tried_again() {
    let (server, dir) = (Hostile::start().await, tempfile::tempdir().unwrap());
    server.put("/v2/app/manifests/v1", b"{}".to_vec());
    let repository = open(&format!("{}/app:v1", server.host()), &access(&dir), Purpose::Read).await;
    server.next([Answer::Reset, Answer::Status(502, vec![], String::new())]);
    assert_eq!(repository.manifest().await.unwrap().bytes, b"{}");
}

/// Reads no body: uploads fill the socket's buffers and stop.
async fn server_that_reads_no_body(listener: tokio::net::TcpListener) {
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((mut stream, _)) = listener.accept().await {
        connections.spawn(async move {
            loop {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else { return };
                    head.push(byte);
                }
                let answer: &[u8] = match &head[..4] {
                    b"POST" => b"HTTP/1.1 202 Accepted\r\nLocation: /upload\r\nContent-Length: 0\r\n\r\n",
                    b"HEAD" => b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
                    _ => std::future::pending().await,
                };
                stream.write_all(answer).await.unwrap();
            }
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_stalls_ends() {
    let dir = tempfile::tempdir().unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let name = format!("{}/app:v1", listener.local_addr().unwrap());
    let server = tokio::spawn(server_that_reads_no_body(listener));
    let access = Access { stall: Duration::from_millis(200), ..access(&dir) };
    let repository = open(&name, &access, Purpose::Push).await;
    let (digest, content) = (Digest::of(b"x"), Content::Bytes(vec![7; 64 << 20].into()));
    let push = repository.push_blob(&digest, 64 << 20, &content);
    let error = tokio::time::timeout(Duration::from_secs(10), push).await.unwrap().unwrap_err();
    assert!(matches!(&error, Error::Unreachable { .. }) && error.to_string().contains("stalled"), "{error}");
    server.abort();
}
