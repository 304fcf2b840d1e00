//! Redirects to object storage, kept until they expire: each saves one request to the registry for every range.
//!
//! What is kept is a URL and nothing else: requests to it never carry the registry's credentials.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use reqwest::Url;
use tokio::time::Instant;

/// Most URLs that are kept.
const MAX_KEPT: usize = 256;
/// How long a URL is used that does not say when it expires.
const UNKNOWN: Duration = Duration::from_secs(60);
/// Longest use of a URL, whatever it says.
const MAX_LIFE: Duration = Duration::from_secs(3600);
/// A URL is not used for the last part of its life, so that a request does not arrive too late.
const MARGIN: Duration = Duration::from_secs(15);

/// Where blobs are, by their URLs at the registry.
#[derive(Default)]
pub(super) struct Redirects {
    kept: Mutex<HashMap<Url, (Url, Instant)>>,
}

impl Redirects {
    /// Where `from` redirects to, if that is known and still valid.
    pub(super) fn get(&self, from: &Url) -> Option<Url> {
        let kept = self.kept.lock();
        kept.get(from).filter(|(_, until)| Instant::now() < *until).map(|(to, _)| to.clone())
    }

    /// Keeps where `from` redirects to for as long as that says it is valid.
    pub(super) fn keep(&self, from: &Url, to: &Url) {
        let life = match expiry(to) {
            None => UNKNOWN,
            Some(at) => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
                Duration::from_secs(at.saturating_sub(now)).saturating_sub(MARGIN).min(MAX_LIFE)
            }
        };
        let mut kept = self.kept.lock();
        if kept.len() >= MAX_KEPT {
            kept.clear();
        }
        if !life.is_zero() {
            kept.insert(from.clone(), (to.clone(), Instant::now() + life));
        }
    }

    /// Forgets where `from` redirects to: it did not work.
    pub(super) fn forget(&self, from: &Url) {
        self.kept.lock().remove(from);
    }
}

/// When a signed URL expires, in seconds since 1970: AWS signature 4 and Google's (`X-…-Date` and `X-…-Expires`), Azure's
/// shared access signature (`se`), CloudFront and older AWS signatures (`Expires`).
fn expiry(url: &Url) -> Option<u64> {
    let get = |wanted: &str| {
        url.query_pairs().find(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| value.into_owned())
    };
    for vendor in ["amz", "goog"] {
        let (date, life) = (get(&format!("x-{vendor}-date")), get(&format!("x-{vendor}-expires")));
        if let (Some(date), Some(life)) = (date, life) {
            return utc(&date)?.checked_add(life.parse().ok()?);
        }
    }
    match (get("se"), get("expires")) {
        (Some(end), _) => utc(&end),
        (None, Some(end)) => end.parse().ok(),
        (None, None) => None,
    }
}

/// A UTC time in ISO 8601, basic or extended, to the second: `20240131T235959Z`, `2024-01-31T23:59:59Z`; the time of day
/// may be missing.
fn utc(text: &str) -> Option<u64> {
    let digits: Vec<u64> = text.chars().filter_map(|c| c.to_digit(10)).map(u64::from).take(14).collect();
    let number = |from: usize, len: usize| digits.get(from..from + len)?.iter().copied().reduce(|a, b| a * 10 + b);
    let (year, month, day) = (number(0, 4)?, number(4, 2)?, number(6, 2)?);
    let (hour, minute) = (number(8, 2).unwrap_or(0), number(10, 2).unwrap_or(0));
    let second = number(12, 2).unwrap_or(0);
    if year < 1970 || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Days since 1970 with years that begin in March, so that the leap day is the last one.
    let (years, months) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = years * 365 + years / 4 - years / 100 + years / 400 + (months * 153 + 2) / 5 + day - 1;
    Some((days - 719_468) * 86400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_end_of_a_signed_url_is_found() {
        let of = |query: &str| expiry(&format!("https://s.example/b?{query}").parse().unwrap());
        assert_eq!(of("X-Amz-Date=20240229T120000Z&X-Amz-Expires=600"), Some(1_709_208_600));
        assert_eq!(of("X-Goog-Expires=60&X-Goog-Date=19700101T000001Z"), Some(61));
        assert_eq!(of("sv=1&se=2024-03-01T00%3A00%3A00Z&sig=x"), Some(1_709_251_200));
        assert_eq!(of("se=2024-03-01"), Some(1_709_251_200));
        assert_eq!(of("Expires=1709251200&Signature=x"), Some(1_709_251_200));
        for nothing in
            ["", "a=b", "se=soon", "X-Amz-Date=20240229T120000Z", "Expires=x", "se=1969-01-01", "se=2024-13-01"]
        {
            assert_eq!(of(nothing), None, "{nothing}");
        }
        assert_eq!(of("X-Amz-Date=99991231T235959Z&X-Amz-Expires=18446744073709551615"), None);
    }
}
