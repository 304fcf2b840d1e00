//! What the library logs, by thread.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::RefCell;
use std::io::Write;
use std::sync::Once;

thread_local! {
    static EVENTS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Collects the events of each thread. One subscriber for all: those of single threads race for what tracing caches.
pub fn collect_events() {
    struct Lines;
    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            EVENTS.with_borrow_mut(|events| events.write(bytes))
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    static ONCE: Once = Once::new();
    ONCE.call_once(|| tracing_subscriber::fmt().with_writer(|| Lines).with_ansi(false).init());
}

/// Runs `work` and returns its warnings and infos on this thread.
pub fn events(work: impl FnOnce()) -> Vec<String> {
    collect_events();
    EVENTS.take();
    work();
    String::from_utf8(EVENTS.take()).unwrap().lines().map(str::to_owned).collect()
}
