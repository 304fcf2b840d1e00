//! Authentication: which `Authorization` header a request carries.
//!
//! A grant (a token, or a basic header) is shared by all requests of its scope until it expires or a request with it
//! gets 401. Renewing is one shared future: the first request that needs it starts it, all others wait for its result.
//! The lock is held only to look things up.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use parking_lot::Mutex;
use reqwest::header::{HeaderMap, HeaderValue};
use reqwest::{Method, Url};
use serde::Deserialize;

use super::challenge::Challenge;
use super::credentials::{self, Credentials};
use super::http::Http;
use super::wire::{self, Timeouts};
use crate::error::{Error, Result};

/// Largest answer of a token server in bytes.
const MAX_TOKEN_ANSWER: u64 = 1 << 20;
/// How long a token lives when its server does not say (distribution's token specification).
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// Longest life that is believed.
const MAX_LIFE: Duration = Duration::from_secs(24 * 3600);
/// How long a basic header is used before the credentials are looked up again.
const BASIC_LIFE: Duration = Duration::from_secs(300);
/// Most scopes that grants are kept for.
const MAX_SCOPES: usize = 64;

/// A header and when to renew it.
#[derive(Clone)]
struct Grant {
    header: HeaderValue,
    renew_at: Instant,
}

type Renewal = Shared<BoxFuture<'static, Result<Grant>>>;

/// What a request was authorized with; handed back when it was refused.
#[derive(Clone)]
pub(super) struct Authorization {
    pub header: HeaderValue,
    generation: u64,
}

/// Where grants come from.
#[derive(Clone)]
struct Issuer {
    host: String,
    plain_http: bool,
    config: Option<PathBuf>,
    client: Arc<Http>,
    timeouts: Timeouts,
}

#[derive(Default)]
struct State {
    challenge: Option<Challenge>,
    grants: HashMap<String, (u64, Renewal)>,
    generation: u64,
}

/// The grants for one registry.
pub(super) struct Auth {
    issuer: Arc<Issuer>,
    state: Mutex<State>,
}

impl Auth {
    /// No grants yet. `plain_http` says that the registry itself is spoken to without TLS: only then may a token
    /// server be, too.
    pub(super) fn new(
        base: &Url,
        host: String,
        config: Option<PathBuf>,
        client: Arc<Http>,
        timeouts: Timeouts,
    ) -> Self {
        let plain_http = base.scheme() == "http";
        Self { issuer: Arc::new(Issuer { host, plain_http, config, client, timeouts }), state: Mutex::default() }
    }

    /// The header for a request of `scope`; none until the registry has asked for one.
    pub(super) async fn authorization(&self, scope: &str) -> Result<Option<Authorization>> {
        let (generation, renewal) = {
            let mut state = self.state.lock();
            let Some(challenge) = state.challenge.clone() else { return Ok(None) };
            let key = if challenge == Challenge::Basic { "" } else { scope };
            let usable = |renewal: &Renewal| match renewal.peek() {
                None => true,
                Some(Ok(grant)) => Instant::now() < grant.renew_at,
                Some(Err(_)) => false,
            };
            match state.grants.get(key).filter(|(_, renewal)| usable(renewal)).cloned() {
                Some(found) => found,
                None => {
                    if state.grants.len() >= MAX_SCOPES {
                        state.grants.clear();
                    }
                    state.generation += 1;
                    let issuer = self.issuer.clone();
                    let scope = scope.to_owned();
                    let renewal = async move { issuer.issue(&challenge, &scope).await }.boxed().shared();
                    let entry = (state.generation, renewal);
                    state.grants.insert(key.to_owned(), entry.clone());
                    entry
                }
            }
        };
        Ok(Some(Authorization { header: renewal.await?.header, generation }))
    }

    /// A request got 401 with these headers. What it was authorized with is forgotten, unless somebody renewed it
    /// meanwhile. Says whether another try makes sense.
    pub(super) fn refused(&self, used: Option<&Authorization>, headers: &HeaderMap) -> bool {
        let mut state = self.state.lock();
        if let Some(used) = used {
            state.grants.retain(|_, (generation, _)| *generation != used.generation);
        }
        match Challenge::of(headers) {
            Some(challenge) => {
                if state.challenge.as_ref() != Some(&challenge) {
                    state.challenge = Some(challenge);
                    state.grants.clear();
                }
                true
            }
            None => used.is_some(),
        }
    }
}

impl Issuer {
    async fn issue(&self, challenge: &Challenge, scope: &str) -> Result<Grant> {
        let credentials = credentials::find(self.config.clone(), &self.host).await?;
        match challenge {
            Challenge::Basic => match &credentials {
                Credentials::Password { user, password } => {
                    Ok(Grant { header: basic(user, password)?, renew_at: Instant::now() + BASIC_LIFE })
                }
                Credentials::None => Err(self.refused(format!("it asks for credentials: docker login {}", self.host))),
                Credentials::Identity(_) => {
                    Err(self.refused("it asks for a password, and the docker config has an identity token".to_owned()))
                }
            },
            Challenge::Bearer { realm, service } => self.token(realm, service.as_deref(), scope, &credentials).await,
        }
    }

    async fn token(&self, realm: &str, service: Option<&str>, scope: &str, credentials: &Credentials) -> Result<Grant> {
        let mut url = Url::parse(realm).map_err(|_| self.refused("its token server's URL is malformed".to_owned()))?;
        if !(url.scheme() == "https" || url.scheme() == "http" && self.plain_http) {
            return Err(self.refused(format!("its token server {} does not use https", wire::shown(&url))));
        }
        let server = format!("token server {}", wire::shown(&url));
        let request = match credentials {
            Credentials::Identity(refresh_token) => {
                let form = Url::parse_with_params(
                    "http://form/",
                    [
                        ("grant_type", "refresh_token"),
                        ("service", service.unwrap_or_default()),
                        ("client_id", "firstread"),
                        ("scope", scope),
                        ("refresh_token", refresh_token),
                    ],
                );
                let form = form.ok().and_then(|url| url.query().map(str::to_owned)).unwrap_or_default();
                self.client
                    .request(Method::POST, url)?
                    .header("content-type", "application/x-www-form-urlencoded")
                    .body(form)
            }
            other => {
                let mut query = url.query_pairs_mut();
                service.map(|service| query.append_pair("service", service));
                scope.split(' ').filter(|scope| !scope.is_empty()).for_each(|scope| {
                    query.append_pair("scope", scope);
                });
                drop(query);
                match other {
                    Credentials::Password { user, password } => {
                        self.client.request(Method::GET, url)?.header("authorization", basic(user, password)?)
                    }
                    _ => self.client.request(Method::GET, url)?,
                }
            }
        };
        let asked_at = Instant::now();
        let response = wire::send(request, &server, self.timeouts).await?;
        let status = response.status();
        let answer = wire::read_bounded(response, MAX_TOKEN_ANSWER, &server, self.timeouts).await?;
        if !status.is_success() {
            return Err(wire::status_error(status, &answer, &server, &format!("a token for {scope}")));
        }
        let answer: TokenAnswer = serde_json::from_slice(&answer)
            .map_err(|_| self.refused(format!("{server} did not answer with a token")))?;
        let token = answer.token.or(answer.access_token).filter(|token| !token.is_empty());
        let token = token.ok_or_else(|| self.refused(format!("{server} answered without a token")))?;
        let mut header = HeaderValue::try_from(format!("Bearer {token}"))
            .map_err(|_| self.refused(format!("{server} sent a token with forbidden characters")))?;
        header.set_sensitive(true);
        let life = answer.expires_in.map_or(DEFAULT_LIFE, Duration::from_secs).min(MAX_LIFE);
        // A tenth of its life early, so that a request does not arrive with a token that expired on the way.
        Ok(Grant { header, renew_at: asked_at + life - (life / 10).min(Duration::from_secs(30)) })
    }

    fn refused(&self, reason: String) -> Error {
        Error::Refused { source_name: self.host.clone(), what: "access".to_owned(), reason }
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

fn basic(user: &str, password: &str) -> Result<HeaderValue> {
    let text = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    let mut header = HeaderValue::try_from(format!("Basic {text}"))
        .map_err(|_| Error::invalid("credentials", "they can't be sent in a header"))?;
    header.set_sensitive(true);
    Ok(header)
}
