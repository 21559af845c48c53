//! Place, score, recompute: which rows a plan holds for which hit pattern.

use kvlite_core::{CoreError, FinishReason, Request, Round, Scope, SpanOutcome};

use crate::driver::{Driver, QUERY, blend, config, request, text};

/// [4 new][8 document][2 new]
fn prompt() -> Vec<i32> {
    [text(1, 4), text(2, 8), text(3, 2)].concat()
}

const SPANS: [(u32, u32); 1] = [(4, 8)];

#[test]
fn a_warm_segment_is_placed_scored_and_its_best_quarter_computed_again() {
    let mut driver = Driver::new(config());
    driver.precompute(&text(2, 8), false);
    let handle = driver.add(&prompt(), Some(blend(&SPANS, &QUERY, 0.25)));
    let first = driver.turn();
    assert_eq!(first.places, [[0, 4, 8, 0]]);
    assert_eq!(first.rows[&0], [0, 1, 2, 3, 12, 13], "the round runs new rows");
    assert_eq!(first.scores, [(vec![12, 13], 4, 12, 0)], "those behind the document score it");
    assert_eq!(first.samples, 0);
    let report = driver.core.reuse_report(handle).unwrap().clone();
    assert_eq!((report.prefix_tokens, report.blended_tokens), (0, 6));
    assert_eq!((report.recomputed_tokens, report.computed_tokens), (2, 6));
    assert_eq!(*report.spans, [SpanOutcome::Hit]);
    let second = driver.turn();
    assert_eq!(second.rows[&0], [10, 11, 12, 13], "the best two of eight, and new rows that see them");
    assert_eq!((second.places.len(), second.scores.len(), second.samples), (0, 0, 1));
    driver.drain();
    assert_eq!(driver.finished.last(), Some(&[handle, 0, FinishReason::Length as i32]));
    let stats = driver.core.stats();
    assert_eq!((stats.segment_hit_tokens_total, stats.blended_tokens_total, stats.recomputed_tokens_total), (8, 6, 2));
}

#[test]
fn ties_go_to_lower_positions_and_no_number_is_the_lowest_score() {
    for (score, expected) in [
        ((|_| (1.0, 1.0)) as fn(i32) -> (f32, f32), [4, 5]),
        (|at| if at < 6 { (f32::NAN, 1.0) } else { (1.0, 1.0) }, [6, 7]),
        (|at| if at == 9 { (2.0, -1.0) } else { (0.0, at as f32 - 20.0) }, [4, 5]),
    ] {
        let mut driver = Driver::new(config());
        driver.score = score;
        driver.precompute(&text(2, 8), false);
        driver.add(&prompt(), Some(blend(&SPANS, &QUERY, 0.25)));
        let plans = driver.drain();
        assert_eq!(plans[1].rows[&0][..2], expected);
    }
}

#[test]
fn ratios_zero_and_one_need_no_round() {
    for (ratio, expected) in [(0.0, vec![0, 1, 2, 3, 12, 13]), (1.0, (0..14).collect())] {
        let mut driver = Driver::new(config());
        driver.precompute(&text(2, 8), false);
        driver.add(&prompt(), Some(blend(&SPANS, &QUERY, ratio)));
        let plan = driver.turn();
        assert_eq!(plan.rows[&0], expected);
        assert_eq!((plan.places.len(), plan.scores.len(), plan.samples), (1, 0, 1));
        driver.drain();
    }
}

#[test]
fn a_static_rule_goes_by_the_requests_own_scores() {
    let mut driver = Driver::new(config());
    driver.precompute(&text(2, 8), false);
    let scores: Vec<f32> = (0..14).map(|at| if at == 7 || at == 5 { 2.0 } else { 1.0 }).collect();
    let mut asked = blend(&SPANS, &[], 0.25);
    asked.scores = Some(&scores);
    driver.add(&prompt(), Some(asked));
    assert_eq!(driver.turn().rows[&0], [0, 1, 2, 3, 5, 7, 12, 13]);
    driver.drain();
}

#[test]
fn rounds_over_all_rows_filter_what_the_round_before_kept() {
    let rounds = [(0.25, 0.5), (0.5, 0.25)].map(|(cost, ratio)| Round { scope: Scope::All, cost, ratio });
    let mut driver = Driver::new(config());
    driver.score = |at| (1.0, (at % 5) as f32); // 4: 4, 5: 0, 6: 1, 7: 2, 8: 3, 9: 4, 10: 0, 11: 1
    driver.precompute(&text(2, 8), false);
    driver.add(&prompt(), Some(blend(&SPANS, &rounds, 0.25)));
    let plans = driver.drain();
    assert_eq!(plans[0].rows[&0], (0..14).collect::<Vec<_>>());
    assert_eq!(plans[0].scores, [((0..14).collect(), 4, 12, 0)]);
    assert_eq!(plans[1].rows[&0], [0, 1, 2, 3, 4, 7, 8, 9, 12, 13]);
    assert_eq!(plans[1].scores[0].3, 1);
    assert_eq!(plans[2].rows[&0], [0, 1, 2, 3, 4, 9, 12, 13]);
}

#[test]
fn chunks_of_a_round_are_scored_together_before_anything_is_chosen() {
    let rounds = [Round { scope: Scope::All, cost: 1.0, ratio: 0.25 }];
    let mut driver = Driver::new(kvlite_core::CoreConfig { max_num_batched_tokens: 5, ..config() });
    driver.precompute(&text(2, 8), false);
    driver.add(&prompt(), Some(blend(&SPANS, &rounds, 0.25)));
    let plans = driver.drain();
    let rows: Vec<_> = plans.iter().map(|plan| plan.rows[&0].clone()).collect();
    // Five tokens at position 0 buy four rows further back.
    let expected: [&[i32]; 6] =
        [&[0, 1, 2, 3], &[4, 5, 6, 7], &[8, 9, 10, 11], &[12, 13], &[0, 1, 2, 3], &[10, 11, 12, 13]];
    assert_eq!(rows[..6], expected);
    assert_eq!(plans.iter().map(|plan| plan.scores.len()).collect::<Vec<_>>()[..5], [1, 1, 1, 1, 0]);
}

#[test]
fn rows_that_score_share_a_plan_where_they_can() {
    let mut driver = Driver::new(kvlite_core::CoreConfig { max_num_batched_tokens: 8, ..config() });
    driver.precompute(&text(2, 8), false);
    let prompt = [text(1, 4), text(2, 8), text(3, 6)].concat();
    driver.add(&prompt, Some(blend(&SPANS, &QUERY, 0.25)));
    let plans = driver.drain();
    assert_eq!(plans[0].rows[&0], [0, 1, 2, 3], "not the fifth, which would part the six that score");
    assert_eq!(plans[1].scores, [((12..18).collect(), 4, 12, 0)]);
}

#[test]
fn a_plan_made_while_scores_are_in_flight_leaves_the_sequence_out() {
    let mut driver = Driver::new(config());
    driver.precompute(&text(2, 8), false);
    driver.add(&prompt(), Some(blend(&SPANS, &QUERY, 0.25)));
    assert_eq!(driver.step().scores.len(), 1);
    assert!(driver.step().rows.is_empty(), "the plan before it is not complete");
    driver.complete_both();
    assert_eq!(driver.turn().samples, 1);
    driver.drain();
}

/// Documents, where they stand, what becomes of them.
type Pattern<'a> = (&'a [&'a [i32]], &'a [(u32, u32)], &'a [SpanOutcome]);

#[test]
fn every_hit_pattern_places_what_is_there_and_computes_the_rest() {
    use SpanOutcome::{Hit, Made};
    let (a, b) = (text(5, 6), text(6, 1));
    let patterns: [Pattern<'_>; 5] = [
        (&[&a, &b], &[(2, 6), (10, 1)], &[Hit, Hit]),
        (&[&b, &a], &[(2, 1), (5, 6)], &[Hit, Hit]),  // reordered
        (&[&a, &a], &[(2, 6), (10, 6)], &[Hit, Hit]), // the same twice
        (&[&a, &text(8, 3)], &[(2, 6), (10, 3)], &[Hit, Made]),
        (&[&text(8, 3), &a], &[(2, 3), (7, 6)], &[Made, Hit]),
    ];
    for (documents, spans, outcomes) in patterns {
        let mut driver = Driver::new(config());
        driver.precompute(&a, false);
        driver.precompute(&b, false);
        let mut prompt = Vec::new();
        for (document, &(start, _)) in documents.iter().zip(spans) {
            prompt.extend((prompt.len() as i32..start as i32).map(|at| 80 + at % 9));
            prompt.extend_from_slice(document);
        }
        prompt.extend([1, 2, 3]);
        let handle = driver.add(&prompt, Some(blend(spans, &[], 0.0)));
        let mut places = Vec::new();
        while driver.core.reuse_report(handle).is_none() {
            places = driver.turn().places;
        }
        let report = driver.core.reuse_report(handle).unwrap();
        assert_eq!(*report.spans, *outcomes);
        let placed: Vec<_> = places.iter().map(|place| (place[1] as u32, place[2] as u32)).collect();
        assert_eq!(placed, spans);
        driver.drain();
    }
}

#[test]
fn the_prompts_last_token_is_always_computed() {
    let mut driver = Driver::new(config());
    driver.precompute(&text(2, 8), false);
    let prompt = text(2, 8);
    let handle = driver.add(&prompt, Some(blend(&[(0, 8)], &[], 0.0)));
    let plan = driver.turn();
    assert_eq!((plan.places.clone(), plan.rows[&0].clone(), plan.samples), (vec![[0, 0, 7, 0]], vec![7], 1));
    assert_eq!(driver.core.reuse_report(handle).unwrap().blended_tokens, 7);
    driver.drain();
    let single = driver.add(&[5], Some(blend(&[(0, 1)], &[], 0.0)));
    while driver.core.reuse_report(single).is_none() {
        driver.turn();
    }
    assert_eq!(*driver.core.reuse_report(single).unwrap().spans, [SpanOutcome::Hole]);
    driver.drain();
}

#[test]
fn exact_prefix_hits_are_trimmed_off_the_spans_and_get_no_budget() {
    let mut driver = Driver::new(config());
    driver.precompute(&text(2, 8), false);
    let exact: Vec<i32> = prompt()[..9].to_vec();
    driver.add(&exact, None);
    driver.drain();
    let handle = driver.add(&prompt(), Some(blend(&SPANS, &[], 0.5)));
    let plan = driver.turn();
    assert_eq!(plan.admitted[0][4], 8, "two full blocks");
    assert_eq!(plan.places, [[0, 8, 4, 4]]);
    assert_eq!(plan.rows[&0], [8, 9, 12, 13], "half of the four rows that are left");
    assert_eq!(driver.core.reuse_report(handle).unwrap().prefix_tokens, 8);
    driver.drain();
    driver.add(&[prompt(), vec![1]].concat(), None);
    assert_eq!(driver.turn().admitted[0][4], 8, "an exact request gets nothing that was blended");
    driver.drain();
}

#[test]
fn a_bad_blend_is_refused_with_what_would_be_right() {
    let mut driver = Driver::new(config());
    let prompt = prompt();
    let spans_of = |spans: &'static [(u32, u32)]| blend(spans, &[], 0.5);
    let refused = [
        (spans_of(&[(4, 0)]), CoreError::Span { index: 0, start: 4, len: 0, low: 0, high: 14 }),
        (spans_of(&[(4, 4), (7, 2)]), CoreError::Span { index: 1, start: 7, len: 2, low: 8, high: 14 }),
        (spans_of(&[(4, 11)]), CoreError::Span { index: 0, start: 4, len: 11, low: 0, high: 14 }),
        (spans_of(&[(4, u32::MAX)]), CoreError::Span { index: 0, start: 4, len: u32::MAX, low: 0, high: 14 }),
        (spans_of(&[(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)]), CoreError::TooManySpans { count: 5, max: 4 }),
        (blend(&SPANS, &[], 1.5), CoreError::Share { field: "ratio", value: 1.5 }),
    ];
    for (asked, error) in refused {
        assert_eq!(driver.core.add(&request(&prompt, Some(asked)), 0), Err(error));
    }
    let nan = driver.core.add(&request(&prompt, Some(blend(&SPANS, &[], f64::NAN))), 0);
    assert!(matches!(nan, Err(CoreError::Share { field: "ratio", .. })));
    let asked = Request { prompt_logprobs: true, ..request(&prompt, Some(blend(&SPANS, &[], 0.5))) };
    assert_eq!(driver.core.add(&asked, 0), Err(CoreError::BlendedLogprobs));
    assert_eq!(driver.core.stats().num_segments, 0, "nothing has changed");
}
