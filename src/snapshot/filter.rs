//! containerd's filters (its package `filters`): which snapshots a List is about.
//!
//! ```text
//! filter   = selector *( "," selector )                    all must hold
//! selector = field *( "." field ) [ operator value ]       without an operator: the field is there
//! operator = "==" | "!=" | "~="                            ~= : a regular expression, found anywhere
//! field    = quoted | letter *( letter | digit | "_" )
//! value    = quoted | *( anything but white space and "," )
//! quoted   = a Go string in double quotes; values also in / or | or `
//! ```
//!
//! A filter comes from outside: its length, its parts and what a regular expression compiles to are bounded.

use regex::{Regex, RegexBuilder};

/// Longest filter in bytes.
const FILTER_MAX: usize = 64 << 10;
/// Most filters of one request.
const FILTERS_MAX: usize = 1024;
/// Most bytes that a compiled regular expression takes.
const REGEX_MAX: usize = 1 << 20;

/// A request's filters.
#[derive(Debug)]
pub struct Filters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filters {
    /// Reads a request's filters.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub fn parse(texts: &[String]) -> Result<Self, String> {
        if texts.len() > FILTERS_MAX {
            return Err(format!("{} filters; at most {FILTERS_MAX} are read", texts.len()));
        }
        texts.iter().map(|text| Parser::read(text)).collect::<Result<_, _>>().map(Self)
    }

    /// Whether something is listed; `field` gives the value of a path such as `["labels", "a.b"]`.
    pub fn matches(&self, field: impl Fn(&[String]) -> Option<String>) -> bool {
        self.0.is_empty() || self.0.iter().any(|all| all.iter().all(|selector| selector.holds(&field)))
    }
}

impl Selector {
    fn holds(&self, field: &impl Fn(&[String]) -> Option<String>) -> bool {
        let value = field(&self.path);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value.as_ref() == Some(wanted),
            // As containerd has it: what is not there has the value "".
            Test::NotEqual(wanted) => value.unwrap_or_default() != *wanted,
            Test::Matches(wanted) => wanted.is_match(&value.unwrap_or_default()),
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn read(text: &'a str) -> Result<Vec<Selector>, String> {
        if text.len() > FILTER_MAX {
            return Err(format!("a filter of {} bytes; at most {FILTER_MAX} are read", text.len()));
        }
        let mut parser = Self { text, at: 0 };
        let mut selectors = Vec::new();
        // An empty filter matches everything.
        if text.is_empty() {
            return Ok(selectors);
        }
        loop {
            selectors.push(parser.selector()?);
            match parser.peek() {
                Some(',') => parser.at += 1,
                None => return Ok(selectors),
                Some(other) => return Err(parser.wrong(&format!("{other:?} instead of `,`"))),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, String> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.at += 1;
            path.push(self.field()?);
        }
        let operator = self.rest().get(..2).unwrap_or_default();
        let test = match operator {
            "==" | "!=" | "~=" => {
                self.at += 2;
                let value = self.value()?;
                match operator {
                    "==" => Test::Equal(value),
                    "!=" => Test::NotEqual(value),
                    _ => {
                        let built = RegexBuilder::new(&value).size_limit(REGEX_MAX).dfa_size_limit(REGEX_MAX).build();
                        Test::Matches(built.map_err(|error| self.wrong(&error.to_string()))?)
                    }
                }
            }
            _ => Test::Present,
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String, String> {
        match self.peek() {
            Some('"') => self.quoted('"'),
            Some(first) if first.is_alphabetic() || first == '_' => {
                let rest = self.rest();
                let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                self.at += end;
                Ok(rest.get(..end).unwrap_or_default().to_owned())
            }
            _ => Err(self.wrong("a field's name is missing")),
        }
    }

    fn value(&mut self) -> Result<String, String> {
        match self.peek() {
            Some(quote @ ('"' | '/' | '|' | '`')) => self.quoted(quote),
            _ => {
                let rest = self.rest();
                let end = rest.find(|c: char| c.is_whitespace() || c == ',').unwrap_or(rest.len());
                self.at += end;
                Ok(rest.get(..end).unwrap_or_default().to_owned())
            }
        }
    }

    /// A Go string, or between other quotes what stands there with `\` before the quote taken away.
    fn quoted(&mut self, quote: char) -> Result<String, String> {
        let mut value = String::new();
        let mut characters = self.rest().char_indices().skip(1);
        while let Some((at, c)) = characters.next() {
            match c {
                _ if c == quote => {
                    self.at += at + c.len_utf8();
                    return Ok(value);
                }
                '\\' if quote == '"' => {
                    let escaped = match characters.next().map(|(_, letter)| letter) {
                        Some('n') => Some('\n'),
                        Some('t') => Some('\t'),
                        Some('r') => Some('\r'),
                        Some('u') => {
                            let digits: String = characters.by_ref().take(4).map(|(_, digit)| digit).collect();
                            u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32)
                        }
                        letter => letter.filter(|letter| matches!(letter, '\\' | '"')),
                    };
                    value.push(escaped.ok_or_else(|| self.wrong("an escape that is none"))?);
                }
                '\\' if self.text.get(self.at + at + 1..).is_some_and(|rest| rest.starts_with(quote)) => {
                    value.push(quote);
                    let _ = characters.next();
                }
                c => value.push(c),
            }
        }
        Err(self.wrong(&format!("a {quote} is not closed")))
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn wrong(&self, reason: &str) -> String {
        format!("the filter {:?}, at byte {}: {reason}", self.text, self.at)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn field(path: &[String]) -> Option<String> {
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        let value = match path[..] {
            ["name"] => "default/1/a,b",
            ["kind"] => "committed",
            ["labels", "containerd.io/snapshot.ref"] => "sha256:12",
            ["labels", "empty"] => "",
            _ => return None,
        };
        Some(value.to_owned())
    }

    #[test]
    fn filters_match_as_containerds() {
        for (text, expected) in [
            ("", true),
            ("name", true),
            ("nothing", false),
            ("kind==committed", true),
            ("kind==active", false),
            ("kind!=active", true),
            ("nothing!=x", true),
            ("nothing!=\"\"", false),
            ("kind==committed,name==x", false),
            (r#"labels."containerd.io/snapshot.ref"==sha256:12,parent!="x""#, true),
            (r#"labels."containerd.io/snapshot.ref"==sha256:1,parent==x"#, false),
            (r#"name=="default/1/a,b""#, true),
            ("name~=/^default\\/[0-9]+/", true),
            ("name~=|a,b$|", true),
            ("name~=^x", false),
            ("labels.empty", true),
            (r#"kind=="committed""#, true),
        ] {
            let filters = Filters::parse(&[text.to_owned()]).unwrap();
            assert_eq!(filters.matches(field), expected, "{text}");
        }
        let either = ["kind==active".to_owned(), "kind==committed".to_owned()];
        assert!(Filters::parse(&either).unwrap().matches(field));
        assert!(Filters::parse(&[]).unwrap().matches(field));
    }

    #[test]
    fn what_is_no_filter_is_refused() {
        for text in ["==x", "name=x", "name==\"x", "name,", "a..b", "name~=(", "name==\"\\q\"", "name==a b", "9a"] {
            assert!(Filters::parse(&[text.to_owned()]).is_err(), "{text}");
        }
        assert!(Filters::parse(&["a".repeat(FILTER_MAX + 1)]).is_err());
        assert!(Filters::parse(&vec![String::new(); FILTERS_MAX + 1]).is_err());
        // A regular expression that would compile to gigabytes.
        assert!(Filters::parse(&["name~=(a{1000}){1000}".to_owned()]).is_err());
    }

    #[test]
    fn escapes_are_gos() {
        let filters = Filters::parse(&[r#"name=="\"\u00e9\\\n""#.to_owned()]).unwrap();
        assert!(filters.matches(|_| Some("\"\u{e9}\\\n".to_owned())));
        let filters = Filters::parse(&[r"name==/a\/b/".to_owned()]).unwrap();
        assert!(filters.matches(|_| Some("a/b".to_owned())));
    }
}
