//! A wait, and where its time went.

use serde::Serialize;

use crate::daemon::trace::{FetchTrace, WaitTrace};

/// A read that waited for a source; times in seconds from attach, the parts of the wait in seconds.
#[derive(Debug, Serialize)]
pub(super) struct Wait {
    asked: f64,
    done: f64,
    chunk: u32,
    offset: u64,
    len: u32,
    file: Option<usize>,
    queue: f64,
    network: f64,
    line_up: f64,
    decompress: f64,
    verify: f64,
    other: f64,
    by: &'static str,
    source: String,
}

/// Where the time of a wait went: to the fetch that ended it.
pub(super) fn parts(wait: &WaitTrace, file: Option<usize>, fetches: &[&FetchTrace], sources: &[String]) -> Wait {
    const SLACK: f64 = 0.001;
    let ending =
        fetches.iter().rev().find(|fetch| fetch.verified <= wait.done + SLACK && fetch.verified >= wait.asked - SLACK);
    let clip = |from: f64, to: f64| (to.min(wait.done) - from.max(wait.asked)).max(0.0);
    let all = wait.done - wait.asked;
    let (mut queue, mut network, mut line_up, mut decompress, mut verify) = (0.0, 0.0, 0.0, 0.0, 0.0);
    let (mut by, mut source) = ("", String::new());
    if let Some(fetch) = ending {
        queue = clip(wait.asked, fetch.requested);
        network = clip(fetch.requested, fetch.arrived);
        line_up = clip(fetch.arrived, fetch.started);
        decompress = clip(fetch.started, fetch.inflated);
        verify = clip(fetch.inflated, fetch.verified);
        by = match fetch.why.as_str() {
            "demand" => "asked for because it was missed",
            "startup" => "came with the start-up stream",
            "read_ahead" => "asked for ahead of its reader",
            _ => "asked for by the background fill",
        };
        source = sources.get(fetch.source).cloned().unwrap_or_default();
    }
    let other = (all - queue - network - line_up - decompress - verify).max(0.0);
    Wait {
        asked: wait.asked,
        done: wait.done,
        chunk: wait.chunk,
        offset: wait.offset,
        len: wait.len,
        file,
        queue,
        network,
        line_up,
        decompress,
        verify,
        other,
        by,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_wait_make_up_the_whole() {
        let fetch = FetchTrace {
            chunk: 1,
            stored: 10,
            plain: 20,
            why: "demand".to_owned(),
            source: 0,
            asked: 1.0,
            requested: 1.5,
            arrived: 2.5,
            started: 2.6,
            inflated: 2.7,
            verified: 2.9,
        };
        let sum = |wait: &Wait| wait.queue + wait.network + wait.line_up + wait.decompress + wait.verify + wait.other;
        let wait = WaitTrace { asked: 1.0, done: 3.0, chunk: 1, offset: 0, len: 4096 };
        let whole = parts(&wait, None, &[&fetch], &["here".to_owned()]);
        assert!(
            (whole.queue - 0.5).abs() < 1e-9 && (whole.network - 1.0).abs() < 1e-9 && (whole.other - 0.1).abs() < 1e-9
        );
        assert_eq!((whole.by, whole.source.as_str()), ("asked for because it was missed", "here"));
        assert!((sum(&whole) - 2.0).abs() < 1e-9);
        // One that came late to a fetch on its way, and one whose fetch is forgotten.
        let late = parts(&WaitTrace { asked: 2.0, ..wait }, None, &[&fetch], &[]);
        assert!(late.queue == 0.0 && (late.network - 0.5).abs() < 1e-9 && (sum(&late) - 1.0).abs() < 1e-9);
        let unknown = parts(&wait, None, &[], &[]);
        assert!((unknown.other - 2.0).abs() < 1e-9);
    }
}
