//! Hostile input ends with a clear error, soon, and without memory for what it claims.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use firstread::build::{Limits, Progress, Request, Silent, build};
use tempfile::TempDir;

/// A header with a right checksum.
fn header(path: &[u8], kind: u8, size: u64, link: &str) -> [u8; 512] {
    let mut header = [0; 512];
    header[..path.len()].copy_from_slice(path);
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    if size < 1 << 33 {
        header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    } else {
        header[124] = 0x80;
        header[128..136].copy_from_slice(&size.to_be_bytes());
    }
    header[136..148].copy_from_slice(b"00000000000\0");
    header[156] = kind;
    header[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header[257..265].copy_from_slice(b"ustar\x0000");
    sum(&mut header);
    header
}

fn sum(header: &mut [u8; 512]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let mut data = Vec::new();
    for (key, value) in records {
        let bare = key.len() + value.len() + 3;
        let mut length = bare + 1;
        while format!("{length}").len() + bare != length {
            length += 1;
        }
        data.extend(format!("{length} {key}={value}\n").bytes());
    }
    let mut all = header(b"pax", b'x', data.len() as u64, "").to_vec();
    data.resize(data.len().next_multiple_of(512), 0);
    all.extend(data);
    all
}

/// The error that a tar ends in.
fn refused(tar: &[u8], limits: Limits) -> String {
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("hostile.tar");
    std::fs::write(&path, tar).unwrap();
    refused_file(&path, limits)
}

fn refused_file(path: &Path, limits: Limits) -> String {
    let temp = TempDir::new().unwrap();
    let started = Instant::now();
    let mut request = Request::new(
        format!("tar:{}", path.display()).parse().unwrap(),
        format!("oci:{}:t", temp.path().join("out").display()).parse().unwrap(),
    );
    request.limits = limits;
    let progress: Arc<dyn Progress> = Arc::new(Silent);
    let error = build(&request, &progress).map(|report| panic!("{report:?}")).unwrap_err().to_string();
    assert!(started.elapsed() < Duration::from_secs(30), "{error} after {:?}", started.elapsed());
    error
}

fn contains(error: &str, words: &[&str]) {
    assert!(words.iter().all(|word| error.contains(word)), "{words:?} in {error}");
}

#[test]
fn sizes_beyond_all_bounds() {
    let limits = Limits::default();
    contains(&refused(&header(b"big", b'0', 1 << 60, ""), limits), &["big", "beyond the limit"]);
    contains(&refused(&header(b"big", b'0', u64::MAX / 2, ""), limits), &["big", "beyond the limit"]);
    contains(&refused(&header(b"name", b'L', 1 << 40, ""), limits), &["extended header", "limit"]);
    contains(&refused(&header(b"short", b'0', 1 << 30, ""), limits), &["short", "ends"]);
    let mut sparse = pax(&[
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", "holes"),
        ("GNU.sparse.realsize", "9223372036854775807"),
    ]);
    sparse.extend(header(b"x", b'0', 512, ""));
    sparse.extend(b"1\n0\n0\n");
    sparse.resize(sparse.len().next_multiple_of(512), 0);
    contains(&refused(&sparse, limits), &["holes", "beyond the limit"]);
}

#[test]
fn a_layer_that_inflates_without_end_stops_at_the_limit() {
    let temp = TempDir::new().unwrap();
    let limits = Limits { plain_bytes: 64 << 20, ..Limits::default() };
    for (name, encode) in [("zstd", true), ("gzip", false)] {
        let path = temp.path().join(name);
        let file = std::fs::File::create(&path).unwrap();
        // Many small files: no single one is beyond a limit.
        let mut entry = header(b"zeros", b'0', 1 << 20, "").to_vec();
        entry.resize(512 + (1 << 20), 0);
        let write = |out: &mut dyn Write| (0..200).for_each(|_| out.write_all(&entry).unwrap());
        if encode {
            let mut encoder = zstd::Encoder::new(file, 1).unwrap();
            write(&mut encoder);
            encoder.finish().unwrap();
        } else {
            let mut encoder = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
            write(&mut encoder);
            encoder.finish().unwrap();
        }
        contains(&refused_file(&path, limits), &["zeros", "limit"]);
    }
}

#[test]
fn too_many_entries_and_names() {
    let many: Vec<u8> = (0..1000).flat_map(|number| header(format!("file-{number}").as_bytes(), b'0', 0, "")).collect();
    contains(&refused(&many, Limits { entries: 500, ..Limits::default() }), &["500 entries"]);
    contains(&refused(&many, Limits { name_bytes: 5000, ..Limits::default() }), &["5000 bytes of names"]);
    let parents = header("d/".repeat(49).as_bytes(), b'5', 0, "");
    contains(&refused(&parents, Limits { entries: 20, ..Limits::default() }), &["20 entries"]);
    contains(&refused(&parents, Limits { depth: 20, ..Limits::default() }), &["20 directories"]);
}

#[test]
fn broken_structure_is_named() {
    let limits = Limits::default();
    contains(&refused(b"not a tar at all, but longer than nothing", limits), &["ends in the middle"]);
    let mut wrong = header(b"file", b'0', 0, "");
    wrong[0] = b'F';
    contains(&refused(&wrong, limits), &["checksum"]);
    contains(&refused(&header(b"odd", b'Q', 0, ""), limits), &["odd", "'Q'"]);
    contains(&refused(&header(b"link", b'1', 0, "nowhere"), limits), &["link", "nowhere"]);
    contains(&refused(&header(b"link", b'2', 0, ""), limits), &["link", "target"]);
    let mut device = header(b"dev", b'3', 0, "");
    device[329..337].copy_from_slice(b"7777777\0");
    device[337..345].copy_from_slice(b"7777777\0");
    sum(&mut device);
    contains(&refused(&device, limits), &["dev", "out of range"]);
    let mut negative = header(b"file", b'0', 0, "");
    negative[124..136].fill(0xff);
    sum(&mut negative);
    contains(&refused(&negative, limits), &["negative size"]);
    let mut long = pax(&[("path", &format!("a/{}", "n".repeat(300)))]);
    long.extend(header(b"x", b'0', 0, ""));
    contains(&refused(&long, limits), &["255 bytes"]);
}

#[test]
fn loops_of_links_end() {
    let mut tar = [header(b"a", b'2', 0, "b"), header(b"b", b'2', 0, "a/../a")].concat();
    tar.extend(header(b"a/file", b'0', 0, ""));
    contains(&refused(&tar, Limits::default()), &["a/file", "loop"]);
    // Each link doubles the length of the path.
    let mut tar = Vec::new();
    for number in 0..60 {
        let next = number + 1;
        tar.extend(header(format!("l{number}").as_bytes(), b'2', 0, &format!("l{next}/../l{next}/..")));
    }
    tar.extend(header(b"l60", b'5', 0, ""));
    tar.extend(header(b"l0/file", b'0', 0, ""));
    contains(&refused(&tar, Limits::default()), &["l0/file", "links"]);
}

#[test]
fn sparse_maps_that_lie() {
    let map = |map: &str, data: usize| {
        let mut tar = pax(&[("GNU.sparse.size", "100000"), ("GNU.sparse.name", "holes"), ("GNU.sparse.map", map)]);
        tar.extend(header(b"x", b'0', data as u64, ""));
        tar.resize(tar.len() + data.next_multiple_of(512), 7);
        refused(&tar, Limits { segments: 4, ..Limits::default() })
    };
    contains(&map("0,10,5,10", 20), &["holes", "overlap"]);
    contains(&map("99999,10", 10), &["holes", "beyond the file"]);
    contains(&map("18446744073709551615,10", 10), &["holes", "beyond the file"]);
    contains(&map("0,10", 20), &["holes", "account"]);
    contains(&map("0,1,2,1,4,1,6,1,8,1", 5), &["malformed"]);
}

/// A million empty files are an ordinary image: they end in time, and each costs some hundred bytes of memory.
#[test]
fn a_million_empty_files() {
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("million.tar.zst");
    let mut encoder = zstd::Encoder::new(std::fs::File::create(&path).unwrap(), 1).unwrap();
    for number in 0..1_000_000 {
        encoder.write_all(&header(format!("{}/{number}", number / 5000).as_bytes(), b'0', 0, "")).unwrap();
    }
    encoder.write_all(&[0; 1024]).unwrap();
    encoder.finish().unwrap();
    let output = std::process::Command::new("time")
        .args(["-f", "%M %U %S", env!("CARGO_BIN_EXE_firstread-build"), "build", "--quiet", "--json"])
        .arg(format!("tar:{}", path.display()))
        .arg(format!("oci:{}:t", temp.path().join("layout").display()))
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("\"inodes\":1000"), "all of them are there");
    let used: Vec<f64> = stderr.split_whitespace().map(|number| number.parse().unwrap()).collect();
    assert!(used[0] < f64::from(400 << 10), "{} KiB", used[0]);
    // Of the processors, not by the clock: others may be busy too.
    assert!(used[1] + used[2] < 120.0, "{} s", used[1] + used[2]);
}

/// Cut off or changed anywhere, a layer ends in an error or in what is left of its meaning, and soon: nothing spins.
#[test]
fn a_corrupt_layer_does_not_make_the_unpacker_spin() {
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("corrupt");
    let mut tar = Vec::new();
    for number in 0..40u32 {
        let size = 3000 + 200 * number;
        tar.extend(header(format!("dir/file-{number}").as_bytes(), b'0', u64::from(size), ""));
        let end = tar.len() + size as usize;
        tar.extend((0..size).flat_map(|at| (at * at + number).to_le_bytes()).take(size as usize));
        tar.resize(end.next_multiple_of(512), 0);
    }
    tar.resize(tar.len() + 1024, 0);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    let forms = [tar.clone(), gzip.finish().unwrap(), zstd::encode_all(&tar[..], 3).unwrap()];
    let mut refused = 0;
    for sound in &forms {
        let places = (0..40).map(|number| sound.len() * number / 40);
        for (at, cut) in places.flat_map(|at| [(at, true), (at, false)]) {
            let mut bytes = sound.clone();
            if cut {
                bytes.truncate(at)
            } else {
                bytes[at] ^= 0x41
            }
            std::fs::write(&path, &bytes).unwrap();
            let request = Request::new(
                format!("tar:{}", path.display()).parse().unwrap(),
                format!("oci:{}:t", temp.path().join("out").display()).parse().unwrap(),
            );
            let progress: Arc<dyn Progress> = Arc::new(Silent);
            let started = Instant::now();
            refused += usize::from(build(&request, &progress).is_err());
            assert!(started.elapsed() < Duration::from_secs(30), "at {at}, cut: {cut}");
        }
    }
    // A changed byte of a file's content in a plain tar is content.
    assert!(refused > 120, "{refused} of 240");
}
