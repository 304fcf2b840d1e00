//! What a registry asks for with 401: the `WWW-Authenticate` header (RFC 9110, section 11.6.1).

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// Longest header that is looked at, in bytes, over all of its lines.
const MAX_HEADER: usize = 8192;
/// Most parameters of one challenge.
const MAX_PARAMETERS: usize = 16;

/// How to authenticate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// User name and password with every request.
    Basic,
    /// A token from the server `realm`.
    Bearer {
        /// The token server's URL.
        realm: String,
        /// What the token is for, passed on as it is.
        service: Option<String>,
    },
}

impl Challenge {
    /// The challenge that `headers` carry: bearer wins over basic, others are ignored.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let mut found = None;
        let mut left = MAX_HEADER;
        for value in headers.get_all(WWW_AUTHENTICATE) {
            left = left.checked_sub(value.len())?;
            for challenge in value.to_str().map(parse).unwrap_or_default() {
                if found.is_none() || matches!(challenge, Self::Bearer { .. }) {
                    found = Some(challenge);
                }
            }
        }
        found
    }
}

/// All challenges of one header line that are understood.
fn parse(line: &str) -> Vec<Challenge> {
    let mut challenges: Vec<(String, Vec<(String, String)>)> = Vec::new();
    for part in split_outside_quotes(line) {
        // A part is `scheme`, `scheme name=value`, or `name=value` that belongs to the scheme before it.
        let (scheme, parameter) = match part.split_once(|c: char| c.is_ascii_whitespace()) {
            Some((scheme, rest)) if !scheme.contains('=') => (Some(scheme), Some(rest.trim())),
            None if !part.contains('=') => (Some(part), None),
            _ => (None, Some(part)),
        };
        if let Some(scheme) = scheme {
            challenges.push((scheme.to_ascii_lowercase(), Vec::new()));
        }
        let (Some(parameter), Some((_, parameters))) = (parameter, challenges.last_mut()) else { continue };
        if let Some((name, value)) = parameter.split_once('=')
            && parameters.len() < MAX_PARAMETERS
        {
            parameters.push((name.trim().to_ascii_lowercase(), unquote(value.trim())));
        }
    }
    challenges.into_iter().filter_map(|(scheme, parameters)| understand(&scheme, parameters)).collect()
}

fn understand(scheme: &str, parameters: Vec<(String, String)>) -> Option<Challenge> {
    let get = |wanted: &str| parameters.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.clone());
    match scheme {
        "basic" => Some(Challenge::Basic),
        "bearer" => Some(Challenge::Bearer { realm: get("realm")?, service: get("service") }),
        _ => None,
    }
}

fn split_outside_quotes(line: &str) -> Vec<&str> {
    let (mut parts, mut start, mut quoted, mut escaped) = (Vec::new(), 0, false, false);
    for (at, byte) in line.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b',' if !quoted => {
                parts.push(line[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(line[start..].trim());
    parts.retain(|part| !part.is_empty());
    parts
}

fn unquote(value: &str) -> String {
    let Some(inner) = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')) else {
        return value.to_owned();
    };
    let mut plain = String::with_capacity(inner.len());
    let mut escaped = false;
    for c in inner.chars() {
        if c == '\\' && !escaped {
            escaped = true;
        } else {
            escaped = false;
            plain.push(c);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn of(lines: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(WWW_AUTHENTICATE, line.parse().unwrap());
        }
        Challenge::of(&headers)
    }

    fn bearer(realm: &str, service: Option<&str>) -> Option<Challenge> {
        Some(Challenge::Bearer { realm: realm.to_owned(), service: service.map(str::to_owned) })
    }

    #[test]
    fn challenges_are_understood() {
        assert_eq!(of(&["Basic realm=\"a, b\""]), Some(Challenge::Basic));
        assert_eq!(of(&["basic"]), Some(Challenge::Basic));
        assert_eq!(
            of(&["Bearer realm=\"https://t.example/token\",service=\"s=1\",scope=\"repository:a:pull,push\""]),
            bearer("https://t.example/token", Some("s=1"))
        );
        assert_eq!(of(&["Basic realm=x, Bearer realm=\"h\\\"t\" , error=\"a\""]), bearer("h\"t", None));
        assert_eq!(of(&["Negotiate", "Bearer realm=r"]), bearer("r", None));
    }

    #[test]
    fn nonsense_is_ignored() {
        let long = format!("Bearer realm=\"{}\"", "a".repeat(MAX_HEADER));
        let open = format!("Bearer realm=\"{}", ",".repeat(4000));
        for line in ["", ",,,", "Bearer", "Bearer service=x", "=", "realm=x", "\"", &long] {
            assert_eq!(of(&[line]), None, "{line:.40}");
        }
        assert!(of(&[&open]).is_some_and(|challenge| challenge != Challenge::Basic));
    }
}
