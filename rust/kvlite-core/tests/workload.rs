//! A whole workload at hand, and the policy `prefix-grouped`: groups together, steps full while prefixes are computed, the
//! bound on waiting.

mod common;

use common::Asked;
use common::engine::{Engine, small_config};
use kvlite_core::plan::Header;
use kvlite_core::{CoreConfig, PolicyKind};

/// `shared` tokens of the group, then `own` of the member.
fn prompt(group: i32, shared: i32, member: i32, own: i32) -> Vec<i32> {
    let beginning = (0..shared).map(|at| (group * 7 + at * 3) % 90);
    beginning.chain((0..own).map(|at| (member * 11 + at * 5 + 1) % 90)).collect()
}

fn asked(group: i32, member: i32) -> Asked {
    Asked { seed: (group * 100 + member) as u64, ..Asked::new(&prompt(group, 16, member, 4), 3) }
}

/// Four groups of four; who arrives next is of another group.
fn interleaved(engine: &mut Engine) -> Vec<(i32, i32)> {
    (0..16).map(|at| (at % 4, engine.add(asked(at % 4, at / 4)).unwrap())).collect()
}

/// Groups in the order in which their members are admitted, and steps until all have ended.
fn admissions(engine: &mut Engine, handles: &[(i32, i32)]) -> (Vec<i32>, usize) {
    let (mut order, mut steps) = (vec![], 0);
    let mut left = handles.to_vec();
    while engine.num_live() > 0 {
        engine.turn();
        steps += 1;
        assert!(steps < 500);
        left.retain(|&(group, handle)| {
            let is_admitted = engine.told[&handle].admitted;
            order.extend(is_admitted.then_some(group));
            !is_admitted
        });
    }
    (order, steps)
}

fn runs(order: &[i32]) -> usize {
    order.chunk_by(|a, b| a == b).count()
}

fn config() -> CoreConfig {
    CoreConfig { max_num_batched_tokens: 8, max_num_seqs: 3, num_blocks: 20, ..small_config() }
}

#[test]
fn members_of_a_group_come_together_though_they_arrived_apart_and_compute_the_prefix_once() {
    let computed = |is_workload: bool| {
        let mut engine = Engine::new(config());
        engine.set_workload(is_workload);
        let handles = interleaved(&mut engine);
        let (order, _) = admissions(&mut engine, &handles);
        assert_eq!(order.len(), 16);
        (runs(&order), engine.core.stats().prefill_tokens_total)
    };
    let (apart, together) = (computed(false), computed(true));
    assert_eq!(together.1, 4 * 16 + 16 * 4, "what an infinite cache computes");
    assert!(together.0 <= 8 && apart.0 > 12 && apart.1 > together.1, "{together:?} against {apart:?}");
}

#[test]
fn while_a_prefix_is_computed_the_step_is_filled_with_the_next_group() {
    let rows_of_first_steps = |is_workload: bool| {
        let mut engine = Engine::new(CoreConfig { max_num_batched_tokens: 24, num_blocks: 64, ..config() });
        engine.set_workload(is_workload);
        for group in 0..2 {
            for member in 0..2 {
                engine.add(asked(group, member)).unwrap();
            }
        }
        engine.turn().header(Header::NumTokens)
    };
    assert_eq!(rows_of_first_steps(false), 20, "in order of arrival the follower holds up who is behind it");
    assert_eq!(rows_of_first_steps(true), 23, "attention to what is before them costs as much as the last row");
}

#[test]
fn who_is_passed_while_it_waits_for_a_prefix_keeps_its_row_and_its_blocks() {
    // One row is for the leader, one for the follower that it computes for: none is left for the second group.
    let mut engine = Engine::new(CoreConfig { max_num_batched_tokens: 24, max_num_seqs: 2, ..config() });
    engine.set_workload(true);
    let handles: Vec<i32> = [(0, 0), (0, 1), (1, 0)].map(|(g, m)| engine.add(asked(g, m)).unwrap()).to_vec();
    engine.turn();
    assert_eq!(handles.iter().map(|handle| engine.told[handle].admitted).collect::<Vec<_>>(), [true, false, false]);
    engine.turn();
    engine.turn();
    assert!(engine.told[&handles[1]].admitted && !engine.told[&handles[2]].admitted);
    engine.drain(50);
}

#[test]
fn a_group_larger_than_the_pool_runs_in_parts() {
    let mut engine = Engine::new(CoreConfig { num_blocks: 9, max_num_seqs: 4, ..config() });
    engine.set_workload(true);
    let handles: Vec<i32> = (0..12).map(|member| engine.add(asked(0, member)).unwrap()).collect();
    engine.drain(300);
    assert!(handles.iter().all(|handle| engine.output(*handle).len() == 3));
    assert!(engine.core.stats().prefill_tokens_total < 12 * 20 / 2, "the prefix stays while its group runs");
}

#[test]
fn a_lone_prompt_among_a_flood_of_one_group_is_passed_as_often_as_the_bound_says() {
    let config = CoreConfig { policy: PolicyKind::PrefixGrouped, max_passes: 5, max_num_seqs: 1, ..config() };
    let mut engine = Engine::new(config);
    engine.add(asked(0, 0)).unwrap();
    engine.turn();
    let lone = engine.add(Asked::new(&prompt(9, 40, 9, 4), 1)).unwrap();
    let mut passed = 0;
    for member in 1..12 {
        let next = engine.add(asked(0, member)).unwrap();
        while !engine.told[&next].admitted && !engine.told[&lone].admitted {
            engine.turn();
        }
        passed += i32::from(!engine.told[&lone].admitted);
    }
    assert_eq!(passed, 5);
    engine.drain(500);
}

#[test]
fn requests_under_way_when_the_workload_begins_and_after_it_ends_are_served() {
    let mut engine = Engine::new(config());
    let first = interleaved(&mut engine);
    engine.turn();
    engine.set_workload(true);
    engine.turn();
    let late = engine.add(asked(5, 5)).unwrap();
    for _ in 0..6 {
        engine.turn();
    }
    engine.set_workload(false);
    engine.drain(300);
    let ended = |handle: &i32| engine.output(*handle).len() == 3;
    assert!(first.iter().all(|(_, handle)| ended(handle)) && ended(&late));
}

#[test]
fn eviction_takes_what_the_arranged_order_needs_last_and_not_what_came_last() {
    // The second to come has more output for its prompt: it goes first while the whole workload is at hand.
    for (is_workload, expected) in [(false, [16, 8]), (true, [8, 16])] {
        let mut engine = Engine::new(CoreConfig { max_num_seqs: 1, num_blocks: 12, ..small_config() });
        let asked = |group: i32, max_tokens: u32| Asked::new(&prompt(group, 16, group, 1), max_tokens);
        for group in [2, 3] {
            engine.add(asked(group, 1)).unwrap();
            engine.drain(20);
        }
        engine.set_workload(is_workload);
        engine.add(Asked::new(&prompt(4, 4, 4, 0), 20)).unwrap(); // Six blocks; four are free.
        engine.turn();
        let waiting = [(2, 1), (3, 4)].map(|(group, max_tokens)| engine.add(asked(group, max_tokens)).unwrap());
        engine.drain(50);
        let cached = waiting.map(|handle| engine.told[&handle].cached_len[0]);
        assert_eq!(cached, expected, "a workload: {is_workload}");
    }
}
