//! A start is explained on a page of its own, which shows what happened and does nothing that an image tells it to.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/program.rs"]
mod program;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use firstread::build::{Request, Silent, build};
use program::Node;
use serde_json::Value;

/// A file name that would do something where names are markup. No `/`, which a name can't have.
const HOSTILE: &str =
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'<\\script>{{DATA}}&amp;'`${alert(1)}";

/// A directory and a file whose path would end the data and begin an element.
const ENDING: (&str, &str) = ("<", "script><img src=x onerror=\"document.title='owned'\">");

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let step = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(step).collect()
}

fn image(node: &Node) -> String {
    let tree = node.path().join("tree");
    fs::create_dir_all(tree.join("app")).unwrap();
    for number in 0..12 {
        fs::write(tree.join(format!("app/part{number}")), bytes(number, 200_000 + number as usize * 50_000)).unwrap();
    }
    fs::write(tree.join("app").join(HOSTILE), bytes(99, 300_000)).unwrap();
    fs::create_dir_all(tree.join("app").join(ENDING.0)).unwrap();
    fs::write(tree.join("app").join(ENDING.0).join(ENDING.1), bytes(77, 100_000)).unwrap();
    let reference = format!("oci:{}:1", node.path().join("layout").display());
    let request = Request::new(format!("dir:{}", tree.display()).parse().unwrap(), reference.parse().unwrap());
    let silent: std::sync::Arc<dyn firstread::build::Progress> = std::sync::Arc::new(Silent);
    build(&request, &silent).unwrap();
    reference
}

/// What a browser makes of the page: its document after the script has run, and a picture in `file`.
fn browse(page: &Path, dir: &Path, scheme: u8) -> (String, Vec<u8>) {
    let picture = dir.join(format!("page-{scheme}.png"));
    let run = |more: &[String]| {
        let profile = tempfile::TempDir::new().unwrap();
        let output = Command::new("chromium")
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg(format!("--blink-settings=preferredColorScheme={scheme}"))
            .args(more)
            .arg(format!("file://{}", page.display()))
            .stdin(Stdio::null())
            .output()
            .expect("chromium runs (Debian package chromium)");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let document = run(&["--dump-dom".to_owned()]);
    run(&[
        format!("--screenshot={}", picture.display()),
        "--window-size=1240,2600".to_owned(),
        "--hide-scrollbars".to_owned(),
    ]);
    (document, fs::read(&picture).unwrap())
}

fn file_of<'a>(report: &'a Value, entry: &Value) -> &'a str {
    entry["file"].as_u64().map_or("", |number| report["files"][number as usize].as_str().unwrap())
}

#[test]
fn a_start_is_explained_and_hostile_names_are_text() {
    let node = Node::new();
    let reference = image(&node);
    let dir = node.mount_point("mnt");
    node.done(&["mount", &reference, dir.to_str().unwrap()]);
    for name in ["part3", HOSTILE, "part7"] {
        fs::read(dir.join("app").join(name)).unwrap();
    }
    fs::read(dir.join("app").join(ENDING.0).join(ENDING.1)).unwrap();
    node.done(&["ready", dir.to_str().unwrap()]);
    // Behind the start: no part of it.
    fs::read(dir.join("app/part9")).unwrap();

    let page = node.path().join("start.html");
    let report = node.json(&["report", dir.to_str().unwrap(), "-o", page.to_str().unwrap()]);
    let start = &report["start"];
    let seconds = start["seconds"].as_f64().unwrap();
    assert!(start["ready"] == true && seconds > 0.0, "{start}");
    assert!(start["waited"].as_f64().unwrap() > 0.0 && start["waited"].as_f64().unwrap() <= seconds, "{start}");
    assert!(start["floor"].as_f64().unwrap() > 0.0 && start["floor"].as_f64().unwrap() <= seconds, "{start}");
    assert!(start["fetched_bytes"].as_u64().unwrap() >= 1_000_000, "random bytes do not shrink: {start}");
    let requests = start["requests"].as_u64().unwrap();
    assert!((1..=start["waits"].as_u64().unwrap() + 20).contains(&requests), "{start}");

    // Every wait is explained whole, and belongs to what was read.
    let waits = report["waits"].as_array().unwrap();
    assert!(!waits.is_empty());
    for wait in waits {
        let part = |name: &str| wait[name].as_f64().unwrap();
        let parts: f64 =
            ["queue", "network", "line_up", "decompress", "verify", "other"].iter().map(|name| part(name)).sum();
        assert!((part("done") - part("asked") - parts).abs() < 1e-6, "{wait}");
        assert!(part("asked") <= seconds);
    }
    let slowest =
        waits.iter().filter(|wait| wait["network"].as_f64().unwrap() > 0.0 && wait["verify"].as_f64().unwrap() > 0.0);
    assert!(slowest.count() > 0, "no wait has a fetch that explains it");
    let by_file = report["by_file"].as_array().unwrap();
    let read = |wanted: &str| {
        by_file.iter().find(|row| file_of(&report, row) == wanted).map_or(0, |row| row["read"].as_u64().unwrap())
    };
    assert_eq!(
        read(&format!("/app/{}", HOSTILE.replace('\\', "\\x5c"))).max(read(&format!("/app/{HOSTILE}"))),
        303_104
    );
    assert_eq!((read("/app/part3"), read("/app/part7"), read("/app/part9")), (352_256, 552_960, 0));
    let cells = report["map"]["cells"].as_str().unwrap();
    assert!(["r", "d", "."].iter().all(|letter| cells.contains(letter)), "{cells}");
    assert!(
        cells.len() as u64 * report["map"]["cell_bytes"].as_u64().unwrap() >= report["device_bytes"].as_u64().unwrap()
    );

    // In a browser, light and dark.
    let mut pictures = Vec::new();
    for scheme in [1, 0] {
        let (document, picture) = browse(&page, node.path(), scheme);
        assert!(document.contains("data-drawn=\"yes\""), "the script did not run to its end");
        assert!(
            document.contains("<title>layout-1: the start explained</title>")
                || document.contains(": the start explained</title>")
        );
        assert!(!document.contains("owned</title>"), "a file's name was run");
        assert!(document.contains("/app/&lt;img src=x onerror="), "the name is not shown");
        assert!(document.contains("/app/&lt;/script&gt;&lt;img src=x"), "the path is not shown");
        assert!(!document.contains("<img"), "a file's name became an element");
        assert!(document.contains("until the program was ready"));
        pictures.push(picture);
    }
    assert!(pictures[0] != pictures[1], "light and dark look the same");
    if let Some(keep) = std::env::var_os("FIRSTREAD_KEEP_PAGES") {
        fs::copy(&page, Path::new(&keep).join("start.html")).unwrap();
        fs::write(Path::new(&keep).join("light.png"), &pictures[0]).unwrap();
        fs::write(Path::new(&keep).join("dark.png"), &pictures[1]).unwrap();
    }
    node.done(&["umount", dir.to_str().unwrap()]);
}

#[test]
fn a_report_says_what_it_can_of_a_device_that_nobody_read() {
    let node = Node::new();
    let reference = image(&node);
    let attached = node.json(&["attach", &reference]);
    let id = attached["id"].as_str().unwrap();
    let report = node.json(&["report", id]);
    assert_eq!(report["start"]["ready"], false);
    assert!(report["by_file"].as_array().unwrap().iter().all(|row| file_of(&report, row).is_empty()));
    let said = node.fails(2, &["report", id]);
    assert!(said.contains("--output"), "{said}");
    let said = node.fails(1, &["report", id, "-o", "/no/such/directory/page.html"]);
    assert!(said.contains("/no/such/directory/page.html"), "{said}");
    let said = node.fails(1, &["report", "nothing-1", "-o", "/x.html"]);
    assert!(said.contains("nothing-1"), "{said}");
    node.done(&["detach", id]);
}
