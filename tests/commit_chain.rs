//! A hundred generations, each a commit of the one before: what is listed stays as large as what is there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/built.rs"]
mod built;
#[path = "common/committed.rs"]
mod committed;
#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;

use std::fs;
use std::path::Path;

use built::{Layout, request, run, shell};
use committed::{Generation, difference};
use nodes::{Compare, assert_same};
use tempfile::TempDir;

const GENERATIONS: usize = 100;

/// What a generation does: a file that grows and is cut again, one that is written anew, small files that come and go, and
/// a package that is replaced by the next one now and then.
fn script(generation: usize) -> String {
    format!(
        "g={generation}
         head -c 30000 /dev/urandom >> log; [ $(stat -c %s log) -lt 400000 ] || : > log
         head -c 120000 /dev/urandom > state
         echo $g > many/f$g; head -c $((g * 97 % 9000)) /dev/urandom > many/r$((g % 20)); rm -f many/f$((g - 30))
         if [ $((g % 7)) = 0 ]; then rm -rf package; mkdir package
           for i in $(seq 12); do head -c $((i * 3001)) /dev/urandom > package/$i; done; fi
         dd if=/dev/urandom of=base bs=4096 seek=$((g * 37 % 480)) count=2 conv=notrunc status=none"
    )
}

struct Listed {
    packs: usize,
    pack_bytes: u64,
    live_bytes: u64,
    index_bytes: u64,
    chunks: usize,
    plain_bytes: u64,
}

fn listed(image: &Generation) -> Listed {
    let index = image.index();
    Listed {
        packs: index.blobs().count(),
        pack_bytes: index.blobs().map(|blob| blob.bytes).sum(),
        live_bytes: index.chunks().map(|chunk| u64::from(chunk.stored_len)).sum(),
        index_bytes: index.bytes(),
        chunks: index.chunks().count(),
        plain_bytes: index.chunks().map(|chunk| u64::from(chunk.plain_len)).sum(),
    }
}

#[test]
fn a_hundred_generations_stay_bounded() {
    let temp = TempDir::new().unwrap();
    let work = temp.path();
    shell(work, "mkdir -p tree/many; head -c 2000000 /dev/urandom > tree/base; echo 1 > tree/many/one; : > tree/log");
    let layout = work.join("layout");
    let mut first = request(&format!("dir:{}", work.join("tree").display()), &format!("oci:{}:g0", layout.display()));
    first.size = Some(16 << 20);
    run(&first).unwrap();
    let disk = work.join("disk");
    let mut parent = Generation::open(&layout, "g0", work);
    fs::write(&disk, &parent.bytes).unwrap();
    let (mut written, mut pushed, mut most) = (0, 0, Listed { packs: 0, ..listed(&parent) });
    for generation in 1..=GENERATIONS {
        let before = fs::read(&disk).unwrap();
        let mount = ext4::Mount::new(&disk, &work.join("mounted"), "rw");
        shell(mount.dir(), &script(generation));
        drop(mount);
        written += difference(&before, &fs::read(&disk).unwrap()).len() as u64 * 4096;
        let blocks = difference(&parent.bytes, &fs::read(&disk).unwrap());
        parent.write(&work.join("upper"), &blocks);
        let tag = format!("g{generation}");
        pushed += parent.commit(&work.join("upper"), &tag).unwrap().new_bytes;
        parent = Generation::open(&layout, &tag, work);
        let now = listed(&parent);
        assert!(now.packs <= 12, "{} packs in generation {generation}", now.packs);
        most.packs = most.packs.max(now.packs);
        let (dead, live) = (now.pack_bytes - now.live_bytes, now.live_bytes);
        assert!(now.pack_bytes < 3 * live, "generation {generation}: {dead} bytes are dead, {live} are not");
    }
    assert!(most.packs > 5, "packs were put together: there were never more than {}", most.packs);

    // What is in the last one, and how a build of the same tree would list it.
    let last = listed(&parent);
    let image = work.join("last.img");
    fs::write(&image, &parent.bytes).unwrap();
    ext4::fsck(&image);
    let tree = |image: &Path| {
        let mount = ext4::Mount::new(image, &work.join("mounted"), "ro");
        let found = nodes::read(mount.dir());
        let fresh = request(&format!("dir:{}", mount.dir().display()), &format!("oci:{}:f", work.join("f").display()));
        run(&fresh).unwrap();
        found
    };
    assert_same(&tree(&disk), &tree(&image), Compare::Everything);
    let fresh = listed(&Generation::open(&work.join("f"), "f", work));
    println!(
        "written {written}, pushed {pushed}; packs {} (most {}), {} of {} bytes live; index {} (fresh {}), chunks {} (fresh {}), plain {} (fresh {})",
        last.packs,
        most.packs,
        last.live_bytes,
        last.pack_bytes,
        last.index_bytes,
        fresh.index_bytes,
        last.chunks,
        fresh.chunks,
        last.plain_bytes,
        fresh.plain_bytes
    );
    assert!(last.plain_bytes < 4 * fresh.plain_bytes, "{} of {}", last.plain_bytes, fresh.plain_bytes);
    assert!(last.chunks < 3 * fresh.chunks + 20, "{} chunks, a build has {}", last.chunks, fresh.chunks);
    assert!(last.index_bytes < 4 * fresh.index_bytes, "{} bytes, a build has {}", last.index_bytes, fresh.index_bytes);
    assert!(pushed < 3 * written, "{pushed} bytes were pushed, {written} written");
    // The history has the latest commits only, and the layers their entries.
    let config = Layout(layout.clone());
    let manifest = config.json(&parent.digest);
    let config = config.json(manifest["config"]["digest"].as_str().unwrap());
    let history = config["history"].as_array().unwrap();
    assert_eq!(history.len(), GENERATIONS + manifest["layers"].as_array().unwrap().len());
}
