//! Gates: how many requests one host gets at a time, and whose come first.
//!
//! All images of a host share its gate. A request waits at the gate by its priority; what nobody waits for leaves places
//! free for what somebody does, and work in the background stands back while readers wait, though not for ever.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Priority;

/// How long work in the background stands back for readers before it insists on one request.
const STAND_BACK: Duration = Duration::from_secs(2);
/// How long readers are remembered: the next one will probably come soon.
const RECENT: Duration = Duration::from_secs(2);
/// How long no reader has waited before work in the background goes on beside readers that are remembered: one who reads
/// miss after miss has the link alone.
const LULL: Duration = Duration::from_millis(20);
/// How often a request that waits looks whether a reader has come to wait for it.
const LOOK: Duration = Duration::from_millis(20);

/// The gates of all hosts.
pub(super) struct Gates {
    limit: usize,
    gates: Mutex<HashMap<String, Weak<Gate>>>,
}

impl Gates {
    /// Gates that let `limit` requests a host pass.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit: limit.max(2), gates: Mutex::default() }
    }

    /// The gate of `host`.
    pub(super) fn of(&self, host: &str) -> Arc<Gate> {
        let mut gates = self.gates.lock();
        if let Some(gate) = gates.get(host).and_then(Weak::upgrade) {
            return gate;
        }
        gates.retain(|_, gate| gate.strong_count() > 0);
        let gate = Arc::new(Gate { limit: self.limit, state: Mutex::default() });
        gates.insert(host.to_owned(), Arc::downgrade(&gate));
        gate
    }
}

/// The gate of one host.
pub(super) struct Gate {
    limit: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Requests that passed and have not ended, by priority.
    running: [usize; 4],
    waiting: BTreeMap<(Priority, u64), Waiter>,
    serial: u64,
    /// When a reader last waited.
    demanded: Option<Instant>,
}

struct Waiter {
    sender: oneshot::Sender<Pass>,
    insists: bool,
}

/// The right to one request. Dropped, it goes to the next that waits.
pub(super) struct Pass {
    gate: Arc<Gate>,
    priority: Priority,
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut state = self.gate.state.lock();
        if let Some(running) = state.running.get_mut(self.priority as usize) {
            *running = running.saturating_sub(1);
        }
        if self.priority == Priority::Demand {
            state.demanded = Some(Instant::now());
        }
        drop(state);
        self.gate.wake();
    }
}

impl State {
    fn total(&self) -> usize {
        self.running.iter().sum()
    }

    fn demand(&self) -> bool {
        self.running[Priority::Demand as usize] > 0
            || self.waiting.first_key_value().is_some_and(|((priority, _), _)| *priority == Priority::Demand)
    }

    fn recent(&self) -> bool {
        self.demand() || self.demanded.is_some_and(|at| at.elapsed() < RECENT)
    }

    /// Whether no reader waits, and none did a moment ago.
    fn lull(&self) -> bool {
        !self.demand() && self.demanded.is_none_or(|at| at.elapsed() >= LULL)
    }

    fn admits(&self, priority: Priority, insists: bool, limit: usize) -> bool {
        let background = self.running[Priority::Background as usize];
        match priority {
            Priority::Demand => self.total() < limit,
            Priority::Startup | Priority::ReadAhead => self.total() + 1 < limit,
            Priority::Background if insists => background == 0 && self.total() < limit,
            Priority::Background if !self.lull() => false,
            Priority::Background if self.recent() => background == 0,
            Priority::Background => background < limit / 2 && self.total() + 1 < limit,
        }
    }
}

impl Gate {
    /// Waits for a place. `wanted` is the priority as it is now: it rises when a reader comes to wait.
    pub(super) async fn enter(self: &Arc<Self>, wanted: impl Fn() -> Priority) -> Pass {
        let mut insists = false;
        loop {
            let priority = wanted();
            let (key, mut receiver) = {
                let mut state = self.state.lock();
                if state.admits(priority, insists, self.limit) && !state.overtaken(priority) {
                    state.running[priority as usize] += 1;
                    return Pass { gate: Arc::clone(self), priority };
                }
                let (sender, receiver) = oneshot::channel();
                state.serial += 1;
                let key = (priority, state.serial);
                state.waiting.insert(key, Waiter { sender, insists });
                (key, receiver)
            };
            let _leaving = Leaving { gate: self, key };
            let since = Instant::now();
            loop {
                match tokio::time::timeout(LOOK, &mut receiver).await {
                    Ok(Ok(pass)) => return pass,
                    Ok(Err(_)) => break,
                    Err(_) if wanted() < priority => break,
                    Err(_) if !insists && priority == Priority::Background && since.elapsed() >= STAND_BACK => {
                        insists = true;
                        break;
                    }
                    // What it waits for may be time alone: that readers were here recently.
                    Err(_) if priority == Priority::Background => self.wake(),
                    Err(_) => {}
                }
            }
        }
    }

    /// A place, if there is one right now.
    pub(super) fn try_enter(self: &Arc<Self>, priority: Priority) -> Option<Pass> {
        let mut state = self.state.lock();
        let free = state.admits(priority, false, self.limit) && !state.overtaken(priority);
        if free {
            state.running[priority as usize] += 1;
        }
        drop(state);
        free.then(|| Pass { gate: Arc::clone(self), priority })
    }

    /// Whether a reader waits at this moment.
    pub(super) fn in_demand(&self) -> bool {
        self.state.lock().demand()
    }

    /// Whether readers were here a moment ago.
    pub(super) fn recently_in_demand(&self) -> bool {
        self.state.lock().recent()
    }

    /// Lets in who may pass now.
    fn wake(self: &Arc<Self>) {
        loop {
            let mut state = self.state.lock();
            let next = state
                .waiting
                .iter()
                .find(|((priority, _), waiter)| state.admits(*priority, waiter.insists, self.limit))
                .map(|(key, _)| *key);
            let Some((key, waiter)) = next.and_then(|key| Some((key, state.waiting.remove(&key)?))) else { return };
            state.running[key.0 as usize] += 1;
            drop(state);
            // If nobody takes it any more, it is dropped here or in the channel, which wakes the next one.
            drop(waiter.sender.send(Pass { gate: Arc::clone(self), priority: key.0 }));
        }
    }
}

impl State {
    /// Whether others of the same priority, or a higher one, wait already.
    fn overtaken(&self, priority: Priority) -> bool {
        self.waiting.keys().next().is_some_and(|(first, _)| *first <= priority && priority != Priority::Background)
    }
}

/// Takes a waiter out however its wait ends.
struct Leaving<'a> {
    gate: &'a Arc<Gate>,
    key: (Priority, u64),
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        let waiter = self.gate.state.lock().waiting.remove(&self.key);
        if waiter.is_some() {
            drop(waiter);
            // It may have stood before others.
            self.gate.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    async fn soon<T>(work: impl Future<Output = T>) -> Option<T> {
        tokio::time::timeout(Duration::from_millis(100), work).await.ok()
    }

    #[tokio::test]
    async fn the_most_urgent_pass_first_and_the_limit_holds() {
        let gates = Gates::new(3);
        let gate = gates.of("host");
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(soon(gate.enter(|| Priority::Demand)).await.unwrap());
        }
        assert!(soon(gate.enter(|| Priority::Demand)).await.is_none());
        assert!(soon(gates.of("other").enter(|| Priority::Demand)).await.is_some(), "hosts have gates of their own");
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut waiting = Vec::new();
        for priority in [Priority::Background, Priority::ReadAhead, Priority::Startup, Priority::Demand] {
            let (gate, order) = (Arc::clone(&gate), Arc::clone(&order));
            waiting.push(tokio::spawn(async move {
                let pass = gate.enter(|| priority).await;
                order.lock().push(priority);
                tokio::time::sleep(Duration::from_millis(10)).await;
                drop(pass);
            }));
            tokio::task::yield_now().await;
        }
        held.clear();
        for task in waiting {
            task.await.unwrap();
        }
        let order = order.lock().clone();
        assert_eq!(order, [Priority::Demand, Priority::Startup, Priority::ReadAhead, Priority::Background]);
        assert_eq!(gate.state.lock().total(), 0);
    }

    #[tokio::test]
    async fn the_background_stands_back_but_not_for_ever() {
        let gate = Gates::new(8).of("host");
        let many: Vec<_> = [(); 4].map(|()| gate.try_enter(Priority::Background)).into();
        assert!(many.iter().all(Option::is_some) && gate.try_enter(Priority::Background).is_none());
        drop(many);
        let reader = gate.enter(|| Priority::Demand).await;
        assert!(soon(gate.enter(|| Priority::Background)).await.is_none());
        let started = Instant::now();
        let background = gate.enter(|| Priority::Background).await;
        assert!(started.elapsed() >= STAND_BACK);
        assert!(soon(gate.enter(|| Priority::Background)).await.is_none());
        drop((reader, background));
        assert!(gate.try_enter(Priority::Background).is_none(), "the next reader comes at once, perhaps");
        // One at a time while readers are remembered.
        let first = soon(gate.enter(|| Priority::Background)).await.unwrap();
        assert!(gate.try_enter(Priority::Background).is_none());
        tokio::time::sleep(RECENT).await;
        assert!(gate.try_enter(Priority::Background).is_some());
        drop(first);
    }

    #[tokio::test]
    async fn who_waits_rises_with_its_reader_and_who_leaves_blocks_nobody() {
        let gate = Gates::new(2).of("host");
        let held = (gate.enter(|| Priority::Demand).await, gate.enter(|| Priority::Demand).await);
        let urgent = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let rising = tokio::spawn({
            let (gate, urgent) = (Arc::clone(&gate), Arc::clone(&urgent));
            async move {
                let priority = || match urgent.load(std::sync::atomic::Ordering::Relaxed) {
                    true => Priority::Demand,
                    false => Priority::Background,
                };
                gate.enter(priority).await.priority
            }
        });
        assert!(soon(gate.enter(|| Priority::Demand)).await.is_none());
        urgent.store(true, std::sync::atomic::Ordering::Relaxed);
        tokio::time::sleep(LOOK * 2).await;
        drop(held.0);
        assert_eq!(rising.await.unwrap(), Priority::Demand);
        assert!(soon(gate.enter(|| Priority::Demand)).await.is_some());
        assert!(gate.state.lock().waiting.is_empty());
    }
}
