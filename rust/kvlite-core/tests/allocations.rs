//! A step in steady state allocates nothing, counted by the allocator itself.

#[path = "common/counting.rs"]
mod counting;
#[path = "common/steady.rs"]
mod steady;

use counting::{Counting, allocations};
use kvlite_core::PolicyKind;
use steady::Steady;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_decode_step_allocates_nothing_at_32_and_at_256_running_sequences() {
    for num_running in [32, 256] {
        let mut steady = Steady::new(num_running, 300);
        let before = allocations();
        for _ in 0..200 {
            steady.step();
        }
        assert_eq!(allocations() - before, 0, "{num_running} running, 200 steps");
        steady.check();
    }
}

#[test]
fn nor_does_a_step_before_a_deep_queue_whatever_its_order() {
    for policy in [PolicyKind::Fcfs, PolicyKind::CacheAware, PolicyKind::Fair] {
        let mut steady = Steady::queued(256, 300, policy, 1024);
        let before = allocations();
        for _ in 0..200 {
            steady.step();
        }
        assert_eq!(allocations() - before, 0, "{policy:?}, 1024 waiting, 200 steps");
        steady.check();
    }
}

#[test]
fn the_allocator_does_count() {
    let before = allocations();
    drop(std::hint::black_box(Vec::<u64>::with_capacity(8)));
    assert_eq!(allocations() - before, 1);
}
