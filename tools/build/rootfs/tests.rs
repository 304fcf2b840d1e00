#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;

fn file() -> Kind {
    Kind::File(Content::Small { offset: 0, bytes: 0 })
}

fn rootfs() -> Rootfs {
    let mut rootfs = Rootfs::new(&Limits::default());
    rootfs.next_layer();
    rootfs
}

fn add(rootfs: &mut Rootfs, path: &str, kind: Kind) {
    match rootfs.place(path.as_bytes(), Whiteouts::Apply).unwrap() {
        Place::At { parent, name } => drop(rootfs.put(parent, &name, Meta::default(), kind).unwrap()),
        Place::Root | Place::Done => panic!("{path}"),
    }
}

fn mark(rootfs: &mut Rootfs, path: &str) {
    assert!(matches!(rootfs.place(path.as_bytes(), Whiteouts::Apply).unwrap(), Place::Done));
}

/// All paths, directories with a slash, links with their target.
fn paths(rootfs: &Rootfs) -> Vec<String> {
    let mut all = Vec::new();
    let mut stack = vec![(ROOT, String::new())];
    while let Some((dir, path)) = stack.pop() {
        for (name, entry) in rootfs.names(dir).unwrap() {
            let path = format!("{path}{}", String::from_utf8_lossy(name));
            match &rootfs.node(entry.node).unwrap().kind {
                Kind::Directory(_) => {
                    all.push(format!("{path}/"));
                    stack.push((entry.node, format!("{path}/")));
                }
                Kind::Symlink(target) => all.push(format!("{path}>{}", String::from_utf8_lossy(target))),
                _ => all.push(path),
            }
        }
    }
    all.sort();
    all
}

#[test]
fn missing_parents_are_made() {
    let mut rootfs = rootfs();
    add(&mut rootfs, "a/b/c", file());
    assert_eq!(paths(&rootfs), ["a/", "a/b/", "a/b/c"]);
    let a = rootfs.link_target(b"a").unwrap().unwrap();
    assert_eq!(rootfs.node(a.node).unwrap().meta.mode, 0o755);
}

#[test]
fn paths_never_leave_the_root() {
    let mut rootfs = rootfs();
    add(&mut rootfs, "../../x", file());
    add(&mut rootfs, "/abs/../y", file());
    add(&mut rootfs, "out", Kind::Symlink((*b"../../..").into()));
    add(&mut rootfs, "out/z", file());
    add(&mut rootfs, "etc", Kind::Symlink((*b"/usr/etc").into()));
    add(&mut rootfs, "etc/passwd", file());
    assert_eq!(paths(&rootfs), ["etc>/usr/etc", "out>../../..", "usr/", "usr/etc/", "usr/etc/passwd", "x", "y", "z"]);
}

#[test]
fn link_loops_and_files_as_parents_are_errors() {
    let mut rootfs = rootfs();
    add(&mut rootfs, "a", Kind::Symlink((*b"b").into()));
    add(&mut rootfs, "b", Kind::Symlink((*b"a").into()));
    add(&mut rootfs, "f", file());
    assert!(rootfs.place(b"a/x", Whiteouts::Apply).unwrap_err().to_string().contains("loop"));
    assert!(rootfs.place(b"f/x", Whiteouts::Apply).unwrap_err().to_string().contains("not a directory"));
    let deep = "d/".repeat(3000) + "x";
    assert!(rootfs.place(deep.as_bytes(), Whiteouts::Apply).unwrap_err().to_string().contains("limit"));
}

#[test]
fn a_whiteout_hides_what_lower_layers_had_only() {
    let mut rootfs = rootfs();
    add(&mut rootfs, "d/lower", file());
    add(&mut rootfs, "d/sub/lower", file());
    add(&mut rootfs, "f", file());
    rootfs.next_layer();
    add(&mut rootfs, "d/upper", file());
    add(&mut rootfs, "f", file());
    mark(&mut rootfs, ".wh.f");
    mark(&mut rootfs, "d/.wh.lower");
    mark(&mut rootfs, "d/.wh.sub");
    mark(&mut rootfs, ".wh.nothing");
    mark(&mut rootfs, "nowhere/.wh.nothing");
    assert_eq!(paths(&rootfs), ["d/", "d/upper", "f"]);
    rootfs.next_layer();
    mark(&mut rootfs, ".wh.d");
    assert_eq!(paths(&rootfs), ["f"]);
}

#[test]
fn an_opaque_mark_counts_wherever_it_stands_in_the_layer() {
    for early in [true, false] {
        let mut rootfs = rootfs();
        add(&mut rootfs, "d/lower", file());
        add(&mut rootfs, "d/sub/lower", file());
        add(&mut rootfs, "d/gone/lower", file());
        rootfs.next_layer();
        if early {
            mark(&mut rootfs, "d/.wh..wh..opq");
        }
        add(&mut rootfs, "d", Kind::directory());
        add(&mut rootfs, "d/sub/upper", file());
        if !early {
            mark(&mut rootfs, "d/.wh..wh..opq");
        }
        assert_eq!(paths(&rootfs), ["d/", "d/sub/", "d/sub/upper"], "early: {early}");
    }
}

#[test]
fn the_private_files_of_aufs_are_left_out_and_bad_marks_refused() {
    let mut rootfs = rootfs();
    mark(&mut rootfs, ".wh..wh.plnk/12.34");
    mark(&mut rootfs, ".wh..wh.aufs");
    for bad in ["a/.wh.", "a/.wh..", "a/.wh..."] {
        add(&mut rootfs, "a/x", file());
        assert!(rootfs.place(bad.as_bytes(), Whiteouts::Apply).is_err(), "{bad}");
    }
}

#[test]
fn directories_merge_and_everything_else_replaces() {
    let mut rootfs = rootfs();
    add(&mut rootfs, "d/x", file());
    add(&mut rootfs, "e/x", file());
    add(&mut rootfs, "f", file());
    add(&mut rootfs, "g", Kind::Symlink((*b"d").into()));
    rootfs.next_layer();
    add(&mut rootfs, "d", Kind::directory());
    add(&mut rootfs, "e", file());
    add(&mut rootfs, "f", Kind::directory());
    add(&mut rootfs, "g", Kind::directory());
    assert_eq!(paths(&rootfs), ["d/", "d/x", "e", "f/", "g/"]);
}
