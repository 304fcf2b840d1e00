//! Has several that want to flush share one sync, without a lock that is held meanwhile.

use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;

use crate::error::Result;

/// Rounds of syncing, one at a time.
#[derive(Default)]
pub(super) struct Flusher {
    state: Mutex<Rounds>,
    ended: Condvar,
    told: Notify,
}

#[derive(Default)]
struct Rounds {
    /// Rounds that began.
    began: u64,
    running: bool,
    /// How the latest round that ended, ended: its number and result.
    last: Option<(u64, Result<()>)>,
}

/// What somebody who flushes does next.
enum Turn {
    /// Nothing: a round that began late enough has ended.
    Ended(Result<()>),
    /// Wait.
    Wait,
    /// Run this round.
    Run(u64),
}

impl Rounds {
    fn turn(&mut self, enough: u64) -> Turn {
        match &self.last {
            Some((round, result)) if *round >= enough => Turn::Ended(result.clone()),
            _ if self.running => Turn::Wait,
            _ => {
                self.began += 1;
                self.running = true;
                Turn::Run(self.began)
            }
        }
    }
}

impl Flusher {
    /// Runs `sync`, or waits for a run of somebody else that begins after this call.
    pub fn flush(&self, sync: impl Fn() -> Result<()>) -> Result<()> {
        let mut state = self.state.lock();
        let enough = state.began + 1;
        loop {
            match state.turn(enough) {
                Turn::Ended(result) => return result,
                Turn::Wait => self.ended.wait(&mut state),
                Turn::Run(round) => {
                    drop(state);
                    self.end(round, sync());
                    state = self.state.lock();
                }
            }
        }
    }

    /// The same without blocking: `start` has somebody sync who then calls [`end`](Self::end).
    pub async fn flush_soon(&self, start: impl Fn(u64)) -> Result<()> {
        let enough = self.state.lock().began + 1;
        loop {
            let mut told = std::pin::pin!(self.told.notified());
            // From here on no end is missed.
            told.as_mut().enable();
            let turn = self.state.lock().turn(enough);
            match turn {
                Turn::Ended(result) => return result,
                Turn::Run(round) => start(round),
                Turn::Wait => {}
            }
            told.await;
        }
    }

    /// A round has ended.
    pub fn end(&self, round: u64, result: Result<()>) {
        let mut state = self.state.lock();
        state.running = false;
        state.last = Some((round, result));
        drop(state);
        self.ended.notify_all();
        self.told.notify_waiters();
    }
}
