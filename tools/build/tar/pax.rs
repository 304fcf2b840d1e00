//! PAX extended headers (IEEE Std 1003.1, pax, "pax Extended Header").

use super::super::limits::Limits;
use super::sparse::PaxSparse;
use crate::error::{Error, Result};
use crate::ext4::{Time, Xattr};

/// The records of an extended header that matter here. An empty value means that the ustar field stands.
#[derive(Default)]
pub(super) struct Pax {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u64>,
    pub gid: Option<u64>,
    pub mtime: Option<Time>,
    pub xattrs: Vec<Xattr>,
    pub sparse: PaxSparse,
}

impl Pax {
    /// Parses the records `<length> <key>=<value>\n` of the header at byte `at`.
    pub(super) fn parse(mut data: &[u8], at: u64, limits: &Limits) -> Result<Self> {
        let malformed =
            |what: &str| Error::invalid("tar", format!("the extended header at byte {at} is malformed: {what}"));
        let mut pax = Self::default();
        while !data.is_empty() && data.first() != Some(&0) {
            let space = data.iter().take(20).position(|byte| *byte == b' ').ok_or_else(|| malformed("no length"))?;
            let length = decimal(data.get(..space).unwrap_or_default()).ok_or_else(|| malformed("no length"))?;
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            let record = data.get(space + 1..length).ok_or_else(|| malformed("a record is longer than the header"))?;
            let record = record.strip_suffix(b"\n").ok_or_else(|| malformed("a record has no end"))?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(|| malformed("no ="))?;
            let (key, value) = (record.get(..equals).unwrap_or_default(), record.get(equals + 1..).unwrap_or_default());
            pax.record(key, value, limits).ok_or_else(|| malformed(&key.escape_ascii().to_string()))?;
            data = data.get(length..).unwrap_or_default();
        }
        Ok(pax)
    }

    fn record(&mut self, key: &[u8], value: &[u8], limits: &Limits) -> Option<()> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.retain(|(known, _)| **known != *name);
            self.xattrs.push((name.into(), value.into()));
            return Some(());
        }
        if value.is_empty() {
            return Some(());
        }
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(decimal(value)?),
            b"gid" => self.gid = Some(decimal(value)?),
            b"mtime" => self.mtime = Some(time(value)?),
            _ => {
                if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.record(key, value, limits)?;
                }
            }
        }
        Some(())
    }
}

/// An unsigned decimal number of ASCII digits and nothing else.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds with a sign and a fraction, cut to nanoseconds.
fn time(text: &[u8]) -> Option<Time> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let secs = i64::try_from(decimal(parts.next()?)?).ok()?;
    let mut nanos = 0;
    if let Some(fraction) = parts.next() {
        if !fraction.iter().all(u8::is_ascii_digit) {
            return None;
        }
        for place in 0..9 {
            nanos = nanos * 10 + fraction.get(place).map_or(0, |digit| u32::from(digit - b'0'));
        }
    }
    Some(match (negative, nanos) {
        (false, _) => Time { secs, nanos },
        (true, 0) => Time { secs: -secs, nanos: 0 },
        (true, _) => Time { secs: -secs - 1, nanos: 1_000_000_000 - nanos },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_have_a_positive_fraction() {
        assert_eq!(time(b"12.5"), Some(Time { secs: 12, nanos: 500_000_000 }));
        assert_eq!(time(b"-1.25"), Some(Time { secs: -2, nanos: 750_000_000 }));
        assert_eq!(time(b"-3"), Some(Time { secs: -3, nanos: 0 }));
        assert_eq!(time(b"1.0000000019"), Some(Time { secs: 1, nanos: 1 }));
        assert_eq!(time(b"1e3"), None);
    }

    #[test]
    fn values_may_hold_newlines_and_equal_signs() {
        let record = b"33 SCHILY.xattr.user.a=x=1\ny\n\0\xff\n\n";
        let record = [format!("{}", record.len()).as_bytes(), &record[2..]].concat();
        let pax = Pax::parse(&record, 0, &Limits::default()).ok();
        assert_eq!(pax.map(|pax| pax.xattrs), Some(vec![((*b"user.a").into(), (*b"x=1\ny\n\0\xff\n").into())]));
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        for data in
            [&b"5 a=\n"[..4], b"99 a=b\n", b"3 a=b\n", b"0 a=b\n", b"99999999999999999999999 a=b\n", b"7 path\n"]
        {
            assert!(Pax::parse(data, 0, &Limits::default()).is_err(), "{}", data.escape_ascii());
        }
    }
}
