//! One step of the scheduler in decode steady state, answered at once. `cargo bench -p kvlite-core --bench schedule`
//!
//! Physics: per running sequence a step reads three or four cache lines of state (sequence, stop ids, its last block), appends
//! one id, and writes 12 integers into the arena; every 16th step it also takes a block and puts one into the tree, about
//! 100 ns. From level-2 cache that is 20-30 ns per sequence, so 1 us at 32 and 7 us at 256; at 1,024 the state no longer fits
//! level 2. Targets: <= 5 us at 32, <= 25 us at 256, no allocation. The time includes writing the fake answers.
//! Checked first: every sequence decodes in every step, and the audit passes. The last line is one JSON object.

#[path = "../tests/common/counting.rs"]
mod counting;
#[path = "../tests/common/steady.rs"]
mod steady;

use std::time::{Duration, Instant};

use counting::{Counting, allocations};
use criterion::Criterion;
use steady::Steady;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Median time of a step in ns, as criterion sampled it; none when its filter leaves this one out.
fn step_ns(criterion: &mut Criterion, num_running: u32) -> Option<f64> {
    const NUM_STEPS: u32 = 2_000;
    let mut steady = Steady::new(num_running, NUM_STEPS);
    steady.check();
    let mut samples = Vec::new();
    criterion.bench_function(&format!("step_{num_running}"), |bencher| {
        bencher.iter_custom(|iterations| {
            let mut total = Duration::ZERO;
            let mut left = iterations;
            while left > 0 {
                if steady.steps_left() == 0 {
                    steady.check();
                    steady = Steady::new(num_running, NUM_STEPS);
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
    for num_running in [1, 32, 256, 1024] {
        if let Some(ns) = step_ns(&mut criterion, num_running) {
            figures.push(format!("\"core_step_us_{num_running}\": {:.3}", ns / 1e3));
        }
    }
    criterion.final_summary();
    figures.push(format!("\"allocs_per_step\": {}", allocs_per_step()));
    println!("{{{}}}", figures.join(", "));
}
