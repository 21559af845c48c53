//! Moves of one request in each of its states: its stream is the one of a run that stayed, and both pools come back.

use kvlite_core::{CoreConfig, FinishReason};

use crate::common::Asked;
use crate::common::engine::{Engine, small_config};
use crate::common::moving::{Move, asked, finish, move_now, prompt, replay, turns};

fn engines() -> [Engine; 2] {
    [Engine::new(small_config()), Engine::new(small_config())]
}

/// What a run that stays gives.
fn unmoved(asked: &Asked) -> (Vec<Vec<i32>>, Vec<FinishReason>) {
    let mut engine = Engine::new(small_config());
    let handle = engine.add(asked.clone()).unwrap();
    finish(&mut engine, handle)
}

/// Moves `asked` after `turns` turns; the second engine finishes it.
fn moved_after(asked: &Asked, count: usize) -> Option<(Vec<Vec<i32>>, Vec<FinishReason>)> {
    let [mut a, mut b] = engines();
    let handle = a.add(asked.clone()).unwrap();
    turns(&mut a, count);
    if a.core.stats().num_requests == 0 {
        return None;
    }
    let Ok(handle) = move_now(&mut a, &mut b, handle) else { return None };
    a.assert_empty();
    let outcome = finish(&mut b, handle);
    b.drain(2);
    a.assert_empty();
    Some(outcome)
}

#[test]
fn a_request_moved_at_any_step_streams_what_it_would_have_streamed() {
    let plain = asked(21, 12);
    let requests = [
        plain.clone(),
        Asked { n: 3, ..plain.clone() },
        Asked { n: 3, prompt: prompt(16, 5), ..plain.clone() },
        Asked { prompt_logprobs: true, ..plain.clone() },
        Asked { prompt_logprobs: true, prompt: prompt(40, 5), n: 2, ..plain.clone() },
        Asked { use_cache: false, n: 2, ..plain.clone() },
        Asked { stop_token_ids: (0..40).collect(), min_tokens: 7, ..plain },
    ];
    for asked in requests {
        let expected = unmoved(&asked);
        let moved: Vec<_> = (0..20).filter_map(|count| moved_after(&asked, count)).collect();
        assert!(moved.len() > 8, "{} moves of {asked:?}", moved.len());
        assert!(moved.iter().all(|outcome| *outcome == expected), "{asked:?}: {moved:?}, expected {expected:?}");
    }
}

#[test]
fn a_request_moved_back_and_forth_at_every_step_ends_as_if_it_had_stayed() {
    let asked = Asked { n: 2, ..asked(18, 14) };
    let expected = unmoved(&asked);
    let [mut a, mut b] = engines();
    let mut handle = a.add(asked).unwrap();
    a.turn();
    let mut num_moves = 0;
    while let Ok(next) = move_now(&mut a, &mut b, handle) {
        handle = next;
        num_moves += 1;
        b.turn();
        std::mem::swap(&mut a, &mut b);
    }
    assert!(num_moves >= 6, "{num_moves} moves");
    assert_eq!(finish(&mut a, handle), expected);
    a.drain(3);
    b.drain(3);
}

#[test]
fn what_the_destination_has_of_the_prompt_is_not_sent() {
    let [mut a, mut b] = engines();
    let known = asked(16, 2);
    let earlier = b.add(known.clone()).unwrap();
    finish(&mut b, earlier);
    b.turn();
    let handle = a.add(Asked { prompt: [known.prompt, prompt(5, 50)].concat(), max_tokens: 9, ..asked(1, 1) }).unwrap();
    turns(&mut a, 6);
    let mut moving = Move::begin(&mut a, &mut b, handle, None).unwrap();
    // 21 of the prompt and 4 of the output are computed: six full blocks, four of which the destination has.
    assert_eq!(moving.stage(&mut a, &mut b), Ok(2));
    moving.abort(&mut a, &mut b);
    let handle = move_now(&mut a, &mut b, handle).unwrap();
    finish(&mut b, handle);
    b.drain(2);
}

#[test]
fn a_move_broken_off_leaves_its_full_blocks_as_a_prefix_for_the_replay() {
    let [mut a, mut b] = engines();
    let request = asked(21, 12);
    let expected = unmoved(&request);
    let handle = a.add(request).unwrap();
    turns(&mut a, 6);
    let mut moving = Move::begin(&mut a, &mut b, handle, None).unwrap();
    moving.stage(&mut a, &mut b).unwrap();
    assert!(moving.land(&mut a, &mut b));
    a.core.freeze(handle).unwrap();
    a.turn();
    assert!(moving.abort(&mut a, &mut b));
    a.core.freeze(handle).unwrap();
    assert_eq!(a.core.is_frozen(handle), Ok(true));
    assert_eq!(b.core.stats().cached_blocks, 5, "the last block that landed may be filled in part");
    let handle = replay(&mut a, &mut b, handle).unwrap();
    b.turn();
    let prefix = b.core.stats().cached_blocks;
    assert_eq!(prefix, 0, "the replay has taken them over");
    assert_eq!(finish(&mut b, handle), expected);
    assert!(b.core.stats().prefill_tokens_total < 10, "{:?}", b.core.stats());
}

#[test]
fn a_frozen_request_is_in_no_plan_and_thaws_where_it_was() {
    let request = Asked { n: 2, ..asked(21, 12) };
    let expected = unmoved(&request);
    for count in 0..12 {
        let [mut a, _] = engines();
        let handle = a.add(request.clone()).unwrap();
        turns(&mut a, count);
        a.core.freeze(handle).unwrap();
        a.core.freeze(handle).unwrap();
        a.turn();
        assert_eq!(a.core.is_frozen(handle), Ok(true));
        let before = a.told[&handle].outputs.clone();
        for _ in 0..3 {
            let plan = a.turn();
            assert_eq!(plan.header(kvlite_core::plan::Header::NumTokens), 0);
        }
        assert_eq!(a.told[&handle].outputs, before);
        assert!(a.core.export_abort(handle));
        assert_eq!(finish(&mut a, handle), expected, "frozen after {count} turns");
        a.drain(2);
    }
}

#[test]
fn a_frozen_request_still_ends_by_its_owner_its_deadline_and_the_plan_in_flight() {
    for end in 0..3 {
        let [mut a, mut b] = engines();
        let deadline_ms = (end == 1).then_some(9);
        let handle = a.add(Asked { deadline_ms, ..asked(9, if end == 2 { 4 } else { 40 }) }).unwrap();
        turns(&mut a, 4);
        let mut moving = Move::begin(&mut a, &mut b, handle, None).unwrap();
        moving.stage(&mut a, &mut b).unwrap();
        a.core.freeze(handle).unwrap();
        if end == 0 {
            assert!(a.abort(handle));
        }
        turns(&mut a, 8);
        let reason = [FinishReason::Cancelled, FinishReason::Timeout, FinishReason::Length][end];
        assert_eq!(a.told[&handle].finished, [Some(reason)]);
        assert!(!moving.abort(&mut a, &mut b), "it has ended");
        assert_eq!(a.core.export_commit(handle), Ok(false));
        a.assert_empty();
        b.assert_empty();
    }
}

#[test]
fn a_hold_outlives_its_request_and_keeps_its_blocks() {
    let [mut a, mut b] = engines();
    let handle = a.add(asked(21, 12)).unwrap();
    turns(&mut a, 6);
    let mut moving = Move::begin(&mut a, &mut b, handle, None).unwrap();
    moving.stage(&mut a, &mut b).unwrap();
    a.abort(handle);
    a.turn();
    a.turn();
    a.core.clear_cache();
    assert_eq!(a.core.stats().num_requests, 0);
    assert_eq!(a.core.stats().owned_blocks, 6, "what is being copied is nobody's to take");
    assert!(moving.land(&mut a, &mut b));
    a.assert_empty();
    moving.abort(&mut a, &mut b);
    b.assert_empty();
}

#[test]
fn an_expired_reservation_gives_everything_back_but_blocks_that_are_being_written() {
    let [mut a, mut b] = engines();
    let handle = a.add(asked(21, 12)).unwrap();
    turns(&mut a, 6);
    let mut moving = Move::begin(&mut a, &mut b, handle, Some(5)).unwrap();
    moving.stage(&mut a, &mut b).unwrap();
    b.now_ms = 4;
    assert_eq!(b.turn().header(kvlite_core::plan::Header::NextWakeMs), 1, "an idle engine wakes for it");
    b.turn();
    let stats = b.core.stats();
    assert_eq!((stats.in_transfer_blocks, stats.owned_blocks, stats.imports_cancelled_total), (6, 0, 1));
    assert!(!moving.land(&mut a, &mut b), "the reservation is gone");
    b.assert_empty();
    assert!(moving.abort(&mut a, &mut b), "the source goes on");
    assert_eq!(b.core.stats().imports_cancelled_total, 1);
    finish(&mut a, handle);
}

#[test]
fn choices_that_have_ended_stay_ended_and_the_others_go_on() {
    let request = Asked { n: 3, ..asked(10, 12) };
    let expected = unmoved(&request);
    let [mut a, mut b] = engines();
    let handle = a.add(request).unwrap();
    turns(&mut a, 6);
    assert!(a.finish(handle, 0, 2, FinishReason::Stop));
    let handle = move_now(&mut a, &mut b, handle).unwrap();
    a.assert_empty();
    let (outputs, reasons) = finish(&mut b, handle);
    assert_eq!(outputs[1..], expected.0[1..]);
    assert_eq!(reasons, [FinishReason::Stop, FinishReason::Length, FinishReason::Length]);
    b.drain(2);
}

#[test]
fn a_preempted_request_moves_and_goes_on_elsewhere() {
    let config = kvlite_core::CoreConfig { num_blocks: 14, reserve_tokens: 0, ..small_config() };
    let requests: Vec<Asked> = (0..3).map(|at| Asked { prompt: prompt(8, at * 31), ..asked(8, 20) }).collect();
    let expected: Vec<_> = requests.iter().map(unmoved).collect();
    let (mut a, mut b) = (Engine::new(config), Engine::new(small_config()));
    let handles: Vec<i32> = requests.into_iter().map(|request| a.add(request).unwrap()).collect();
    while a.core.stats().preemptions_total == 0 {
        a.turn();
    }
    a.turn();
    let moved = move_now(&mut a, &mut b, handles[2]).unwrap();
    assert_eq!(finish(&mut b, moved), expected[2]);
    for at in 0..2 {
        assert_eq!(finish(&mut a, handles[at]), expected[at]);
    }
    a.drain(3);
    b.drain(3);
}

#[test]
fn a_preempted_request_whose_blocks_went_to_the_host_moves_and_leaks_nothing_on_either_side() {
    let config = CoreConfig { num_blocks: 17, host_blocks: 32, max_num_batched_tokens: 64, ..small_config() };
    let [mut a, mut b] = [CoreConfig { reserve_tokens: 0, ..config }, small_config()].map(Engine::new);
    let leader = a.add(asked(1, 40)).unwrap();
    let others: Vec<Asked> = (2..5).map(|salt| Asked::new(&prompt(13, salt), 12)).collect();
    let handles: Vec<i32> = others.iter().map(|asked| a.add(asked.clone()).unwrap()).collect();
    // The youngest goes first: it has computed as little as any.
    let (last, swapped) = (handles[2], &others[2]);
    let is_swapped = |engine: &Engine| {
        let stats = engine.core.stats();
        stats.preemptions_total > 0 && stats.num_waiting > 0 && stats.demoted_blocks_total > 0
    };
    for _ in 0..40 {
        if is_swapped(&a) {
            break;
        }
        a.turn();
    }
    assert!(is_swapped(&a), "the test is about a request whose blocks are on the host: {:?}", a.core.stats());
    a.core.export_begin(last).unwrap();
    assert_eq!(a.core.export_left(last), Ok(0), "it waits without a block of the pool");
    assert!(a.core.export_abort(last));

    let moved = move_now(&mut a, &mut b, last).expect("the other engine is empty");
    assert_eq!(finish(&mut b, moved), unmoved(swapped));
    for (handle, asked) in handles.iter().zip(&others).take(2) {
        assert_eq!(finish(&mut a, *handle), unmoved(asked));
    }
    finish(&mut a, leader);
    a.drain(3);
    b.drain(3);
}
