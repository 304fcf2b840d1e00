//! From a snapshot and what is below it to what containerd has to mount.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::failure::Failure;
use super::record::Kind;
use super::wire::Mount;

/// What an overlay or a bind mount is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parts {
    /// What the snapshot is.
    pub kind: Kind,
    /// Its own directory.
    pub dir: PathBuf,
    /// What is below it, the topmost first.
    pub lowers: Vec<PathBuf>,
}

impl Parts {
    /// The mounts, as containerd's overlayfs snapshotter has them: an overlay where there are two directories or more,
    /// otherwise the one directory itself.
    ///
    /// # Errors
    /// A path that can't be written in mount options, or a snapshot that is not to be mounted.
    pub fn mounts(&self) -> Result<Vec<Mount>, Failure> {
        let own = self.dir.join("fs");
        match (self.kind, self.lowers.as_slice()) {
            (Kind::Committed, _) => Err(Failure::Precondition("a committed snapshot is not mounted itself".to_owned())),
            (Kind::Active, []) => bind(&own, "rw"),
            (Kind::View, []) => bind(&own, "ro"),
            (Kind::View, [only]) => bind(only, "ro"),
            (kind, lowers) => {
                let mut options = Vec::new();
                if Path::new("/sys/module/overlay/parameters/index").exists() {
                    // Lower directories are used by many overlays at once, and on other file systems than before.
                    options.push("index=off".to_owned());
                }
                if kind == Kind::Active {
                    options.push(format!("workdir={}", plain(&self.dir.join("work"))?));
                    options.push(format!("upperdir={}", plain(&own)?));
                }
                let lowers = lowers.iter().map(|lower| plain(lower)).collect::<Result<Vec<_>, _>>()?;
                options.push(format!("lowerdir={}", lowers.join(":")));
                Ok(vec![Mount {
                    r#type: "overlay".to_owned(),
                    source: "overlay".to_owned(),
                    target: String::new(),
                    options,
                }])
            }
        }
    }
}

/// A container's own block device. Kata's runtime hands a root file system to its virtual machine as a disk when it is
/// exactly one mount of a block device; otherwise it shares a directory.
///
/// # Errors
/// A path that is not UTF-8.
pub fn block(device: &Path) -> Result<Vec<Mount>, Failure> {
    Ok(vec![Mount {
        r#type: "ext4".to_owned(),
        source: plain(device)?,
        target: String::new(),
        options: vec!["rw".to_owned()],
    }])
}

fn bind(dir: &Path, access: &str) -> Result<Vec<Mount>, Failure> {
    let options = vec![access.to_owned(), "rbind".to_owned()];
    Ok(vec![Mount { r#type: "bind".to_owned(), source: plain(dir)?, target: String::new(), options }])
}

/// A path as it stands in mount options: without what would end it there.
fn plain(path: &Path) -> Result<String, Failure> {
    let text = OsString::from(path).into_string();
    text.ok()
        .filter(|text| !text.contains([':', ',', '\\']))
        .ok_or_else(|| Failure::Failed(format!("{} can't be in mount options: choose another --root", path.display())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn parts(kind: Kind, lowers: &[&str]) -> Parts {
        Parts { kind, dir: "/s/7".into(), lowers: lowers.iter().map(PathBuf::from).collect() }
    }

    fn one(kind: Kind, lowers: &[&str]) -> (String, String, Vec<String>) {
        let mut mounts = parts(kind, lowers).mounts().unwrap();
        assert_eq!(mounts.len(), 1);
        let mount = mounts.remove(0);
        let options = mount.options.into_iter().filter(|option| option != "index=off").collect();
        (mount.r#type, mount.source, options)
    }

    #[test]
    fn mounts_are_those_of_containerds_overlayfs() {
        let bind = |source: &str, access: &str| {
            ("bind".to_owned(), source.to_owned(), vec![access.to_owned(), "rbind".to_owned()])
        };
        assert_eq!(one(Kind::Active, &[]), bind("/s/7/fs", "rw"));
        assert_eq!(one(Kind::View, &[]), bind("/s/7/fs", "ro"));
        assert_eq!(one(Kind::View, &["/s/3/mnt"]), bind("/s/3/mnt", "ro"));
        let overlay = |options: &[&str]| {
            ("overlay".to_owned(), "overlay".to_owned(), options.iter().map(|&text| text.to_owned()).collect())
        };
        let active = overlay(&["workdir=/s/7/work", "upperdir=/s/7/fs", "lowerdir=/s/2/fs:/s/1/fs"]);
        assert_eq!(one(Kind::Active, &["/s/2/fs", "/s/1/fs"]), active);
        assert_eq!(one(Kind::View, &["/s/2/fs", "/s/1/fs"]), overlay(&["lowerdir=/s/2/fs:/s/1/fs"]));
        assert!(parts(Kind::Committed, &[]).mounts().is_err());
        assert!(parts(Kind::Active, &["/a:b"]).mounts().is_err());
    }

    #[test]
    fn a_block_device_is_exactly_the_one_mount_that_kata_looks_for() {
        let expected = Mount {
            r#type: "ext4".to_owned(),
            source: "/dev/loop7".to_owned(),
            target: String::new(),
            options: vec!["rw".to_owned()],
        };
        assert_eq!(block(Path::new("/dev/loop7")).unwrap(), [expected]);
    }
}
