//! Two engines by seed: requests of every kind arrive at either, move at random points with copies that take their time,
//! and are aborted, finished, timed out, broken off and replayed on the way. Every draw is checked against KV computed
//! naively, so a stream that moved is the stream that stayed. `KVLITE_SEED`, `KVLITE_SEEDS`, `KVLITE_STEPS` as in `simulate`.

use std::sync::Mutex;

use kvlite_core::{CoreConfig, CoreError, FinishReason};

use crate::common::engine::{Engine, Outcome};
use crate::common::moving::{Move, replay};
use crate::common::seeds::{for_each_seed, seeds, setting};
use crate::common::workload::{Texts, random_config};
use crate::common::{Asked, Rng};

const DEFAULT_SEEDS: u64 = 1_200;
const DEFAULT_STEPS: u64 = 120;

/// How often the interesting things happened.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    begun: u64,
    refused: u64,
    moved: u64,
    blocks: u64,
    moved_blends: u64,
    moved_choices: u64,
    moved_waiting: u64,
    aborted: u64,
    expired: u64,
    ended: u64,
    replayed: u64,
}

/// A move under way.
struct Under {
    from: usize,
    moving: Move,
    is_frozen: bool,
    has_tail: bool,
}

struct Fleet {
    rng: Rng,
    engines: [Engine; 2],
    texts: Texts,
    blended: u64,
    eager: u64,
    with_faults: bool,
    moves: Vec<Under>,
    seen: Seen,
}

impl Fleet {
    fn new(seed: u64) -> Fleet {
        let mut rng = Rng(seed.wrapping_mul(0x9876_5432_1abc_def1));
        let config = random_config(&mut rng);
        let texts = Texts::new(&mut rng, &config);
        let other = random_config(&mut rng);
        // What both must have in common; pool, rows, budget, watermark and caching may differ.
        let other = CoreConfig {
            block_size: config.block_size,
            vocab_size: config.vocab_size,
            max_model_len: config.max_model_len,
            model_digest: config.model_digest,
            canonical_prefix: config.canonical_prefix.clone(),
            max_segments: config.max_segments,
            policy: config.policy, // Levels of priority, or none.
            num_blocks: other.num_blocks + 8,
            max_num_seqs: other.max_num_seqs + 2,
            max_num_batched_tokens: other.max_num_batched_tokens + 2,
            ..other
        };
        let blended = [0, 40, 80][rng.range(0, 2) as usize];
        let eager = [100, 0, 50][rng.range(0, 2) as usize];
        let with_faults = rng.chance(25);
        let engines = [Engine::new(config), Engine::new(other)];
        Fleet { rng, engines, texts, blended, eager, with_faults, moves: Vec::new(), seen: Seen::default() }
    }

    fn arrive(&mut self) {
        let engine = &mut self.engines[self.rng.range(0, 1) as usize];
        let (rng, config) = (&mut self.rng, engine.core.config());
        let asked = if !rng.chance(self.blended) {
            self.texts.plain(rng, config, engine.now_ms)
        } else if rng.chance(5) {
            self.texts.precompute(rng, config, engine.now_ms)
        } else {
            self.texts.blended(rng, config, engine.now_ms)
        };
        let (precomputes, contradicts) = (asked.precompute.is_some(), asked.blend.is_some() && asked.prompt_logprobs);
        if let Err(error) = engine.add(asked) {
            let is_known = match error {
                CoreError::NeverFits { .. } => true,
                CoreError::SegmentTooLong { .. } => precomputes,
                CoreError::BlendedLogprobs => contradicts,
                error => error.is_capacity(),
            };
            assert!(is_known, "a good request is refused");
        }
    }

    fn interfere(&mut self) {
        let engine = &mut self.engines[self.rng.range(0, 1) as usize];
        let handles: Vec<i32> = engine.told.keys().copied().collect();
        let Some(&handle) = handles.get(self.rng.range(0, handles.len().max(1) as u64 - 1) as usize) else { return };
        match self.rng.range(0, 99) {
            0..3 => drop(engine.abort(handle)),
            3..7 => {
                let choice = self.rng.range(0, u64::from(engine.asked[&handle].n)) as u32;
                engine.finish(handle, choice, 0, FinishReason::Stop);
            }
            7 => engine.core.clear_cache(),
            _ => {}
        }
    }

    fn begin_move(&mut self) {
        let from = self.rng.range(0, 1) as usize;
        let is_free = |handle: i32| !self.moves.iter().any(|under| under.from == from && under.moving.handle == handle);
        let live = self.engines[from].told.iter().filter(|(_, told)| told.finished.contains(&None));
        let runs_only = self.rng.chance(70);
        let live = live.filter(|(_, told)| !runs_only || told.outputs.iter().any(|output| !output.is_empty()));
        let handles: Vec<i32> = live.map(|(&handle, _)| handle).filter(|&handle| is_free(handle)).collect();
        let Some(&handle) = handles.get(self.rng.range(0, handles.len().max(1) as u64 - 1) as usize) else { return };
        let deadline = self.rng.chance(30).then(|| self.engines[from].now_ms + self.rng.range(1, 12) as i64);
        let precomputes = self.engines[from].asked[&handle].precompute.is_some();
        let [source, destination] = pair(&mut self.engines, from);
        match Move::begin(source, destination, handle, deadline) {
            Ok(moving) => {
                assert!(!precomputes, "what makes a segment stays");
                self.seen.begun += 1;
                self.moves.push(Under { from, moving, is_frozen: false, has_tail: false });
            }
            Err(error) => {
                let is_known = match error {
                    CoreError::MakesSegment { .. } => precomputes,
                    CoreError::UnknownHandle { .. } => true, // It has ended, and nobody was told yet.
                    CoreError::NeverFits { .. } | CoreError::Choices { .. } => true,
                    CoreError::Manifest { what } => what.contains("longer than the limits"),
                    error => error.is_capacity(),
                };
                assert!(is_known, "a good move is refused");
                self.seen.refused += 1;
            }
        }
    }

    /// One random thing happens to each move.
    fn advance(&mut self, quiet: bool) {
        for mut under in std::mem::take(&mut self.moves) {
            let from = under.from;
            let handle = under.moving.handle;
            let [source, destination] = pair(&mut self.engines, from);
            let Ok(at_rest) = source.core.is_frozen(handle) else {
                self.seen.ended += 1;
                assert!(!under.moving.abort(source, destination), "a request that has ended does not go on");
                continue;
            };
            let event = self.rng.range(0, 99);
            if event < 3 {
                self.seen.aborted += 1;
                assert!(under.moving.abort(source, destination), "an aborted move leaves the request at work");
                continue;
            }
            if under.moving.num_copies() > 0 && (event < 40 || quiet) {
                if under.moving.land(source, destination) {
                    self.moves.push(under);
                } else {
                    self.seen.expired += 1;
                    under.moving.abort(source, destination);
                }
                continue;
            }
            if !under.is_frozen && (event < 55 || quiet) {
                source.core.freeze(handle).expect("it lives");
                source.told.get_mut(&handle).expect("it lives").moved = true;
                under.is_frozen = true;
            } else if !under.has_tail && (event < 80 || at_rest) {
                if under.moving.stage(source, destination).is_err() {
                    self.seen.expired += 1;
                    under.moving.abort(source, destination);
                    continue;
                }
                under.has_tail = at_rest;
            } else if under.has_tail && at_rest {
                self.end_move(under, event);
                continue;
            }
            self.moves.push(under);
        }
    }

    fn end_move(&mut self, under: Under, event: u64) {
        let (from, handle) = (under.from, under.moving.handle);
        let [source, destination] = pair(&mut self.engines, from);
        if event > 90 {
            let told = &source.told[&handle];
            let is_known = told.finished.contains(&None);
            if is_known && replay(source, destination, handle).is_ok() {
                self.seen.replayed += 1;
                assert!(!under.moving.abort(source, destination), "it is gone from here");
            } else {
                under.moving.abort(source, destination);
            }
            return;
        }
        let asked: Asked = source.asked[&handle].clone();
        let num_blocks = under.moving.num_blocks;
        match under.moving.hand_over(source, destination) {
            Ok(_) => {
                self.seen.moved += 1;
                self.seen.blocks += num_blocks as u64;
                self.seen.moved_blends += u64::from(asked.blend.is_some() && num_blocks > 0);
                self.seen.moved_choices += u64::from(asked.n > 1 && num_blocks > 0);
                self.seen.moved_waiting += u64::from(num_blocks == 0);
            }
            Err((moving, error)) => {
                assert!(matches!(error, CoreError::UnknownTicket { .. } | CoreError::NotFilled { .. }), "{error}");
                self.seen.expired += 1;
                moving.abort(source, destination);
            }
        }
    }

    fn turn(&mut self, quiet: bool) {
        for engine in &mut self.engines {
            if !quiet && self.rng.chance(15) && engine.num_in_flight() < 2 {
                continue;
            }
            engine.step();
            while engine.num_in_flight() > 1 || (engine.num_in_flight() == 1 && self.rng.chance(self.eager)) {
                let breaks = !quiet && self.with_faults && self.rng.chance(2);
                engine.complete(if breaks { Outcome::Failed { garbage: true } } else { Outcome::Ok });
            }
        }
        let now_ms = self.engines[0].now_ms + self.rng.range(0, 2) as i64;
        self.engines.iter_mut().for_each(|engine| engine.now_ms = now_ms);
    }

    fn run(&mut self, steps: u64) -> Seen {
        for _ in 0..self.rng.range(steps / 4, steps) {
            for _ in 0..if self.rng.chance(5) { 6 } else { u64::from(self.rng.chance(30)) } {
                self.arrive();
            }
            self.interfere();
            if self.moves.len() < 3 && self.rng.chance(40) {
                self.begin_move();
            }
            self.advance(false);
            self.turn(false);
        }
        let work = |engine: &Engine| -> u32 {
            let live = engine.told.iter().filter(|(_, told)| told.finished.contains(&None));
            live.map(|(handle, _)| engine.asked[handle].work()).sum()
        };
        let bound = 120 + 6 * self.engines.iter().map(work).sum::<u32>();
        let is_busy = |engine: &Engine| {
            let stats = engine.core.stats();
            engine.num_live() + stats.num_requests + stats.num_running + stats.num_waiting > 0
        };
        let mut turns = 0;
        while !self.moves.is_empty() || self.engines.iter().any(is_busy) {
            assert!(turns < bound, "still busy after {bound} quiet turns");
            self.advance(true);
            self.turn(true);
            turns += 1;
        }
        for engine in &mut self.engines {
            while engine.num_in_flight() > 0 {
                engine.complete(Outcome::Ok);
            }
            engine.turn();
        }
        for (tenant, ids) in self.texts.all_segments() {
            for engine in &mut self.engines {
                engine.core.pin_segment(tenant, &ids, false).expect("anybody may let go");
            }
        }
        self.engines.iter().for_each(Engine::assert_empty);
        self.seen
    }
}

fn pair(engines: &mut [Engine; 2], from: usize) -> [&mut Engine; 2] {
    let [first, second] = engines;
    if from == 0 { [first, second] } else { [second, first] }
}

#[test]
fn streams_that_move_at_random_points_are_the_streams_that_stay() {
    let seeds = seeds("KVLITE_SEED", "KVLITE_SEEDS", DEFAULT_SEEDS);
    let steps = setting("KVLITE_STEPS").unwrap_or(DEFAULT_STEPS);
    let totals = Mutex::new(Seen::default());
    let replay = |seed| format!("KVLITE_SEED={seed} cargo test -p kvlite-core --test migration fleet");
    for_each_seed(&seeds, replay, |seed| {
        let seen = Fleet::new(seed).run(steps);
        add(&mut totals.lock().unwrap(), &seen);
    });
    let seen = *totals.lock().unwrap();
    println!("{seen:?}");
    if seeds.end - seeds.start >= DEFAULT_SEEDS {
        let with_kv = seen.moved_blends > 200 && seen.moved_choices > 60 && seen.blocks > 2_000;
        let rare = seen.moved_waiting.min(seen.replayed).min(seen.aborted).min(seen.expired).min(seen.ended);
        assert!(seen.moved > 3_000 && with_kv && rare > 200, "too little happened: {seen:?}");
    }
}

fn add(total: &mut Seen, seen: &Seen) {
    let Seen { begun, refused, moved, blocks, moved_blends, moved_choices, .. } = *seen;
    let Seen { moved_waiting, aborted, expired, ended, replayed, .. } = *seen;
    total.begun += begun;
    total.refused += refused;
    total.moved += moved;
    total.blocks += blocks;
    total.moved_blends += moved_blends;
    total.moved_choices += moved_choices;
    total.moved_waiting += moved_waiting;
    total.aborted += aborted;
    total.expired += expired;
    total.ended += ended;
    total.replayed += replayed;
}
