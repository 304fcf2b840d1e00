//! What the config's command needs comes first in the packs, and the index says so.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/built.rs"]
mod built;
#[path = "common/committed.rs"]
mod committed;
#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use built::{Layout, request, run, shell, try_build};
use committed::{BLOCK, Generation};
use firstread::Digest;
use firstread::build::Report;
use firstread::index::Index;
use serde_json::{Value, json};

/// The libraries of a program, and theirs, as the dynamic linker finds them.
fn libraries(program: &Path) -> Vec<String> {
    let listed = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8(listed.stdout).unwrap();
    let libraries: Vec<String> =
        text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect();
    assert!(libraries.len() >= 2, "{text}");
    libraries
}

/// This program in a tree with its libraries, behind a script and `env`; files before and behind them, and others beside.
fn tree(dir: &Path) -> Vec<PathBuf> {
    let exe = std::env::current_exe().unwrap();
    let libraries = libraries(&exe);
    // Libraries are found by ld.so.conf alone, but the linker, by links on the way.
    shell(
        dir,
        &format!(
            r#"mkdir -p tree/usr/{{local/bin,bin,lib/deep,share}} tree/etc/ld.so.conf.d tree/opt/app tree/aaa tree/zzz
            ln -s usr/lib tree/lib; ln -s usr/lib64 tree/lib64; mkdir tree/usr/lib64
            echo 'include /etc/ld.so.conf.d/*.conf' > tree/etc/ld.so.conf
            printf '# ours\n/lib/deep\n' > tree/etc/ld.so.conf.d/ours.conf
            cp {exe} tree/usr/local/bin/runner-1; ln -s runner-1 tree/usr/local/bin/runner
            for library in {libraries}; do
                case $library in */ld-linux*) cp -L $library tree$library ;; *) cp -L $library tree/usr/lib/deep/ ;; esac
            done
            cp -L /usr/bin/env tree/usr/bin/env
            printf '#!/usr/bin/env -S runner --quiet\n' > tree/opt/app/start; chmod 755 tree/opt/app/start tree/usr/local/bin/runner-1
            head -c 300000 /dev/urandom > tree/opt/app/data
            for dir in aaa usr/lib usr/lib/deep zzz; do head -c 1000000 /dev/urandom > tree/$dir/aside; done"#,
            exe = exe.display(),
            libraries = libraries.join(" "),
        ),
    );
    let linked = |path: &String| match path.contains("/ld-linux") {
        true => PathBuf::from(format!("tree{path}")),
        false => Path::new("tree/usr/lib/deep").join(Path::new(path).file_name().unwrap()),
    };
    libraries.iter().map(linked).chain(["tree/usr/local/bin/runner-1".into()]).map(|path| dir.join(path)).collect()
}

/// Builds the tree as an image of one layer.
fn build(dir: &Path, name: &str, config: &Value) -> (Index, Report) {
    let layers = format!(
        r#"[ -e layer.tar ] || tar -C tree --sort=name --numeric-owner --mtime=@0 -cf layer.tar .
        diff=$(sha256sum layer.tar | cut -d' ' -f1)
        cat > {name}.json <<'END'
{}
END
        sed -i "s/DIFF/$diff/" {name}.json
        echo '[{{"Config": "{name}.json", "Layers": ["layer.tar"]}}]' > manifest.json
        tar -cf {name}.tar manifest.json {name}.json layer.tar"#,
        json!({"os": "linux", "architecture": "amd64", "config": config, "rootfs": {"type": "layers", "diff_ids": ["sha256:DIFF"]}})
    );
    shell(dir, &layers);
    let layout = dir.join("layout");
    let mut request = request(
        &format!("docker-archive:{}", dir.join(format!("{name}.tar")).display()),
        &format!("oci:{}:{name}", layout.display()),
    );
    request.cache = None;
    let report = run(&request).unwrap();
    (Index::from_bytes(Layout(layout).index(&report.digest.to_string())).unwrap(), report)
}

fn pieces(path: &Path) -> HashSet<Digest> {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let padded = |piece: &[u8]| {
        let mut piece = piece.to_vec();
        piece.resize(piece.len().next_multiple_of(4096), 0);
        Digest::of(&piece)
    };
    bytes.chunks(256 << 10).map(padded).collect()
}

fn likely(index: &Index) -> Vec<Digest> {
    (0..index.likely_chunks()).map(|number| index.chunk(number).unwrap().digest).collect()
}

#[test]
fn a_script_brings_its_interpreter_and_all_its_libraries() {
    let temp = tempfile::tempdir().unwrap();
    let needed = tree(temp.path());
    let config = json!({
        "Entrypoint": ["start", "data"],
        "Cmd": ["./data"],
        "WorkingDir": "/opt/app",
        "Env": ["PATH=/nowhere:/usr/local/bin:/opt/app:/usr/bin"],
    });
    let (index, report) = build(temp.path(), "app", &config);
    let likely: HashSet<Digest> = likely(&index).into_iter().collect();
    assert!(likely.len() > 4, "{}", likely.len());
    for path in &needed {
        let (bytes, pieces) = (std::fs::metadata(path).unwrap().len(), pieces(path));
        let found = pieces.iter().filter(|piece| likely.contains(piece)).count();
        // Of what is too large to be read whole, what links it.
        let whole = bytes <= 6 << 20;
        assert!(
            if whole { found == pieces.len() } else { found > 1 },
            "{}: {found} of {}",
            path.display(),
            pieces.len()
        );
    }
    assert!(pieces(&temp.path().join("tree/opt/app/data")).is_subset(&likely), "the command names it");
    for aside in ["aaa", "usr/lib", "usr/lib/deep", "zzz"] {
        let pieces = pieces(&temp.path().join("tree").join(aside).join("aside"));
        assert!(pieces.is_disjoint(&likely), "{aside}");
    }
    // They lie in one stretch at the front of the pack.
    let mut end = None;
    for number in 0..index.likely_chunks() {
        let chunk = index.chunk(number).unwrap();
        assert!(end.is_none_or(|end| end == chunk.offset), "chunk {number} at {}", chunk.offset);
        end = Some(chunk.offset + u64::from(chunk.stored_len));
    }
    assert!(index.chunks().skip(index.likely_chunks() as usize).all(|chunk| chunk.offset >= end.unwrap()));
    // The whole of it is a sound file system, and comes out the same again.
    let layout = Layout(temp.path().join("layout"));
    layout.tree(&report.digest.to_string(), temp.path());
    assert_eq!(build(temp.path(), "app", &config).1.digest, report.digest);
}

#[test]
fn libraries_of_libraries_come_as_well() {
    let temp = tempfile::tempdir().unwrap();
    // Its program names few of them.
    let libraries = libraries(Path::new("/usr/bin/curl"));
    shell(
        temp.path(),
        &format!(
            r#"mkdir -p tree/usr/bin tree/usr/lib tree/usr/lib64; ln -s usr/lib64 tree/lib64; cp -L /usr/bin/curl tree/usr/bin/
            for library in {}; do case $library in */ld-linux*) cp -L $library tree$library ;; *) cp -L $library tree/usr/lib/ ;; esac; done"#,
            libraries.join(" ")
        ),
    );
    let (index, _) = build(temp.path(), "app", &json!({"Cmd": ["curl"]}));
    let likely: HashSet<Digest> = likely(&index).into_iter().collect();
    for library in &libraries {
        let pieces = pieces(Path::new(library));
        // What is small lies in a chunk with others.
        let small = std::fs::metadata(library).unwrap().len() < 64 << 10;
        assert!(small || pieces.iter().any(|piece| likely.contains(piece)), "{library}");
    }
}

#[test]
fn packs_that_are_reused_are_read_for_the_guess() {
    let temp = tempfile::tempdir().unwrap();
    tree(temp.path());
    let config = json!({"Cmd": ["/opt/app/start"], "Env": ["PATH=/usr/local/bin"]});
    let (first, _) = build(temp.path(), "first", &config);
    let layout = temp.path().join("layout");
    let mut request = request(
        &format!("docker-archive:{}", temp.path().join("first.tar").display()),
        &format!("oci:{}:again", layout.display()),
    );
    request.cache = None;
    request.reuse = vec![format!("oci:{}:first", layout.display()).parse().unwrap()];
    let report = run(&request).unwrap();
    assert_eq!(report.new_chunks, 0);
    let again = Index::from_bytes(Layout(layout).index(&report.digest.to_string())).unwrap();
    assert!(first.likely_chunks() > 4);
    assert_eq!(likely(&again), likely(&first));
}

#[test]
fn what_can_not_be_run_is_no_error_and_nothing_is_guessed() {
    let temp = tempfile::tempdir().unwrap();
    shell(
        temp.path(),
        r#"mkdir -p tree/bin tree/etc; cp -L /usr/bin/env tree/bin/cut; truncate -s 100 tree/bin/cut
        printf '#!/bin/self\n' > tree/bin/self; chmod 755 tree/bin/*; ln -s loop tree/bin/loop
        echo 'include /etc/ld.so.conf' > tree/etc/ld.so.conf; head -c 200000 /dev/urandom > tree/etc/file"#,
    );
    for (number, config) in [
        json!({}),
        json!({"Cmd": null, "Entrypoint": []}),
        json!({"Cmd": [""], "Env": ["PATH"]}),
        json!({"Cmd": ["loop"]}),
        json!({"Cmd": ["nothing"], "WorkingDir": "/nowhere"}),
        json!({"Entrypoint": ["cut"]}),
        json!({"Cmd": [7, {"a": 1}]}),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(build(temp.path(), &format!("none{number}"), &config).0.likely_chunks(), 0, "{config}");
    }
    // A script that runs itself is what there is of it, once.
    let (index, _) = build(temp.path(), "itself", &json!({"Cmd": ["self", "/etc/../etc/file", "/etc"]}));
    assert!(pieces(&temp.path().join("tree/etc/file")).is_subset(&likely(&index).into_iter().collect()));
    // A tree alone has no command.
    let layout = temp.path().join("plain");
    let report =
        try_build(&format!("dir:{}", temp.path().join("tree").display()), &format!("oci:{}:t", layout.display()))
            .unwrap();
    let index = Index::from_bytes(Layout(layout).index(&report.digest.to_string())).unwrap();
    assert_eq!(index.likely_chunks(), 0);
}

#[test]
fn a_commit_keeps_the_guess_where_it_lies() {
    const PIECE: usize = 256 << 10;
    let temp = tempfile::tempdir().unwrap();
    tree(temp.path());
    let config = json!({"Entrypoint": ["/usr/local/bin/runner"], "Cmd": ["--quiet"]});
    let (index, _) = build(temp.path(), "app", &config);
    let parent = Generation::open(&temp.path().join("layout"), "app", temp.path());
    let guess = likely(&index);
    let places = |wanted: &dyn Fn(u32) -> bool| -> Vec<usize> {
        let whole = index.extents().iter().filter(|extent| extent.blocks as usize * BLOCK == PIECE);
        whole.filter(|extent| wanted(extent.chunk)).map(|extent| extent.block as usize).collect()
    };
    // A block in the middle of a file that a start needs, and one of a file that none does.
    let needed = *places(&|chunk| chunk < index.likely_chunks()).last().unwrap();
    let aside = *places(&|chunk| chunk >= index.likely_chunks()).last().unwrap();
    let blocks = [needed, aside].map(|place| (place as u64 + 3, Some(vec![7; BLOCK])));
    let upper = temp.path().join("upper");
    parent.write(&upper, &blocks);
    let (before, after) = (parent.bytes.clone(), parent.with(&blocks));
    let piece = |bytes: &[u8], place: usize| Digest::of(&bytes[place * BLOCK..][..PIECE]);
    let expected: Vec<Digest> = guess
        .iter()
        .map(|digest| if *digest == piece(&before, needed) { piece(&after, needed) } else { *digest })
        .collect();
    assert_ne!(expected, guess);
    let child = |tag: &str, changes: &[&str]| {
        parent.commit_with(&upper, tag, changes).unwrap();
        Generation::open(&parent.layout, tag, temp.path()).index()
    };
    let same = child("same", &[]);
    assert_eq!(likely(&same), expected);
    assert!(same.chunks().any(|chunk| chunk.digest == piece(&after, aside)));
    // It is of the program: other arguments are nothing to it, and of another program it says nothing.
    assert_eq!(likely(&child("arguments", &[r#"CMD ["--loud"]"#])), expected);
    assert_eq!(child("program", &[r#"ENTRYPOINT ["/usr/bin/env"]"#]).likely_chunks(), 0);
}
