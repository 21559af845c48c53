//! `Threads`: who computes which task of one call.
//!
//! The caller works too, beside the pool's workers, and all take tasks from one counter; which thread computes a task never
//! changes its result. A decode step is some two hundred calls of tens of microseconds, so a worker spins for a while before it
//! sleeps, and a caller that is done shuts the job instead of waiting for workers that are still waking up:
//!
//! ```text
//!   state   generation (odd: a job is open) << 8 | workers inside
//!   caller  open --- tasks --- shut --- until nobody is inside
//!   worker      enter, while it is open ------ leave
//! ```
//!
//! Owns the workers; knows no op. A second caller at the same time computes alone.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Multiply-adds below which a call stays on the caller's thread: a few microseconds, as long as a cache line takes to go
/// to another core and back some times.
pub(crate) const SMALL_WORK: usize = 1 << 16;
/// Multiply-adds that are worth waking a worker that sleeps.
const WAKING_WORK: usize = 1 << 19;
/// How long a worker spins for the next job: the serial part between two products of a layer takes less.
const SPIN: Duration = Duration::from_micros(200);
/// How long it goes on looking, and lets others have the processor, before it sleeps: what lies between two decode steps
/// takes less. Waking took up to two of the fifteen milliseconds of such a step, on a virtual machine.
const LINGER: Duration = Duration::from_millis(5);
/// Looks at `state` between two looks at the clock.
const SPINS: usize = 64;
const GENERATION: u64 = 1 << 8;

/// A fixed number of threads, the caller's included.
#[derive(Debug)]
pub struct Threads {
    /// Absent when the caller works alone.
    pool: Option<Pool>,
    count: usize,
}

impl Threads {
    /// `count` threads, 1 to 256. Panics when the system refuses to start them.
    pub fn new(count: usize) -> Threads {
        let count = count.clamp(1, GENERATION as usize);
        Threads { pool: (count > 1).then(|| Pool::start(count - 1)), count }
    }

    /// Threads, the caller's included.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Runs `task(0..tasks)`, each once, in any order; `work` is the multiply-adds of all. Panics when a task does.
    pub(crate) fn run(&self, tasks: usize, work: usize, task: impl Fn(usize) + Sync) {
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
        match &self.pool {
            Some(pool) if tasks > 1 && work >= SMALL_WORK => pool.run(&drain, work >= WAKING_WORK),
            _ => drain(),
        }
    }
}

type Job<'a> = &'a (dyn Fn() + Sync);

#[derive(Debug)]
struct Pool {
    shared: Arc<Shared>,
    /// Held by the caller whose job is open.
    caller: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: AtomicU64,
    /// Written by the caller between two jobs, read by workers that are inside one.
    job: UnsafeCell<Option<Job<'static>>>,
    panicked: AtomicBool,
    stopped: AtomicBool,
    sleepers: AtomicUsize,
    /// What sleepers wait with; guards nothing but the moment between the last look and the sleep.
    asleep: Mutex<()>,
    awake: Condvar,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("state", &self.state).finish_non_exhaustive()
    }
}

// SAFETY: `job` is written only while no job is open and nobody is inside, by the one holder of `Pool::caller`; it is read
// only inside.
#[allow(unsafe_code)]
unsafe impl Sync for Shared {}
// SAFETY: a `Job` is `Sync`, so a reference to it may go to another thread.
#[allow(unsafe_code)]
unsafe impl Send for Shared {}

impl Pool {
    fn start(count: usize) -> Pool {
        let shared = Arc::<Shared>::default();
        let worker = |index: usize| {
            let shared = shared.clone();
            let named = std::thread::Builder::new().name(format!("kvlite-cpu-{index}"));
            named.spawn(move || shared.work()).expect("the system starts threads")
        };
        Pool { workers: (1..=count).map(worker).collect(), shared, caller: Mutex::new(()) }
    }

    /// Runs `job` on this thread and on every worker that comes in time.
    fn run(&self, job: Job<'_>, wakes: bool) {
        let _caller = match self.caller.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(guard)) => guard.into_inner(),
            Err(TryLockError::WouldBlock) => return job(),
        };
        self.shared.panicked.store(false, Ordering::Relaxed); // where both sides of the last job panicked
        let open = self.shared.open(job, wakes);
        job();
        drop(open);
        if self.shared.panicked.load(Ordering::Relaxed) {
            panic!("a task panicked on another thread");
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        self.shared.wake();
        for worker in self.workers.drain(..) {
            // A worker catches what its tasks throw.
            let _ = worker.join();
        }
    }
}

/// A job that workers may enter; dropping it shuts it and waits for those inside, also when the caller's part panics.
struct Open<'a>(&'a Shared);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_add(GENERATION, Ordering::SeqCst);
        let mut patience = Patience::default();
        while !self.0.state.load(Ordering::Acquire).is_multiple_of(GENERATION) {
            if patience.waited() >= SPIN {
                std::thread::yield_now();
            }
        }
    }
}

impl Shared {
    fn open(&self, job: Job<'_>, wakes: bool) -> Open<'_> {
        // SAFETY: nobody is inside (`Open::drop` waited, and the caller's lock is held), so nobody reads; and nobody will
        // use the job after `Open::drop`, which the caller reaches before `job` goes.
        #[allow(unsafe_code)]
        unsafe {
            *self.job.get() = Some(std::mem::transmute::<Job<'_>, Job<'static>>(job));
        }
        self.state.fetch_add(GENERATION, Ordering::SeqCst);
        if wakes && self.sleepers.load(Ordering::SeqCst) > 0 {
            self.wake();
        }
        Open(self)
    }

    fn wake(&self) {
        drop(self.asleep.lock().unwrap_or_else(PoisonError::into_inner));
        self.awake.notify_all();
    }

    /// A worker's life.
    fn work(&self) {
        let mut last = 0;
        while let Some(generation) = self.enter(last) {
            last = generation;
            // SAFETY: inside a job nobody writes it.
            #[allow(unsafe_code)]
            let job = unsafe { *self.job.get() }.expect("an open job was written");
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for a job other than generation `last`, enters it and returns its generation; None at the end.
    fn enter(&self, last: u64) -> Option<u64> {
        let mut patience = Patience::default();
        loop {
            if let Some(generation) = self.try_enter(last) {
                return Some(generation);
            }
            if self.stopped.load(Ordering::Relaxed) {
                return None;
            }
            let waited = patience.waited();
            if waited >= SPIN + LINGER {
                self.sleep(last);
                patience = Patience::default();
            } else if waited >= SPIN {
                std::thread::yield_now();
            }
        }
    }

    fn try_enter(&self, last: u64) -> Option<u64> {
        let state = self.open_state(last)?;
        // Fails when the job is shut meanwhile, or when another worker enters: then the next look tries again.
        let entered = self.state.compare_exchange(state, state + 1, Ordering::Acquire, Ordering::Relaxed);
        entered.ok().map(|state| state / GENERATION)
    }

    /// The state now, if a job other than `last` is open.
    fn open_state(&self, last: u64) -> Option<u64> {
        let state = self.state.load(Ordering::SeqCst);
        let generation = state / GENERATION;
        (generation % 2 == 1 && generation != last).then_some(state)
    }

    /// Until somebody wakes it; at once where a job other than `last` is open.
    fn sleep(&self, last: u64) {
        let guard = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        if self.open_state(last).is_none() && !self.stopped.load(Ordering::SeqCst) {
            // It may also wake for nothing: the caller of `sleep` looks again.
            drop(self.awake.wait(guard));
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// How long somebody has waited.
#[derive(Default)]
struct Patience {
    spins: usize,
    since: Option<Instant>,
    waited: Duration,
}

impl Patience {
    /// Looked up now and then while it is less than `SPIN`: the clock costs as much as some looks.
    fn waited(&mut self) -> Duration {
        std::hint::spin_loop();
        self.spins += 1;
        if self.waited >= SPIN || self.spins.is_multiple_of(SPINS) {
            self.waited = self.since.get_or_insert_with(Instant::now).elapsed();
        }
        self.waited
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum_of(threads: &Threads, tasks: usize, work: usize) -> usize {
        let total = AtomicUsize::new(0);
        threads.run(tasks, work, |task| {
            total.fetch_add(task + 1, Ordering::Relaxed);
        });
        total.into_inner()
    }

    #[test]
    fn every_task_runs_once_whatever_the_threads_and_the_pause_between_jobs() {
        for count in [1, 2, 3, 8] {
            let threads = Threads::new(count);
            for round in 0..2000 {
                let (tasks, work) = (round % 17, [1, SMALL_WORK, WAKING_WORK][round % 3]);
                assert_eq!(sum_of(&threads, tasks, work), tasks * (tasks + 1) / 2, "{count} threads, round {round}");
                if round % 500 == 0 {
                    // Workers fall asleep on the way: the next job finds some asleep, some falling asleep.
                    std::thread::sleep(SPIN);
                }
            }
        }
    }

    #[test]
    fn a_worker_takes_part_even_after_it_slept() {
        let threads = Threads::new(2);
        for _ in 0..3 {
            // Both tasks wait for each other, so two threads must compute them.
            let barrier = std::sync::Barrier::new(2);
            threads.run(2, WAKING_WORK, |_| {
                barrier.wait();
            });
            let shared = &threads.pool.as_ref().expect("two threads").shared;
            while shared.sleepers.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn callers_at_the_same_time_each_get_their_own_tasks() {
        let threads = Threads::new(3);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        assert_eq!(sum_of(&threads, 9, WAKING_WORK), 45);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_serves_on() {
        let threads = Threads::new(2);
        for _ in 0..20 {
            let run = || threads.run(8, WAKING_WORK, |task| assert!(task != 5, "task 5"));
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
            assert_eq!(sum_of(&threads, 8, WAKING_WORK), 36);
        }
    }
}
