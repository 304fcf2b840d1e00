//! What programs write to a terminal.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::{Command, Stdio};

/// What `command`, in its directory, writes to a terminal when it runs on one.
pub fn on_a_terminal(command: &Command) -> String {
    let words: Vec<&str> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(|word| word.to_str().unwrap()).collect();
    let mut on_one = Command::new("script");
    on_one.args(["--quiet", "--return", "--flush", "--command", &words.join(" "), "/dev/null"]);
    if let Some(dir) = command.get_current_dir() {
        on_one.current_dir(dir);
    }
    let output = on_one.env("TERM", "xterm").env("COLUMNS", "200").stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stdout).unwrap()
}

/// Every one of `words` is in `text`.
pub fn contains(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text}");
    }
}
