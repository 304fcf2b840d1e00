//! Every form of source gives the device that the tree it holds gives.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/built.rs"]
mod built;
#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;

use built::{Layout, request, run, shell, tool, try_build};
use firstread::build::{Limits, Request};
use nodes::{Compare, assert_same};
use tempfile::TempDir;

/// A tree with one of everything.
const TREE: &str = r#"
    mkdir -p tree/{bin,etc/deep/er,empty,var/lib}
    cd tree
    for n in $(seq 100); do head -c $((n * 700)) /dev/urandom > bin/small-$n; done
    head -c 3000001 /dev/urandom > bin/large
    cp bin/large bin/same-content
    head -c 65536 /dev/zero > etc/zeros
    head -c 65535 /dev/urandom > etc/just-small
    head -c 65536 /dev/urandom > etc/just-large
    touch etc/nothing
    truncate -s 5M var/sparse
    head -c 5000 /dev/urandom | dd of=var/sparse bs=1 seek=1000000 conv=notrunc status=none
    truncate -s 40K var/sparse-small
    printf x | dd of=var/sparse-small bs=1 seek=30000 conv=notrunc status=none
    truncate -s 1G var/hole
    ln bin/large var/hard
    ln -s ../bin/large var/soft
    ln -s /nowhere/$(printf 'x%.0s' $(seq 200)) var/dangling
    ln var/soft var/soft-too
    mkfifo var/fifo
    mknod var/null c 1 3
    mknod var/disk b 259 1048575
    printf odd > "$(printf 'etc/\xff\xfe')"
    printf long > etc/$(printf 'n%.0s' $(seq 255))
    setfattr -n user.note -v "two
lines" bin/large
    setfattr -n security.capability -v 0x0100000200200000000000000000000a00000000 bin/small-1
    setfattr -n trusted.x -v y etc
    chown 1000:100000 bin/small-2
    chmod 4755 bin/small-3
    chmod 1777 empty
    touch -d @-5.25 bin/small-4
    touch -d @4102444800.123456789 bin/small-5
    touch -h -d @12.000000001 var/soft
"#;

fn tree() -> TempDir {
    let temp = tempfile::tempdir().unwrap();
    shell(temp.path(), TREE);
    temp
}

const TAR: &str =
    "tar --format=pax --sort=name --xattrs --xattrs-include='*' --sparse --pax-option=delete=atime,delete=ctime";

#[test]
fn a_directory_is_on_the_device_node_by_node() {
    let temp = tree();
    let (source, layout) = (temp.path().join("tree"), temp.path().join("layout"));
    let report = try_build(&format!("dir:{}", source.display()), &format!("oci:{}:t", layout.display())).unwrap();
    assert_eq!(report.new_chunks, report.chunks);
    let found = Layout(layout).tree(&report.digest.to_string(), temp.path());
    assert_same(&nodes::read(&source), &found, Compare::AcrossFileSystems);
}

/// Names are listed ahead of the contents that are read: an error of either ends both, and names the path.
#[test]
fn a_directory_beyond_a_limit_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    shell(
        temp.path(),
        "mkdir -p tree/a/b/c/d; for n in $(seq 400); do echo $n > tree/a/b/$n; done; head -c 5000 /dev/zero > tree/a/b/long",
    );
    let defaults = Limits::default();
    for (limits, words) in [
        (Limits { depth: 3, ..defaults }, ["tree/a/b/c/d", "too deep"]),
        (Limits { entries: 100, ..defaults }, ["tree/a/b/", "100 entries"]),
        (Limits { file_bytes: 4999, ..defaults }, ["tree/a/b/long", "5000 bytes"]),
    ] {
        let source = format!("dir:{}", temp.path().join("tree").display());
        let error =
            run(&Request { limits, ..request(&source, &format!("oci:{}:t", temp.path().join("out").display())) });
        let error = error.unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{words:?} in {error}");
    }
}

/// The tree as a tar, made with these options and sent through this filter, has the index that the directory has.
fn tar_is_as_the_directory(options: &str, filter: &str) {
    let temp = tree();
    let at = |name: &str| temp.path().join(name).display().to_string();
    shell(temp.path(), &format!("{TAR} {options} -C tree -cf all . && ({filter}) < all > filtered.tar"));
    let layout = Layout(temp.path().join("layout"));
    let index = |form: &str, tag: &str| {
        let report = try_build(form, &format!("oci:{}:{tag}", layout.0.display())).unwrap();
        layout.index(&report.digest.to_string())
    };
    let from_tar = index(&format!("tar:{}", at("filtered.tar")), "tar");
    assert!(from_tar == index(&format!("dir:{}", at("tree")), "dir"));
}

#[test]
fn sparse_files_of_pax_1_0() {
    tar_is_as_the_directory("--format=pax --sparse-version=1.0", "cat");
}

#[test]
fn sparse_files_of_pax_0_1_and_gzip() {
    tar_is_as_the_directory("--format=pax --sparse-version=0.1", "gzip");
}

#[test]
fn sparse_files_of_pax_0_0_and_zstd() {
    tar_is_as_the_directory("--format=pax --sparse-version=0.0", "zstd -1");
}

#[test]
fn gzip_of_two_members() {
    tar_is_as_the_directory("--format=pax", "head -c 1000000 all | gzip; tail -c +1000001 all | gzip");
}

#[test]
fn zstd_of_two_frames() {
    tar_is_as_the_directory("--format=pax", "head -c 500000 all | zstd -q; tail -c +500001 all | zstd -q");
}

#[test]
fn old_gnu_sparse_files_and_long_names_are_read() {
    let temp = tempfile::tempdir().unwrap();
    shell(
        temp.path(),
        r#"
        mkdir tree; cd tree
        truncate -s 9M sparse
        for at in $(seq 0 60); do printf "piece $at" | dd of=sparse bs=1 seek=$((at * 140000)) conv=notrunc status=none; done
        name=$(printf 'directory-%.0s' $(seq 20))
        mkdir -p $name/$name; echo content > $name/$name/file; ln -s $name/$name/$name link
        touch -d @1600000000 $name/$name/file $name/$name $name sparse; touch -h -d @1600000000 link
        touch -d @1600000000 .
        cd ..; tar --format=gnu --sparse --sort=name -C tree -cf gnu.tar ."#,
    );
    let at = |name: &str| temp.path().join(name).display().to_string();
    let layout = Layout(temp.path().join("layout"));
    let digest = |form: String, tag: &str| {
        try_build(&form, &format!("oci:{}:{tag}", layout.0.display())).unwrap().digest.to_string()
    };
    let from_tar = digest(format!("tar:{}", at("gnu.tar")), "tar");
    let from_dir = digest(format!("dir:{}", at("tree")), "dir");
    assert!(layout.index(&from_tar) == layout.index(&from_dir));
}

/// skopeo makes the other forms of an image, and copies what is built without changing it.
#[test]
fn image_forms_give_equal_devices_and_keep_the_config() {
    let temp = tree();
    let at = |name: &str| temp.path().join(name).display().to_string();
    shell(temp.path(), &format!("{TAR} -C tree -cf layer.tar ."));
    shell(
        temp.path(),
        "umoci init --layout plain; umoci new --image plain:t; umoci raw add-layer --image plain:t layer.tar
         umoci config --image plain:t --config.env A=B --config.cmd run --config.label k=v --manifest.annotation m=n
         for to in docker-archive:saved.tar:some/name:v1 oci-archive:archive.tar:t oci:copied:t; do
             skopeo --insecure-policy copy -q oci:plain:t $to
         done",
    );
    let layout = Layout(temp.path().join("layout"));
    let mut indexes = Vec::new();
    for (number, form) in [
        format!("oci:{}:t", at("plain")),
        format!("docker-archive:{}", at("saved.tar")),
        format!("oci-archive:{}:t", at("archive.tar")),
        format!("oci:{}:t", at("copied")),
    ]
    .iter()
    .enumerate()
    {
        let report = try_build(form, &format!("oci:{}:t{number}", layout.0.display()))
            .unwrap_or_else(|error| panic!("{form}: {error}"));
        let manifest = layout.json(&report.digest.to_string());
        let config = layout.json(manifest["config"]["digest"].as_str().unwrap());
        assert_eq!(config["config"]["Env"][0], "A=B");
        assert_eq!(config["config"]["Cmd"][0], "run");
        assert_eq!(config["config"]["Labels"]["k"], "v");
        let layers = manifest["layers"].as_array().unwrap();
        assert_eq!(config["rootfs"]["diff_ids"].as_array().unwrap().len(), layers.len());
        let history = config["history"].as_array().unwrap();
        assert_eq!(history.iter().filter(|entry| entry["empty_layer"] != true).count(), layers.len());
        if number != 1 {
            assert_eq!(manifest["annotations"]["m"], "n", "{form}");
        }
        for (layer, diff_id) in layers.iter().zip(config["rootfs"]["diff_ids"].as_array().unwrap()) {
            let path = layout.blob_path(layer["digest"].as_str().unwrap());
            let path = path.display().to_string();
            let listed = tool("bash", ["-c", &format!("set -o pipefail; zstd -dcq < {path} | tar t")]);
            assert!(String::from_utf8(listed).unwrap().lines().last().unwrap().starts_with(".firstread/"));
            let sum = tool("bash", ["-c", &format!("set -o pipefail; zstd -dcq < {path} | sha256sum")]);
            assert_eq!(format!("sha256:{}", &String::from_utf8(sum).unwrap()[..64]), diff_id.as_str().unwrap());
        }
        indexes.push(layout.index(&report.digest.to_string()));
    }
    assert!(indexes.iter().all(|index| *index == indexes[0]));

    shell(temp.path(), "skopeo --insecure-policy copy -q oci:layout:t0 oci:again:t0");
    let again = Layout(temp.path().join("again"));
    assert_eq!(again.top("t0"), layout.top("t0"));
    assert_eq!(again.json(&again.top("t0")), layout.json(&layout.top("t0")));
}

#[test]
fn builds_are_byte_identical_whatever_the_threads_and_paths() {
    let temp = tree();
    shell(temp.path(), "mkdir other; cp -a tree other/place");
    let (one, two) = (Layout(temp.path().join("one")), Layout(temp.path().join("two")));
    let mut first =
        request(&format!("dir:{}", temp.path().join("tree").display()), &format!("oci:{}:t", one.0.display()));
    first.workers = 1;
    let mut second =
        request(&format!("dir:{}", temp.path().join("other/place").display()), &format!("oci:{}:t", two.0.display()));
    second.workers = 7;
    second.temp = temp.path().join("other");
    assert_eq!(run(&first).unwrap().digest, run(&second).unwrap().digest);
    shell(temp.path(), "diff -r one two");
}

#[test]
fn a_second_version_reuses_the_packs_of_the_first() {
    let temp = tree();
    let layout = Layout(temp.path().join("layout"));
    let source = format!("dir:{}", temp.path().join("tree").display());
    let destination = |tag: &str| format!("oci:{}:{tag}", layout.0.display());
    let first = try_build(&source, &destination("one")).unwrap();
    shell(temp.path(), "head -c 70000 /dev/urandom > tree/etc/new-file");
    let mut second = request(&source, &destination("two"));
    second.reuse = vec![destination("one").parse().unwrap()];
    let second = run(&second).unwrap();
    assert!(second.new_bytes < first.stored_bytes / 4, "{second:?}");
    assert_eq!(second.new_bytes + second.reused_bytes, second.stored_bytes);
    let found = layout.tree(&second.digest.to_string(), temp.path());
    assert_same(&nodes::read(&temp.path().join("tree")), &found, Compare::AcrossFileSystems);
}

#[test]
fn the_source_date_is_when_the_image_was_created_and_bounds_file_times() {
    let temp = tempfile::tempdir().unwrap();
    shell(
        temp.path(),
        "mkdir tree; echo a > tree/old; touch -d @1000.5 tree/old; echo b > tree/new; tar -C tree -cf tree.tar .",
    );
    let layout = Layout(temp.path().join("layout"));
    let build = |source: String, date: Option<u64>| {
        let mut request = request(&source, &format!("oci:{}:t", layout.0.display()));
        request.source_date = date;
        let report = run(&request).unwrap();
        let manifest = layout.json(&report.digest.to_string());
        let config = layout.json(manifest["config"]["digest"].as_str().unwrap());
        let times: Vec<_> = layout
            .tree(&report.digest.to_string(), temp.path())
            .iter()
            .map(|(path, node)| (String::from_utf8(path.clone()).unwrap(), node.mtime))
            .collect();
        (config, times)
    };
    let dir = format!("dir:{}", temp.path().join("tree").display());
    let (config, times) = build(dir.clone(), Some(1_735_689_600));
    assert_eq!(config["created"], "2025-01-01T00:00:00Z");
    assert_eq!(config["history"][0]["created"], "2025-01-01T00:00:00Z");
    let time = |name: &str, times: &[(String, (i64, u32))]| times.iter().find(|(path, _)| path == name).unwrap().1;
    assert_eq!(time("old", &times), (1000, 500_000_000));
    assert_eq!(time("new", &times), (1_735_689_600, 0));
    assert_eq!(time("", &times), (1_735_689_600, 0));
    // What a tar says is content.
    let (config, times) = build(format!("tar:{}", temp.path().join("tree.tar").display()), Some(1_735_689_600));
    assert_eq!(config["created"], "2025-01-01T00:00:00Z");
    assert!(time("new", &times).0 > 1_735_689_600);
    let (config, _) = build(dir, None);
    assert_eq!(config["created"], "1970-01-01T00:00:00Z");
}

#[test]
fn an_archive_is_the_layout_in_a_tar_and_replaces_what_was_there() {
    let temp = tree();
    let at = |name: &str| temp.path().join(name).display().to_string();
    let spool = temp.path().join("spool");
    std::fs::create_dir(&spool).unwrap();
    std::fs::write(at("image.tar"), "in the way").unwrap();
    let archive = |name: &str| {
        let mut request = request(&format!("dir:{}", at("tree")), &format!("oci-archive:{}:t", at(name)));
        request.temp = spool.clone();
        run(&request)
    };
    let report = archive("image.tar").unwrap();
    archive("again.tar").unwrap();
    shell(temp.path(), "cmp image.tar again.tar; test -z \"$(ls -A spool)\"; test -z \"$(ls | grep partial)\"");
    // skopeo reads it, and it is what a layout would be.
    shell(
        temp.path(),
        "skopeo --insecure-policy copy -q oci-archive:image.tar:t oci:copy:t; mkdir layout; tar -C layout -xf image.tar",
    );
    for layout in ["copy", "layout"] {
        assert_eq!(Layout(temp.path().join(layout)).top("t"), report.digest.to_string());
    }
    let found = Layout(temp.path().join("layout")).tree(&report.digest.to_string(), temp.path());
    assert_same(&nodes::read(&temp.path().join("tree")), &found, Compare::AcrossFileSystems);
    // What fails leaves nothing behind.
    let error = archive("nowhere/image.tar").unwrap_err().to_string();
    assert!(error.contains("nowhere/image.tar"), "{error}");
    shell(temp.path(), "test -z \"$(ls -A spool)\"");
}

#[test]
fn a_missing_source_is_named_once() {
    let temp = tempfile::tempdir().unwrap();
    let missing = temp.path().join("missing").display().to_string();
    for kind in ["dir", "tar", "raw", "docker-archive", "oci-archive"] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_firstread-build"))
            .args(["build", "--quiet", "--no-cache", &format!("{kind}:{missing}"), &format!("oci:{missing}-to:t")])
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(&missing), "{kind}: {error}");
        assert_eq!(error.matches("os error").count(), 1, "{kind}: {error}");
    }
}
