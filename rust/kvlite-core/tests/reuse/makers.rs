//! Segments on their way: one maker per cold segment, whoever waits, and every way in which that ends early.

use kvlite_core::{CoreConfig, CoreError, FinishReason, Request, SpanOutcome};

use crate::driver::{Driver, QUERY, blend, config, request, text};

fn prompt(question: i32) -> Vec<i32> {
    [text(1, 4), text(2, 8), text(question, 2)].concat()
}

const SPANS: [(u32, u32); 1] = [(4, 8)];

fn cold(driver: &mut Driver, question: i32) -> i32 {
    driver.add(&prompt(question), Some(blend(&SPANS, &QUERY, 0.25)))
}

#[test]
fn two_requests_for_one_cold_segment_compute_it_once() {
    let mut driver = Driver::new(config());
    let both = [cold(&mut driver, 3), cold(&mut driver, 4)];
    let first = driver.turn();
    assert_eq!(first.rows[&0], (0..10).collect::<Vec<_>>(), "canonical prefix and document, alone");
    assert_eq!((first.num_segment_rows, first.samples, first.admitted.len(), first.num_waiting), (8, 0, 0, 2));
    for handle in both {
        while driver.core.reuse_report(handle).is_none() {
            driver.turn();
        }
        assert_eq!(*driver.core.reuse_report(handle).unwrap().spans, [SpanOutcome::Made]);
    }
    driver.drain();
    assert_eq!(driver.core.stats().segments_made_total, 1);
    assert!(driver.finished.iter().all(|end| both.contains(&end[0])), "nobody hears of the maker");
}

#[test]
fn later_requests_pass_one_that_waits_for_its_segment() {
    let mut driver = Driver::new(CoreConfig { max_num_batched_tokens: 4, ..config() });
    cold(&mut driver, 3);
    let plain = driver.add(&[7, 8], None);
    let mut ended = Vec::new();
    for _ in 0..8 {
        ended.extend(driver.turn().finished);
    }
    assert_eq!(ended, [[plain, 0, 1]]);
    driver.drain();
}

#[test]
fn another_tenant_gets_nothing_and_everybody_gets_what_is_public() {
    let mut driver = Driver::new(config());
    driver.precompute(&text(2, 8), false);
    let foreign = prompt(3);
    let asked = Request { tenant: 1, ..request(&foreign, Some(blend(&SPANS, &QUERY, 0.25))) };
    driver.core.add(&asked, 0).unwrap();
    assert_eq!(driver.turn().num_segment_rows, 8, "tenant 1 computes its own");
    driver.drain();
    assert!(driver.core.segment(2, &text(2, 8)).is_none());
    driver.core.add_segment(&text(9, 5), (1 << 31) - 1, false, None, 0).unwrap();
    driver.drain();
    assert_eq!(driver.core.segment(2, &text(9, 5)).unwrap().tenant, (1 << 31) - 1);
    assert!(!driver.core.drop_segment(2, &text(9, 5)), "only its owner drops it");
}

#[test]
fn aborted_in_every_phase_a_request_leaves_nothing_behind() {
    for turns in 0..8 {
        for pipelined in [false, true] {
            let mut driver =
                Driver::new(CoreConfig { max_num_batched_tokens: 6, enable_prefix_caching: false, ..config() });
            let handle = cold(&mut driver, 3);
            for _ in 0..turns {
                driver.turn();
            }
            if pipelined {
                driver.step();
            }
            let lives = driver.core.abort(handle);
            assert!(lives || turns > 5, "{turns}");
            if pipelined {
                driver.complete(0);
            }
            driver.drain();
            let stats = driver.core.stats();
            assert_eq!(driver.finished.len(), 1);
            assert_eq!(stats.owned_blocks + stats.num_recipes, 0, "after {turns} turns");
            assert_eq!(driver.core.segment(0, &text(2, 8)).is_some(), stats.segments_made_total == 1);
        }
    }
}

#[test]
fn a_maker_stops_when_nobody_needs_it_and_goes_on_while_somebody_does() {
    let mut driver = Driver::new(CoreConfig { max_num_batched_tokens: 4, ..config() });
    let (first, second) = (cold(&mut driver, 3), cold(&mut driver, 4));
    driver.turn();
    driver.core.abort(first);
    assert!(!driver.turn().rows.is_empty());
    driver.core.abort(second);
    assert!(driver.turn().rows.is_empty());
    assert_eq!(driver.core.stats().num_segments, 0);
    let again = cold(&mut driver, 5);
    driver.drain();
    assert!(driver.finished.contains(&[again, 0, 1]));
}

#[test]
fn a_deadline_ends_who_waits_for_a_segment() {
    let mut driver = Driver::new(CoreConfig { max_num_batched_tokens: 4, ..config() });
    let asked = prompt(3);
    let asked = Request { deadline_ms: Some(5), ..request(&asked, Some(blend(&SPANS, &QUERY, 0.25))) };
    let handle = driver.core.add(&asked, 0).unwrap();
    let precompute = driver.core.add_segment(&text(9, 9), 0, false, Some(5), 0).unwrap();
    driver.step();
    driver.now_ms = 5;
    driver.complete(0);
    let ends = driver.drain();
    assert!(ends.is_empty());
    let timeout = FinishReason::Timeout as i32;
    assert_eq!(driver.finished, [[handle, -1, timeout], [precompute, -1, timeout]]);
}

#[test]
fn a_failed_makers_plan_is_tried_once_more_and_then_the_span_is_new_text() {
    let mut driver = Driver::new(config());
    let handle = cold(&mut driver, 3);
    for _ in 0..2 {
        assert_eq!(driver.step().num_segment_rows, 8);
        driver.complete(1);
    }
    let plan = driver.turn();
    assert_eq!((plan.num_segment_rows, plan.rows[&0].len()), (0, 14));
    assert_eq!(*driver.core.reuse_report(handle).unwrap().spans, [SpanOutcome::Hole]);
    driver.drain();
    let precompute = driver.core.add_segment(&text(9, 5), 0, false, None, 0).unwrap();
    for _ in 0..2 {
        driver.step();
        driver.complete(1);
    }
    driver.drain();
    assert_eq!(driver.finished[1..], [[precompute, -1, FinishReason::Error as i32]]);
}

#[test]
fn what_the_store_can_never_hold_is_new_text_and_refused_as_a_document() {
    let mut driver = Driver::new(CoreConfig { segment_cache_ratio: 1.5 / 64.0, ..config() });
    let handle = cold(&mut driver, 3);
    assert_eq!(driver.turn().rows[&0].len(), 14);
    assert_eq!(*driver.core.reuse_report(handle).unwrap().spans, [SpanOutcome::Hole]);
    driver.drain();
    let error = driver.core.add_segment(&text(2, 8), 0, false, None, 0);
    assert_eq!(error, Err(CoreError::SegmentTooLong { len: 8, max: 4 }));
    assert_eq!(driver.core.stats().num_segments, 0);
}

#[test]
fn alone_in_a_pool_too_small_for_prompt_and_segment_the_span_is_new_text() {
    // 14 + 1 tokens need 4 blocks, the segment 2 and its maker 3.
    let mut driver = Driver::new(CoreConfig { num_blocks: 5, segment_cache_ratio: 1.0, ..config() });
    let handle = cold(&mut driver, 3);
    driver.drain();
    assert_eq!(driver.finished, [[handle, 0, 1]]);
    assert_eq!(driver.core.stats().segment_hit_tokens_total, 0);
}

#[test]
fn a_segment_dropped_while_it_is_placed_stays_until_the_plan_is_done() {
    let mut driver = Driver::new(config());
    driver.precompute(&text(2, 8), false);
    cold(&mut driver, 3);
    assert_eq!(driver.step().places.len(), 1);
    assert!(driver.core.drop_segment(0, &text(2, 8)));
    assert!(driver.core.segment(0, &text(2, 8)).is_none(), "not found any more");
    assert_eq!(driver.core.stats().segment_blocks, 2);
    driver.complete(0);
    driver.turn();
    assert_eq!(driver.core.stats().segment_blocks, 0);
    driver.drain();
}

#[test]
fn a_document_deleted_while_it_is_precomputed_is_cancelled_and_who_blends_it_makes_it_anew() {
    let mut driver = Driver::new(CoreConfig { max_num_batched_tokens: 4, ..config() });
    let precompute = driver.core.add_segment(&text(2, 8), 0, true, None, 0).unwrap();
    let blended = cold(&mut driver, 3);
    driver.turn();
    assert!(driver.core.drop_segment(0, &text(2, 8)));
    assert!(!driver.core.drop_segment(0, &text(2, 8)));
    driver.drain();
    assert_eq!(driver.finished, [[precompute, -1, FinishReason::Cancelled as i32], [blended, 0, 1]]);
    assert_eq!((driver.core.stats().segments_made_total, driver.core.stats().pinned_blocks), (1, 0));
}

#[test]
fn pins_keep_a_segment_and_may_not_take_what_a_live_request_needs() {
    let mut driver = Driver::new(CoreConfig { num_blocks: 16, segment_cache_ratio: 1.0, ..config() });
    driver.precompute(&text(2, 8), true);
    let live = driver.core.add(&Request { max_tokens: 20, ..request(&text(4, 20), None) }, 0).unwrap(); // 10 blocks
    let refused = driver.core.add_segment(&text(5, 20), 0, true, None, 0);
    assert_eq!(refused, Err(CoreError::Pinned { needed: 10, total: 16, pinned: 7 }));
    let never = driver.core.add(&Request { max_tokens: 20, ..request(&text(4, 40), None) }, 0);
    assert_eq!(never, Err(CoreError::Pinned { needed: 15, total: 16, pinned: 2 }));
    driver.core.abort(live);
    driver.drain();
    driver.core.clear_cache();
    assert!(driver.core.segment(0, &text(2, 8)).is_some_and(|info| info.pinned));
    assert_eq!(driver.core.pin_segment(0, &text(2, 8), false), Ok(true));
    driver.core.clear_cache();
    assert!(driver.core.segment(0, &text(2, 8)).is_none());
    assert_eq!(driver.core.pin_segment(0, &text(2, 8), true), Ok(false));
}

#[test]
fn a_full_queue_counts_who_waits_for_segments_but_not_their_makers() {
    let mut driver = Driver::new(config());
    for salt in 0..8 {
        let prompt = [text(20 + salt, 4), text(40 + salt, 4), vec![1]].concat();
        driver.add(&prompt, Some(blend(&[(0, 4), (4, 4)], &[], 0.0)));
    }
    let error = driver.core.add(&request(&[1], None), 0);
    assert_eq!(error, Err(CoreError::QueueFull { waiting: 8, max: 8 }));
    driver.drain();
    assert_eq!(driver.finished.len(), 8);
}
