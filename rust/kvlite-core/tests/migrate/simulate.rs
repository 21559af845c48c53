//! Long random lives: engines that come and go, requests that move all the time, faults of every kind; then the fair course.
//!
//! `KVLITE_MIGRATION_SEED=n` replays one seed, `KVLITE_MIGRATION_SEEDS=n` runs more of them; a failing seed is printed. The
//! control runs the same seeds with the fence off, and the checker has to see it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use kvlite_core::sched::migrate::{Limits, NOBODY};

use crate::actions::{Action, Fault};
use crate::engine::mix;
use crate::seeds::{for_each_seed, seeds};
use crate::world::World;

/// Enough for 10^5 moves.
const DEFAULT_SEEDS: u64 = 7_000;
/// Within so many seeds the checker must catch machines without their fence.
const CONTROL_SEEDS: u64 = 1_000;

/// splitmix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    fn chance(&mut self, per_mille: u64) -> bool {
        self.next() % 1000 < per_mille
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> Option<T> {
        (!of.is_empty()).then(|| of[self.below(of.len())])
    }
}

/// One life.
struct Simulation {
    rng: Rng,
    world: World,
    next_request: u64,
    num_orders: u64,
    num_faults: u64,
    /// Faults per thousand actions; whether frames may be lost, doubled and reordered.
    fault_rate: u64,
    lossy: bool,
    max_requests: usize,
}

impl Simulation {
    fn new(seed: u64, fenced: bool) -> Simulation {
        let mut rng = Rng(seed.wrapping_mul(0x1234_5678_9abc_def1));
        let limits = Limits {
            max_moves: rng.range(1, 4) as usize,
            max_inflight_bytes: rng.range(1, 40),
            block_bytes: 4,
            max_stages: rng.range(1, 4) as u32,
            reserve_ms: rng.range(5, 80) as i64,
            ack_ms: rng.range(5, 60) as i64,
            freeze_ms: rng.range(5, 60) as i64,
            claim_ms: rng.range(5, 30) as i64,
        };
        let wants_logprobs = rng.chance(300);
        let world = World::new(rng.range(2, 4) as i32, limits, fenced, wants_logprobs);
        let (fault_rate, lossy, max_requests) = ([0, 5, 20, 60][rng.below(4)], rng.chance(400), rng.below(5) + 1);
        Simulation { rng, world, next_request: 0, num_orders: 0, num_faults: 0, fault_rate, lossy, max_requests }
    }

    fn engines_up(&self) -> Vec<i32> {
        (0..self.world.engines.len() as i32).filter(|engine| !self.world.lost.contains(engine)).collect()
    }

    fn open_requests(&self) -> Vec<u64> {
        self.world.streams.iter().filter(|(_, stream)| !stream.is_over).map(|(&request, _)| request).collect()
    }

    fn arrive(&mut self) {
        let up = self.engines_up();
        if let Some(engine) = self.rng.pick(&up)
            && self.open_requests().len() < self.max_requests
        {
            let (num_choices, max_tokens) = (self.rng.range(1, 3) as usize, self.rng.range(2, 30) as usize);
            self.world.add(self.next_request, engine, num_choices, max_tokens);
            self.next_request += 1;
        }
    }

    fn order(&mut self) {
        let (up, open) = (self.engines_up(), self.open_requests());
        let (Some(to), Some(request)) = (self.rng.pick(&up), self.rng.pick(&open)) else { return };
        let owner = self.world.owner.owner(request);
        let accepted = self.world.order(request, to, self.rng.chance(200));
        let may = owner.is_some_and(|(engine, _)| engine != to && engine != NOBODY);
        assert!(may || !accepted, "no order to itself, or of what has no engine, is accepted");
        self.num_orders += u64::from(accepted);
    }

    fn fault(&mut self) {
        let faults: Vec<Fault> = self.world.faults().into_iter().filter(|fault| self.is_allowed(fault)).collect();
        if let Some(fault) = self.rng.pick(&faults) {
            self.num_faults += 1;
            self.world.act(Action::Fault(fault));
        }
    }

    fn is_allowed(&self, fault: &Fault) -> bool {
        match fault {
            Fault::Drop { .. } | Fault::Double { .. } | Fault::Overtake { .. } => self.lossy,
            Fault::Order { .. } => false,
            _ => true,
        }
    }

    fn regular(&mut self) {
        let mut actions = self.world.regular();
        // Tokens and time are cheap, messages make the difference.
        if self.rng.chance(600) {
            actions.retain(|action| !matches!(action, Action::Decode { .. } | Action::Tick { .. }));
        }
        match self.rng.pick(&actions) {
            Some(Action::Answer { engine, at }) => {
                let parts = self.rng.below(3) + 1;
                self.world.on(engine, |process, now_ms| process.answer(at, parts, false, now_ms));
            }
            Some(action) => self.world.act(action),
            None => {}
        }
    }

    fn run(&mut self) {
        for _ in 0..self.rng.range(200, 1500) {
            match self.rng.below(100) {
                0..4 => self.arrive(),
                4..14 => self.order(),
                14 => {
                    let engine = self.rng.below(self.world.engines.len()) as i32;
                    self.world.restart(engine);
                }
                _ if self.rng.chance(self.fault_rate) => self.fault(),
                _ => self.regular(),
            }
            self.world.now_ms += i64::from(self.rng.chance(300));
        }
        self.world.settle();
        self.world.assert_at_rest();
    }
}

#[test]
fn every_seed_delivers_every_token_once_and_gives_everything_back() {
    let seeds = seeds("KVLITE_MIGRATION_SEED", "KVLITE_MIGRATION_SEEDS", DEFAULT_SEEDS);
    let totals = Mutex::new(([0u64; 3], [0u64; 6]));
    let replay = |seed| format!("KVLITE_MIGRATION_SEED={seed} cargo test -p kvlite-core --test migrate");
    for_each_seed(&seeds, replay, |seed| {
        let mut simulation = Simulation::new(seed, true);
        simulation.run();
        let (sums, results) = &mut *totals.lock().unwrap();
        let counts = [simulation.num_orders, simulation.num_faults, simulation.next_request];
        sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        results.iter_mut().zip(simulation.world.num_moved).for_each(|(sum, n)| *sum += u64::from(n));
    });
    let ([orders, faults, requests], results) = *totals.lock().unwrap();
    println!(
        "{orders} moves of {requests} requests among {faults} faults; moved, refused, aborted, reclaimed, ended, failed: {results:?}"
    );
    assert_eq!(results.iter().sum::<u64>(), orders, "every order ends once");
    if seeds.end - seeds.start >= DEFAULT_SEEDS {
        assert!(orders >= 100_000, "{orders} moves");
        assert!(results.iter().all(|&count| count > 1_000), "the simulation reaches its corners");
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or_default().lines().next().unwrap_or_default().to_owned()
}

#[test]
fn without_the_fence_the_checker_goes_red_within_a_thousand_seeds() {
    let life = |seed| catch_unwind(AssertUnwindSafe(|| Simulation::new(seed, false).run()));
    let red: Vec<(u64, String)> =
        (0..CONTROL_SEEDS).filter_map(|seed| Some((seed, message(&*life(seed).err()?)))).collect();
    println!("{} of {CONTROL_SEEDS} seeds are red, the first is {:?}", red.len(), red.first());
    let two = red.iter().filter(|(_, message)| message.contains("both compute")).count();
    assert!(two > 0, "two engines that compute one request are seen: {:?}", red.iter().take(5).collect::<Vec<_>>());
}
