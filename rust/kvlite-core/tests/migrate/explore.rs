//! Every interleaving of small worlds: each state is visited once, in each the checker looks, and from some of them (all that
//! have nothing left to do among them) the fair course must bring everything to rest. The number of states is printed.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use kvlite_core::sched::migrate::Limits;

use crate::actions::{Action, Fault};
use crate::world::World;

/// Time stands still: every deadline is due at once, so a tick can come at any moment.
fn limits() -> Limits {
    Limits {
        max_moves: 4,
        max_inflight_bytes: 1 << 30,
        block_bytes: 4,
        max_stages: 2,
        reserve_ms: 0,
        ack_ms: 0,
        freeze_ms: 0,
        claim_ms: 0,
    }
}

/// One small world and what may go wrong in it.
struct Scene {
    name: &'static str,
    world: World,
    /// Faults in one course of events.
    faults: u32,
    allowed: fn(&Fault) -> bool,
    /// From one state in this many the fair course is followed to its end.
    settle_one_in: u64,
}

#[derive(Clone)]
struct State {
    world: World,
    faults: u32,
    trail: Option<Rc<Trail>>,
}

/// How a state came about, to be printed.
struct Trail {
    action: Action,
    before: Option<Rc<Trail>>,
}

fn steps(trail: &Option<Rc<Trail>>) -> Vec<Action> {
    let mut steps: Vec<Action> =
        std::iter::successors(trail.as_deref(), |step| step.before.as_deref()).map(|step| step.action).collect();
    steps.reverse();
    steps
}

fn fingerprint(state: &State) -> u64 {
    let mut hasher = DefaultHasher::new();
    (&state.world, state.faults).hash(&mut hasher);
    hasher.finish()
}

/// Visits every state; returns how many there are.
fn explore(scene: &Scene) -> usize {
    let mut seen = HashSet::new();
    let mut stack = vec![State { world: scene.world.clone(), faults: scene.faults, trail: None }];
    seen.insert(fingerprint(&stack[0]));
    while let Some(state) = stack.pop() {
        let mut actions = state.world.regular();
        if actions.is_empty() && state.world.engines.iter().all(Option::is_some) {
            state.world.assert_at_rest();
        }
        if state.faults > 0 {
            actions.extend(state.world.faults().into_iter().filter(scene.allowed).map(Action::Fault));
        }
        for action in actions {
            let mut next = state.clone();
            next.trail = Some(Rc::new(Trail { action, before: next.trail.take() }));
            next.faults -= u32::from(matches!(action, Action::Fault(_)));
            let mut print = 0;
            let step = catch_unwind(AssertUnwindSafe(|| {
                next.world.act(action);
                print = fingerprint(&next);
                if print % scene.settle_one_in == 0 && !seen.contains(&print) {
                    let mut world = next.world.clone();
                    world.settle();
                    world.assert_at_rest();
                }
            }));
            if let Err(panic) = step {
                eprintln!("{}: {:?}", scene.name, steps(&next.trail));
                resume_unwind(panic);
            }
            if seen.insert(print) {
                stack.push(next);
            }
        }
    }
    println!("{}: {} states", scene.name, seen.len());
    seen.len()
}

/// `num_requests` on engines in turn, each with two tokens, each ordered to the next engine.
fn world(num_requests: u64, num_engines: i32, max_tokens: usize, replay: bool, wants_logprobs: bool) -> World {
    let mut world = World::new(num_engines, limits(), true, wants_logprobs);
    for request in 0..num_requests {
        let engine = request as i32 % num_engines;
        world.add(request, engine, 1, max_tokens);
        world.deliver(-1, engine, 0, false);
        assert!(world.order(request, (engine + 1) % num_engines, replay));
    }
    world
}

fn any(_: &Fault) -> bool {
    true
}

/// Engines and links that fail, wrongly suspected engines, lost and doubled frames.
fn hard(fault: &Fault) -> bool {
    use Fault::{Cut, Double, Drop, GiveUp, Kill, Overtake};
    matches!(fault, Kill { .. } | GiveUp { .. } | Cut { .. } | Drop { .. } | Double { .. } | Overtake { .. })
}

#[test]
fn one_request_survives_any_one_fault_at_any_moment() {
    for (name, replay, wants_logprobs) in
        [("copy", false, false), ("replay", true, false), ("copy with log-probabilities", false, true)]
    {
        let world = world(1, 2, 2, replay, wants_logprobs);
        let count = explore(&Scene { name, world, faults: 1, allowed: any, settle_one_in: 16 });
        assert!(count > 1_000, "the scene {name} has {count} states");
    }
}

/// Orders at any moment beside what a network may do to frames.
fn orders(fault: &Fault) -> bool {
    matches!(fault, Fault::Order { .. } | Fault::Overtake { .. } | Fault::Double { .. })
}

/// More than fits into every run; `make soak` asks for it.
fn is_deep() -> bool {
    std::env::var_os("KVLITE_EXPLORE_DEEP").is_some()
}

#[test]
fn one_request_survives_any_two_hard_faults() {
    for (name, replay) in [("copy, 2 hard faults", false), ("replay, 2 hard faults", true)] {
        let world = world(1, 2, if is_deep() { 2 } else { 1 }, replay, false);
        let count = explore(&Scene { name, world, faults: 2, allowed: hard, settle_one_in: 64 });
        assert!(count > 10_000, "the scene {name} has {count} states");
    }
}

#[test]
fn one_request_moves_there_and_back_whatever_overtakes_what() {
    let faults = if is_deep() { 3 } else { 2 };
    let world = world(1, 2, 1, false, false);
    let count = explore(&Scene { name: "there and back", world, faults, allowed: orders, settle_one_in: 64 });
    assert!(count > 10_000, "the scene has {count} states");
}

#[test]
fn two_requests_pass_each_other_in_opposite_directions() {
    let (replay, faults) = if is_deep() { (false, 1) } else { (true, 0) };
    let world = world(2, 2, 1, replay, false);
    let count = explore(&Scene { name: "two opposite ways", world, faults, allowed: hard, settle_one_in: 64 });
    assert!(count > 10_000, "the scene has {count} states");
}
