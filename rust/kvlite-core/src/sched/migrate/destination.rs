//! The destination's side of one move: from the source's PREPARE to the owner's word.
//!
//! Until it claims it may drop the arrival at any time; a claim is repeated until the owner has answered, because a grant
//! may be on its way. Every method appends effects and says whether the arrival's record goes. Called by `mover`.

use std::collections::{BTreeMap, BTreeSet};

use super::source::IsOver;
use super::{Choice, Effect, Limits, MoveId, OWNER};
use crate::sched::frames::Frame;

/// Parts of one stage; a driver sends far fewer.
const MAX_PARTS: u32 = 1 << 16;

/// What the destination waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum State {
    /// The driver's room.
    Reserving,
    /// Stages and the tail.
    Staging,
    /// The owner's word.
    Claiming,
}

impl State {
    pub(super) fn name(self) -> &'static str {
        match self {
            State::Reserving => "reserving",
            State::Staging => "receiving",
            State::Claiming => "claiming",
        }
    }
}

/// What has arrived of one stage.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Stage {
    parts: BTreeSet<u32>,
    last: Option<u32>,
    blocks: u32,
}

impl Stage {
    fn is_complete(&self) -> bool {
        self.last.is_some_and(|last| self.parts.len() as u64 == u64::from(last) + 1)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Tail {
    stage_blocks: Vec<u32>,
    manifest: Vec<u8>,
    choices: Vec<Choice>,
}

/// A part of a stage that the driver has looked at.
pub(super) struct Part {
    pub(super) stage: u32,
    pub(super) part: u32,
    pub(super) is_last: bool,
    pub(super) blocks: u32,
}

/// One move in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Arrival {
    pub(super) id: MoveId,
    pub(super) source: i32,
    pub(super) state: State,
    pub(super) deadline_ms: i64,
    replay: bool,
    stages: BTreeMap<u32, Stage>,
    tail: Option<Tail>,
}

impl Arrival {
    pub(super) fn begin(
        id: MoveId,
        source: i32,
        replay: bool,
        manifest: Vec<u8>,
        deadline_ms: i64,
        ttl_ms: i64,
        effects: &mut Vec<Effect>,
    ) -> Arrival {
        effects.push(Effect::Reserve { id, source, manifest, ttl_ms, replay });
        Arrival { id, source, state: State::Reserving, deadline_ms, replay, stages: BTreeMap::new(), tail: None }
    }

    fn answer(&self, frame: Frame, effects: &mut Vec<Effect>) {
        effects.push(Effect::Send { peer: self.source, frame });
    }

    pub(super) fn reserved(&mut self, hit_blocks: u32, limits: &Limits, now_ms: i64, effects: &mut Vec<Effect>) {
        if self.state == State::Reserving {
            (self.state, self.deadline_ms) = (State::Staging, now_ms + limits.reserve_ms);
            self.answer(Frame::Reserved { id: self.id, hit_blocks }, effects);
        }
    }

    /// The driver has no room, or none any more.
    pub(super) fn refused(&mut self, reason: &str, effects: &mut Vec<Effect>) -> IsOver {
        match self.state {
            State::Reserving => self.refuse(reason, effects),
            State::Staging => self.drop_with(reason, effects),
            State::Claiming => false,
        }
    }

    /// A part is stored, or is not what it should be.
    pub(super) fn part(
        &mut self,
        part: &Part,
        ok: bool,
        limits: &Limits,
        now_ms: i64,
        effects: &mut Vec<Effect>,
    ) -> IsOver {
        if self.state != State::Staging {
            return false;
        }
        if !ok {
            return self.drop_with("blocks did not arrive as they were sent, or found no room", effects);
        }
        if part.stage > limits.max_stages.saturating_add(1) || part.part >= MAX_PARTS {
            return self.drop_with("a stage or part is numbered beyond the limits", effects);
        }
        self.deadline_ms = now_ms + limits.reserve_ms;
        let stage = self.stages.entry(part.stage).or_default();
        if stage.parts.insert(part.part) {
            stage.blocks = stage.blocks.saturating_add(part.blocks);
            if part.is_last {
                stage.last = Some(part.part);
            }
        }
        if stage.is_complete() {
            self.answer(Frame::Ack { id: self.id, stage: part.stage }, effects);
        }
        self.claim_if_complete(limits, now_ms, effects)
    }

    pub(super) fn tail(
        &mut self,
        stage_blocks: Vec<u32>,
        manifest: Vec<u8>,
        choices: Vec<Choice>,
        limits: &Limits,
        now_ms: i64,
        effects: &mut Vec<Effect>,
    ) -> IsOver {
        if self.state != State::Staging || self.tail.is_some() {
            return false;
        }
        self.tail = Some(Tail { stage_blocks, manifest, choices });
        self.claim_if_complete(limits, now_ms, effects)
    }

    fn claim_if_complete(&mut self, limits: &Limits, now_ms: i64, effects: &mut Vec<Effect>) -> IsOver {
        let Some(tail) = &self.tail else { return false };
        for (number, &blocks) in (0..).zip(&tail.stage_blocks) {
            let arrived = self.stages.get(&number).filter(|stage| stage.is_complete()).map(|stage| stage.blocks);
            match arrived {
                None if blocks > 0 => return false,
                Some(arrived) if arrived != blocks => {
                    return self.drop_with("a stage holds another number of blocks than its tail says", effects);
                }
                _ => {}
            }
        }
        self.state = State::Claiming;
        self.claim(limits, now_ms, effects);
        false
    }

    fn claim(&mut self, limits: &Limits, now_ms: i64, effects: &mut Vec<Effect>) {
        let Some(tail) = &self.tail else { return };
        let (stages, blocks) = (tail.stage_blocks.len() as u32, tail.stage_blocks.iter().sum());
        let choices = tail.choices.clone();
        let frame = Frame::Claim { id: self.id, source: self.source, stages, blocks, choices };
        effects.push(Effect::Send { peer: OWNER, frame });
        self.deadline_ms = now_ms + limits.claim_ms;
    }

    pub(super) fn granted(&mut self, effects: &mut Vec<Effect>) -> IsOver {
        if self.state != State::Claiming {
            return false;
        }
        let manifest = self.tail.take().map(|tail| tail.manifest).unwrap_or_default();
        effects.push(Effect::Commit { id: self.id, epoch: self.id.epoch + 1, manifest, replay: self.replay });
        true
    }

    pub(super) fn denied(&mut self, effects: &mut Vec<Effect>) -> IsOver {
        self.state == State::Claiming && self.drop_with("the owner denied the claim", effects)
    }

    /// The source gave up or its link is gone. A claim stays: the owner decides.
    pub(super) fn abandoned(&mut self, effects: &mut Vec<Effect>) -> IsOver {
        if self.state != State::Claiming {
            self.cancel(effects);
        }
        self.state != State::Claiming
    }

    pub(super) fn timeout(&mut self, limits: &Limits, now_ms: i64, effects: &mut Vec<Effect>) -> IsOver {
        if self.state != State::Claiming {
            return self.drop_with("the source does not go on", effects);
        }
        self.claim(limits, now_ms, effects);
        false
    }

    pub(super) fn cancel(&self, effects: &mut Vec<Effect>) {
        effects.push(Effect::Cancel { id: self.id });
    }

    pub(super) fn drop_with(&mut self, reason: &str, effects: &mut Vec<Effect>) -> IsOver {
        self.cancel(effects);
        self.refuse(reason, effects)
    }

    fn refuse(&self, reason: &str, effects: &mut Vec<Effect>) -> IsOver {
        self.answer(Frame::Refused { id: self.id, reason: reason.to_owned() }, effects);
        true
    }
}
