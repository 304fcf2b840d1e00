//! How long readers wait for sources.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// How long a reader waits for a source that is unreachable: `60s`, `5m`, `1h`, or `wait`. Without a unit: seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Patience {
    /// Then the read fails.
    For(Duration),
    /// For ever.
    Endless,
}

impl Patience {
    /// The longest wait, if there is one.
    #[must_use]
    pub fn limit(self) -> Option<Duration> {
        match self {
            Self::For(time) => Some(time),
            Self::Endless => None,
        }
    }
}

impl FromStr for Patience {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "wait" {
            return Ok(Self::Endless);
        }
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let malformed = || format!("{text:?} is not a time: write `wait`, or a number with s, m or h");
        let factor = match unit {
            "" | "s" => 1,
            "m" => 60,
            "h" => 3600,
            _ => return Err(malformed()),
        };
        let seconds = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
        Ok(Self::For(Duration::from_secs(seconds.ok_or_else(malformed)?)))
    }
}

impl fmt::Display for Patience {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::For(time) => write!(f, "{}s", time.as_secs()),
            Self::Endless => f.write_str("wait"),
        }
    }
}
