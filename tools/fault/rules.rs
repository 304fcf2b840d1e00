//! Rules: which requests get which fault.
//!
//! A rule is `FAULT[:KEY=VALUE[,KEY=VALUE]…]`, e.g. `stall:after=4096,path=/blobs/,count=1`. The first rule that takes a
//! request decides; the others do not count it.

use std::fmt::Write;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// What happens to a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// It is answered later by so much.
    Delay(Duration),
    /// The answer stops after so many bytes of its body, with the connection open; without a number there is none at all.
    Stall(Option<u64>),
    /// The connection is reset after so many bytes of the body, or before the head.
    Reset(Option<u64>),
    /// The connection is closed after so many bytes of the body.
    Truncate(u64),
    /// The byte at this position of the body is flipped.
    Flip(u64),
    /// The right head, then the body turned by so many bytes.
    Shift(u64),
    /// 200 with everything for a range.
    Whole,
    /// 206 with a range that begins so many bytes later.
    Range(u64),
    /// An error, with the seconds of a `Retry-After` header.
    Status(u16, Option<u64>),
    /// A redirect to itself.
    Loop,
    /// The body comes with so many bytes a second.
    Drip(u64),
    /// `Content-Length` says so many bytes more than there are.
    Length(i64),
    /// A redirect to a host that does not exist (RFC 6761: `.invalid` never does).
    Dns,
    /// With `--tls-cert` the handshake is broken off, otherwise: a redirect to where it is.
    Tls,
    /// 401, as if the token had expired.
    Expire,
}

/// A fault and when it strikes.
#[derive(Clone, Debug)]
pub struct Rule {
    text: String,
    pub fault: Fault,
    path: Option<String>,
    method: Option<String>,
    /// Requests that are left alone first.
    skip: u64,
    /// Faults after which it has healed.
    count: Option<u64>,
    /// It strikes every so many requests.
    every: u64,
    /// It strikes with this probability in percent.
    chance: Option<f64>,
    /// When it has healed.
    until: Option<Instant>,
    matched: u64,
    fired: u64,
}

impl Rule {
    /// The rule and what it did, as JSON.
    pub fn report(&self, now: Instant) -> serde_json::Value {
        serde_json::json!({
            "rule": self.text, "matched": self.matched, "fired": self.fired, "armed": self.armed(now),
        })
    }

    fn armed(&self, now: Instant) -> bool {
        self.count.is_none_or(|count| self.fired < count) && self.until.is_none_or(|until| now < until)
    }

    /// Whether a request is struck; `random` is in 0..100.
    fn strikes(&mut self, method: &str, path: &str, random: f64, now: Instant) -> bool {
        let meant = self.path.as_deref().is_none_or(|part| path.contains(part))
            && self.method.as_deref().is_none_or(|wanted| wanted.eq_ignore_ascii_case(method));
        if !meant || !self.armed(now) {
            return false;
        }
        self.matched += 1;
        let counted = self.matched > self.skip && (self.matched - self.skip - 1).is_multiple_of(self.every);
        let struck = counted && self.chance.is_none_or(|chance| random < chance);
        self.fired += u64::from(struck);
        struck
    }
}

impl FromStr for Rule {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let text = text.trim();
        let (name, arguments) = text.split_once(':').unwrap_or((text, ""));
        let mut arguments: Vec<(&str, &str)> = arguments
            .split(',')
            .filter(|argument| !argument.is_empty())
            .map(|argument| {
                argument.split_once('=').with_context(|| format!("rule {text:?}: {argument:?} has no value"))
            })
            .collect::<anyhow::Result<_>>()?;
        let mut take = |wanted: &str| {
            let at = arguments.iter().position(|(key, _)| *key == wanted)?;
            Some(arguments.remove(at).1)
        };
        let number = |key: &str, value: &str| -> anyhow::Result<u64> {
            size(value).with_context(|| format!("rule {text:?}: {key}"))
        };
        let optional = |key: &str, value: Option<&str>| value.map(|value| number(key, value)).transpose();
        let needed = |key: &str, value: Option<&str>| {
            number(key, value.with_context(|| format!("rule {text:?} needs {key}=NUMBER"))?)
        };
        let fault = match name {
            "delay" => Fault::Delay(duration(take("time").with_context(|| format!("rule {text:?} needs time=TIME"))?)?),
            "stall" => Fault::Stall(optional("after", take("after"))?),
            "reset" => Fault::Reset(optional("after", take("after"))?),
            "truncate" => Fault::Truncate(needed("after", take("after"))?),
            "flip" => Fault::Flip(optional("at", take("at"))?.unwrap_or(0)),
            "shift" => Fault::Shift(optional("by", take("by"))?.unwrap_or(1)),
            "whole" => Fault::Whole,
            "range" => Fault::Range(optional("by", take("by"))?.unwrap_or(1)),
            "status" => {
                let code = u16::try_from(needed("code", take("code"))?).unwrap_or(0);
                if !(400..600).contains(&code) {
                    bail!("rule {text:?}: code is 400 to 599");
                }
                Fault::Status(code, optional("retry_after", take("retry_after"))?)
            }
            "loop" => Fault::Loop,
            "drip" => Fault::Drip(needed("rate", take("rate"))?.max(1)),
            "length" => Fault::Length(take("by").unwrap_or("1").parse().with_context(|| format!("rule {text:?}: by"))?),
            "dns" => Fault::Dns,
            "tls" => Fault::Tls,
            "expire" => Fault::Expire,
            _ => bail!("rule {text:?}: there is no fault {name:?}; see --help"),
        };
        let path = take("path").map(str::to_owned);
        let method = take("method").map(str::to_owned);
        let skip = optional("skip", take("skip"))?.unwrap_or(0);
        let count = optional("count", take("count"))?;
        let every = optional("every", take("every"))?.unwrap_or(1).max(1);
        let chance = take("chance").map(|value| value.trim_end_matches('%').parse::<f64>()).transpose();
        let chance = chance.with_context(|| format!("rule {text:?}: chance is a number of percent"))?;
        let until = take("for").map(duration).transpose()?.and_then(|time| Instant::now().checked_add(time));
        if let Some((key, _)) = arguments.first() {
            bail!("rule {text:?}: {key:?} means nothing here");
        }
        let text = text.to_owned();
        Ok(Self { text, fault, path, method, skip, count, every, chance, until, matched: 0, fired: 0 })
    }
}

/// All rules, and the dice.
#[derive(Debug)]
pub struct Rules {
    rules: Vec<Rule>,
    state: u64,
}

/// Most rules.
const MAX_RULES: usize = 1024;

impl Rules {
    pub fn new(rules: Vec<Rule>, seed: u64) -> Self {
        // Any odd number will do; xorshift must not start at 0.
        Self { rules, state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 }
    }

    /// The fault for a request. Of handshakes (`tls`) only those rules decide that are for them.
    pub fn decide(&mut self, method: &str, path: &str, meant: impl Fn(&Fault) -> bool) -> Option<Fault> {
        let now = Instant::now();
        for at in 0..self.rules.len() {
            let random = self.random();
            let Some(rule) = self.rules.get_mut(at) else { break };
            if meant(&rule.fault) && rule.strikes(method, path, random, now) {
                return Some(rule.fault.clone());
            }
        }
        None
    }

    /// Adds the rules in `text`, one a line; `#` begins a comment.
    pub fn arm(&mut self, text: &str) -> anyhow::Result<()> {
        let rules = parse(text)?;
        if self.rules.len() + rules.len() > MAX_RULES {
            bail!("there would be more than {MAX_RULES} rules");
        }
        self.rules.extend(rules);
        Ok(())
    }

    /// Forgets all rules.
    pub fn heal(&mut self) {
        self.rules.clear();
    }

    pub fn report(&self) -> Vec<serde_json::Value> {
        let now = Instant::now();
        self.rules.iter().map(|rule| rule.report(now)).collect()
    }

    /// A number in 0..100.
    fn random(&mut self) -> f64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 11) as f64 / (1u64 << 53) as f64 * 100.0
    }
}

/// The rules in `text`, one a line.
pub fn parse(text: &str) -> anyhow::Result<Vec<Rule>> {
    text.lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|line| !line.is_empty())
        .map(str::parse)
        .collect()
}

/// A number of bytes, with K, M or G for powers of 1024.
pub fn size(text: &str) -> anyhow::Result<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..).unwrap_or_default() {
        "" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        unit => bail!("{unit:?} is no unit: K, M, G"),
    };
    let number: u64 = digits.parse().with_context(|| format!("{text:?} is not a number such as 4096 or 12M"))?;
    number.checked_mul(1 << shift).with_context(|| format!("{text:?} is too large"))
}

/// A time: `20ms`, `3s`, `2m`; without a unit: seconds.
pub fn duration(text: &str) -> anyhow::Result<Duration> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: f64 = digits.parse().with_context(|| format!("{text:?} is not a time such as 20ms or 3s"))?;
    let factor = match text.get(digits.len()..).unwrap_or_default() {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        unit => bail!("{unit:?} is no unit of time: ms, s, m"),
    };
    Duration::try_from_secs_f64(number * factor).with_context(|| format!("{text:?} is no length of time"))
}

/// The faults for `--help`.
pub fn help() -> String {
    let mut text = String::from("Rules: FAULT[:KEY=VALUE[,KEY=VALUE]...]. Faults:\n");
    for (form, meaning) in [
        ("delay:time=TIME", "answer later"),
        ("stall[:after=N]", "stop after N bytes of the body, or before the head, with the connection open"),
        ("reset[:after=N]", "reset the connection after N bytes of the body, or before the head"),
        ("truncate:after=N", "close the connection after N bytes of the body"),
        ("flip[:at=N]", "flip a bit of byte N of the body"),
        ("shift[:by=N]", "the right head, the body turned by N bytes"),
        ("whole", "200 with everything where a range was asked for"),
        ("range[:by=N]", "206 with a range that begins N bytes later"),
        ("status:code=CODE[,retry_after=S]", "an error: 401, 403, 404, 416, 429, 500, ..."),
        ("loop", "redirect to itself"),
        ("drip:rate=N", "N bytes of the body a second"),
        ("length[:by=N]", "Content-Length N bytes too large (or small: by=-N)"),
        ("dns", "redirect to a host that does not exist"),
        ("tls", "break off the TLS handshake (without --tls-cert: redirect to where that happens)"),
        ("expire", "401, as if the token had expired"),
    ] {
        // Writing to a string can't fail.
        let _ = writeln!(text, "  {form:<34} {meaning}");
    }
    text.push_str(
        "Which requests, by default all for ever:\n  \
         path=PART, method=NAME   only these\n  \
         skip=N                   but not the first N\n  \
         every=N, chance=PERCENT  only every Nth, only by chance (see --seed)\n  \
         count=N, for=TIME        healed after N faults, after a time\n\
         While it runs, on the same address:\n  \
         GET /_fault/counters                      what was asked, sent and done, as JSON; DELETE sets them to 0\n  \
         POST, GET, DELETE /_fault/rules           arm more (one a line), list, heal all\n  \
         PUT /_fault/latency, /_fault/bandwidth    a time; bytes a second (0: no limit)\n  \
         PUT /_fault/user                          USER:PASSWORD that tokens are given for",
    );
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn struck(rules: &str, requests: &[&str]) -> Vec<bool> {
        let mut rules = Rules::new(parse(rules).unwrap(), 1);
        requests.iter().map(|path| rules.decide("GET", path, |_| true).is_some()).collect()
    }

    #[test]
    fn a_rule_strikes_the_requests_that_it_names() {
        let all = ["/a", "/b", "/a", "/a", "/a"];
        assert_eq!(struck("reset", &all), [true; 5]);
        assert_eq!(struck("reset:path=b", &all), [false, true, false, false, false]);
        assert_eq!(struck("reset:path=a,skip=1,count=2", &all), [false, false, true, true, false]);
        assert_eq!(struck("reset:every=2", &all), [true, false, true, false, true]);
        assert_eq!(struck("reset:method=PUT", &all), [false; 5]);
        assert_eq!(struck("reset:for=0s", &all), [false; 5]);
        let some = struck("reset:chance=30", &vec!["/"; 2000]).iter().filter(|&&struck| struck).count();
        assert!((500..700).contains(&some), "{some}");
    }

    #[test]
    fn the_first_rule_that_strikes_decides() {
        let mut rules = Rules::new(parse("# two\nflip:at=4,count=1\nstall # then this\n").unwrap(), 1);
        assert_eq!(rules.decide("GET", "/", |_| true), Some(Fault::Flip(4)));
        assert_eq!(rules.decide("GET", "/", |_| true), Some(Fault::Stall(None)));
        assert_eq!(rules.report()[1]["fired"], 1);
    }

    #[test]
    fn what_is_malformed_is_refused() {
        for text in [
            "",
            "nonsense",
            "stall:after",
            "stall:after=x",
            "truncate",
            "status",
            "status:code=200",
            "flip:by=1",
            "delay",
            "delay:time=soon",
            "length:by=x",
            "reset:chance=often",
            "drip:rate=1X",
        ] {
            assert!(text.parse::<Rule>().is_err(), "{text}");
        }
    }
}
