//! `Threads`: who computes which task of one call.
//!
//! The caller works too, beside the pool's threads, and takes tasks from one counter; which thread computes a task never
//! changes its result. Owns the pool; knows no op. Work below `SMALL_WORK` is not worth waking a thread.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Multiply-adds below which a call stays on the caller's thread (some 40 us; waking another costs as much on a busy machine).
pub(crate) const SMALL_WORK: usize = 1 << 19;

/// A fixed number of threads, the caller's included.
#[derive(Debug)]
pub struct Threads {
    /// Absent when the caller works alone.
    pool: Option<rayon::ThreadPool>,
    count: usize,
}

impl Threads {
    /// `count` threads (at least 1). Panics when the system refuses to start them.
    pub fn new(count: usize) -> Threads {
        let count = count.max(1);
        let pool = (count > 1).then(|| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(count - 1)
                .thread_name(|i| format!("kvlite-cpu-{}", i + 1))
                .build()
                .expect("the system starts threads")
        });
        Threads { pool, count }
    }

    /// Threads, the caller's included.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Runs `task(0..tasks)`, each once, in any order; `work` is the multiply-adds of all.
    pub(crate) fn run(&self, tasks: usize, work: usize, task: impl Fn(usize) + Sync) {
        let helpers = self.count.min(tasks).saturating_sub(1);
        match &self.pool {
            Some(pool) if helpers > 0 && work >= SMALL_WORK => {
                let next = AtomicUsize::new(0);
                let drain = || {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= tasks {
                            break;
                        }
                        task(index);
                    }
                };
                pool.in_place_scope(|scope| {
                    for _ in 0..helpers {
                        scope.spawn(|_| drain());
                    }
                    drain();
                });
            }
            _ => (0..tasks).for_each(task),
        }
    }
}
