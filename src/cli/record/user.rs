//! Who runs an image's program: a `USER[:GROUP]` of its config, looked up in its own /etc/passwd and /etc/group.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};

/// Most bytes of /etc/passwd and /etc/group that are looked at: they are the image's.
const MAX_FILE: u64 = 4 << 20;

/// Numbers to run as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
}

/// Finds `USER[:GROUP]` in the files of the root directory that this process has.
///
/// # Errors
/// A name that is not in them.
pub fn look_up(wanted: Option<&str>) -> Result<User, String> {
    let read = |path| File::open(path).map(lines).unwrap_or_default();
    resolve(wanted.unwrap_or("0"), &read("/etc/passwd"), &read("/etc/group"))
}

fn lines(file: impl Read) -> Vec<String> {
    BufReader::new(file.take(MAX_FILE)).lines().map_while(Result::ok).collect()
}

fn resolve(wanted: &str, passwd: &[String], group: &[String]) -> Result<User, String> {
    let (name, wanted_group) = match wanted.split_once(':') {
        Some((name, group)) if !group.is_empty() => (name, Some(group)),
        Some((name, _)) => (name, None),
        None => (wanted, None),
    };
    let entries = || passwd.iter().map(|line| line.split(':').collect::<Vec<_>>()).filter(|entry| entry.len() >= 7);
    let number = |text: &str| text.parse::<u32>().ok();
    // A name goes before a number, as in docker.
    let entry = entries().find(|entry| entry.first() == Some(&name)).or_else(|| {
        entries().find(|entry| entry.get(2).copied().and_then(number) == number(name) && number(name).is_some())
    });
    let field = |at: usize| entry.as_ref().and_then(|entry| entry.get(at).copied());
    let uid = field(2).and_then(number).or_else(|| number(name));
    let uid = uid.ok_or_else(|| format!("the image has no user {name:?} in /etc/passwd"))?;
    let own_name = field(0).unwrap_or(name);
    let groups = || group.iter().map(|line| line.split(':').collect::<Vec<_>>()).filter(|entry| entry.len() >= 3);
    let gid_of = |entry: &Vec<&str>| entry.get(2).copied().and_then(number);
    let gid = match wanted_group {
        Some(wanted) => groups()
            .find(|entry| entry.first() == Some(&wanted))
            .and_then(|entry| gid_of(&entry))
            .or_else(|| number(wanted))
            .ok_or_else(|| format!("the image has no group {wanted:?} in /etc/group"))?,
        None => field(3).and_then(number).unwrap_or(0),
    };
    // A group that was asked for stands alone.
    let supplementary = match wanted_group {
        Some(_) => Vec::new(),
        None => groups()
            .filter(|entry| entry.get(3).is_some_and(|members| members.split(',').any(|member| member == own_name)))
            .filter_map(|entry| gid_of(&entry))
            .take(1024)
            .collect(),
    };
    let home = field(5).filter(|home| home.starts_with('/')).unwrap_or("/").to_owned();
    Ok(User { uid, gid, groups: supplementary, home })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn users_are_looked_up_as_docker_does() {
        let passwd = lines(
            "root:x:0:0:root:/root:/bin/sh\nweb:x:33:44:w:/var/web:/bin/sh\nbad:x\n7:x:1007:1007::/seven:/bin/sh\n"
                .as_bytes(),
        );
        let group = lines("root:x:0:\nweb:x:44:\nlog:x:50:a,web,b\nx:y\n".as_bytes());
        let user = |text: &str| resolve(text, &passwd, &group);
        let expected = User { uid: 33, gid: 44, groups: vec![50], home: "/var/web".to_owned() };
        assert_eq!(user("web").unwrap(), expected);
        assert_eq!(user("33").unwrap(), expected);
        assert_eq!(user("web:log").unwrap(), User { gid: 50, groups: Vec::new(), ..expected.clone() });
        assert_eq!(user("web:77").unwrap().gid, 77);
        assert_eq!(user("web:").unwrap(), expected);
        assert_eq!(user("7").unwrap().uid, 1007, "a name before a number");
        assert_eq!(user("4711").unwrap(), User { uid: 4711, gid: 0, groups: Vec::new(), home: "/".to_owned() });
        assert_eq!(user("0").unwrap().home, "/root");
        for unknown in ["nobody", "bad", "web:nogroup", "-1", "4294967296"] {
            assert!(user(unknown).is_err(), "{unknown}");
        }
    }
}
