//! Engines, the stream's owner, the links between them, and the checker of every promise.
//!
//! A link delivers in order until it is cut; each end notices a cut by itself, later. An engine may die, or be given up by the
//! owner while it lives on (a zombie). The checker looks at every token that the owner delivers, at every switch, and at
//! every copy of a request that computes.

mod failures;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use kvlite_core::sched::frames::Frame;
use kvlite_core::sched::migrate::{Limits, NOBODY, OWNER, Owner, OwnerEffect};

use crate::engine::{Engine, Sequence, Wire, next_token};

/// One request as its client sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Stream {
    pub choices: Vec<Sequence>,
    pub max_tokens: usize,
    /// It ended or was cancelled, once.
    pub is_over: bool,
    /// Choices that the owner has cut by itself.
    cut: BTreeSet<u32>,
    /// Which engine's tokens were delivered under an epoch.
    producers: BTreeMap<u32, i32>,
    /// Orders that have not ended.
    orders: u32,
}

/// One direction of a link.
type Queue = VecDeque<Wire>;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub owner: Owner,
    /// None: the process is dead.
    pub engines: Vec<Option<Engine>>,
    pub links: BTreeMap<(i32, i32), Queue>,
    /// (who, peer): `who` has not noticed yet that its link to `peer` has ended.
    pub cuts: BTreeSet<(i32, i32)>,
    /// Links whose ends have both noticed are open again; those to the owner only after a restart.
    pub lost: BTreeSet<i32>,
    pub streams: BTreeMap<u64, Stream>,
    pub waiting: BTreeSet<u64>,
    pub num_moved: [u32; 6],
    pub now_ms: i64,
    fenced: bool,
    limits: Limits,
    /// Claims lost their logprobs: these requests take tokens from engines alone.
    wants_logprobs: bool,
}

impl World {
    pub fn new(num_engines: i32, limits: Limits, fenced: bool, wants_logprobs: bool) -> World {
        let engines = (0..num_engines).map(|engine| Some(Engine::new(engine, limits.clone(), fenced))).collect();
        World {
            owner: if fenced { Owner::default() } else { Owner::default().unfenced() },
            engines,
            links: BTreeMap::new(),
            cuts: BTreeSet::new(),
            lost: BTreeSet::new(),
            streams: BTreeMap::new(),
            waiting: BTreeSet::new(),
            num_moved: [0; 6],
            now_ms: 0,
            fenced,
            limits,
            wants_logprobs,
        }
    }

    pub fn engine(&mut self, engine: i32) -> Option<&mut Engine> {
        self.engines[engine as usize].as_mut()
    }

    /// A new request, placed by the owner.
    pub fn add(&mut self, request: u64, engine: i32, num_choices: usize, max_tokens: usize) {
        let epoch = self.owner.add(request, engine, num_choices, self.wants_logprobs).expect("the number is new");
        let choices = vec![Sequence::default(); num_choices];
        let stream = Stream { choices: choices.clone(), max_tokens, ..Stream::default() };
        self.streams.insert(request, stream);
        self.push(OWNER, engine, Wire::Add { request, epoch, choices, max_tokens });
    }

    fn is_open(&self, from: i32, to: i32) -> bool {
        let is_lost = |engine: i32| engine >= 0 && self.lost.contains(&engine);
        !(from == OWNER && is_lost(to) || to == OWNER && is_lost(from))
    }

    fn push(&mut self, from: i32, to: i32, wire: Wire) {
        let is_cut = self.cuts.contains(&(from, to)) || self.cuts.contains(&(to, from));
        let is_dead = to != OWNER && self.engines[to as usize].is_none();
        if self.is_open(from, to) && !is_cut && !is_dead {
            self.links.entry((from, to)).or_default().push_back(wire);
        }
    }

    /// Takes what an engine has said; a peer that is dead cannot be reached.
    pub fn flush(&mut self, engine: i32) {
        loop {
            let Some(process) = self.engine(engine) else { return };
            let outbox = std::mem::take(&mut process.outbox);
            if outbox.is_empty() {
                return;
            }
            for (to, wire) in outbox {
                if to != OWNER && self.engines[to as usize].is_none() && !self.cuts.contains(&(engine, to)) {
                    self.notice_peer(engine, to);
                } else {
                    self.push(engine, to, wire);
                }
            }
        }
    }

    fn notice_peer(&mut self, engine: i32, peer: i32) {
        let now_ms = self.now_ms;
        if let Some(process) = self.engine(engine) {
            let effects = process.mover.link_down(peer, now_ms);
            process.apply(effects);
        }
    }

    /// Runs something on an engine, then takes what it said.
    pub fn on(&mut self, engine: i32, act: impl FnOnce(&mut Engine, i64)) {
        let now_ms = self.now_ms;
        if let Some(process) = self.engine(engine) {
            act(process, now_ms);
        }
        self.flush(engine);
        self.check_copies();
    }

    /// Delivers item `at` of a link.
    pub fn deliver(&mut self, from: i32, to: i32, at: usize, spoilt: bool) {
        let Some(wire) = self.links.get_mut(&(from, to)).and_then(|queue| queue.remove(at)) else { return };
        self.links.retain(|_, queue| !queue.is_empty());
        if to == OWNER {
            self.take(from, wire);
        } else {
            self.on(to, |process, now_ms| process.receive(from, wire, spoilt, now_ms));
        }
        self.check_copies();
    }

    /// The owner takes something from an engine.
    fn take(&mut self, engine: i32, wire: Wire) {
        match wire {
            Wire::Frame(frame) => {
                let effects = self.owner.frame(engine, frame).expect("engines keep to the protocol");
                self.carry_out(effects);
            }
            Wire::Tokens { request, epoch, choice, position, ids } => {
                let count = ids.len() as u32;
                // A parked claim may be granted by the call: these tokens are still the old owner's.
                let owner = self.owner.owner(request);
                let (offset, count) =
                    self.owner.tokens(request, engine, epoch, choice, position, count).expect("tokens leave no gap");
                let new = &ids[offset as usize..(offset + count) as usize];
                if let Some((_, epoch)) = owner.filter(|_| !new.is_empty()) {
                    self.append(request, (engine, epoch), choice, position + offset, new);
                }
                let fence = self.owner.fence(request, engine, epoch);
                self.carry_out(if self.fenced { fence } else { Vec::new() });
            }
            Wire::Ended { request, epoch, choice } => {
                if self.owner.finish(request, engine, epoch, choice) {
                    self.end_choice(request, choice);
                }
            }
            other => panic!("{other:?} is nothing that an engine says"),
        }
        let due = self.owner.due();
        self.carry_out(due);
    }

    fn append(&mut self, request: u64, (engine, epoch): (i32, u32), choice: u32, position: u32, ids: &[i32]) {
        let stream = self.streams.get_mut(&request).expect("it was added");
        assert!(!stream.is_over, "nothing follows the end of {request}");
        let producer = *stream.producers.entry(epoch).or_insert(engine);
        assert_eq!(producer, engine, "one engine produces what is delivered of {request} under epoch {epoch}");
        let sequence = &mut stream.choices[choice as usize];
        assert!(!sequence.ended, "nothing follows the end of a choice");
        assert_eq!(sequence.outputs.len(), position as usize, "positions go up one by one");
        for &id in ids {
            assert_eq!(id, next_token(request, choice, &sequence.outputs), "tokens are those of an unmoved run");
            sequence.outputs.push(id);
        }
    }

    fn end_choice(&mut self, request: u64, choice: u32) {
        let stream = self.streams.get_mut(&request).expect("it was added");
        let sequence = &mut stream.choices[choice as usize];
        assert!(!sequence.ended && !stream.is_over, "a choice ends once");
        sequence.ended = true;
        if stream.choices.iter().all(|choice| choice.ended) {
            stream.is_over = true;
            self.waiting.remove(&request);
            self.owner.remove(request);
        }
    }

    fn carry_out(&mut self, effects: Vec<OwnerEffect>) {
        for effect in effects {
            match effect {
                OwnerEffect::Send { engine, frame } => self.push(OWNER, engine, Wire::Frame(frame)),
                OwnerEffect::Switch { request, engine, epoch } => {
                    let owner = self.owner.owner(request);
                    assert!(!self.fenced || owner == Some((engine, epoch)), "the switch says who owns it now");
                    self.waiting.remove(&request);
                    for choice in self.streams[&request].cut.clone() {
                        self.push(OWNER, engine, Wire::Cut { request, choice });
                    }
                }
                OwnerEffect::Deliver { request, choice, position, ids } => {
                    let stream = self.streams.get_mut(&request).expect("it was added");
                    let sequence = &mut stream.choices[choice as usize];
                    assert_eq!(sequence.outputs.len(), position as usize, "positions go up one by one");
                    for id in ids {
                        let expected = next_token(request, choice, &sequence.outputs);
                        assert_eq!(id, expected, "a claim holds the tokens of an unmoved run");
                        sequence.outputs.push(id);
                    }
                }
                OwnerEffect::Replay { request, .. } => {
                    self.waiting.insert(request);
                }
                OwnerEffect::Moved { request, result, .. } => {
                    self.num_moved[result as usize] += 1;
                    let stream = self.streams.get_mut(&request).expect("it was added");
                    stream.orders = stream.orders.checked_sub(1).expect("an order ends once");
                }
            }
        }
    }

    /// Orders a move; false: refused, with nothing changed.
    pub fn order(&mut self, request: u64, to: i32, replay: bool) -> bool {
        let Ok(effects) = self.owner.order(request, to, replay, self.now_ms) else { return false };
        if let Some(stream) = self.streams.get_mut(&request) {
            stream.orders += 1;
        }
        self.carry_out(effects);
        true
    }

    /// The client leaves.
    pub fn cancel(&mut self, request: u64) {
        let Some((engine, _)) = self.owner.owner(request) else { return };
        self.streams.get_mut(&request).expect("it was added").is_over = true;
        self.waiting.remove(&request);
        self.owner.remove(request);
        if engine != NOBODY {
            self.push(OWNER, engine, Wire::Abort { request });
        }
        let due = self.owner.due();
        self.carry_out(due);
    }

    /// The owner ends one choice: a stop string.
    pub fn cut_choice(&mut self, request: u64, choice: u32) {
        let Some((engine, epoch)) = self.owner.owner(request).filter(|&(engine, _)| engine != NOBODY) else { return };
        if self.owner.finish(request, engine, epoch, choice) {
            self.streams.get_mut(&request).expect("it was added").cut.insert(choice);
            self.push(OWNER, engine, Wire::Cut { request, choice });
            self.end_choice(request, choice);
            let due = self.owner.due();
            self.carry_out(due);
        }
    }

    /// At most one copy of a request computes among the engines that the owner has not given up.
    pub fn check_copies(&self) {
        let mut computing = BTreeMap::new();
        for (engine, process) in self.engines.iter().enumerate().filter(|(at, _)| !self.lost.contains(&(*at as i32))) {
            for (&request, live) in process.iter().flat_map(|process| &process.live).filter(|(_, live)| !live.is_frozen)
            {
                let other = computing.insert(request, engine);
                assert!(other.is_none(), "engines {other:?} and {engine} both compute request {request}: {live:?}");
            }
        }
    }

    /// Everything has ended and nothing is held.
    pub fn is_at_rest(&self) -> bool {
        let idle = self.engines.iter().flatten().all(Engine::is_idle);
        let over = self
            .streams
            .iter()
            .all(|(&request, stream)| stream.is_over && stream.orders == 0 && self.owner.owner(request).is_none());
        idle && over && self.links.is_empty() && self.cuts.is_empty() && self.waiting.is_empty()
    }

    pub fn assert_at_rest(&self) {
        let open: Vec<_> = self.streams.iter().filter(|(_, stream)| !stream.is_over || stream.orders > 0).collect();
        assert!(open.is_empty(), "streams that never end: {open:?} in {self:?}");
        for process in self.engines.iter().flatten() {
            assert!(process.is_idle(), "an engine holds something for ever: {process:?}");
            assert!(process.exports.is_empty(), "every export ends: {process:?}");
        }
        assert!(self.is_at_rest(), "something goes on for ever: {self:?}");
    }

    /// Frames of the migration alone may be lost, doubled and reordered: everything else is the stream itself.
    pub fn is_frame(&self, from: i32, to: i32, at: usize) -> bool {
        matches!(
            self.links.get(&(from, to)).and_then(|queue| queue.get(at)),
            Some(Wire::Frame(_) | Wire::Blocks { .. })
        )
    }

    /// Whether a claim or reclaim of `engine` about `request`, or its answer, is under way already.
    pub fn is_asking(&self, engine: i32, request: u64) -> bool {
        let asks = |wire: &Wire| match wire {
            Wire::Frame(
                Frame::Claim { id, .. }
                | Frame::Reclaim { id }
                | Frame::Granted { id }
                | Frame::Denied { id }
                | Frame::Reclaimed { id },
            ) => id.request == request,
            Wire::Frame(Frame::Revoked { request: other, .. }) => *other == request,
            _ => false,
        };
        let queues = [(engine, OWNER), (OWNER, engine)];
        queues.iter().filter_map(|link| self.links.get(link)).any(|queue| queue.iter().any(asks))
    }
}
