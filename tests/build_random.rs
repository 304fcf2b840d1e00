//! Generated stacks of layers: what is mounted in the end must be what a simple model says, and what the build cache makes of
//! them the same image.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/built.rs"]
mod built;
#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/layer_model.rs"]
mod layer_model;
#[path = "common/nodes.rs"]
mod nodes;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;

use ::tar::{Builder, Header};
use built::{Layout, request, run};
use firstread::build::CacheSettings;
use layer_model::{Illegal, Leaf, Model, Names, content, stack, tar};
use nodes::{Content, ContentDigest, Nodes};
use proptest::prelude::prop_assert_eq;
use proptest::test_runner::{Config, TestRunner};
use tempfile::TempDir;

/// Each of them is built three times and mounted; the flattening alone is tested with many more in the library.
const CASES: u32 = 60;

/// What `docker save` writes.
fn archive(path: &Path, tars: &[Vec<u8>]) {
    let digest = |bytes: &[u8]| firstread::Digest::of(bytes).to_string();
    let ids: Vec<String> = tars.iter().map(|tar| digest(tar)).collect();
    let config =
        serde_json::json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": ids}});
    let names: Vec<String> = (0..tars.len()).map(|number| format!("{number}.tar")).collect();
    let manifest = serde_json::json!([{"Config": "config.json", "RepoTags": ["n:t"], "Layers": names}]);
    let mut out = Builder::new(std::fs::File::create(path).unwrap());
    let mut put = |name: &str, bytes: &[u8]| {
        let mut header = Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        out.append_data(&mut header, name, bytes).unwrap();
    };
    put("config.json", config.to_string().as_bytes());
    put("manifest.json", manifest.to_string().as_bytes());
    names.iter().zip(tars).for_each(|(name, tar)| put(name, tar));
    out.finish().unwrap();
}

/// What a mount must show, but for what a model of paths does not know.
fn compare(model: &Model, found: &Nodes) {
    let joined: BTreeMap<Vec<u8>, &Names> = model.map.keys().map(|path| (path.join("/").into_bytes(), path)).collect();
    let list = |paths: Vec<&Vec<u8>>| paths.iter().map(|path| path.escape_ascii().to_string()).collect::<Vec<_>>();
    assert_eq!(list(joined.keys().collect()), list(found.keys().filter(|path| !path.is_empty()).collect()));
    for (path, names) in joined {
        let (number, _) = model.map[names];
        let inode = &model.inodes[number];
        assert!(names.len() == 1 || model.is_dir(&names[..names.len() - 1].to_vec()));
        let node = &found[&path];
        let same: Vec<&Names> =
            model.map.iter().filter(|(_, (other, _))| *other == number).map(|(path, _)| path).collect();
        let (kind, size, target, bytes) = match &inode.leaf {
            None => (0o040_000, 0, "", Vec::new()),
            Some(Leaf::File(number, len)) => (0o100_000, *len, "", content(*number, *len)),
            Some(Leaf::Symlink(target)) => (0o120_000, target.len(), &**target, Vec::new()),
            Some(Leaf::Fifo) => (0o010_000, 0, "", Vec::new()),
        };
        let mut digest = ContentDigest::default();
        bytes.chunks(4096).enumerate().for_each(|(number, block)| digest.block(number as u64, block));
        let content = if kind == 0o100_000 { digest.finish() } else { Content::default() };
        let text = path.escape_ascii();
        assert_eq!(node.mode, kind | inode.mode, "{text}");
        assert_eq!((node.uid, node.gid, node.mtime), (inode.uid, inode.gid, (inode.time, 0)), "{text}");
        assert_eq!((node.size, &*node.target), (size as u64, target.as_bytes()), "{text}");
        assert!(node.content == content, "content of {text}");
        if inode.leaf.is_some() {
            let first = same.iter().map(|path| path.join("/").into_bytes()).min().unwrap();
            assert_eq!((node.links, &node.first_path), (same.len() as u64, &first), "{text}");
        }
    }
}

#[test]
fn any_stack_of_layers_is_what_the_model_says() {
    let temp = TempDir::new().unwrap();
    let (saved, cache) = (temp.path().join("saved.tar"), temp.path().join("cache"));
    let layout = Layout(temp.path().join("layout"));
    let (built, refused) = (Cell::new(0), Cell::new(0));
    let config = Config { cases: CASES, max_shrink_iters: 300, failure_persistence: None, ..Config::default() };
    let result = TestRunner::new(config).run(&stack(), |stack| {
        let mut first = 0;
        let tars: Vec<Vec<u8>> = stack
            .iter()
            .map(|items| {
                first += items.len();
                tar(items, first - items.len())
            })
            .collect();
        archive(&saved, &tars);
        let source = format!("docker-archive:{}", saved.display());
        let mut request = request(&source, &format!("oci:{}:t", layout.0.display()));
        let plain = run(&request);
        request.cache = Some(CacheSettings { dir: cache.clone(), limit: 50 << 20 });
        // Layers of stacks before this one are in the cache, then all of this one.
        for _ in 0..2 {
            let cached = run(&request);
            let text = |result: &firstread::Result<firstread::build::Report>| match result {
                Ok(report) => report.digest.to_string(),
                Err(_) => "refused".to_owned(),
            };
            prop_assert_eq!(text(&plain), text(&cached), "{:?}", cached);
        }
        match (Model::of(&stack), plain) {
            (Ok(model), Ok(report)) => {
                compare(&model, &layout.tree(&report.digest.to_string(), temp.path()));
                built.set(built.get() + 1);
            }
            (Err(Illegal), Err(_)) => refused.set(refused.get() + 1),
            (Ok(_), Err(error)) => panic!("refused: {error}"),
            (Err(Illegal), Ok(_)) => panic!("built, and has no meaning"),
        }
        std::fs::remove_dir_all(&layout.0).ok();
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let (built, refused) = (built.get(), refused.get());
    println!("{built} stacks built, {refused} refused");
    assert!(built > 30 && refused > 0, "{built} stacks built, {refused} refused");
}
