//! `--change`: instructions of a Dockerfile that change an image's configuration, as `docker commit` takes them.

use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// Longest instruction in bytes.
const MAX_BYTES: usize = 64 << 10;

/// One instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    text: String,
    what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    Cmd(Vec<String>),
    Entrypoint(Vec<String>),
    Env(Vec<(String, String)>),
    Expose(Vec<String>),
    Label(Vec<(String, String)>),
    User(String),
    Volume(Vec<String>),
    Workdir(String),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Change {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = |reason: &str| Error::invalid(format!("change {text:?}"), reason);
        let text = text.trim();
        if text.len() > MAX_BYTES || text.contains('\0') {
            return Err(refuse("it is too long, or has a zero byte"));
        }
        let (verb, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let rest = rest.trim();
        let what = match verb.to_ascii_uppercase().as_str() {
            "CMD" => What::Cmd(command(rest).map_err(refuse)?),
            "ENTRYPOINT" => What::Entrypoint(command(rest).map_err(refuse)?),
            _ if rest.is_empty() => return Err(refuse("it says nothing: write INSTRUCTION ARGUMENTS")),
            "ENV" => What::Env(pairs(rest).map_err(refuse)?),
            "LABEL" => What::Label(pairs(rest).map_err(refuse)?),
            "EXPOSE" => {
                let words = words(rest).map_err(refuse)?;
                What::Expose(
                    words
                        .iter()
                        .map(|word| ports(word))
                        .collect::<std::result::Result<Vec<_>, _>>()
                        .map_err(refuse)?
                        .concat(),
                )
            }
            "USER" => What::User(one(rest).map_err(refuse)?),
            "VOLUME" => What::Volume(match list(rest) {
                Some(list) => list,
                None => words(rest).map_err(refuse)?,
            }),
            "WORKDIR" => What::Workdir(one(rest).map_err(refuse)?),
            _ => {
                return Err(refuse("it is none of CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, USER, VOLUME, WORKDIR"));
            }
        };
        Ok(Self { text: text.to_owned(), what })
    }
}

type Parsed<T> = std::result::Result<T, &'static str>;

/// The JSON form: an array of strings.
fn list(text: &str) -> Option<Vec<String>> {
    text.starts_with('[').then(|| serde_json::from_str(text).ok()).flatten()
}

/// A command in its JSON form, or a line for the shell; nothing at all clears it.
fn command(text: &str) -> Parsed<Vec<String>> {
    match list(text) {
        Some(list) => Ok(list),
        None if text.is_empty() => Ok(Vec::new()),
        None => Ok(["/bin/sh", "-c", text].map(str::to_owned).to_vec()),
    }
}

fn one(text: &str) -> Parsed<String> {
    let mut words = words(text)?;
    match (words.pop(), words.is_empty()) {
        (Some(word), true) if !word.is_empty() => Ok(word),
        _ => Err("one word is wanted: put quotes around it"),
    }
}

/// Stands for a dollar sign that is not the start of a variable; instructions have no zero bytes.
const DOLLAR: char = '\0';

/// Words between white space; quotes hold them together, a backslash takes what follows as it is.
fn words(text: &str) -> Parsed<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match (quote, character) {
            (Some('\''), '\'') | (Some('"'), '"') => quote = None,
            (Some('\''), '$') => word.get_or_insert_default().push(DOLLAR),
            (Some('\''), other) => word.get_or_insert_default().push(other),
            (_, '\\') => {
                let next = characters.next().ok_or("a backslash is at its end")?;
                word.get_or_insert_default().push(if next == '$' { DOLLAR } else { next });
            }
            (None, '\'' | '"') => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            (None, space) if space.is_whitespace() => words.extend(word.take()),
            (_, other) => word.get_or_insert_default().push(other),
        }
    }
    if quote.is_some() {
        return Err("a quote is not closed");
    }
    words.extend(word);
    Ok(words)
}

/// `NAME=VALUE …`, or the old form `NAME VALUE`.
fn pairs(text: &str) -> Parsed<Vec<(String, String)>> {
    let all = words(text)?;
    if !all.first().is_some_and(|first| first.contains('=')) {
        let (name, value) = text.split_once(char::is_whitespace).ok_or("NAME=VALUE is wanted")?;
        return Ok(vec![(name.to_owned(), value.trim().to_owned())]);
    }
    let pair = |word: String| match word.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("NAME=VALUE is wanted"),
    };
    all.into_iter().map(pair).collect()
}

/// `PORT[-PORT][/PROTOCOL]`, each port by itself.
fn ports(word: &str) -> Parsed<Vec<String>> {
    const WRONG: &str = "PORT[-PORT][/tcp|udp|sctp] is wanted";
    let (ports, protocol) = word.split_once('/').unwrap_or((word, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0).ok_or(WRONG);
    let (first, last) = (port(first)?, port(last)?);
    if first > last || !["tcp", "udp", "sctp"].contains(&protocol.as_str()) {
        return Err(WRONG);
    }
    Ok((first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

/// Applies the changes, in their order, to the `config` of an image config.
pub(super) fn apply(changes: &[Change], settings: &mut Value) -> Result<()> {
    let Some(settings) = settings.as_object_mut() else {
        return Err(Error::invalid("image config", "its settings are not an object"));
    };
    let mut has_command = false;
    for change in changes {
        match &change.what {
            What::Cmd(command) => {
                has_command = true;
                set_list(settings, "Cmd", command);
            }
            What::Entrypoint(entrypoint) => {
                set_list(settings, "Entrypoint", entrypoint);
                // The old command was the old entry point's.
                if !has_command {
                    settings.remove("Cmd");
                }
            }
            What::Env(pairs) => {
                // All of one instruction see what was before it.
                let environment = settings.get("Env").cloned().unwrap_or_else(|| json!([]));
                let mut all: Vec<String> = strings(&environment);
                for (name, value) in pairs {
                    let line = format!("{name}={}", expand(value, &environment));
                    let prefix = format!("{name}=");
                    match all.iter_mut().find(|line| line.starts_with(&prefix)) {
                        Some(place) => *place = line,
                        None => all.push(line),
                    }
                }
                settings.insert("Env".into(), json!(all));
            }
            What::Label(pairs) => {
                let environment = settings.get("Env").cloned().unwrap_or_default();
                for (name, value) in pairs {
                    insert(settings, "Labels", name.clone(), json!(expand(value, &environment)));
                }
            }
            What::Expose(ports) => {
                for port in ports {
                    insert(settings, "ExposedPorts", port.clone(), json!({}));
                }
            }
            What::Volume(paths) => {
                let environment = settings.get("Env").cloned().unwrap_or_default();
                for path in paths {
                    insert(settings, "Volumes", expand(path, &environment), json!({}));
                }
            }
            What::User(user) => {
                let environment = settings.get("Env").cloned().unwrap_or_default();
                settings.insert("User".into(), json!(expand(user, &environment)));
            }
            What::Workdir(path) => {
                let environment = settings.get("Env").cloned().unwrap_or_default();
                let path = expand(path, &environment);
                let before = settings.get("WorkingDir").and_then(Value::as_str).unwrap_or_default();
                settings.insert("WorkingDir".into(), json!(resolve(before, &path)));
            }
        }
    }
    Ok(())
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(|line| line.as_str().map(str::to_owned)).collect()
}

fn set_list(settings: &mut Map<String, Value>, name: &str, list: &[String]) {
    if list.is_empty() {
        settings.remove(name);
    } else {
        settings.insert(name.into(), json!(list));
    }
}

/// Adds a member to the object `name`, which is made if it is not there.
fn insert(settings: &mut Map<String, Value>, name: &str, member: String, value: Value) {
    let mut object = match settings.remove(name) {
        Some(Value::Object(object)) => object,
        _ => Map::new(),
    };
    object.insert(member, value);
    settings.insert(name.into(), Value::Object(object));
}

/// `$NAME` and `${NAME}` become what the environment says, or nothing.
fn expand(text: &str, environment: &Value) -> String {
    let value = |name: &str| {
        let prefix = format!("{name}=");
        let lines = environment.as_array().into_iter().flatten().filter_map(Value::as_str);
        lines.filter_map(|line| line.strip_prefix(&prefix)).next_back().unwrap_or_default().to_owned()
    };
    let is_name = |character: char| character.is_ascii_alphanumeric() || character == '_';
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        if let Some((name, later)) = after.strip_prefix('{').and_then(|inside| inside.split_once('}'))
            && !name.is_empty()
            && name.chars().all(is_name)
        {
            expanded.push_str(&value(name));
            rest = later;
            continue;
        }
        let end = after.find(|character: char| !is_name(character)).unwrap_or(after.len());
        let (name, later) = after.split_at(end);
        if name.is_empty() {
            expanded.push('$');
        } else {
            expanded.push_str(&value(name));
        }
        rest = later;
    }
    expanded.push_str(rest);
    expanded.replace(DOLLAR, "$")
}

/// A working directory, relative to the one before.
fn resolve(before: &str, path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    let whole = if path.starts_with('/') { path.to_owned() } else { format!("{before}/{path}") };
    for part in whole.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn applied(before: Value, changes: &[&str]) -> Value {
        let mut settings = before;
        let changes: Vec<Change> = changes.iter().map(|change| change.parse().unwrap()).collect();
        apply(&changes, &mut settings).unwrap();
        settings
    }

    #[test]
    fn instructions_do_what_they_do_in_a_dockerfile() {
        let before = json!({ "Cmd": ["old"], "Env": ["PATH=/bin", "A=1"], "WorkingDir": "/srv", "Labels": null });
        let after = applied(
            before,
            &[
                r#"ENTRYPOINT ["/init", "--now"]"#,
                "cmd echo $HOME",
                r#"ENV PATH=$PATH:/opt B="two words" C='$A' D=x\ y E="$A" F=\$A"#,
                "ENV OLD  the old form",
                "EXPOSE 80 53/udp 8000-8001",
                r#"LABEL "a b"=c d=${A}"#,
                "USER app:app",
                r#"VOLUME ["/data", "/more"]"#,
                "VOLUME /third",
                "WORKDIR app",
                "WORKDIR ../other",
            ],
        );
        let expected = json!({
            "Entrypoint": ["/init", "--now"],
            "Cmd": ["/bin/sh", "-c", "echo $HOME"],
            "Env": ["PATH=/bin:/opt", "A=1", "B=two words", "C=$A", "D=x y", "E=1", "F=$A", "OLD=the old form"],
            "ExposedPorts": { "80/tcp": {}, "53/udp": {}, "8000/tcp": {}, "8001/tcp": {} },
            "Labels": { "a b": "c", "d": "1" },
            "User": "app:app",
            "Volumes": { "/data": {}, "/more": {}, "/third": {} },
            "WorkingDir": "/srv/other",
        });
        assert_eq!(after, expected);
    }

    #[test]
    fn a_new_entry_point_ends_the_old_command_only() {
        assert_eq!(applied(json!({ "Cmd": ["old"] }), &["ENTRYPOINT /x"])["Cmd"], Value::Null);
        let both = applied(json!({ "Cmd": ["old"] }), &["CMD [\"new\"]", "ENTRYPOINT [\"/x\"]"]);
        assert_eq!(both["Cmd"], json!(["new"]));
        assert_eq!(applied(json!({ "Cmd": ["old"] }), &["CMD"]), json!({}));
    }

    #[test]
    fn what_is_no_instruction_is_refused() {
        for text in [
            "",
            "RUN true",
            "ENV",
            "ENV A",
            "ENV =x",
            "ENV A=1 B",
            "ENV A='x",
            "ENV A=x\\",
            "EXPOSE 0",
            "EXPOSE 80/icmp",
            "EXPOSE 9-8",
            "EXPOSE x",
            "USER a b",
            "WORKDIR ''",
            "LABEL",
            "ENV A=\0",
        ] {
            assert!(text.parse::<Change>().is_err(), "{text:?}");
        }
    }
}
