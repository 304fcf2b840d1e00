//! How a daemon starts, stops, dies and is found again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/image.rs"]
mod image;
#[path = "common/program.rs"]
mod program;
#[path = "common/random.rs"]
mod random;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use program::{Node, same_files, wait_until};
use random::Random;
use serde_json::{Value, json};

#[test]
fn a_verb_starts_a_daemon_and_says_so_and_two_at_once_start_one() {
    let node = Node::new();
    let verbs: Vec<Child> = (0..4)
        .map(|_| {
            let mut command = node.command(&["pool", "stat", "--json"]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let outputs: Vec<_> = verbs.into_iter().map(|verb| verb.wait_with_output().unwrap()).collect();
    let mut starts = 0;
    for output in &outputs {
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap();
        starts += usize::from(String::from_utf8_lossy(&output.stderr).contains("starting one"));
    }
    assert_eq!(starts, 1);
    assert_eq!(node.log().matches("serving").count(), 1, "{}", node.log());
    let mode = |path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(node.run_dir()), 0o700);

    node.done(&["stop"]);
    assert!(node.pid().is_none() && !node.run_dir().join("control.sock").exists());
    let quiet = node.run(&["pool", "stat", "--quiet"]);
    assert!(quiet.status.success() && quiet.stderr.is_empty(), "{quiet:?}");
}

#[test]
fn a_second_daemon_is_refused_and_told_of_the_first() {
    let node = Node::new();
    node.done(&["pool", "stat"]);
    let pid = node.pid().unwrap().to_string();
    let error = node.fails(1, &["daemon"]);
    assert!(error.contains(&pid) && error.contains("run directory"), "{error}");
    // Another run directory, the same root: it is the pool that has an owner.
    let other = node.path().join("other-run");
    for verb in [&["daemon"][..], &["pool", "stat"]] {
        let mut arguments = vec!["--run", other.to_str().unwrap()];
        arguments.extend(verb);
        let mut command = Command::new(env!("CARGO_BIN_EXE_firstread"));
        let output = command.arg("--root").arg(node.root()).args(&arguments).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains(&pid) && error.contains("pool"), "{error}");
    }
    // Another root, the same run directory.
    let root = node.path().join("other-root");
    let output = node.command(&["list", "--root", root.to_str().unwrap()]).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(error.contains(node.root().to_str().unwrap()), "{error}");
}

#[test]
fn a_signal_detaches_what_is_free_and_ends_the_daemon() {
    let node = Node::new();
    let image = image::make(node.path(), "app", 4);
    let attached = node.json(&["attach", &image.reference()]);
    node.kill("-TERM");
    let name = attached["device"].as_str().unwrap().trim_start_matches("/dev/").to_owned();
    assert!(!fs::exists(format!("/sys/block/{name}/loop")).unwrap());
    assert!(!node.run_dir().join("control.sock").exists());
    assert_eq!(node.json(&["list"]), json!([]));
    assert!(node.log().contains("SIGTERM"), "{}", node.log());
}

#[test]
fn a_daemon_that_is_forced_to_stop_leaves_a_mount_that_can_be_undone() {
    let node = Node::new();
    let image = image::make(node.path(), "app", 4);
    for force in [true, false] {
        let dir = node.mount_point("mnt");
        node.done(&["mount", &image.reference(), dir.to_str().unwrap()]);
        if force {
            let stopped = node.json(&["stop", "--force"]);
            assert_eq!(stopped["stopping"], true);
            assert!(stopped["in_use"][0].as_str().unwrap().contains(dir.to_str().unwrap()), "{stopped}");
            assert!(node.pid().is_none());
        } else {
            node.kill("-TERM");
        }
        assert!(node.log().contains("get errors from now on"), "{}", node.log());
        node.done(&["umount", dir.to_str().unwrap()]);
        assert!(node.fails(1, &["umount", dir.to_str().unwrap()]).contains("no image"));
    }
    node.done(&["pool", "stat"]);
    assert_eq!(node.json(&["list"]), json!([]));
}

#[test]
fn without_privileges_an_image_is_exported() {
    let node = Node::new();
    let image = image::make(node.path(), "app", 4);
    let home = node.path().join("home");
    fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(65534), Some(65534)).unwrap();
    fs::set_permissions(node.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = node.path().join("firstread");
    fs::copy(env!("CARGO_BIN_EXE_firstread"), &program).unwrap();
    let verb = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"]);
        command.arg(&program).args(arguments);
        command.arg("--root").arg(home.join("root")).arg("--run").arg(home.join("run")).env("HOME", &home);
        command
    };
    let socket = format!("unix:{}", home.join("nbd.sock").display());
    let mut export = verb(&["export", &image.reference(), "--nbd", &socket]).stdout(Stdio::piped()).spawn().unwrap();
    let mut uri = String::new();
    BufReader::new(export.stdout.as_mut().unwrap()).read_line(&mut uri).unwrap();
    let size = Command::new("nbdinfo").args(["--size", uri.trim_end()]).output().unwrap();
    let stopped = verb(&["stop"]).output().unwrap();
    export.wait().unwrap();
    assert!(stopped.status.success(), "{stopped:?}");
    let expected = fs::metadata(&image.disk).unwrap().len();
    assert_eq!(String::from_utf8_lossy(&size.stdout).trim_end(), expected.to_string());
}

#[test]
fn a_killed_daemon_leaves_a_lost_device_until_it_is_unmounted() {
    let node = Node::new();
    let image = image::make(node.path(), "app", 6);
    let (dir, free) = (node.mount_point("mnt"), node.mount_point("free"));
    let dir_text = dir.to_str().unwrap();
    node.done(&["mount", &image.reference(), dir_text]);
    node.done(&["attach", &image.reference()]);
    node.kill("-9");
    node.done(&["pool", "stat"]);
    let list = node.json(&["list"]);
    assert_eq!(list.as_array().unwrap().len(), 1, "the one that nobody held is gone: {list}");
    assert_eq!((&list[0]["id"], &list[0]["state"]), (&json!("app-1"), &json!("lost")));
    assert!(node.log().contains("app-2"), "it was reported: {}", node.log());
    assert_eq!(node.json(&["status", "app-1"])["state"], "lost");
    assert!(node.fails(1, &["detach", "app-1"]).contains(dir_text));
    // A new device of the image is served all the same, under another id.
    assert_eq!(node.json(&["mount", &image.reference(), free.to_str().unwrap()])["id"], "app-2");
    same_files(&image.tree, &free);
    node.done(&["umount", dir_text]);
    node.done(&["umount", free.to_str().unwrap()]);
    assert_eq!(node.json(&["list"]), json!([]));

    // Without a daemon a lost device is unmounted as well.
    node.done(&["mount", &image.reference(), dir_text]);
    node.kill("-9");
    node.done(&["umount", dir_text]);
    assert!(node.pid().is_none());
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(dir_text));
    node.done(&["pool", "stat"]);
    assert_eq!(node.json(&["list"]), json!([]));
}

#[test]
fn a_daemon_that_is_killed_while_reading_serves_nothing_wrong_afterwards() {
    let node = Node::new();
    let image = image::make(node.path(), "app", 40);
    let mut random = Random(7);
    for round in 0..8 {
        let dir = node.mount_point(&format!("mnt{round}"));
        let dir_text = dir.to_str().unwrap();
        node.done(&["mount", &image.reference(), dir_text]);
        let pid = node.pid().unwrap().to_string();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut read = 0;
                for number in 0..40 {
                    let path = format!("d{}/f{number}", number % 4);
                    // What is read at all is right; after the kill it is an error.
                    if let Ok(bytes) = fs::read(dir.join(&path)) {
                        assert!(bytes == fs::read(image.tree.join(&path)).unwrap(), "{path} differs");
                        read += 1;
                    }
                }
                read
            });
            std::thread::sleep(Duration::from_millis(random.below(60)));
            assert!(Command::new("kill").args(["-9", &pid]).status().unwrap().success());
            reader.join().unwrap()
        });
        node.done(&["umount", dir_text]);
    }
    let dir = node.mount_point("mnt");
    node.done(&["mount", &image.reference(), dir.to_str().unwrap()]);
    same_files(&image.tree, &dir);
    let stat = node.json(&["pool", "stat"]);
    assert_eq!(stat["quarantined"], 0, "a kill is no power loss: {stat}");
    node.done(&["umount", dir.to_str().unwrap()]);
    assert_eq!(node.json(&["list"]), json!([]));
}

#[test]
fn a_daemon_with_one_mounted_image_is_small() {
    let node = Node::new();
    let image = image::make(node.path(), "app", 40);
    let dir = node.mount_point("mnt");
    node.done(&["mount", &image.reference(), dir.to_str().unwrap()]);
    same_files(&image.tree, &dir);
    let resident = node.resident_kib();
    println!("resident: {resident} KiB");
    assert!(resident <= 40 << 10, "{resident} KiB");
}

/// Starts an export; its process and the address it printed.
fn export(node: &Node, arguments: &[&str]) -> (Child, String) {
    let mut all = vec!["export"];
    all.extend(arguments);
    let mut child = node.command(&all).stdout(Stdio::piped()).spawn().unwrap();
    let mut uri = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut uri).unwrap();
    (child, uri.trim_end().to_owned())
}

#[test]
fn an_export_is_the_disk_and_ends_with_its_verb() {
    let node = Node::new();
    let image = image::make(node.path(), "app", 12);
    let socket = node.path().join("nbd.sock");
    let unix = format!("unix:{}", socket.display());
    let disk = fs::read(&image.disk).unwrap();
    for signal in ["-INT", "-TERM", "-KILL"] {
        let (mut verb, uri) = export(&node, &[&image.reference(), "--nbd", &unix]);
        assert_eq!(uri, format!("nbd+unix:///?socket={}", socket.display()));
        let copy = node.path().join("copy");
        let copied = Command::new("nbdcopy").arg(&uri).arg(&copy).status().unwrap();
        assert!(copied.success());
        assert!(fs::read(&copy).unwrap() == disk, "the export differs");
        fs::remove_file(copy).unwrap();
        assert!(Command::new("kill").args([signal, &verb.id().to_string()]).status().unwrap().success());
        assert_eq!(verb.wait().unwrap().success(), signal != "-KILL");
        if signal == "-KILL" {
            wait_until("the socket is removed", || !socket.exists());
        }
        assert!(!socket.exists(), "{signal}");
    }
    let (mut verb, uri) = export(&node, &[&image.reference(), "--nbd", "tcp:127.0.0.1:0"]);
    assert!(uri.starts_with("nbd://127.0.0.1:"), "{uri}");
    assert!(Command::new("nbdinfo").args(["--size", &uri]).output().unwrap().status.success());
    node.done(&["stop"]);
    assert_eq!(verb.wait().unwrap().code(), Some(1), "the daemon left first");
}

/// Speaks to the socket as no verb would.
fn raw(node: &Node, lines: &[u8]) -> String {
    let mut stream = UnixStream::connect(node.run_dir().join("control.sock")).unwrap();
    // The daemon may close the connection before it has read everything.
    let _ = stream.write_all(lines);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).unwrap()
}

#[test]
fn what_is_no_request_is_answered_with_an_error_and_harms_nobody() {
    let node = Node::new();
    node.done(&["pool", "stat"]);
    for (line, expected) in [
        ("nonsense\n", "no request"),
        ("{}\n", "no request"),
        ("{\"version\":2,\"id\":5,\"call\":\"hello\"}\n", "version"),
        ("{\"version\":1,\"id\":5,\"call\":\"dance\"}\n", "dance"),
        ("{\"version\":1,\"id\":5,\"call\":\"attach\"}\n", "reference"),
    ] {
        let answer = raw(&node, line.as_bytes());
        assert!(answer.contains("\"error\"") && answer.contains(expected), "{line}: {answer}");
    }
    let many = raw(&node, "{\"version\":1,\"id\":5,\"call\":\"list\",\"later\":{}}\n".repeat(500).as_bytes());
    assert_eq!(many.lines().count(), 500);
    assert!(raw(&node, &vec![b'x'; 5 << 20]).contains("longer"));
    // Half a request, then nothing.
    assert_eq!(raw(&node, b"{\"version\":1"), "");
    node.done(&["pool", "stat"]);
    assert_eq!(node.log().matches("serving").count(), 1, "it is the same daemon");
}

#[test]
fn a_client_that_dies_leaves_no_device() {
    let node = Node::new();
    let image = image::make(node.path(), "app", 4);
    node.done(&["pool", "stat"]);
    let request = |lifetime: &str| {
        let reference = image.reference();
        let request = json!({"version": 1, "id": 1, "call": "attach", "reference": reference, "transport": "auto", "lifetime": lifetime});
        format!("{request}\n")
    };
    let mut stream = UnixStream::connect(node.run_dir().join("control.sock")).unwrap();
    stream.write_all(request("tentative").as_bytes()).unwrap();
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer).unwrap();
    assert!(answer.contains("app-1"), "{answer}");
    assert_eq!(node.json(&["list"]).as_array().unwrap().len(), 1);
    drop(stream);
    wait_until("the device is detached", || node.json(&["list"]) == json!([]));
    // It left before it had its answer: the daemon sees both at once.
    let pid = node.pid().unwrap().to_string();
    let signal = |name: &str| assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    signal("-STOP");
    let mut stream = UnixStream::connect(node.run_dir().join("control.sock")).unwrap();
    stream.write_all(request("permanent").as_bytes()).unwrap();
    drop(stream);
    signal("-CONT");
    wait_until("the device came", || node.log().matches("is /dev/loop").count() == 2);
    wait_until("the device is detached", || node.json(&["list"]) == json!([]));
}

#[test]
fn a_damaged_record_costs_one_device() {
    let node = Node::new();
    let devices = node.root().join("devices");
    fs::create_dir_all(&devices).unwrap();
    fs::write(devices.join("app-1.json"), "{").unwrap();
    node.done(&["pool", "stat"]);
    assert!(node.log().contains("app-1.json is damaged"), "{}", node.log());
    assert_eq!(node.json(&["list"]), json!([]));
}
