//! The host tier under the scheduler, on the device that hashes every byte it reads: what leaves the pool comes back the same.
//! `model.rs` has the tree of two tiers against a naive one, `simulate.rs` everything at once.

mod common;

use common::engine::{Engine, Outcome, small_config};
use common::{Asked, PUBLIC};
use kvlite_core::plan::{CopyDirection, Region};
use kvlite_core::{CoreConfig, FinishReason, Layout};

fn prompt(salt: i32, len: usize) -> Vec<i32> {
    (0..len as i32).map(|at| (at * 7 + salt * 13) % 90).collect()
}

fn two_tiers(num_blocks: u32, host_blocks: u32) -> CoreConfig {
    CoreConfig { num_blocks, host_blocks, max_num_batched_tokens: 64, ..small_config() }
}

/// Runs one request to its end and returns how many prompt tokens the cache served.
fn run(engine: &mut Engine, asked: Asked) -> i32 {
    let handle = engine.add(asked).unwrap();
    engine.drain(200);
    engine.told[&handle].cached_len[0]
}

#[test]
fn the_plan_has_room_for_the_copies_of_two_of_the_longest_sequences() {
    let rows = |config: &CoreConfig| Layout::new(config).region(Region::BlockCopy).rows;
    assert_eq!(rows(&small_config()), 2 * 4);
    assert_eq!(rows(&two_tiers(32, 1)), 2 * 4 + 2 * 16);
}

#[test]
fn prompts_that_the_pool_cannot_keep_are_found_on_the_host() {
    let mut engine = Engine::new(two_tiers(12, 64));
    for salt in 0..5 {
        assert_eq!(run(&mut engine, Asked::new(&prompt(salt, 41), 1)), 0);
    }
    let computed = engine.core.stats().prefill_tokens_total;
    for salt in 0..5 {
        assert_eq!(run(&mut engine, Asked::new(&prompt(salt, 41), 1)), 40, "all full blocks, wherever they are");
    }
    let stats = engine.core.stats();
    assert_eq!(stats.prefill_tokens_total, computed + 5, "one token of each prompt");
    assert!(stats.demoted_blocks_total >= 40 && stats.promoted_blocks_total >= 40, "{stats:?}");
    assert_eq!(stats.host_hit_tokens_total, 4 * stats.promoted_blocks_total);
}

#[test]
fn a_block_that_came_from_the_host_goes_back_without_a_copy() {
    let mut engine = Engine::new(two_tiers(12, 64));
    for _ in 0..2 {
        for salt in [0, 1] {
            run(&mut engine, Asked::new(&prompt(salt, 41), 1));
        }
    }
    let (before, mut promoted) = (engine.core.stats().demoted_blocks_total, 0);
    for _ in 0..3 {
        for salt in [0, 1] {
            run(&mut engine, Asked::new(&prompt(salt, 41), 1));
        }
        assert!(engine.core.stats().promoted_blocks_total >= promoted + 10);
        promoted = engine.core.stats().promoted_blocks_total;
    }
    assert_eq!(engine.core.stats().demoted_blocks_total, before, "only the delta moves, and there is none");
}

#[test]
fn copies_to_the_host_read_blocks_that_the_same_plan_gives_away() {
    let mut engine = Engine::new(two_tiers(4, 8));
    run(&mut engine, Asked::new(&prompt(1, 13), 1));
    engine.add(Asked::new(&prompt(2, 13), 1)).unwrap();
    let plan = engine.turn();
    let copies: Vec<_> = plan.rows::<3>(Region::BlockCopy).collect();
    let slots = plan.flat(Region::SlotMapping, 13);
    // Tail first, and from the last block of the host down: the run lies there in order.
    assert_eq!(copies, [[1, 2, 7], [1, 1, 6], [1, 0, 5]]);
    assert!(copies.iter().all(|copy| slots.iter().any(|slot| slot / 4 == copy[1])), "{slots:?}");
    engine.drain(10);
    engine.add(Asked::new(&prompt(1, 13), 1)).unwrap();
    let copies: Vec<_> = engine.turn().rows::<3>(Region::BlockCopy).collect();
    let back: Vec<_> = copies.iter().filter(|copy| copy[0] == CopyDirection::FromHost as i32).collect();
    assert_eq!(back.iter().map(|copy| copy[1]).collect::<Vec<_>>(), [5, 6, 7], "the path in its order");
    engine.drain(10);
}

#[test]
fn what_costs_less_to_compute_than_to_swap_is_dropped_unless_others_hang_below_it() {
    let dear = CoreConfig { swap_cost_tokens: 5, ..two_tiers(12, 64) }; // 5 tokens are more than a block of 4.
    let mut engine = Engine::new(dear.clone());
    for salt in [1, 2, 1] {
        run(&mut engine, Asked::new(&prompt(salt, 41), 1));
    }
    assert_eq!([engine.core.stats().demoted_blocks_total, engine.core.stats().host_blocks as u64], [0, 0]);
    // At depth 20 a token costs twice one at the beginning.
    let mut engine = Engine::new(CoreConfig { attention_cost_tokens: 20, ..dear });
    run(&mut engine, Asked::new(&prompt(1, 41), 1));
    run(&mut engine, Asked::new(&prompt(2, 45), 1));
    assert_eq!(engine.core.stats().host_blocks, 10, "the deep ones first, then those above them");
}

#[test]
fn a_failed_plan_loses_what_it_was_to_copy_and_nothing_else() {
    for garbage in [false, true] {
        let mut engine = Engine::new(two_tiers(12, 64));
        run(&mut engine, Asked::new(&prompt(1, 41), 1));
        let doomed = engine.add(Asked::new(&prompt(2, 41), 1)).unwrap();
        engine.step();
        assert!(engine.core.stats().demoted_blocks_total > 0);
        engine.complete(Outcome::Failed { garbage });
        engine.drain(10);
        assert_eq!(engine.told[&doomed].finished, [Some(FinishReason::Error)]);
        assert_eq!(engine.core.stats().host_blocks, 0);
        run(&mut engine, Asked::new(&prompt(1, 41), 4));
    }
}

#[test]
fn a_request_waits_a_step_for_blocks_that_are_on_their_way_to_the_host() {
    let mut engine = Engine::new(two_tiers(32, 64));
    for salt in [1, 3] {
        run(&mut engine, Asked::new(&prompt(salt, 41), 1));
    }
    let filler = engine.add(Asked::new(&prompt(2, 61), 2)).unwrap();
    engine.step();
    assert!(engine.core.stats().demoted_blocks_total > 0);
    let again = engine.add(Asked::new(&prompt(1, 41), 1)).unwrap();
    engine.step();
    assert!(!engine.told[&again].admitted, "the copy is under way");
    engine.complete(Outcome::Ok);
    engine.step();
    assert!(engine.told[&again].admitted && engine.told[&again].cached_len == [40]);
    assert!(engine.told[&filler].admitted);
    for _ in 0..engine.num_in_flight() {
        engine.complete(Outcome::Ok);
    }
    engine.drain(20);
}

#[test]
fn the_host_keeps_what_was_used_last() {
    let mut engine = Engine::new(two_tiers(12, 12));
    for salt in 0..4 {
        run(&mut engine, Asked::new(&prompt(salt, 41), 1));
    }
    let stats = engine.core.stats();
    assert_eq!(stats.host_blocks, 12);
    assert_eq!(run(&mut engine, Asked::new(&prompt(0, 41), 1)), 0, "long gone");
    let mut engine = Engine::new(two_tiers(12, 12));
    for salt in [0, 1, 0, 2] {
        run(&mut engine, Asked::new(&prompt(salt, 41), 1));
    }
    assert_eq!(run(&mut engine, Asked::new(&prompt(0, 41), 1)), 40);
}

#[test]
fn no_tenant_reads_what_another_one_left_on_the_host_and_public_blocks_stay_public() {
    let mut engine = Engine::new(two_tiers(12, 64));
    let of = |tenant: u32, salt: i32| Asked { tenant, ..Asked::new(&prompt(salt, 41), 1) };
    run(&mut engine, of(1, 1));
    run(&mut engine, of(PUBLIC, 3));
    run(&mut engine, of(1, 2));
    assert_eq!(run(&mut engine, of(2, 1)), 0);
    for tenant in [2, 1, 4] {
        assert_eq!(run(&mut engine, of(tenant, 3)), 40, "published for everybody");
        run(&mut engine, of(1, 2));
    }
    assert_eq!(run(&mut engine, of(1, 1)), 40);
}

#[test]
fn clearing_the_cache_clears_the_host_even_under_copies() {
    let mut engine = Engine::new(two_tiers(12, 64));
    run(&mut engine, Asked::new(&prompt(1, 41), 1));
    engine.add(Asked::new(&prompt(2, 41), 1)).unwrap();
    engine.step();
    engine.core.clear_cache();
    engine.core.audit();
    engine.complete(Outcome::Ok);
    engine.drain(10);
    engine.core.clear_cache();
    assert_eq!(engine.core.stats().host_blocks, 0);
    assert_eq!(run(&mut engine, Asked::new(&prompt(1, 41), 1)), 0);
}

#[test]
fn a_preempted_request_comes_back_from_the_host_and_nobody_is_started_over_in_a_loop() {
    for host_blocks in [0, 6, 64] {
        let config = CoreConfig { reserve_tokens: 0, max_num_batched_tokens: 8, ..two_tiers(20, host_blocks) };
        let mut engine = Engine::new(config);
        for salt in 0..3 {
            engine.add(Asked::new(&prompt(salt, 4), 30)).unwrap();
        }
        let long = engine.add(Asked::new(&prompt(9, 50), 2)).unwrap();
        engine.drain(300);
        let stats = engine.core.stats();
        assert_eq!(engine.told[&long].finished, [Some(FinishReason::Length)]);
        assert!((1..=4).contains(&stats.preemptions_total), "{} preemptions", stats.preemptions_total);
        assert!(stats.prefill_tokens_total <= 2 * (3 * 4 + 50), "{} tokens prefilled", stats.prefill_tokens_total);
        assert_eq!(stats.promoted_blocks_total > 0, host_blocks > 0, "{host_blocks}");
        assert_eq!(stats.host_hit_tokens_total > 0, host_blocks > 0);
    }
}

#[test]
fn what_a_tenant_copied_back_from_its_own_takes_no_public_place_though_its_own_is_gone_meanwhile() {
    let mut engine = Engine::new(two_tiers(12, 64));
    let of = |tenant: u32, salt: i32, len: usize| Asked { tenant, ..Asked::new(&prompt(salt, len), 1) };
    run(&mut engine, of(1, 1, 9));
    run(&mut engine, of(2, 2, 45)); // Takes the whole pool: tenant 1's blocks are on the host.
    engine.add(of(PUBLIC, 1, 9)).unwrap();
    engine.step(); // The operator computes the same tokens ...
    let own = engine.add(of(1, 1, 9)).unwrap();
    engine.step(); // ... while tenant 1 copies its own back,
    assert_eq!(engine.told[&own].cached_len, [8]);
    engine.core.clear_cache(); // which are gone before they are published again,
    engine.complete(Outcome::Ok);
    let demoted = engine.core.stats().demoted_blocks_total;
    engine.add(of(2, 3, 34)).unwrap();
    engine.step(); // when the public ones have come and were evicted to the host.
    assert_eq!(engine.core.stats().demoted_blocks_total, demoted + 2);
    engine.complete(Outcome::Ok);
    engine.step();
    while engine.num_in_flight() > 0 {
        engine.complete(Outcome::Ok);
    }
    engine.drain(10);
    let promoted = engine.core.stats().promoted_blocks_total;
    assert_eq!(run(&mut engine, of(3, 1, 9)), 8, "published for everybody");
    assert_eq!(engine.core.stats().promoted_blocks_total, promoted + 2, "from the host: on the device are tenant 1's");
}
