//! Where the dynamic linker looks for libraries: what ld.so(8) and musl say, as far as files of the image decide it.

use super::Guess;
use crate::build::rootfs::NodeId;
use crate::error::Result;

/// Longest file of directories that is read, in bytes.
const CONF: u64 = 64 << 10;
/// Most directories, and files that list them.
const DIRS: usize = 256;
/// Where libraries are when nothing says otherwise. glibc's `ld.so.cache` lists what is in the directories of `ld.so.conf`
/// and in these.
const USUAL: [&[u8]; 5] = [b"/lib", b"/usr/lib", b"/lib64", b"/usr/lib64", b"/usr/local/lib"];

/// The directories that hold for every program of the image, in order.
pub(super) fn directories(guess: &Guess<'_>) -> Result<Vec<Vec<u8>>> {
    let mut dirs: Vec<Vec<u8>> = Vec::new();
    let mut files: Vec<Vec<u8>> = vec![b"/etc/ld.so.conf".to_vec()];
    files.extend(listed(guess, b"/etc", b"ld-musl-", b".path"));
    let mut at = 0;
    while let Some(path) = files.get(at).cloned() {
        at += 1;
        let Some(node) = guess.find(&path) else { continue };
        let text = guess.read(node, CONF)?;
        for line in text.split(|byte| matches!(byte, b'\n' | b':' | b',')) {
            let line = line.split(|byte| *byte == b'#').next().unwrap_or_default().trim_ascii();
            if let Some(pattern) = line.strip_prefix(b"include").filter(|rest| rest.starts_with(b" ")) {
                files.extend(matching(guess, pattern.trim_ascii()));
                files.truncate(DIRS);
            } else if line.starts_with(b"/") && dirs.len() < DIRS {
                dirs.push(line.to_vec());
            }
        }
    }
    dirs.extend(USUAL.iter().map(|dir| dir.to_vec()));
    Ok(dirs)
}

/// What a pattern with one `*` in its last part names.
fn matching(guess: &Guess<'_>, pattern: &[u8]) -> Vec<Vec<u8>> {
    let at = pattern.iter().rposition(|byte| *byte == b'/').unwrap_or_default();
    let (dir, name) = pattern.split_at(at);
    let name = name.strip_prefix(b"/").unwrap_or(name);
    match name.iter().position(|byte| *byte == b'*') {
        None => vec![pattern.to_vec()],
        Some(star) => {
            listed(guess, dir, name.get(..star).unwrap_or_default(), name.get(star + 1..).unwrap_or_default())
        }
    }
}

/// Paths of what is in `dir` and begins and ends so, in the order of names.
fn listed(guess: &Guess<'_>, dir: &[u8], start: &[u8], end: &[u8]) -> Vec<Vec<u8>> {
    let names = guess.find(dir).and_then(|node| guess.contents.rootfs.names(node));
    let fits = |name: &&[u8]| name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end);
    let names = names.into_iter().flat_map(|names| names.keys()).map(|name| &**name).filter(fits).take(DIRS);
    names.map(|name| [dir, b"/", name].concat()).collect()
}

/// Directories that a list with colons names, `$ORIGIN` being `origin`; those with anything else that is filled in are left out.
pub(super) fn split(list: &[u8], origin: &[u8]) -> Vec<Vec<u8>> {
    let fill = |dir: &[u8]| -> Vec<u8> {
        for name in [b"$ORIGIN".as_slice(), b"${ORIGIN}"] {
            if let Some(rest) = dir.strip_prefix(name) {
                return [origin, rest].concat();
            }
        }
        dir.to_vec()
    };
    let dirs = list.split(|byte| *byte == b':').take(DIRS).map(fill);
    dirs.filter(|dir| dir.starts_with(b"/") && !dir.contains(&b'$')).collect()
}

/// The first of `dirs` that has a file `name` which `fits`.
pub(super) fn search(
    guess: &Guess<'_>,
    name: &[u8],
    dirs: &[Vec<u8>],
    mut fits: impl FnMut(NodeId) -> Result<bool>,
) -> Result<Option<Vec<u8>>> {
    if name.contains(&b'/') {
        return Ok(name.starts_with(b"/").then(|| name.to_vec()));
    }
    for dir in dirs {
        let path = [dir, b"/".as_slice(), name].concat();
        if let Some(node) = guess.find(&path)
            && fits(node)?
        {
            return Ok(Some(path));
        }
    }
    Ok(None)
}
