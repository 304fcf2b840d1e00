//! The build cache: layers that did not change are not read again, the result is the same to the byte, and what is in the
//! cache is never believed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/built.rs"]
mod built;
#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;
#[path = "common/program.rs"]
mod program;
#[path = "common/random.rs"]
mod random;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use built::{Layout, request, run, shell};
use firstread::build::{CacheSettings, Report, Request, Tree};
use program::Node;
use random::Random;
use tempfile::TempDir;

/// An image of three layers: large and small files, then changes to them, then more of both, whiteouts and links.
const IMAGE: &str = r#"
    layer() { tar --format=pax --xattrs --xattrs-include='*' --sparse --sort=name -C $1 -cf $1.tar . && umoci raw add-layer --image source:t $1.tar; }
    umoci init --layout source; umoci new --image source:t
    mkdir -p one/usr/lib one/etc one/var
    seq 1 300000 > one/usr/lib/numbers; head -c 3000001 /dev/urandom > one/usr/lib/random; head -c 300K /dev/zero > one/var/zeros
    for n in $(seq 300); do seq $n $((n * 9)) > one/etc/file-$n; done
    truncate -s 5M one/var/sparse; printf x | dd of=one/var/sparse bs=1 seek=3000000 conv=notrunc status=none
    setfattr -n user.note -v "two
lines" one/usr/lib/numbers; mkfifo one/var/fifo; mknod one/var/null c 1 3; chown 3000000000:7 one/etc/file-1
    printf odd > "$(printf 'one/etc/\377\376')"; touch -d @-5.25 one/etc/file-2
    layer one
    mkdir -p two/etc two/opt two/var; echo changed > two/etc/file-3; : > two/etc/.wh.file-4; : > two/var/.wh..wh..opq
    head -c 800000 /dev/urandom > two/opt/tool; ln two/opt/tool two/opt/hard; ln -s /etc two/link
    layer two
    mkdir -p three/link three/opt; echo through > three/link/through; head -c 700000 /dev/urandom > three/opt/own
    for n in $(seq 100); do echo $n > three/opt/small-$n; done
    layer three
"#;

fn image() -> TempDir {
    let temp = TempDir::new().unwrap();
    shell(temp.path(), IMAGE);
    temp
}

/// A request for `source` of the directory, to the layout `to`, with the cache in `cache` or without one.
fn with(temp: &Path, to: &str, cache: Option<&Path>) -> Request {
    let path = |name: &str| temp.join(name).display().to_string();
    let mut request = request(&format!("oci:{}:t", path("source")), &format!("oci:{}:t", path(to)));
    request.cache = cache.map(|dir| CacheSettings { dir: dir.to_owned(), limit: 1 << 30 });
    request
}

fn files(cache: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// Both layouts have the same bytes.
fn same(temp: &Path, one: &str, two: &str) {
    shell(temp, &format!("diff -r {one} {two}"));
}

/// What a build must do whatever is in the cache: the layout has no byte that a build without a cache would not make.
fn checked(temp: &Path, number: &mut u32, cache: &Path) -> Report {
    *number += 1;
    let to = format!("out-{number}");
    let report = run(&with(temp, &to, Some(cache))).unwrap();
    if !temp.join("plain").exists() {
        let expected = run(&with(temp, "plain", None)).unwrap();
        assert_eq!((report.chunks, report.stored_bytes), (expected.chunks, expected.stored_bytes));
        assert_eq!((expected.cached_layers, expected.cached_chunks), (0, 0));
    }
    same(temp, &to, "plain");
    fs::remove_dir_all(temp.join(to)).unwrap();
    report
}

#[test]
fn only_the_changed_layer_is_read_and_compressed() {
    let temp = image();
    let (temp, cache, mut number) = (temp.path(), temp.path().join("cache"), 0);
    let layer_bytes = |at: usize| {
        let layout = Layout(temp.join("source"));
        let layer = layout.json(&layout.top("t"))["layers"][at]["digest"].as_str().unwrap().to_owned();
        fs::metadata(layout.blob_path(&layer)).unwrap().len()
    };
    let first = checked(temp, &mut number, &cache);
    assert_eq!((first.layers, first.cached_layers, first.cached_chunks), (3, 0, 0));
    assert_eq!(first.read_bytes, layer_bytes(0) + layer_bytes(1) + layer_bytes(2));
    assert!(first.compressed_bytes > 5_000_000);

    // The same again: nothing is read, nothing inflated, nothing compressed.
    let again = checked(temp, &mut number, &cache);
    assert_eq!((again.cached_layers, again.read_bytes, again.inflated_bytes), (3, 0, 0));
    // A chunk of a file that a higher layer replaced is in the cache, and not in the image.
    assert_eq!((again.compressed_bytes, again.cached_chunks), (0, again.chunks + 1));

    // Another third layer: its bytes are read, and no others.
    shell(
        temp,
        r#"
        rm -rf source plain; sed -n '/^    layer()/p' <<'X' > layer.sh
    layer() { tar --format=pax --xattrs --xattrs-include='*' --sparse --sort=name -C $1 -cf $1.tar . && umoci raw add-layer --image source:t $1.tar; }
X
        umoci init --layout source; umoci new --image source:t
        umoci raw add-layer --image source:t one.tar; umoci raw add-layer --image source:t two.tar
        . ./layer.sh; echo other > three/link/through; head -c 600000 /dev/urandom > three/opt/own; layer three"#,
    );
    let changed = checked(temp, &mut number, &cache);
    assert_eq!(changed.cached_layers, 2);
    assert_eq!(changed.read_bytes, layer_bytes(2));
    let tar = fs::metadata(temp.join("three.tar")).unwrap().len();
    assert!(changed.inflated_bytes <= tar, "{} of {tar}", changed.inflated_bytes);
    // The new file, the small files beside it, and metadata.
    assert!(changed.compressed_bytes < 600_000 + 1_600_000, "{}", changed.compressed_bytes);
    assert!(changed.compressed_bytes >= 600_000);
    let again = checked(temp, &mut number, &cache);
    assert_eq!((again.cached_layers, again.read_bytes, again.compressed_bytes), (3, 0, 0));

    // Another image on the first layer: what it makes of that layer's files is its own.
    shell(
        temp,
        "rm -rf source plain; umoci init --layout source; umoci new --image source:t; umoci raw add-layer --image source:t one.tar
        mkdir -p four/etc; : > four/etc/.wh.file-7; tar -C four -cf four.tar .; umoci raw add-layer --image source:t four.tar",
    );
    assert_eq!(checked(temp, &mut number, &cache).cached_layers, 1);
    assert_eq!(checked(temp, &mut number, &cache).compressed_bytes, 0);
}

#[test]
fn a_damaged_cache_is_found_and_made_again() {
    let temp = image();
    let (temp, cache, mut number) = (temp.path(), temp.path().join("cache"), 0);
    run(&with(temp, "first", Some(&cache))).unwrap();
    let kept = files(&cache);
    assert_eq!(kept.len(), 4, "three layers and what is of all: {kept:?}");
    let mut random = Random(7);
    for path in &kept {
        let len = fs::metadata(path).unwrap().len();
        // The first stored byte, the last one of the footer, and some between.
        for at in [0, len - 1, random.below(len)] {
            let sound = fs::read(path).unwrap();
            let mut bytes = sound.clone();
            bytes[at as usize] ^= 0x20;
            fs::write(path, &bytes).unwrap();
            let report = checked(temp, &mut number, &cache);
            let is_layer = path.extension().unwrap() == "layer";
            assert_eq!(report.cached_layers, if is_layer { 2 } else { 3 }, "{} at {at} of {len}", path.display());
            assert!(report.compressed_bytes > 0 || is_layer, "{} at {at}", path.display());
            // What a layer's file holds does not depend on when it was made.
            if is_layer {
                assert!(fs::read(path).unwrap() == sound, "{} is not what it was", path.display());
            }
            let after = checked(temp, &mut number, &cache);
            assert_eq!((after.cached_layers, after.compressed_bytes), (3, 0), "{} at {at}", path.display());
        }
        // Cut off, empty, of another layer.
        let sound = fs::read(path).unwrap();
        let other = fs::read(kept.iter().find(|other| *other != path).unwrap()).unwrap();
        for bytes in [&sound[..sound.len() / 2], &[], &other[..]] {
            fs::write(path, bytes).unwrap();
            checked(temp, &mut number, &cache);
            assert_eq!(checked(temp, &mut number, &cache).read_bytes, 0);
        }
    }
    // Directories where files should be, and names that mean nothing.
    let blocked = &kept[0];
    fs::remove_file(blocked).unwrap();
    fs::create_dir(blocked).unwrap();
    fs::write(cache.join("x.layer"), "x").unwrap();
    fs::write(cache.join("unknown"), "x").unwrap();
    checked(temp, &mut number, &cache);
}

#[test]
fn other_options_have_their_own_files() {
    let temp = image();
    let (temp, cache) = (temp.path(), temp.path().join("cache"));
    run(&with(temp, "first", Some(&cache))).unwrap();
    let mut number = 0;
    let mut differs = |change: &dyn Fn(&mut Request), cached: u64| {
        number += 1;
        let (mut with_cache, mut without) =
            (with(temp, &format!("a-{number}"), Some(&cache)), with(temp, &format!("b-{number}"), None));
        change(&mut with_cache);
        change(&mut without);
        let report = run(&with_cache).unwrap();
        assert_eq!(report.digest, run(&without).unwrap().digest);
        same(temp, &format!("a-{number}"), &format!("b-{number}"));
        assert_eq!(report.cached_layers, cached, "change {number}");
        let again = run(&with_cache).unwrap();
        assert_eq!((again.cached_layers, again.read_bytes), (3, 0), "change {number}");
    };
    differs(&|request| request.level = 7, 0);
    differs(&|request| request.limits.file_bytes /= 2, 0);
    // These make something else of the same layers.
    differs(&|request| request.size = Some(100 << 20), 3);
    differs(&|request| request.workers = 5, 3);
    differs(&|request| request.tree = Tree::Verity, 3);
    let earlier = format!("oci:{}:t", temp.join("first").display());
    differs(&|request| request.reuse = vec![earlier.parse().unwrap()], 3);

    // Layers read while an earlier image had their chunks: those are not in the cache, and must be had from elsewhere.
    let empty = temp.join("empty-cache");
    let mut reusing = with(temp, "reusing", Some(&empty));
    reusing.reuse = vec![earlier.parse().unwrap()];
    run(&reusing).unwrap();
    let again = run(&reusing).unwrap();
    assert_eq!((again.cached_layers, again.new_bytes), (3, 0));
    let alone = run(&with(temp, "alone", Some(&empty))).unwrap();
    assert_eq!((alone.cached_layers, alone.reused_bytes), (0, 0));
    run(&with(temp, "plain", None)).unwrap();
    same(temp, "alone", "plain");
}

/// What an archive of docker's says of its layers is what the config says: enough to know them by.
#[test]
fn layers_of_archives_are_kept_too() {
    let temp = image();
    let (temp, cache) = (temp.path(), temp.path().join("cache"));
    shell(
        temp,
        "skopeo --insecure-policy copy -q oci:source:t docker-archive:saved.tar:n:t; skopeo --insecure-policy copy -q oci:source:t oci-archive:image.tar:t",
    );
    for (number, form) in ["docker-archive:saved.tar", "oci-archive:image.tar:t"].into_iter().enumerate() {
        let (kind, file) = form.split_once(':').unwrap();
        let source = format!("{kind}:{}", temp.join(file).display());
        let build = |to: String, cache: Option<&Path>| {
            let mut request = with(temp, &to, cache);
            request.source = source.parse().unwrap();
            run(&request).unwrap()
        };
        assert_eq!(build(format!("one-{number}"), Some(&cache)).cached_layers, 0, "{form}");
        let again = build(format!("two-{number}"), Some(&cache));
        assert_eq!((again.cached_layers, again.inflated_bytes, again.compressed_bytes), (3, 0, 0), "{form}");
        build(format!("three-{number}"), None);
        same(temp, &format!("two-{number}"), &format!("three-{number}"));
    }
}

#[test]
fn a_layer_that_is_refused_is_not_kept() {
    let temp = image();
    let (temp, cache) = (temp.path(), temp.path().join("cache"));
    run(&with(temp, "first", Some(&cache))).unwrap();
    let sound = files(&cache);
    // The second layer's file goes, and its blob is damaged.
    let layout = Layout(temp.join("source"));
    let layer = layout.json(&layout.top("t"))["layers"][1]["digest"].as_str().unwrap().to_owned();
    let path = layout.blob_path(&layer);
    let len = fs::metadata(&path).unwrap().len();
    fs::File::options().write(true).open(&path).unwrap().write_all_at(&[0x55; 64], len / 2).unwrap();
    // From the cache it can still be built: what was kept is what the digests say.
    assert_eq!(run(&with(temp, "second", Some(&cache))).unwrap().cached_layers, 3);
    same(temp, "first", "second");
    for path in &sound {
        fs::remove_file(path).unwrap();
    }
    let error = run(&with(temp, "third", Some(&cache))).unwrap_err().to_string();
    assert!(error.contains(&layer), "{error}");
    assert!(files(&cache).is_empty(), "{:?}", files(&cache));
}

#[test]
fn the_cache_is_bounded_and_what_was_used_last_stays() {
    let temp = image();
    let (temp, cache) = (temp.path(), temp.path().join("cache"));
    run(&with(temp, "first", Some(&cache))).unwrap();
    let sizes = |cache: &Path| files(cache).iter().map(|path| fs::metadata(path).unwrap().len()).sum::<u64>();
    let all = sizes(&cache);
    // Everything is old, but for one layer that is used again.
    let long_ago = SystemTime::now() - Duration::from_secs(3600);
    let age = |path: &Path| fs::File::options().write(true).open(path).unwrap().set_modified(long_ago).unwrap();
    files(&cache).iter().for_each(|path| age(path));
    shell(
        temp,
        "mv source whole; umoci init --layout source; umoci new --image source:t; umoci raw add-layer --image source:t two.tar",
    );
    let mut one = with(temp, "second", Some(&cache));
    one.cache.as_mut().unwrap().limit = all / 4;
    assert_eq!(run(&one).unwrap().cached_layers, 1);
    assert!(sizes(&cache) <= all / 4, "{} of {all}", sizes(&cache));
    assert_eq!(run(&one).unwrap().cached_layers, 1, "the one that was used is still there");
    shell(temp, "rm -r source; mv whole source");
    // No single file fits: nothing is kept, and nothing else is lost for it.
    let mut tiny = with(temp, "third", Some(&cache));
    tiny.cache.as_mut().unwrap().limit = 1000;
    run(&tiny).unwrap();
    assert!(sizes(&cache) <= 1000);
    // What a killed build left goes after a day, not before.
    for (name, hours) in [("1-1.partial", 30), ("2-1.partial", 1)] {
        fs::write(cache.join(name), "x").unwrap();
        let at = SystemTime::now() - Duration::from_secs(hours * 3600);
        fs::File::options().write(true).open(cache.join(name)).unwrap().set_modified(at).unwrap();
    }
    run(&with(temp, "fourth", Some(&cache))).unwrap();
    assert!(!cache.join("1-1.partial").exists() && cache.join("2-1.partial").exists());
}

/// Builds are killed at any time: whatever they leave, the next build gives what a build without a cache gives.
#[test]
fn killed_builds_leave_nothing_wrong() {
    let temp = image();
    let (temp, cache, mut number) = (temp.path(), temp.path().join("cache"), 0);
    let mut random = Random(11);
    let started = std::time::Instant::now();
    run(&with(temp, "timed", None)).unwrap();
    let whole = started.elapsed().as_micros() as u64 * 3 / 2;
    let mut partial = 0;
    for _ in 0..25 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_firstread-build"))
            .args(["build", "--quiet", "--cache"])
            .arg(&cache)
            .arg(format!("oci:{}:t", temp.join("source").display()))
            .arg(format!("oci:{}:t", temp.join("killed").display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(random.below(whole)));
        child.kill().unwrap();
        child.wait().unwrap();
        let there = if cache.exists() { files(&cache) } else { Vec::new() };
        partial += usize::from(there.iter().any(|path| path.extension().unwrap() == "partial"));
        if random.one_in(5) {
            checked(temp, &mut number, &cache);
            fs::remove_dir_all(&cache).unwrap();
        }
    }
    println!("{partial} of 25 kills left a partial file");
    checked(temp, &mut number, &cache);
    assert_eq!(checked(temp, &mut number, &cache).read_bytes, 0);
}

#[test]
fn builds_share_a_cache_at_the_same_time() {
    let temp = image();
    let (temp, cache, mut number) = (temp.path(), temp.path().join("cache"), 0);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let cache = &cache;
            scope.spawn(move || {
                for turn in 0..4 {
                    let mut request = with(temp, &format!("parallel-{thread}-{turn}"), Some(cache));
                    // Files go while others read them.
                    request.cache.as_mut().unwrap().limit = if turn % 2 == 0 { 3_000_000 } else { 1 << 30 };
                    run(&request).unwrap();
                }
            });
        }
    });
    run(&with(temp, "plain", None)).unwrap();
    for (thread, turn) in [(0, 0), (1, 3), (2, 2), (3, 1)] {
        same(temp, &format!("parallel-{thread}-{turn}"), "plain");
    }
    checked(temp, &mut number, &cache);
}

#[test]
fn the_program_keeps_the_cache_below_its_root_and_says_what_came_from_it() {
    let temp = image();
    let node = Node::new();
    let (source, to) = (
        format!("oci:{}:t", temp.path().join("source").display()),
        format!("oci:{}:t", temp.path().join("to").display()),
    );
    let first = node.json(&["build", &source, &to]);
    assert_eq!((&first["layers"], &first["cached_layers"]), (&3.into(), &0.into()));
    let cache = node.root().join("build-cache");
    assert_eq!(files(&cache).len(), 4);
    assert_eq!(fs::metadata(&cache).unwrap().mode() & 0o777, 0o700);
    let second = node.json(&["build", &source, &to]);
    assert_eq!(second["digest"], first["digest"]);
    assert_eq!((&second["cached_layers"], &second["read_bytes"]), (&3.into(), &0.into()));
    assert_eq!(second["compressed_bytes"], 0);
    let third = node.json(&["build", "--no-cache", &source, &to]);
    assert_eq!((&third["cached_layers"], &third["digest"]), (&0.into(), &first["digest"]));
    let output = node.run(&["build", &source, &to]);
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(out.contains("3, 3 from the cache, 0 B read"), "{out}");
    assert_eq!(err.matches("from the cache sha256:").count(), 3, "{err}");
    // Settings have the same: a directory that can't be used is said, and the build goes on.
    let blocked = temp.path().join("source/index.json/cache");
    let config = temp.path().join("config.toml");
    fs::write(&config, format!("[build]\ncache = {:?}\ncache_limit = \"5M\"\n", blocked.display().to_string()))
        .unwrap();
    let output = node.run(&["--config", config.to_str().unwrap(), "build", &source, &to]);
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && err.contains("building without the cache"), "{err}");
    fs::write(&config, "[build.limit]\nentries = 100\n").unwrap();
    let error = node.fails(1, &["--config", config.to_str().unwrap(), "build", &source, &to]);
    assert!(error.contains("100 entries"), "{error}");
    fs::write(&config, "[build.limit]\nfiles = 100\n").unwrap();
    let error = node.fails(1, &["--config", config.to_str().unwrap(), "build", &source, &to]);
    assert!(error.contains("files"), "{error}");
}
