//! Blended KV found again: by the next turn of a conversation, by itself after a preemption, by nobody else.

use kvlite_core::{CoreConfig, FinishReason, Request, SpanOutcome};

use crate::driver::{Driver, QUERY, blend, config, request, text};

fn prompt() -> Vec<i32> {
    [text(1, 4), text(2, 8), text(3, 4)].concat()
}

const SPANS: [(u32, u32); 1] = [(4, 8)];

/// A first turn of 16 prompt and 2 output tokens, and the prompt of the second.
fn first_turn(driver: &mut Driver) -> Vec<i32> {
    driver.add(&prompt(), Some(blend(&SPANS, &QUERY, 0.25)));
    driver.drain();
    [prompt(), vec![90, 90], text(4, 3)].concat()
}

#[test]
fn a_follow_up_turn_hits_what_its_first_turn_blended() {
    let mut driver = Driver::new(config());
    let next = first_turn(&mut driver);
    let handle = driver.add(&next, Some(blend(&SPANS, &QUERY, 0.25)));
    let plan = driver.turn();
    assert_eq!(plan.admitted[0][4], 16, "four blocks, three of them blended");
    assert_eq!((plan.places.len(), plan.scores.len(), plan.rows[&0].clone()), (0, 0, (16..21).collect()));
    let report = driver.core.reuse_report(handle).unwrap();
    assert_eq!((report.prefix_tokens, report.computed_tokens, &*report.spans), (16, 5, &[SpanOutcome::Recipe][..]));
    driver.drain();
    assert_eq!(driver.core.stats().num_recipes, 1, "both turns have one recipe");
}

#[test]
fn rows_behind_a_shorter_hit_are_placed_and_replayed_without_scoring() {
    let mut driver = Driver::new(CoreConfig { num_blocks: 16, ..config() });
    let next = first_turn(&mut driver);
    driver.add(&text(7, 47), None); // 12 blocks: evicts the segment's and the conversation's tail
    driver.drain();
    driver.precompute(&text(2, 8), false);
    driver.add(&next, Some(blend(&SPANS, &QUERY, 0.25)));
    let plan = driver.turn();
    let hit = plan.admitted[0][4];
    assert!((4..16).contains(&hit), "{hit}");
    assert_eq!(plan.scores.len(), 0);
    driver.drain();
}

#[test]
fn another_rule_tenant_or_text_finds_no_blended_block() {
    let mut driver = Driver::new(config());
    let next = first_turn(&mut driver);
    let mut other_text = next.clone();
    other_text[14] += 1;
    let mut other_method = blend(&SPANS, &QUERY, 0.25);
    other_method.ratio = 0.5;
    let asked = [
        (request(&next, Some(other_method)), 4),
        (Request { tenant: 1, ..request(&next, Some(blend(&SPANS, &QUERY, 0.25))) }, 0),
        (request(&other_text, Some(blend(&SPANS, &QUERY, 0.25))), 4),
        (request(&next, Some(blend(&[(4, 7)], &QUERY, 0.25))), 4),
        (request(&next, None), 4),
    ];
    for (asked, expected) in asked {
        let handle = driver.core.add(&asked, 0).unwrap();
        let plans = driver.drain();
        let cached = plans.iter().flat_map(|plan| &plan.admitted).find(|row| row[0] == handle).unwrap()[4];
        assert_eq!(cached, expected);
        let next = first_turn(&mut driver);
        assert_eq!(next.len(), 21);
    }
}

#[test] // found by `simulate`: its last row was computed as new, under the label of the recipe that places it
fn a_prompt_that_ends_in_its_document_does_not_go_by_the_recipe_of_a_longer_one() {
    let mut driver = Driver::new(config());
    driver.add(&prompt(), Some(blend(&SPANS, &[], 0.0)));
    driver.drain();
    driver.add(&prompt()[..12], Some(blend(&SPANS, &[], 0.0)));
    let plan = driver.turn();
    assert_eq!(plan.admitted[0][4], 4, "what lies before the document is exact");
    assert_eq!((&plan.places[..], &plan.rows[&0][..]), (&[[0, 4, 7, 0]][..], &[11][..]));
    driver.drain();
    assert_eq!(driver.core.stats().num_recipes, 2, "one places the document's last row, the other does not");
}

#[test]
fn recipes_whose_blocks_are_gone_are_forgotten() {
    let mut driver = Driver::new(config());
    for salt in 0..200 {
        let prompt = [text(1, 4), text(2, 8), vec![salt % 90, salt / 90, 3, 4]].concat();
        driver.add(&prompt, Some(blend(&SPANS, &QUERY, 0.25)));
        driver.drain();
    }
    let stats = driver.core.stats();
    assert!((2..=130).contains(&stats.num_recipes), "{} recipes for 64 blocks", stats.num_recipes);
}

#[test]
fn choices_share_the_blended_prompt_and_each_ends() {
    let mut driver = Driver::new(config());
    let asked = prompt();
    let asked = Request { n: 3, max_tokens: 6, ..request(&asked[..15], Some(blend(&SPANS, &QUERY, 0.25))) };
    let handle = driver.core.add(&asked, 0).unwrap();
    let plans = driver.drain();
    let placed: usize = plans.iter().map(|plan| plan.places.len()).sum();
    assert_eq!((placed, plans.iter().filter(|plan| !plan.scores.is_empty()).count()), (1, 1));
    assert_eq!(plans.iter().map(|plan| plan.samples).max(), Some(3));
    assert_eq!(driver.finished, [0, 1, 2].map(|choice| [handle, choice, FinishReason::Length as i32]));
}

#[test]
fn preempted_after_its_rows_were_chosen_a_request_replays_them_and_before_it_starts_over() {
    let mut seen: Vec<usize> = Vec::new();
    for (wait, tokens) in (5..14).flat_map(|tokens| [(0, tokens), (1, tokens)]) {
        // The document is pinned in 2 blocks, the prompt takes 4, and the old one's third is not there.
        let mut driver = Driver::new(CoreConfig { num_blocks: 8, max_num_batched_tokens: tokens, ..config() });
        driver.precompute(&text(2, 8), true);
        driver.core.add(&Request { max_tokens: 20, ..request(&[5, 6, 7, 8, 9], None) }, 0).unwrap();
        (0..=wait).for_each(|_| drop(driver.turn()));
        let asked = prompt();
        let asked = Request { max_tokens: 1, ..request(&asked, Some(blend(&SPANS, &QUERY, 0.25))) };
        let blended = driver.core.add(&asked, 0).unwrap();
        let plans = driver.drain();
        if driver.core.stats().preemptions_total == 0 {
            continue; // It was through before the old one needed its block.
        }
        assert_eq!(driver.finished.last(), Some(&[blended, 0, 1]));
        let back = plans.iter().rposition(|plan| !plan.admitted.is_empty()).unwrap();
        let (cause, places) = (plans[back].admitted[0][3], plans[back].places.len());
        assert_eq!((cause, places), (1, 1), "it comes back and places again");
        seen.push(plans[back..].iter().map(|plan| plan.scores.len()).sum());
    }
    assert!(seen.contains(&0) && seen.contains(&1), "replayed without scores and started over: {seen:?}");
}

#[test]
fn decode_steps_repair_further_rows_by_what_the_newest_token_attends_to_and_publish_none_of_it() {
    let mut driver = Driver::new(config());
    driver.precompute(&text(2, 8), false);
    let prompt = prompt();
    let mut blend = blend(&SPANS, &QUERY, 0.25);
    blend.decode_rows = 2;
    let asked = Request { max_tokens: 6, n: 2, ..request(&prompt, Some(blend)) };
    let handle = driver.core.add(&asked, 0).unwrap();
    driver.turn();
    assert_eq!(driver.turn().rows[&0], [10, 11, 12, 13, 14, 15]);
    driver.score = |at| (-at as f32, 0.0); // From here on low positions weigh most; values stay.
    let mut own = Vec::new();
    for at in 16..20 {
        let plan = driver.turn();
        own.push(plan.rows[&0].clone());
        assert_eq!(plan.scores.iter().any(|score| (&score.0[..], score.3) == (&[at], 1)), at < 19);
    }
    assert_eq!(own, [vec![8, 9, 16], vec![4, 5, 17], vec![6, 7, 18], vec![19]]);
    let plans = driver.drain();
    let last = plans.iter().flat_map(|plan| &plan.admitted).next_back();
    assert!(last.is_none_or(|row| row[1] == 1));
    let mut ends = driver.finished[1..].to_vec();
    ends.sort_unstable();
    assert_eq!(ends, [[handle, 0, 1], [handle, 1, 1]]);
    let follow_up = [prompt.clone(), vec![90; 6], vec![1]].concat();
    driver.core.add(&request(&follow_up, Some(blend)), 0).unwrap();
    assert_eq!(driver.turn().admitted[0][4], 4, "only what lies before the document is found");
    driver.drain();
}
