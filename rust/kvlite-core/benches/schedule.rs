//! One step of the scheduler in decode steady state, answered at once. `cargo bench -p kvlite-core --bench schedule`
//!
//! Physics: per running sequence a step reads three or four cache lines of state (sequence, stop ids, its last block), appends
//! one id, and writes 12 integers into the arena; every 16th step it also takes a block and puts one into the tree, about
//! 100 ns. From level-2 cache that is 20-30 ns per sequence, so 1 us at 32 and 7 us at 256; at 1,024 the state no longer fits
//! level 2. `_queued`: the same behind 1,024 requests that no row is free for, ordered by work: such a step asks the cache for
//! nobody, so it costs what it costs without a queue. Targets: <= 5 us at 32, <= 25 us at 256, no allocation. The time includes writing the fake answers.
//! Checked first: every sequence decodes in every step, and the audit passes. The last line is one JSON object.

#[path = "../tests/common/counting.rs"]
mod counting;
#[path = "../tests/common/steady.rs"]
mod steady;

use std::time::{Duration, Instant};

use counting::{Counting, allocations};
use criterion::Criterion;
use kvlite_core::PolicyKind;
use steady::Steady;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Median time of a step in ns, as criterion sampled it; none when its filter leaves this one out.
fn step_ns(criterion: &mut Criterion, name: &str, fresh: impl Fn() -> Steady) -> Option<f64> {
    let mut steady = fresh();
    steady.check();
    let mut samples = Vec::new();
    criterion.bench_function(name, |bencher| {
        bencher.iter_custom(|iterations| {
            let mut total = Duration::ZERO;
            let mut left = iterations;
            while left > 0 {
                if steady.steps_left() == 0 {
                    steady.check();
                    steady = fresh();
                }
                let batch = left.min(u64::from(steady.steps_left()));
                let start = Instant::now();
                for _ in 0..batch {
                    steady.step();
                }
                total += start.elapsed();
                left -= batch;
            }
            samples.push(total.as_nanos() as f64 / iterations as f64);
            total
        });
    });
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied()
}

fn allocs_per_step() -> f64 {
    const NUM_STEPS: u32 = 400;
    let mut steady = Steady::new(256, NUM_STEPS + 100);
    let before = allocations();
    for _ in 0..NUM_STEPS {
        steady.step();
    }
    (allocations() - before) as f64 / f64::from(NUM_STEPS)
}

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(1000))
        .sample_size(20)
        .configure_from_args();
    let mut figures = Vec::new();
    let mut measure = |name: &str, fresh: &dyn Fn() -> Steady| {
        if let Some(ns) = step_ns(&mut criterion, &format!("step_{name}"), fresh) {
            figures.push(format!("\"core_step_us_{name}\": {:.3}", ns / 1e3));
        }
    };
    const NUM_STEPS: u32 = 2_000;
    for num_running in [1, 32, 256, 1024] {
        measure(&num_running.to_string(), &|| Steady::new(num_running, NUM_STEPS));
    }
    measure("256_queued", &|| Steady::queued(256, NUM_STEPS, PolicyKind::CacheAware, 1024));
    criterion.final_summary();
    figures.push(format!("\"allocs_per_step\": {}", allocs_per_step()));
    println!("{{{}}}", figures.join(", "));
}
