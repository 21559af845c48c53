//! `Mover`: source and destination of every move of one engine, in one table each.
//!
//! Owns who may move when: one move per request, `max_moves` out and in, the bytes in flight. Frames and answers of another
//! attempt than the one in the table are ignored, and so is an order or a PREPARE of an attempt that was seen before: a
//! frame that comes twice or late begins nothing. Called by the binding.

use std::collections::BTreeMap;

use super::destination::{Arrival, Part, State as Destination};
use super::source::{Export, IsOver, State as Source};
use super::{Choice, Effect, Limits, MoveId, MoveResult, OWNER};
use crate::sched::frames::{BlocksFrame, Frame, FrameError};

/// Requests whose newest attempt is remembered. Frames of a link come in order, so that old ones are never asked for.
const MAX_SEEN: usize = 4096;

/// One engine's part in every move.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mover {
    engine: i32,
    limits: Limits,
    exports: BTreeMap<u64, Export>,
    arrivals: BTreeMap<u64, Arrival>,
    /// The newest attempt of a request that began here, on either side.
    seen: BTreeMap<u64, u32>,
    /// Off only in the control of the checker's tests.
    is_fenced: bool,
}

impl Mover {
    /// The machine of engine `engine`.
    pub fn new(engine: i32, limits: Limits) -> Mover {
        let (exports, arrivals, seen) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Mover { engine, limits, exports, arrivals, seen, is_fenced: true }
    }

    /// A source that goes on by itself when nobody answers its tail: what the checker must catch.
    #[cfg(feature = "unfenced")]
    pub fn unfenced(self) -> Mover {
        Mover { is_fenced: false, ..self }
    }

    /// Whether an attempt is new; remembers it then.
    fn is_new(&mut self, id: &MoveId) -> bool {
        let newest = self.seen.entry(id.request).or_insert(0);
        let is_new = id.attempt > *newest;
        *newest = (*newest).max(id.attempt);
        while self.seen.len() > MAX_SEEN {
            self.seen.pop_first();
        }
        is_new
    }

    /// The owner's order.
    pub fn order(&mut self, id: MoveId, to: i32, replay: bool) -> Vec<Effect> {
        let mut effects = Vec::new();
        if !self.is_new(&id) {
            return effects;
        }
        let refusal = if to == self.engine || to < 0 {
            "an engine cannot move a request to itself"
        } else if self.exports.contains_key(&id.request) {
            "it is moving already"
        } else if self.exports.len() >= self.limits.max_moves {
            "the engine moves as many requests as it may"
        } else {
            self.exports.insert(id.request, Export::begin(id, to, replay, &mut effects));
            return effects;
        };
        let (result, reason) = (MoveResult::Refused, refusal.to_owned());
        let frame = Frame::Done { id, result, stages: 0, blocks: 0, reason: reason.clone() };
        vec![Effect::Send { peer: OWNER, frame }, Effect::Done { id, result, stages: 0, blocks: 0, reason }]
    }

    /// A frame from a peer. Errors when the peer may not send it; nothing has changed then.
    pub fn frame(&mut self, peer: i32, frame: Frame, now_ms: i64) -> Result<Vec<Effect>, FrameError> {
        let from_owner = matches!(
            frame,
            Frame::Move { .. }
                | Frame::Granted { .. }
                | Frame::Denied { .. }
                | Frame::Reclaimed { .. }
                | Frame::Revoked { .. }
        );
        let to_owner = matches!(frame, Frame::Claim { .. } | Frame::Reclaim { .. } | Frame::Done { .. });
        if to_owner || from_owner != (peer == OWNER) {
            return Err(FrameError::Protocol { what: "a frame came from a peer that may not send it" });
        }
        Ok(match frame {
            Frame::Move { id, to, replay } => self.order(id, to, replay),
            Frame::Prepare { id, replay, manifest } => self.prepare(id, peer, replay, manifest, now_ms),
            Frame::Reserved { id, hit_blocks } => {
                self.export(id, peer, |export, limits, to| export.reserved(hit_blocks, limits, now_ms, to))
            }
            Frame::Refused { id, reason } => self.export(id, peer, |export, limits, to| {
                let early = export.state == Source::Preparing;
                let result = if early { MoveResult::Refused } else { MoveResult::Aborted };
                export.lost(result, &reason, limits, now_ms, to)
            }),
            Frame::Ack { id, stage } => {
                self.export(id, peer, |export, limits, to| export.acked(stage, limits, now_ms, to))
            }
            Frame::Tail { id, stage_blocks, manifest, choices } => self.arrival(id, peer, |arrival, limits, to| {
                arrival.tail(stage_blocks, manifest, choices, limits, now_ms, to)
            }),
            Frame::Abort { id } => self.arrival(id, peer, |arrival, _, to| arrival.abandoned(to)),
            Frame::Granted { id } => self.granted(id),
            Frame::Denied { id } => self.arrival(id, OWNER, |arrival, _, to| arrival.denied(to)),
            Frame::Reclaimed { id } => self.export(id, OWNER, |export, _, to| export.reclaimed(to)),
            Frame::Revoked { request, epoch } => self.revoked(request, epoch),
            Frame::Claim { .. } | Frame::Reclaim { .. } | Frame::Done { .. } => Vec::new(),
        })
    }

    fn prepare(&mut self, id: MoveId, source: i32, replay: bool, manifest: Vec<u8>, now_ms: i64) -> Vec<Effect> {
        let mut effects = Vec::new();
        let refuse = |reason: &str| {
            let frame = Frame::Refused { id, reason: reason.to_owned() };
            vec![Effect::Send { peer: source, frame }]
        };
        if self.seen.get(&id.request).is_some_and(|&newest| id.attempt <= newest) {
            return effects;
        }
        if self.arrivals.get(&id.request).is_some_and(|arrival| arrival.state == Destination::Claiming) {
            return refuse("an older move of this request waits for the owner here");
        }
        if let Some(mut older) = self.arrivals.remove(&id.request) {
            older.drop_with("a newer move of this request has come", &mut effects);
        }
        self.is_new(&id);
        if self.arrivals.len() >= self.limits.max_moves {
            effects.extend(refuse("the engine takes in as many requests as it may"));
            return effects;
        }
        let ttl_ms = self.limits.reserve_ms;
        let arrival = Arrival::begin(id, source, replay, manifest, now_ms + ttl_ms, ttl_ms, &mut effects);
        self.arrivals.insert(id.request, arrival);
        effects
    }

    /// A grant of what this engine itself gave away before overtook the word that it was taken: that goes first.
    fn granted(&mut self, id: MoveId) -> Vec<Effect> {
        let is_claimed = self.arrivals.get(&id.request).is_some_and(|arrival| arrival.id == id);
        let is_back = is_claimed && self.exports.get(&id.request).is_some_and(|export| export.id.epoch <= id.epoch);
        let mut effects = if is_back { self.revoked(id.request, id.epoch) } else { Vec::new() };
        effects.extend(self.arrival(id, OWNER, |arrival, _, to| arrival.granted(to)));
        effects
    }

    /// The owner has taken back what this engine has of a request, moving or not.
    fn revoked(&mut self, request: u64, epoch: u32) -> Vec<Effect> {
        match self.exports.get(&request).map(|export| export.id) {
            Some(id) if id.epoch <= epoch => self.export(id, OWNER, |export, _, to| export.revoked(to)),
            Some(_) => Vec::new(),
            None => vec![Effect::Release { request, attempt: 0, epoch }],
        }
    }

    /// A BLOCKS frame whose payload was stored (`ok`) or could not be.
    pub fn blocks(&mut self, peer: i32, frame: &BlocksFrame, ok: bool, now_ms: i64) -> Vec<Effect> {
        let blocks = frame.keys.len() as u32;
        let part = Part { stage: frame.stage, part: frame.part, is_last: frame.is_last, blocks };
        self.arrival(frame.id, peer, |arrival, limits, to| arrival.part(&part, ok, limits, now_ms, to))
    }

    /// The link to a peer has ended or cannot be opened.
    pub fn link_down(&mut self, peer: i32, now_ms: i64) -> Vec<Effect> {
        let mut effects = Vec::new();
        if peer == OWNER {
            std::mem::take(&mut self.exports).values_mut().for_each(|export| export.owner_lost(&mut effects));
            std::mem::take(&mut self.arrivals).values().for_each(|arrival| arrival.cancel(&mut effects));
            return effects;
        }
        let limits = &self.limits;
        self.exports.retain(|_, export| {
            let reason = "the link to the destination is down";
            export.to != peer || !export.lost(MoveResult::Aborted, reason, limits, now_ms, &mut effects)
        });
        self.arrivals.retain(|_, arrival| arrival.source != peer || !arrival.abandoned(&mut effects));
        self.start_queued(&mut effects);
        effects
    }

    /// What is due by now.
    pub fn tick(&mut self, now_ms: i64) -> Vec<Effect> {
        let is_due = |deadline_ms: i64| deadline_ms <= now_ms;
        let exports = self.exports.iter().filter(|(_, export)| export.deadline_ms.is_some_and(is_due));
        let arrivals = self.arrivals.iter().filter(|(_, arrival)| is_due(arrival.deadline_ms));
        let due: Vec<u64> = exports.map(|(&request, _)| request).chain(arrivals.map(|(&request, _)| request)).collect();
        due.into_iter().flat_map(|request| self.tick_one(request, now_ms)).collect()
    }

    /// As `tick`, for one request.
    pub fn tick_one(&mut self, request: u64, now_ms: i64) -> Vec<Effect> {
        let mut effects = Vec::new();
        let is_fenced = self.is_fenced;
        if let Some(export) = self.exports.get(&request)
            && export.deadline_ms.is_some_and(|deadline_ms| deadline_ms <= now_ms)
        {
            let (id, peer) = (export.id, export.to);
            effects = self.export(id, peer, |export, limits, to| export.timeout(is_fenced, limits, now_ms, to));
        }
        if let Some(arrival) = self.arrivals.get(&request).filter(|arrival| arrival.deadline_ms <= now_ms) {
            let (id, peer) = (arrival.id, arrival.source);
            effects.extend(self.arrival(id, peer, |arrival, limits, to| arrival.timeout(limits, now_ms, to)));
        }
        effects
    }

    /// When `tick` has something to do.
    pub fn next_wake_ms(&self) -> Option<i64> {
        let exports = self.exports.values().filter_map(|export| export.deadline_ms);
        exports.chain(self.arrivals.values().map(|arrival| arrival.deadline_ms)).min()
    }

    /// The live request ended here.
    pub fn ended(&mut self, request: u64) -> Vec<Effect> {
        self.answer(request, None, |export, _, to| export.ended(to))
    }

    /// Answers `Export`.
    pub fn exported(
        &mut self,
        request: u64,
        attempt: u32,
        manifest: Option<Vec<u8>>,
        num_choices: u32,
        now_ms: i64,
    ) -> Vec<Effect> {
        self.answer(request, Some(attempt), |export, limits, to| {
            export.exported(manifest, num_choices, limits, now_ms, to)
        })
    }

    /// Answers `Stage`: `num_blocks` are with the link, another stage would hold `left` now.
    pub fn staged(
        &mut self,
        request: u64,
        attempt: u32,
        stage: u32,
        num_blocks: u32,
        left: u32,
        now_ms: i64,
    ) -> Vec<Effect> {
        self.answer(request, Some(attempt), |export, limits, to| {
            export.staged(stage, num_blocks, left, limits, now_ms, to)
        })
    }

    /// Answers `Freeze`.
    pub fn frozen(&mut self, request: u64, attempt: u32) -> Vec<Effect> {
        self.answer(request, Some(attempt), |export, _, to| export.frozen(to))
    }

    /// Answers `Tail`.
    pub fn tail(
        &mut self,
        request: u64,
        attempt: u32,
        manifest: Vec<u8>,
        choices: Vec<Choice>,
        now_ms: i64,
    ) -> Vec<Effect> {
        self.answer(request, Some(attempt), |export, limits, to| export.tail(manifest, choices, limits, now_ms, to))
    }

    /// Answers any effect of the source that could not be carried out.
    pub fn failed(&mut self, request: u64, attempt: u32, reason: &str) -> Vec<Effect> {
        self.answer(request, Some(attempt), |export, _, to| export.failed(reason, to))
    }

    /// Answers `Reserve`.
    pub fn reserved(&mut self, request: u64, attempt: u32, hit_blocks: u32, now_ms: i64) -> Vec<Effect> {
        self.arrived(request, attempt, |arrival, limits, to| {
            arrival.reserved(hit_blocks, limits, now_ms, to);
            false
        })
    }

    /// Answers `Reserve`, or takes a reservation back before it is claimed.
    pub fn refused(&mut self, request: u64, attempt: u32, reason: &str) -> Vec<Effect> {
        self.arrived(request, attempt, |arrival, _, to| arrival.refused(reason, to))
    }

    /// Of every move under way: the request, its attempt, the other engine, whether it leaves, and its state.
    pub fn moves(&self) -> Vec<(u64, u32, i32, bool, &'static str)> {
        let exports = self.exports.values();
        let out = exports.map(|export| (export.id.request, export.id.attempt, export.to, true, export.state.name()));
        let arrivals = self.arrivals.values();
        let into = arrivals.map(|a| (a.id.request, a.id.attempt, a.source, false, a.state.name()));
        out.chain(into).collect()
    }

    /// Runs `act` on the export of this very move, if `peer` is its destination or the owner.
    fn export(
        &mut self,
        id: MoveId,
        peer: i32,
        act: impl FnOnce(&mut Export, &Limits, &mut Vec<Effect>) -> IsOver,
    ) -> Vec<Effect> {
        match self.exports.get(&id.request) {
            Some(export) if export.id == id && (peer == export.to || peer == OWNER) => {
                self.answer(id.request, Some(id.attempt), act)
            }
            _ => Vec::new(),
        }
    }

    fn answer(
        &mut self,
        request: u64,
        attempt: Option<u32>,
        act: impl FnOnce(&mut Export, &Limits, &mut Vec<Effect>) -> IsOver,
    ) -> Vec<Effect> {
        let mut effects = Vec::new();
        if let Some(export) = self.exports.get_mut(&request)
            && attempt.is_none_or(|attempt| attempt == export.id.attempt)
        {
            if act(export, &self.limits, &mut effects) {
                self.exports.remove(&request);
            }
            self.start_queued(&mut effects);
        }
        effects
    }

    /// Runs `act` on the arrival of this very move, if `peer` is its source or the owner.
    fn arrival(
        &mut self,
        id: MoveId,
        peer: i32,
        act: impl FnOnce(&mut Arrival, &Limits, &mut Vec<Effect>) -> IsOver,
    ) -> Vec<Effect> {
        match self.arrivals.get(&id.request) {
            Some(arrival) if arrival.id == id && (peer == arrival.source || peer == OWNER) => {
                self.arrived(id.request, id.attempt, act)
            }
            _ => Vec::new(),
        }
    }

    fn arrived(
        &mut self,
        request: u64,
        attempt: u32,
        act: impl FnOnce(&mut Arrival, &Limits, &mut Vec<Effect>) -> IsOver,
    ) -> Vec<Effect> {
        let mut effects = Vec::new();
        if let Some(arrival) = self.arrivals.get_mut(&request)
            && arrival.id.attempt == attempt
            && act(arrival, &self.limits, &mut effects)
        {
            self.arrivals.remove(&request);
        }
        effects
    }

    /// Lets moves that wait for bytes in flight go on, lowest request first.
    fn start_queued(&mut self, effects: &mut Vec<Effect>) {
        let blocks: u64 = self.exports.values().map(Export::inflight_blocks).sum();
        let staging = self.exports.values().filter(|export| export.state == Source::Staging).count();
        let mut inflight = blocks.saturating_mul(self.limits.block_bytes);
        // A stage that is being sent counts as a whole budget: its size is known when it is sent.
        for _ in 0..staging {
            inflight = inflight.saturating_add(self.limits.max_inflight_bytes);
        }
        for export in self.exports.values_mut().filter(|export| export.state == Source::Queued) {
            if inflight >= self.limits.max_inflight_bytes {
                break;
            }
            export.next_stage(effects);
            inflight = inflight.saturating_add(self.limits.max_inflight_bytes);
        }
    }
}
