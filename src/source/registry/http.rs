//! HTTP clients: one for `http` URLs, and one for `https` URLs, which is made when the first of them is asked for. Making it
//! reads and parses the system's certificates, some hundred files: of a start whose page cache is cold that is a third.

use std::sync::OnceLock;

use parking_lot::Mutex;
use reqwest::{ClientBuilder, Method, RequestBuilder, Url};

use super::wire;
use crate::error::{Error, Result};

/// Variables that name a proxy of `http` URLs.
const PROXIES: [&str; 4] = ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"];

/// The clients for what one host serves, and for where it redirects to.
pub(super) struct Http {
    /// Whose clients they are, for errors.
    name: String,
    /// Knows no certificate, so that every TLS server is refused. `None`: the way to `http` URLs has TLS as well.
    plain: Option<reqwest::Client>,
    secure: OnceLock<Result<reqwest::Client>>,
    /// What the secure one is made of, until it is.
    builder: Mutex<Option<ClientBuilder>>,
}

impl Http {
    /// The clients of the host `name` whose own URL is `base`. `builder` makes one without certificates, `secure` has those of
    /// the host.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when a client that is needed can't be set up.
    pub(super) fn new(
        name: &str,
        base: &Url,
        builder: impl FnOnce() -> ClientBuilder,
        secure: ClientBuilder,
    ) -> Result<Self> {
        let failed = |error: reqwest::Error| Error::unreachable(name, wire::describe(&error));
        let direct = !PROXIES.iter().any(|name| std::env::var(name).is_ok_and(|proxy| has_tls(&proxy)));
        let plain = direct.then(|| builder().tls_certs_only([]).build().map_err(failed)).transpose()?;
        let (secure, builder) = (OnceLock::new(), Mutex::new(Some(secure)));
        let http = Self { name: name.to_owned(), plain, secure, builder };
        // What is wrong with its certificates is told before anything is asked for.
        http.client(base)?;
        Ok(http)
    }

    /// A request of `url`.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when TLS can't be set up.
    pub(super) fn request(&self, method: Method, url: Url) -> Result<RequestBuilder> {
        Ok(self.client(&url)?.request(method, url))
    }

    fn client(&self, url: &Url) -> Result<&reqwest::Client> {
        if let Some(plain) = self.plain.as_ref().filter(|_| url.scheme() == "http") {
            return Ok(plain);
        }
        self.secure.get_or_init(|| self.make()).as_ref().map_err(Error::clone)
    }

    fn make(&self) -> Result<reqwest::Client> {
        let builder = self.builder.lock().take();
        let builder = builder.ok_or_else(|| Error::unreachable(&self.name, "TLS could not be set up"))?;
        builder.build().map_err(|error| Error::unreachable(&self.name, wire::describe(&error)))
    }

    /// Whether the client with certificates was made.
    #[cfg(test)]
    pub(super) fn has_certificates(&self) -> bool {
        self.secure.get().is_some()
    }
}

/// Whether a proxy is spoken to by TLS.
fn has_tls(proxy: &str) -> bool {
    proxy.trim().get(..6).is_some_and(|scheme| scheme.eq_ignore_ascii_case("https:"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn certificates_are_read_for_https_alone() {
        let http = |base: &str| {
            Http::new("r.example", &base.parse().unwrap(), reqwest::Client::builder, reqwest::Client::builder())
                .unwrap()
        };
        let plain = http("http://r.example/v2/");
        drop(plain.request(Method::GET, "http://r.example/v2/a/manifests/b".parse().unwrap()).unwrap());
        assert!(!plain.has_certificates());
        // Object storage that a plain registry redirects to.
        drop(plain.request(Method::GET, "https://storage.example/a".parse().unwrap()).unwrap());
        assert!(plain.has_certificates());
        assert!(http("https://r.example/v2/").has_certificates());
    }

    #[test]
    fn a_proxy_may_have_tls_itself() {
        for (proxy, tls) in
            [("https://p:3128", true), (" HTTPS://p", true), ("http://p", false), ("p:3128", false), ("", false)]
        {
            assert_eq!(has_tls(proxy), tls, "{proxy:?}");
        }
    }
}
