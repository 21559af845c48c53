//! A fake engine with its driver: requests whose next token hashes all tokens before it, and blocks that hash theirs.
//!
//! Effects that only change tables are carried out at once; those that take an engine time wait in `todo` until the test
//! answers them. What leaves the engine goes to `outbox`.

use std::collections::{BTreeMap, BTreeSet};

use kvlite_core::sched::frames::{BlocksFrame, Frame};
use kvlite_core::sched::migrate::{Choice, Effect, Limits, MoveId, MoveResult, Mover, OWNER};

/// Tokens per block.
pub const BLOCK: usize = 2;

/// The token that follows `outputs`.
pub fn next_token(request: u64, choice: u32, outputs: &[i32]) -> i32 {
    let fold = |state: u64, &id: &i32| mix(state.wrapping_add(id as u64));
    (outputs.iter().fold(mix(request << 8 | u64::from(choice)), fold) % 50_000) as i32
}

/// splitmix64's last step.
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// What lies in a block of KV: a hash of every token up to its end.
fn block_content(request: u64, choice: u32, outputs: &[i32], index: usize) -> i32 {
    next_token(request, choice, &outputs[..outputs.len().min((index + 1) * BLOCK)])
}

/// One choice of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Sequence {
    pub outputs: Vec<i32>,
    pub ended: bool,
}

/// A request that lives on an engine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Live {
    pub epoch: u32,
    pub choices: Vec<Sequence>,
    pub max_tokens: usize,
    pub is_frozen: bool,
    /// The attempt that exports it, and how many full blocks of each choice it was given.
    exporting: Option<(u32, Vec<usize>)>,
}

impl Live {
    pub fn new(epoch: u32, choices: Vec<Sequence>, max_tokens: usize) -> Live {
        Live { epoch, choices, max_tokens, is_frozen: false, exporting: None }
    }

    fn left(&self) -> u32 {
        let Some((_, given)) = &self.exporting else { return 0 };
        let full = self.choices.iter().map(|choice| choice.outputs.len() / BLOCK);
        full.zip(given).map(|(full, given)| full.saturating_sub(*given) as u32).sum()
    }
}

/// What arrives, with the blocks that came so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Arriving {
    attempt: u32,
    blocks: BTreeMap<(i32, i32), i32>,
}

/// What travels on links.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Wire {
    Frame(Frame),
    Blocks { id: MoveId, stage: u32, part: u32, is_last: bool, keys: Vec<(i32, i32)>, contents: Vec<i32> },
    Tokens { request: u64, epoch: u32, choice: u32, position: u32, ids: Vec<i32> },
    Ended { request: u64, epoch: u32, choice: u32 },
    Add { request: u64, epoch: u32, choices: Vec<Sequence>, max_tokens: usize },
    Abort { request: u64 },
    Cut { request: u64, choice: u32 },
}

/// One engine process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Engine {
    pub mover: Mover,
    pub live: BTreeMap<u64, Live>,
    pub arriving: BTreeMap<u64, Arriving>,
    /// Effects that wait for an answer.
    pub todo: Vec<Effect>,
    pub outbox: Vec<(i32, Wire)>,
    /// (request, attempt) of exports that began and have not ended.
    pub exports: BTreeSet<(u64, u32)>,
}

impl Engine {
    pub fn new(engine: i32, limits: Limits, fenced: bool) -> Engine {
        let mover = Mover::new(engine, limits);
        let mover = if fenced { mover } else { mover.unfenced() };
        let (live, arriving) = (BTreeMap::new(), BTreeMap::new());
        Engine { mover, live, arriving, todo: Vec::new(), outbox: Vec::new(), exports: BTreeSet::new() }
    }

    pub fn is_idle(&self) -> bool {
        self.live.is_empty() && self.arriving.is_empty() && self.todo.is_empty() && self.mover.moves().is_empty()
    }

    /// Carries out what can be done at once.
    pub fn apply(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Send { peer, frame } => self.outbox.push((peer, Wire::Frame(frame))),
                Effect::Thaw { request, attempt, epoch } => {
                    self.todo.retain(|todo| !is_source_of(todo, request));
                    if let Some(live) = self.live.get_mut(&request) {
                        assert!(live.exporting.as_ref().is_none_or(|(exporting, _)| *exporting == attempt));
                        (live.epoch, live.is_frozen, live.exporting) = (epoch, false, None);
                    }
                }
                Effect::Release { request, epoch, .. } => {
                    if self.live.get(&request).is_some_and(|live| live.epoch <= epoch) {
                        self.live.remove(&request);
                    }
                }
                Effect::Cancel { id } => {
                    self.todo.retain(|todo| !matches!(todo, Effect::Reserve { id: other, .. } if *other == id));
                    if self.arriving.get(&id.request).is_some_and(|arriving| arriving.attempt == id.attempt) {
                        self.arriving.remove(&id.request);
                    }
                }
                Effect::Commit { id, epoch, manifest, replay } => self.commit(id, epoch, &manifest, replay),
                Effect::Done { id, result, .. } => {
                    let had_begun = self.exports.remove(&(id.request, id.attempt));
                    assert!(had_begun || result == MoveResult::Refused, "a move ends once: {id:?} {result:?}");
                }
                Effect::Export { id } => {
                    assert!(self.exports.insert((id.request, id.attempt)), "a move begins once: {id:?}");
                    self.todo.push(effect);
                }
                _ => self.todo.push(effect),
            }
        }
    }

    fn commit(&mut self, id: MoveId, epoch: u32, manifest: &[u8], replay: bool) {
        let arriving = self.arriving.remove(&id.request).expect("a commit follows a reservation");
        assert_eq!(arriving.attempt, id.attempt, "the reservation is that of the claim");
        let (max_tokens, choices) = parse(manifest);
        for (choice, sequence) in (0..).zip(&choices) {
            let num_blocks = if replay || sequence.ended { 0 } else { sequence.outputs.len().div_ceil(BLOCK) };
            for index in 0..num_blocks {
                let content = block_content(id.request, choice as u32, &sequence.outputs, index);
                let arrived = arriving.blocks.get(&(choice, index as i32));
                assert_eq!(arrived, Some(&content), "block {index} of choice {choice} is complete and fresh");
            }
        }
        let old = self.live.insert(id.request, Live::new(epoch, choices, max_tokens));
        assert!(old.is_none(), "an engine has one copy of a request");
    }

    /// Answers one effect of `todo`. `parts`: into how many a stage is cut; `refuse`: a fault that the driver may have.
    pub fn answer(&mut self, at: usize, parts: usize, refuse: bool, now_ms: i64) {
        let effect = self.todo.remove(at);
        let effects = match &effect {
            Effect::Reserve { id, .. } if refuse => self.mover.refused(id.request, id.attempt, "no room"),
            Effect::Reserve { id, .. } => {
                self.arriving.insert(id.request, Arriving { attempt: id.attempt, blocks: BTreeMap::new() });
                self.mover.reserved(id.request, id.attempt, 0, now_ms)
            }
            Effect::Export { id } => {
                let live = self.live.get_mut(&id.request).filter(|live| live.epoch == id.epoch && !refuse);
                let manifest = live.map(|live| {
                    live.exporting = Some((id.attempt, vec![0; live.choices.len()]));
                    (manifest(live), live.choices.len() as u32)
                });
                let (manifest, num_choices) = manifest.unzip();
                self.mover.exported(id.request, id.attempt, manifest, num_choices.unwrap_or(0), now_ms)
            }
            Effect::Freeze { id } => match self.exporting(id) {
                Some(live) if !refuse => {
                    live.is_frozen = true;
                    self.mover.frozen(id.request, id.attempt)
                }
                _ => self.mover.failed(id.request, id.attempt, "it has ended"),
            },
            Effect::Stage { id, to, stage, last, .. } => self.stage(*id, *to, *stage, *last, parts, now_ms),
            Effect::Tail { id } => self.tail(*id, now_ms),
            other => panic!("{other:?} has no answer"),
        };
        self.apply(effects);
    }

    fn exporting(&mut self, id: &MoveId) -> Option<&mut Live> {
        let is_exporting =
            |live: &&mut Live| live.exporting.as_ref().is_some_and(|(attempt, _)| *attempt == id.attempt);
        self.live.get_mut(&id.request).filter(is_exporting)
    }

    fn stage(&mut self, id: MoveId, to: i32, stage: u32, last: bool, parts: usize, now_ms: i64) -> Vec<Effect> {
        let Some(live) = self.exporting(&id) else {
            return self.mover.failed(id.request, id.attempt, "it has ended");
        };
        assert_eq!(live.is_frozen, last, "only the last stage is frozen");
        let (mut keys, mut contents) = (Vec::new(), Vec::new());
        let given = &mut live.exporting.as_mut().expect("it is exported").1;
        for (choice, (sequence, given)) in live.choices.iter().zip(given.iter_mut()).enumerate() {
            let len = sequence.outputs.len();
            let end = if last { len.div_ceil(BLOCK) } else { len / BLOCK };
            for index in *given..if sequence.ended { *given } else { end } {
                keys.push((choice as i32, index as i32));
                contents.push(block_content(id.request, choice as u32, &sequence.outputs, index));
            }
            *given = len / BLOCK;
        }
        let left = live.left();
        let cut = keys.len().div_ceil(parts.max(1)).max(1);
        let num_parts = keys.len().div_ceil(cut);
        for (part, (keys, contents)) in keys.chunks(cut).zip(contents.chunks(cut)).enumerate() {
            let is_last = part + 1 == num_parts;
            let (keys, contents, part) = (keys.to_vec(), contents.to_vec(), part as u32);
            self.outbox.push((to, Wire::Blocks { id, stage, part, is_last, keys, contents }));
        }
        self.mover.staged(id.request, id.attempt, stage, keys.len() as u32, left, now_ms)
    }

    fn tail(&mut self, id: MoveId, now_ms: i64) -> Vec<Effect> {
        let Some(live) = self.exporting(&id) else {
            return self.mover.failed(id.request, id.attempt, "it has ended");
        };
        let manifest = manifest(live);
        let choice = |sequence: &Sequence| Choice {
            position: sequence.outputs.len() as u32,
            ids: (!sequence.ended).then(|| sequence.outputs.clone()),
        };
        let choices = live.choices.iter().map(choice).collect();
        self.mover.tail(id.request, id.attempt, manifest, choices, now_ms)
    }

    /// One decode step of one request: a token per choice.
    pub fn decode(&mut self, request: u64) {
        let Some(live) = self.live.get_mut(&request).filter(|live| !live.is_frozen) else { return };
        let (epoch, max_tokens) = (live.epoch, live.max_tokens);
        for (choice, sequence) in (0..).zip(&mut live.choices).filter(|(_, sequence)| !sequence.ended) {
            if sequence.outputs.len() < max_tokens {
                let position = sequence.outputs.len() as u32;
                let id = next_token(request, choice, &sequence.outputs);
                sequence.outputs.push(id);
                self.outbox.push((OWNER, Wire::Tokens { request, epoch, choice, position, ids: vec![id] }));
            }
            if sequence.outputs.len() >= max_tokens {
                sequence.ended = true;
                self.outbox.push((OWNER, Wire::Ended { request, epoch, choice }));
            }
        }
        self.reap(request);
    }

    /// The engine's own deadline ends a request, frozen or not.
    pub fn time_out(&mut self, request: u64) {
        let Some(live) = self.live.get_mut(&request) else { return };
        for (choice, sequence) in (0..).zip(&mut live.choices).filter(|(_, sequence)| !sequence.ended) {
            sequence.ended = true;
            self.outbox.push((OWNER, Wire::Ended { request, epoch: live.epoch, choice }));
        }
        self.reap(request);
    }

    fn reap(&mut self, request: u64) {
        if self.live.get(&request).is_some_and(|live| live.choices.iter().all(|choice| choice.ended)) {
            self.end(request);
        }
    }

    fn end(&mut self, request: u64) {
        self.live.remove(&request);
        let effects = self.mover.ended(request);
        self.apply(effects);
    }

    /// Something has arrived. `spoilt`: its payload is not what its digests say.
    pub fn receive(&mut self, peer: i32, wire: Wire, spoilt: bool, now_ms: i64) {
        match wire {
            Wire::Frame(frame) => {
                let effects = self.mover.frame(peer, frame, now_ms).expect("peers keep to the protocol");
                self.apply(effects);
            }
            Wire::Blocks { id, stage, part, is_last, keys, contents } => {
                let arriving = self.arriving.get_mut(&id.request).filter(|arriving| arriving.attempt == id.attempt);
                let ok = arriving.is_some() && !spoilt;
                if let Some(arriving) = arriving.filter(|_| ok) {
                    arriving.blocks.extend(keys.iter().copied().zip(contents));
                }
                let frame = BlocksFrame { id, stage, part, is_last, block_bytes: 4, keys, digests: Vec::new() };
                let effects = self.mover.blocks(peer, &frame, ok, now_ms);
                self.apply(effects);
            }
            Wire::Add { request, epoch, choices, max_tokens } => {
                if self.live.contains_key(&request) {
                    self.end(request);
                }
                self.live.insert(request, Live::new(epoch, choices, max_tokens));
                self.reap(request);
            }
            Wire::Abort { request } => self.end(request),
            Wire::Cut { request, choice } => {
                if let Some(live) = self.live.get_mut(&request) {
                    live.choices[choice as usize].ended = true;
                }
                self.reap(request);
            }
            Wire::Tokens { .. } | Wire::Ended { .. } => panic!("only the owner takes tokens"),
        }
    }
}

fn is_source_of(effect: &Effect, request: u64) -> bool {
    match effect {
        Effect::Export { id } | Effect::Stage { id, .. } | Effect::Freeze { id } | Effect::Tail { id } => {
            id.request == request
        }
        _ => false,
    }
}

fn manifest(live: &Live) -> Vec<u8> {
    let mut bytes = vec![live.max_tokens as u8];
    for choice in &live.choices {
        bytes.extend_from_slice(&[u8::from(choice.ended), choice.outputs.len() as u8]);
        choice.outputs.iter().for_each(|id| bytes.extend_from_slice(&id.to_le_bytes()));
    }
    bytes
}

fn parse(manifest: &[u8]) -> (usize, Vec<Sequence>) {
    let (mut choices, mut rest) = (Vec::new(), &manifest[1..]);
    while let [ended, len, ..] = *rest {
        let (ids, after) = rest[2..].split_at(4 * len as usize);
        let outputs = ids.chunks_exact(4).map(|id| i32::from_le_bytes(id.try_into().expect("4 bytes"))).collect();
        choices.push(Sequence { outputs, ended: ended == 1 });
        rest = after;
    }
    (manifest[0].into(), choices)
}
