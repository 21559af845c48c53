//! How every simulation by seed is run: which seeds, on two threads, and what is printed when one fails.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

/// The number in an environment variable, if it is set.
pub fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// The one seed that variable `one` names, else as many as `many` says, else `default`.
pub fn seeds(one: &str, many: &str, default: u64) -> Range<u64> {
    match setting(one) {
        Some(seed) => seed..seed + 1,
        None => 0..setting(many).unwrap_or(default),
    }
}

/// Runs `life` for every seed; when it panics, prints what `replay` says of the seed and passes the panic on.
pub fn for_each_seed(seeds: &Range<u64>, replay: impl Fn(u64) -> String + Sync, life: impl Fn(u64) + Sync) {
    let next = AtomicU64::new(seeds.start);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| life(seed))) {
                        eprintln!("replay: {}", replay(seed));
                        resume_unwind(panic);
                    }
                }
            });
        }
    });
}
