//! One command from an image to the profile of its start: the image's program runs in a container, and is gone with all
//! that belongs to it whatever happens. A real registry, an image of a Debian package.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/program.rs"]
mod program;
#[path = "common/registry.rs"]
mod registry;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use firstread::profile::{Place, Profile};
use program::{Node, wait_until};
use registry::Registry;

/// The image `small` of scripts/image, packed into the registry.
struct Testbed {
    node: Node,
    registry: Registry,
}

impl Testbed {
    fn new() -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/image");
        let made = Command::new(script).arg("small").stderr(Stdio::inherit()).output().unwrap();
        assert!(made.status.success(), "scripts/image small");
        let dir = PathBuf::from(String::from_utf8(made.stdout).unwrap().trim());
        let bed = Self { node: Node::new(), registry: Registry::start() };
        let source = format!("oci:{}:latest", dir.join("layout").display());
        bed.node.done(&["build", &source, &bed.reference(), "--level", "1", "--quiet"]);
        bed
    }

    fn reference(&self) -> String {
        format!("{}/small:packed", self.registry.host())
    }

    fn file(&self) -> PathBuf {
        self.node.path().join("profile")
    }

    fn arguments(&self, more: &[&str]) -> Vec<String> {
        let file = self.file();
        let fixed = ["record", &self.reference(), "-o", file.to_str().unwrap()].map(str::to_owned);
        fixed.into_iter().chain(more.iter().map(|text| (*text).to_owned())).collect()
    }

    /// Records; the answer and the profile.
    fn record(&self, more: &[&str]) -> (serde_json::Value, Profile) {
        let arguments = self.arguments(more);
        let answer = self.node.json(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        self.nothing_is_left();
        (answer, Profile::from_text(&fs::read_to_string(self.file()).unwrap()).unwrap())
    }

    /// Records in vain; what it says.
    fn fails(&self, more: &[&str]) -> String {
        let arguments = self.arguments(more);
        let said = self.node.fails(1, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
        self.nothing_is_left();
        assert!(!self.file().exists(), "a profile was written");
        said
    }

    /// Starts a recording that does not end by itself, and waits until its program runs.
    fn start(&self) -> Child {
        let arguments =
            self.arguments(&["--ready-when", "never", "--", "sh", "-c", "echo started-31415; exec sleep 31415"]);
        let child = self
            .node
            .command(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_until("the program runs", || !processes(&["sleep", "31415"]).is_empty());
        child
    }

    fn nothing_is_left(&self) {
        wait_until("no device is left", || self.node.json(&["list"]).as_array().unwrap().is_empty());
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(
            !mounts.contains("firstread-record") && !mounts.contains(self.node.path().to_str().unwrap()),
            "{mounts}"
        );
        let inside = self.node.run_dir().display().to_string();
        assert!(processes(&["record-inside"]).iter().all(|line| !line.contains(&inside)));
        assert!(processes(&["sleep", "31415"]).is_empty());
    }
}

/// The command lines of processes that have all of these arguments.
fn processes(arguments: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line).into_owned();
        let all: Vec<&str> = line.split('\0').collect();
        if arguments.iter().all(|argument| all.contains(argument)) {
            found.push(all.join(" "));
        }
    }
    found
}

fn paths(profile: &Profile) -> BTreeSet<String> {
    let named = profile.runs.iter().filter_map(|run| match &run.place {
        Place::Named { path, .. } => Some(String::from_utf8_lossy(path).into_owned()),
        _ => None,
    });
    named.collect()
}

fn has(profile: &Profile, path: &str) -> bool {
    paths(profile).contains(path)
}

#[test]
fn a_start_is_recorded_up_to_its_readiness() {
    let bed = Testbed::new();

    // Until the program ends.
    let (answer, profile) =
        bed.record(&["--ready-when", "EXIT", "--", "cat", "/usr/lib/many/entry-00007", "/var/lib/data/size-65536"]);
    for path in ["/bin/busybox", "/usr/lib/many/entry-00007", "/var/lib/data/size-65536"] {
        assert!(has(&profile, path), "{path} is not in {:?}", paths(&profile));
    }
    assert!(!has(&profile, "/usr/lib/random"));
    assert!(profile.recording.ready.is_some() && profile.recording.complete);
    assert_eq!(answer["ready_when"], "its end");
    assert!(answer["ready_seconds"].as_f64().unwrap() > 0.0);
    assert!(answer["bytes"].as_u64().unwrap() >= 65536, "{answer}");

    // Until a text is written, in two pieces; what is read later is not in the profile.
    let script = "cat /usr/lib/many/entry-00011; printf 'all is re'; sleep 0.1; echo ady; sleep 5; cat /var/lib/data/size-262144";
    let (_, profile) = bed.record(&["--ready-when", "is ready", "--", "sh", "-c", script]);
    assert!(
        has(&profile, "/usr/lib/many/entry-00011") && !has(&profile, "/var/lib/data/size-262144"),
        "{:?}",
        paths(&profile)
    );

    // Until a port is listened on, in a network of the program's own.
    let (answer, profile) =
        bed.record(&["--ready-when", "18080", "--", "busybox", "httpd", "-f", "-p", "127.0.0.1:18080"]);
    assert_eq!(answer["ready_when"], "port 18080");
    assert!(has(&profile, "/bin/busybox"));

    // However long it takes, the read-ahead is that of the recording: a page that is not read is not in the profile.
    let script = "sleep 5; dd if=/usr/lib/random of=/dev/null bs=4096 count=1";
    let (answer, profile) = bed.record(&["--ready-when", "EXIT", "--read-ahead", "0", "--", "sh", "-c", script]);
    let of_random = |place: &Place| matches!(place, Place::Named { path, .. } if path == b"/usr/lib/random");
    let blocks: u32 = profile.runs.iter().filter(|run| of_random(&run.place)).map(|run| run.blocks).sum();
    assert_eq!((blocks, answer["read_ahead_kb"].as_u64()), (1, Some(0)));

    // The image's own command: a shell, whose standard input is at its end.
    let (answer, _) = bed.record(&[]);
    assert_eq!(answer["ready_when"], "its end");
}

#[test]
fn a_program_that_never_gets_ready_is_told_of_and_leaves_nothing() {
    let bed = Testbed::new();
    let said = bed.fails(&["--ready-when", "ready", "--", "sh", "-c", "echo 'no database'; exit 3"]);
    assert!(said.contains("status 3") && said.contains("| no database"), "{said}");
    let said = bed.fails(&["--ready-when", "ready", "--timeout", "1", "--", "busybox", "sleep", "1000"]);
    assert!(said.contains("not ready in time"), "{said}");
    let said = bed.fails(&["--", "/no/such/program"]);
    assert!(said.contains("/no/such/program") && said.contains("No such file"), "{said}");
    let said = bed.fails(&["--user", "nobody-knows", "--", "true"]);
    assert!(said.contains("no user \"nobody-knows\""), "{said}");
    let said = bed.node.fails(2, &["record", &bed.reference(), "-o", "/x", "--ready-when", "70000"]);
    assert!(said.contains("no port"), "{said}");
}

#[test]
fn however_the_verb_ends_its_program_ends_too() {
    let bed = Testbed::new();
    for signal in ["-INT", "-TERM", "-KILL"] {
        let mut child = bed.start();
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        let status = child.wait().unwrap();
        assert!(!status.success(), "{signal}");
        wait_until("the program is gone", || processes(&["sleep", "31415"]).is_empty());
        bed.nothing_is_left();
        assert!(!bed.file().exists());
    }
}

#[test]
fn the_program_is_contained() {
    let bed = Testbed::new();
    let own = |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).unwrap().display().to_string();
    // Each line says what a program of the image, as root, must not be able to do or see.
    let script = format!(
        "set -u
        for ns in mnt pid net uts ipc cgroup; do readlink /proc/self/ns/$ns; done >/tmp/ns
        for ns in '{}' '{}' '{}' '{}' '{}' '{}'; do grep -qF \"$ns\" /tmp/ns && echo BAD shares $ns; done
        [ $$ = 1 ] || echo BAD not process 1
        echo x >/proc/sys/kernel/domainname && echo BAD writes sysctl
        echo b >/proc/sysrq-trigger && echo BAD sysrq
        mount -t tmpfs t /tmp && echo BAD mounts
        mknod /tmp/disk b 259 0 && echo BAD makes devices
        hostname evil && echo BAD names the host
        [ -s /proc/kcore ] && echo BAD sees memory
        ls /sys/class/net >/tmp/net; grep -v '^lo$' /tmp/net && echo BAD network
        ls -a / /run /tmp >/tmp/ls; grep -q firstread /tmp/ls && echo BAD sees the host
        grep -q '^NoNewPrivs:.*1' /proc/self/status || echo BAD may gain privileges
        grep '^CapBnd:' /proc/self/status
        echo written >/etc/hostname && cat /etc/hostname
        echo x >/dev/null && head -c 4 /dev/urandom >/tmp/random && [ -d /dev/pts ] && [ -d /dev/shm ] && echo devices
        true",
        own("mnt"),
        own("pid"),
        own("net"),
        own("uts"),
        own("ipc"),
        own("cgroup"),
    );
    let arguments = bed.arguments(&["--", "sh", "-c", &script]);
    let output = bed.node.run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(!said.contains("BAD"), "{said}");
    assert!(said.contains("written\n") && said.contains("devices\n"), "{said}");
    let bounding = said.lines().find_map(|line| line.strip_prefix("CapBnd:")).unwrap().trim();
    let bounding = u64::from_str_radix(bounding, 16).unwrap();
    assert_eq!(bounding & (1 << 21 | 1 << 27 | 1 << 16), 0, "SYS_ADMIN, MKNOD or SYS_MODULE is in {bounding:x}");

    // As the user that was asked for, in its directory, with its variables.
    let script = "id -u; id -g; pwd; echo $GREETING; echo $HOME; [ -w /etc/hostname ] && echo BAD writes; true";
    let arguments = bed.arguments(&["--user", "nobody", "-e", "GREETING=hello there", "--", "sh", "-c", script]);
    let output = bed.node.run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.contains("65534\n65534\n/\nhello there\n/\n") && !said.contains("BAD"),
        "{said}"
    );
    bed.nothing_is_left();
}

#[test]
fn an_image_that_lies_about_its_directories_is_refused() {
    let bed = Testbed::new();
    let tree = bed.node.path().join("tree");
    fs::create_dir_all(tree.join("bin")).unwrap();
    std::os::unix::fs::symlink("/etc", tree.join("proc")).unwrap();
    let layout = format!("oci:{}:1", bed.node.path().join("layout").display());
    bed.node.done(&["build", &format!("dir:{}", tree.display()), &layout, "--quiet"]);
    let before = fs::read_dir("/etc").unwrap().count();
    let output = Path::new("/tmp").join(format!("unwritten-{}", std::process::id()));
    let said = bed.node.fails(1, &["record", &layout, "-o", output.to_str().unwrap(), "--", "/bin/x"]);
    assert!(said.contains("/proc is no directory"), "{said}");
    assert_eq!(fs::read_dir("/etc").unwrap().count(), before);
    assert!(!output.exists());
    bed.nothing_is_left();
}
