//! Long work that a client follows: the call that starts it also asks how far it is.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;
use serde_json::Value;

use super::control::{JobState, Kind, Problem};

/// How far a piece of work is, in bytes.
#[derive(Debug, Default)]
pub struct Job {
    /// Done so far.
    pub done: AtomicU64,
    /// In all.
    pub total: AtomicU64,
    outcome: Mutex<Option<Result<Value, Problem>>>,
}

/// The work under way, and what nobody asked for yet.
#[derive(Debug, Default)]
pub struct Jobs(Mutex<HashMap<String, Arc<Job>>>);

impl Jobs {
    /// Starts the work called `name` unless it is under way, and says how far it is. When it has ended the answer is
    /// given once, and the name is free again.
    ///
    /// # Errors
    /// The work's.
    pub fn start_or_ask<F>(&self, name: &str, work: impl FnOnce(Arc<Job>) -> F) -> Result<JobState, Problem>
    where
        F: Future<Output = Result<Value, Problem>> + Send + 'static,
    {
        let mut jobs = self.0.lock();
        let job = match jobs.get(name) {
            Some(job) => Arc::clone(job),
            None => {
                let job = Arc::new(Job::default());
                jobs.insert(name.to_owned(), Arc::clone(&job));
                let (work, ends) = (tokio::spawn(work(Arc::clone(&job))), Arc::clone(&job));
                drop(tokio::spawn(async move {
                    let outcome = work.await;
                    let bug = |error| Err(Problem::new(Kind::Failed, format!("a bug: {error}")));
                    *ends.outcome.lock() = Some(outcome.unwrap_or_else(bug));
                }));
                job
            }
        };
        let (done, total) = (job.done.load(Relaxed), job.total.load(Relaxed));
        let outcome = job.outcome.lock().take();
        if outcome.is_some() {
            jobs.remove(name);
        }
        Ok(JobState { done, total, answer: outcome.transpose()? })
    }
}
