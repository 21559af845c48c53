//! One test per failure that the big engines have had (scheduling.md section 6), as far as it can happen here; those of
//! loading from another tier are in `tiers.rs`.

mod common;

use common::engine::{Engine, Outcome, small_config};
use common::{Asked, Blend};
use kvlite_core::plan::{Header, Region};
use kvlite_core::{CoreConfig, CoreError, FinishReason, SpanOutcome};

fn prompt(salt: i32, len: usize) -> Vec<i32> {
    (0..len as i32).map(|at| (at * 7 + salt * 13) % 90).collect()
}

/// Runs one request to its end and returns how many prompt tokens the cache served.
fn run(engine: &mut Engine, asked: Asked) -> i32 {
    let handle = engine.add(asked).unwrap();
    engine.drain(200);
    engine.told[&handle].cached_len[0]
}

#[test]
fn a_cold_request_is_not_passed_by_a_flood_of_hits() {
    let mut engine = Engine::new(CoreConfig { max_num_seqs: 1, ..small_config() });
    run(&mut engine, Asked::new(&prompt(1, 40), 1));
    engine.add(Asked::new(&prompt(1, 40), 8)).unwrap();
    let cold = engine.add(Asked::new(&prompt(2, 40), 2)).unwrap();
    for _ in 0..10 {
        engine.add(Asked::new(&prompt(1, 40), 8)).unwrap();
    }
    for _ in 0..20 {
        engine.turn();
    }
    assert!(engine.told[&cold].finished[0].is_some(), "it waits for the one before it and for nobody else");
    engine.drain(300);
}

#[test]
fn two_requests_that_fit_only_one_after_the_other_both_finish() {
    let mut engine = Engine::new(CoreConfig { num_blocks: 12, ..small_config() });
    let both = [1, 2].map(|salt| engine.add(Asked::new(&prompt(salt, 30), 16)).unwrap());
    engine.drain(200);
    assert!(both.iter().all(|handle| engine.told[handle].finished == [Some(FinishReason::Length)]));
    assert_eq!(engine.core.stats().preemptions_total, 0, "the second is not let in to hold half of what it needs");
}

#[test]
fn outputs_that_fit_only_one_after_the_other_are_not_begun_together() {
    let mut engine = Engine::new(CoreConfig { num_blocks: 8, reserve_tokens: 0, ..small_config() });
    for salt in [1, 2] {
        engine.add(Asked::new(&prompt(salt, 8), 24)).unwrap();
    }
    engine.drain(200);
    assert_eq!(engine.core.stats().preemptions_total, 0, "the banker finds no order in which both reach their ends");
}

#[test]
fn the_watermark_keeps_its_share_free_while_somebody_runs() {
    for (watermark_ratio, expected) in [(1.0, 2), (0.5, 1)] {
        let config = CoreConfig { num_blocks: 16, max_num_batched_tokens: 64, watermark_ratio, ..small_config() };
        let mut engine = Engine::new(config);
        for salt in [1, 2] {
            engine.add(Asked::new(&prompt(salt, 24), 8)).unwrap();
        }
        assert_eq!(engine.turn().header(Header::NumRunning), expected, "8 blocks each, 8 of 16 are kept at one half");
        engine.drain(50);
    }
}

#[test]
fn the_oldest_running_request_is_never_preempted() {
    let mut engine =
        Engine::new(CoreConfig { num_blocks: 17, max_num_batched_tokens: 64, reserve_tokens: 0, ..small_config() });
    let oldest = engine.add(Asked { use_cache: false, ..Asked::new(&prompt(1, 1), 40) }).unwrap();
    for salt in 2..5 {
        engine.add(Asked::new(&prompt(salt, 13), 12)).unwrap(); // In step with the oldest: all ask for a block at once.
    }
    engine.drain(300);
    assert!(engine.core.stats().preemptions_total > 0, "the test is about preemption");
    assert_eq!(engine.told[&oldest].resumed, 0, "it has computed least, but it leads");
}

#[test]
fn a_pool_full_of_cached_blocks_admits_at_once() {
    let mut engine = Engine::new(small_config());
    for salt in 0..8 {
        run(&mut engine, Asked::new(&prompt(salt, 30), 2));
    }
    assert!(engine.core.stats().free_blocks <= 1, "the pool is full of cached blocks");
    let handle = engine.add(Asked::new(&prompt(20, 60), 3)).unwrap();
    engine.turn();
    assert!(engine.told[&handle].admitted);
    engine.drain(50);
}

#[test]
fn a_long_chunked_prefill_is_not_preempted_and_started_over_in_a_loop() {
    let config = CoreConfig { num_blocks: 20, max_num_batched_tokens: 8, reserve_tokens: 0, ..small_config() };
    let mut engine = Engine::new(config);
    for salt in 0..3 {
        engine.add(Asked { use_cache: false, ..Asked::new(&prompt(salt, 4), 30) }).unwrap();
    }
    let long = engine.add(Asked { use_cache: false, ..Asked::new(&prompt(9, 50), 2) }).unwrap();
    engine.drain(300);
    let stats = engine.core.stats();
    assert_eq!(engine.told[&long].finished, [Some(FinishReason::Length)]);
    assert!(stats.preemptions_total <= 4, "{} preemptions", stats.preemptions_total);
    assert!(stats.prefill_tokens_total <= 3 * (3 * 4 + 50), "{} tokens prefilled", stats.prefill_tokens_total);
}

#[test]
fn eviction_shortens_a_chain_from_its_tail_and_the_rest_is_still_found() {
    let mut engine = Engine::new(CoreConfig { num_blocks: 12, ..small_config() });
    run(&mut engine, Asked::new(&prompt(1, 41), 1)); // 10 full blocks
    run(&mut engine, Asked::new(&prompt(2, 17), 1)); // needs 5: evicts 3 from the tail
    let cached = run(&mut engine, Asked::new(&prompt(1, 41), 1));
    assert!((20..40).contains(&cached), "{cached} tokens are still found: the head of the chain");
}

#[test]
fn the_prefix_of_the_next_request_in_the_queue_is_evicted_last() {
    let mut engine = Engine::new(CoreConfig { max_num_seqs: 1, num_blocks: 24, ..small_config() });
    run(&mut engine, Asked::new(&prompt(1, 33), 1)); // the oldest in the cache: 8 blocks
    run(&mut engine, Asked::new(&prompt(2, 33), 1));
    engine.add(Asked::new(&prompt(3, 20), 30)).unwrap(); // takes 13 of 24, so it evicts 5
    let next = engine.add(Asked::new(&prompt(1, 33), 1)).unwrap();
    engine.drain(100);
    assert_eq!(engine.told[&next].cached_len, [32]);
}

#[test]
fn requests_with_one_prefix_that_arrive_together_compute_it_once() {
    let mut engine = Engine::new(CoreConfig { max_num_batched_tokens: 64, ..small_config() });
    for seed in 0..3 {
        engine.add(Asked { seed, ..Asked::new(&prompt(1, 17), 4) }).unwrap();
    }
    engine.drain(50);
    assert_eq!(engine.core.stats().prefill_tokens_total, 17 + 1 + 1, "the others hit 16 tokens and compute the last");
}

#[test]
fn a_load_of_ten_times_the_pool_costs_at_most_two_preemptions_per_request() {
    let config = CoreConfig {
        num_blocks: 60,
        max_num_seqs: 16,
        max_num_batched_tokens: 32,
        max_num_waiting: 64,
        reserve_tokens: 0,
        ..small_config()
    };
    let mut engine = Engine::new(config);
    let handles: Vec<i32> = (0..60)
        .map(|salt| engine.add(Asked { use_cache: false, ..Asked::new(&prompt(salt, 5), 36) }).unwrap())
        .collect();
    engine.drain(2_000);
    let resumed: Vec<u32> = handles.iter().map(|handle| engine.told[handle].resumed).collect();
    assert!(resumed.iter().sum::<u32>() > 10, "the test is about preemption: {resumed:?}");
    assert!(resumed.iter().all(|&times| times <= 2), "{resumed:?}");
}

#[test]
fn preempted_requests_give_back_every_block_and_row_and_keep_their_handles() {
    let config = CoreConfig { num_blocks: 11, reserve_tokens: 0, ..small_config() };
    let mut engine = Engine::new(config);
    let handles: Vec<i32> =
        (0..4).map(|salt| engine.add(Asked { seed: 5, ..Asked::new(&prompt(salt, 6), 20) }).unwrap()).collect();
    engine.drain(300);
    assert!(engine.core.stats().preemptions_total > 0, "the test is about preemption");
    assert!(handles.iter().all(|handle| engine.told[handle].outputs[0].len() == 20));
    let again = engine.add(Asked::new(&prompt(0, 6), 1)).unwrap();
    assert!(!handles.contains(&again), "a handle is not given out again soon");
    engine.drain(10);
}

#[test]
fn a_client_that_goes_away_during_prefill_leaves_nothing_behind() {
    let mut engine = Engine::new(CoreConfig { enable_prefix_caching: false, ..small_config() });
    let handle = engine.add(Asked::new(&prompt(1, 60), 2)).unwrap();
    let idx = engine.step();
    assert!(engine.view(idx).header(Header::NumTokens) > 0, "the prefill is under way");
    assert!(engine.abort(handle));
    engine.step();
    assert!(engine.core.stats().owned_blocks > 0, "a plan that runs keeps its blocks");
    engine.complete(Outcome::Ok);
    engine.complete(Outcome::Ok);
    engine.turn();
    assert_eq!(engine.core.stats().free_blocks, 32, "freed within two steps");
    assert_eq!(engine.told[&handle].finished, [Some(FinishReason::Cancelled)]);
    assert!(!engine.abort(handle), "abort twice finds nothing");
}

#[test]
fn an_abort_before_admission_leaves_no_pin() {
    let mut engine = Engine::new(CoreConfig { max_num_seqs: 1, ..small_config() });
    run(&mut engine, Asked::new(&prompt(1, 33), 1));
    engine.add(Asked::new(&prompt(2, 8), 20)).unwrap();
    engine.turn();
    let waiting = engine.add(Asked { n: 1, ..Asked::new(&prompt(1, 33), 4) }).unwrap();
    engine.turn(); // Its prefix has been looked up while it waits for a row.
    let owned = engine.core.stats().owned_blocks;
    assert!(engine.abort(waiting));
    engine.turn();
    assert_eq!(engine.core.stats().owned_blocks, owned);
    engine.drain(50);
    engine.core.clear_cache();
    assert_eq!(engine.core.stats().free_blocks, 32, "nothing is pinned");
}

#[test]
fn a_hit_on_the_whole_prompt_still_computes_its_last_token() {
    for len in [9, 11, 12] {
        let mut engine = Engine::new(small_config());
        run(&mut engine, Asked::new(&prompt(1, 20), 2));
        let cached = run(&mut engine, Asked::new(&prompt(1, len), 3));
        assert_eq!(cached, len as i32 - 1, "all but one of {len} tokens: full blocks by reference, the rest by copy");
    }
}

#[test]
fn prompts_around_a_multiple_of_the_block_size_come_out_right() {
    for len in [1, 3, 4, 5, 7, 8, 9] {
        for n in [1, 3] {
            let mut engine = Engine::new(small_config());
            for seed in 0..3 {
                engine.add(Asked { n, seed, ..Asked::new(&prompt(1, len), 9) }).unwrap();
            }
            engine.drain(200); // The engine compares every answer with the oracle.
            assert_eq!(engine.core.stats().finished_total[FinishReason::Length as usize], 3 * u64::from(n));
        }
    }
}

#[test]
fn blocks_that_a_plan_still_writes_are_no_hit() {
    let mut engine = Engine::new(CoreConfig { max_num_batched_tokens: 64, ..small_config() });
    let first = engine.add(Asked::new(&prompt(1, 33), 4)).unwrap();
    engine.step();
    let second = engine.add(Asked { seed: 1, ..Asked::new(&prompt(1, 33), 4) }).unwrap();
    engine.step();
    assert!(!engine.told[&second].admitted, "it waits for the neighbour's plan instead of reading unwritten blocks");
    engine.complete(Outcome::Ok);
    engine.step();
    assert_eq!(engine.told[&second].cached_len, [32]);
    engine.complete(Outcome::Ok);
    engine.complete(Outcome::Ok);
    engine.drain(50);
    assert!(engine.told[&first].outputs != engine.told[&second].outputs);
}

#[test]
fn a_failed_plan_ends_its_requests_and_no_neighbour() {
    let mut engine = Engine::new(CoreConfig { max_num_batched_tokens: 4, ..small_config() });
    let first = engine.add(Asked::new(&prompt(1, 4), 9)).unwrap();
    let waits = engine.add(Asked::new(&prompt(2, 4), 9)).unwrap();
    engine.step();
    engine.complete(Outcome::Failed { garbage: true });
    engine.drain(50);
    assert_eq!(engine.told[&first].finished, [Some(FinishReason::Error)]);
    assert_eq!(engine.told[&waits].finished, [Some(FinishReason::Length)]);
    assert_eq!(run(&mut engine, Asked::new(&prompt(1, 9), 1)), 0, "nothing that the failed plan wrote is a hit");
}

#[test] // Seed 10397 of the simulation: choice 0 had ended, so nobody looked at its plan, and choice 1 read what was never written.
fn a_failed_plan_ends_choices_that_wait_for_its_prompt_even_when_the_first_has_ended() {
    let mut engine = Engine::new(CoreConfig { max_num_batched_tokens: 8, ..small_config() });
    let handle = engine.add(Asked { n: 2, ..Asked::new(&prompt(1, 14), 4) }).unwrap();
    engine.step();
    engine.step(); // The end of the prompt is planned while its beginning runs.
    assert!(engine.finish(handle, 0, 0, FinishReason::Cancelled));
    engine.complete(Outcome::Failed { garbage: true });
    engine.complete(Outcome::Ok);
    engine.drain(50);
    assert_eq!(engine.told[&handle].finished, [Some(FinishReason::Cancelled), Some(FinishReason::Error)]);
}

#[test]
fn tenants_never_share_a_block_and_one_tenant_does() {
    let mut engine = Engine::new(small_config());
    run(&mut engine, Asked::new(&prompt(1, 17), 1));
    assert_eq!(run(&mut engine, Asked { tenant: 1, ..Asked::new(&prompt(1, 17), 1) }), 0);
    assert_eq!(run(&mut engine, Asked { tenant: 1, ..Asked::new(&prompt(1, 17), 1) }), 16);
    for tenant in [2, 3] {
        engine.add(Asked { tenant, ..Asked::new(&prompt(1, 12), 2) }).unwrap();
    }
    assert_eq!(engine.turn().header(Header::NumRunning), 2, "nobody is held back for another tenant's prefill");
    engine.drain(50);
}

#[test]
fn generated_tokens_are_found_by_the_next_turn_of_a_conversation() {
    let mut engine = Engine::new(small_config());
    let first = engine.add(Asked::new(&prompt(1, 10), 15)).unwrap();
    engine.drain(50);
    let mut next = prompt(1, 10);
    next.extend(engine.output(first));
    next.push(3);
    assert_eq!(run(&mut engine, Asked::new(&next, 1)), 24, "all full blocks of the 24 tokens whose KV was written");
}

#[test] // found by `simulate`: when that plan failed, the group of the next one read through what was there before
fn nobody_else_reads_by_a_table_that_a_plan_in_flight_has_yet_to_set() {
    let mut engine = Engine::new(CoreConfig { attention_split_tokens: 4, ..small_config() });
    run(&mut engine, Asked::new(&prompt(1, 9), 1));
    run(&mut engine, Asked::new(&prompt(2, 9), 1)); // Leaves the row's table with other blocks.
    let failed = engine.add(Asked::new(&prompt(1, 9), 4)).unwrap();
    engine.step();
    let other = engine.add(Asked::new(&prompt(1, 9), 4)).unwrap();
    engine.step();
    engine.complete(Outcome::Failed { garbage: false });
    engine.complete(Outcome::Ok);
    engine.drain(50);
    let reasons = [failed, other].map(|handle| engine.told[&handle].finished[0]);
    assert_eq!(reasons, [Some(FinishReason::Error), Some(FinishReason::Length)]);
}

#[test] // found by `simulate`: the rows that the copy would have brought were computed as new, under the recipe's label
fn reused_rows_whose_copy_finds_no_room_are_placed_or_the_recipe_is_given_up() {
    // One row of the document lies in the block to copy from. Pinned, its segment costs no further room.
    for (num_blocks, pinned, expected) in [(4, false, (0, SpanOutcome::Hole)), (6, true, (4, SpanOutcome::Hit))] {
        let mut engine = Engine::new(CoreConfig { num_blocks, canonical_prefix: vec![98], ..small_config() });
        let blend =
            Blend { spans: vec![(0, 5)], method_id: 0, ratio: 0.0, rounds: vec![], scores: None, decode_rows: 0 };
        let asked = |len: usize| Asked { blend: Some(blend.clone()), ..Asked::new(&prompt(1, len), 3) };
        engine.add(Asked { precompute: Some(pinned), ..Asked::new(&prompt(1, 5), 0) }).unwrap();
        // This one leaves two blocks of the recipe; the second ends in its output.
        engine.add(asked(6)).unwrap();
        while engine.num_live() > 0 {
            engine.turn();
        }
        let handle = engine.add(asked(13)).unwrap();
        engine.turn();
        let report = engine.core.reuse_report(handle).unwrap();
        assert_eq!((report.prefix_tokens, report.spans[0]), expected);
        engine.pin_segment(0, &prompt(1, 5), false).unwrap();
        engine.drain(50);
    }
}

#[test]
fn a_refused_request_changes_nothing_and_says_what_would_be_right() {
    let mut engine = Engine::new(CoreConfig { num_blocks: 8, max_num_waiting: 2, ..small_config() });
    let good = Asked::new(&prompt(1, 8), 4);
    let refused = [
        (Asked { prompt: vec![], ..good.clone() }, CoreError::EmptyPrompt),
        (
            Asked { prompt: vec![1, -1], ..good.clone() },
            CoreError::OutsideVocabulary { index: 1, token: -1, vocab_size: 100 },
        ),
        (
            Asked { prompt: vec![100], ..good.clone() },
            CoreError::OutsideVocabulary { index: 0, token: 100, vocab_size: 100 },
        ),
        (Asked::new(&prompt(1, 64), 1), CoreError::PromptTooLong { prompt_len: 64, max_model_len: 64 }),
        (Asked::new(&prompt(1, 60), 5), CoreError::TooLong { prompt_len: 60, max_tokens: 5, max_model_len: 64 }),
        (Asked::new(&prompt(1, 30), 4), CoreError::NeverFits { needed: 9, total: 8 }),
        (Asked { n: 0, ..good.clone() }, CoreError::Choices { n: 0, max: 4 }),
        (Asked { n: 5, ..good.clone() }, CoreError::Choices { n: 5, max: 4 }),
        (Asked { max_tokens: 0, ..good.clone() }, CoreError::NoOutput),
        (Asked { min_tokens: 5, ..good.clone() }, CoreError::MinTokens { min_tokens: 5, max_tokens: 4 }),
        (Asked { stop_token_ids: vec![1; 65], ..good.clone() }, CoreError::StopIds { count: 65, max: 64 }),
        (Asked { tenant: 1 << 31, ..good.clone() }, CoreError::Tenant { tenant: 1 << 31 }),
    ];
    for (asked, error) in refused {
        assert_eq!(engine.add(asked), Err(error));
        assert_eq!(engine.core.stats().num_requests, 0);
    }
    engine.add(Asked::new(&prompt(1, 29), 4)).expect("exactly the pool");
    engine.add(good.clone()).unwrap();
    let full = engine.add(good).unwrap_err();
    assert!(full.is_capacity(), "{full}");
    engine.drain(50);
}

#[test]
fn an_arena_whose_plan_still_runs_is_not_overwritten() {
    let mut engine = Engine::new(small_config());
    engine.add(Asked::new(&prompt(1, 8), 4)).unwrap();
    let len = engine.core.layout().len();
    let (mut first, mut second) = (vec![0; len], vec![0; len]);
    engine.core.step([&mut first, &mut second], 0, 0).unwrap();
    engine.core.step([&mut first, &mut second], 1, 0).unwrap();
    let error = engine.core.step([&mut first, &mut second], 0, 0).unwrap_err();
    assert_eq!(error, CoreError::PlanOutstanding { plan_id: 1, arena_idx: 0 });
    first[engine.core.layout().region(Region::DonePlanId).offset] = 1;
    engine.core.step([&mut first, &mut second], 0, 0).unwrap();
    let wrong = engine.core.step([&mut first[1..], &mut second], 0, 0).unwrap_err();
    assert_eq!(wrong, CoreError::ArenaLength { arena_idx: 0, len: len - 1, expected: len });
}
