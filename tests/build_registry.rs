//! Building from a registry into a registry.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/built.rs"]
mod built;
#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;
#[path = "common/registry.rs"]
mod registry;

use built::{Layout, request, run, shell, try_build};
use nodes::{Compare, assert_same};
use registry::Registry;

/// An image of two platforms in a registry: both are converted, and a copy of the result is the result.
#[test]
fn all_platforms_of_an_image_in_a_registry() {
    let registry = Registry::start();
    let host = registry.host();
    let temp = tempfile::tempdir().unwrap();
    shell(
        temp.path(),
        &format!(
            r#"umoci init --layout l
            for arch in amd64 arm64; do
                mkdir $arch; head -c 300000 /dev/urandom > $arch/large; echo $arch > $arch/name
                tar -C $arch --format=pax -cf $arch.tar .
                umoci new --image l:$arch; umoci raw add-layer --image l:$arch $arch.tar
                umoci config --image l:$arch --architecture $arch
                skopeo --insecure-policy copy -q --dest-tls-verify=false oci:l:$arch docker://{host}/plain:$arch
            done
            entry() {{
                digest=$(skopeo inspect --tls-verify=false --format '{{{{.Digest}}}}' docker://{host}/plain:$1)
                size=$(curl -sf -H 'Accept: application/vnd.oci.image.manifest.v1+json' http://{host}/v2/plain/manifests/$digest | wc -c)
                printf '{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"%s","size":%s,"platform":{{"os":"linux","architecture":"%s"}}}}' $digest $size $1
            }}
            printf '{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[%s,%s]}}' $(entry amd64) $(entry arm64) > index
            curl -sf -X PUT -H 'Content-Type: application/vnd.oci.image.index.v1+json' --data-binary @index http://{host}/v2/plain/manifests/all"#
        ),
    );
    let report = try_build(&format!("{host}/plain:all"), &format!("{host}/lazy:all")).unwrap();
    assert_eq!(report.platforms, ["linux/amd64", "linux/arm64"]);
    shell(
        temp.path(),
        &format!(
            "skopeo --insecure-policy copy -q --all --src-tls-verify=false docker://{host}/lazy:all oci:copy:all
            skopeo inspect --tls-verify=false docker://{host}/lazy:all > inspected"
        ),
    );
    let layout = Layout(temp.path().join("copy"));
    assert_eq!(layout.top("all"), report.digest.to_string());
    for manifest in layout.json(&layout.top("all"))["manifests"].as_array().unwrap() {
        let architecture = manifest["platform"]["architecture"].as_str().unwrap();
        let work = temp.path().join(format!("work-{architecture}"));
        std::fs::create_dir(&work).unwrap();
        let found = layout.tree(manifest["digest"].as_str().unwrap(), &work);
        assert_same(
            &without_fractions(nodes::read(&temp.path().join(architecture))),
            &without_fractions(found),
            Compare::AcrossFileSystems,
        );
    }

    // One of them is chosen, or an error says which there are; the same for an image of one platform.
    let chosen = |tag: &str, platform: &str| {
        let mut one = request(&format!("{host}/plain:{tag}"), &format!("{host}/lazy:one"));
        one.platforms = vec![platform.parse().unwrap()];
        run(&one)
    };
    assert_eq!(chosen("all", "linux/arm64").unwrap().platforms, ["linux/arm64"]);
    shell(
        temp.path(),
        &format!(
            "skopeo inspect --raw --tls-verify=false docker://{host}/lazy:one | jq -e .layers
            skopeo inspect --config --tls-verify=false docker://{host}/lazy:one | jq -e '.architecture == \"arm64\"'"
        ),
    );
    let error = chosen("all", "linux/riscv64").unwrap_err().to_string();
    assert!(error.contains("linux/riscv64") && error.contains("linux/amd64, linux/arm64"), "{error}");
    let error = chosen("amd64", "linux/arm64").unwrap_err().to_string();
    assert!(error.contains("linux/arm64") && error.contains("there is: linux/amd64"), "{error}");
}

/// skopeo and umoci keep the layer as it is, but a ustar time has no fraction.
fn without_fractions(mut nodes: nodes::Nodes) -> nodes::Nodes {
    nodes.values_mut().for_each(|node| node.mtime.1 = 0);
    nodes
}

/// The packs of an earlier image come along to another repository of the registry, to a layout, and from one.
#[test]
fn reused_packs_are_carried_to_where_the_image_goes() {
    let registry = Registry::start();
    let host = registry.host();
    let temp = tempfile::tempdir().unwrap();
    shell(temp.path(), "mkdir tree spool; head -c 900000 /dev/urandom > tree/large; echo 1 > tree/version");
    let source = format!("dir:{}", temp.path().join("tree").display());
    let first = try_build(&source, &format!("{host}/team/one:t")).unwrap();
    let mut from = format!("{host}/team/one:t");
    let layout = temp.path().join("layout");
    for (number, to) in
        [format!("{host}/other/two:t"), format!("oci:{}:t", layout.display()), format!("{host}/third:t")]
            .iter()
            .enumerate()
    {
        shell(temp.path(), &format!("echo version {number} > tree/version"));
        let mut next = request(&source, to);
        next.reuse = vec![from.parse().unwrap()];
        next.temp = temp.path().join("spool");
        let report = run(&next).unwrap();
        assert!(report.reused_bytes > 900_000 && report.new_bytes < first.stored_bytes / 4, "{to}: {report:?}");
        // A full copy has everything that the manifest names.
        let copy = Layout(temp.path().join(format!("copy-{number}")));
        match to.strip_prefix("oci:") {
            Some(_) => shell(temp.path(), &format!("skopeo --insecure-policy copy -q {to} oci:{}:t", copy.0.display())),
            None => shell(
                temp.path(),
                &format!(
                    "skopeo --insecure-policy copy -q --src-tls-verify=false docker://{to} oci:{}:t",
                    copy.0.display()
                ),
            ),
        }
        let found = copy.tree(&report.digest.to_string(), temp.path());
        assert_same(&nodes::read(&temp.path().join("tree")), &found, Compare::AcrossFileSystems);
        from.clone_from(to);
    }
    assert!(std::fs::read_dir(temp.path().join("spool")).unwrap().next().is_none());
}
