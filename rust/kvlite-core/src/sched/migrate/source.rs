//! The source's side of one move: from the owner's order to the end.
//!
//! Until the tail is sent the source may give up by itself; afterwards only the owner's word ends the move, because the
//! destination may have claimed. Every method appends effects and says whether the move is over. Called by `mover`.

use super::{Choice, Effect, Limits, MoveId, MoveResult, OWNER};
use crate::sched::frames::{Frame, MAX_FRAME_LEN};

/// What the source waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum State {
    /// The driver's manifest.
    Exporting,
    /// The destination's room.
    Preparing,
    /// Bytes of other moves to be acknowledged.
    Queued,
    /// The driver's word that a stage is sent.
    Staging,
    /// The destination's word that it arrived.
    Acking,
    /// The step boundary.
    Freezing,
    /// The driver's word that the last stage is sent.
    LastStaging,
    /// The driver's final manifest.
    Tailing,
    /// The owner's word; the first state that may not be left alone.
    Tailed,
    /// The owner's word on a reclaim.
    Reclaiming,
}

impl State {
    pub(super) fn name(self) -> &'static str {
        match self {
            State::Exporting => "exporting",
            State::Preparing => "preparing",
            State::Queued => "queued",
            State::Staging => "staging",
            State::Acking => "acking",
            State::Freezing => "freezing",
            State::LastStaging => "last staging",
            State::Tailing => "tailing",
            State::Tailed => "tailed",
            State::Reclaiming => "reclaiming",
        }
    }
}

/// One move out.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Export {
    pub(super) id: MoveId,
    pub(super) to: i32,
    pub(super) state: State,
    pub(super) deadline_ms: Option<i64>,
    replay: bool,
    num_choices: u32,
    skip_blocks: u32,
    /// Blocks of every stage that the driver has sent.
    stage_blocks: Vec<u32>,
    /// Blocks that another stage would hold, as of the last one.
    left: u32,
    /// The destination was faster than the driver's own word.
    is_acked: bool,
}

/// The move is over and its record goes.
pub(super) type IsOver = bool;

impl Export {
    pub(super) fn begin(id: MoveId, to: i32, replay: bool, effects: &mut Vec<Effect>) -> Export {
        effects.push(Effect::Export { id });
        Export {
            id,
            to,
            state: State::Exporting,
            deadline_ms: None,
            replay,
            num_choices: 0,
            skip_blocks: 0,
            stage_blocks: Vec::new(),
            left: 0,
            is_acked: false,
        }
    }

    /// Blocks that are sent and not acknowledged.
    pub(super) fn inflight_blocks(&self) -> u64 {
        match self.state {
            State::Acking => self.stage_blocks.last().copied().unwrap_or(0).into(),
            _ => 0,
        }
    }

    fn stage(&self) -> u32 {
        self.stage_blocks.len() as u32
    }

    fn wait(&mut self, state: State, deadline_ms: Option<i64>) -> IsOver {
        (self.state, self.deadline_ms) = (state, deadline_ms);
        false
    }

    fn send(&self, frame: Frame, effects: &mut Vec<Effect>) {
        effects.push(Effect::Send { peer: self.to, frame });
    }

    pub(super) fn exported(
        &mut self,
        manifest: Option<Vec<u8>>,
        num_choices: u32,
        limits: &Limits,
        now_ms: i64,
        effects: &mut Vec<Effect>,
    ) -> IsOver {
        let Some(manifest) = manifest.filter(|_| self.state == State::Exporting) else {
            return self.state == State::Exporting && self.over(MoveResult::Refused, "it cannot be moved", effects);
        };
        if manifest.len() >= MAX_FRAME_LEN / 2 {
            return self.abort("its manifest is too long", effects);
        }
        self.num_choices = num_choices;
        self.send(Frame::Prepare { id: self.id, replay: self.replay, manifest }, effects);
        self.wait(State::Preparing, Some(now_ms + limits.ack_ms))
    }

    pub(super) fn reserved(
        &mut self,
        hit_blocks: u32,
        limits: &Limits,
        now_ms: i64,
        effects: &mut Vec<Effect>,
    ) -> IsOver {
        match (self.state, self.replay) {
            (State::Preparing, true) => self.freeze(limits, now_ms, effects),
            (State::Preparing, false) => {
                self.skip_blocks = hit_blocks;
                self.wait(State::Queued, None)
            }
            _ => false,
        }
    }

    /// The next stage, for one that is `Queued`.
    pub(super) fn next_stage(&mut self, effects: &mut Vec<Effect>) {
        self.push_stage(false, effects);
        self.wait(State::Staging, None);
    }

    fn push_stage(&mut self, last: bool, effects: &mut Vec<Effect>) {
        self.is_acked = false;
        let (id, to, stage, skip_blocks) = (self.id, self.to, self.stage(), self.skip_blocks);
        effects.push(Effect::Stage { id, to, stage, skip_blocks, last });
    }

    pub(super) fn staged(
        &mut self,
        stage: u32,
        num_blocks: u32,
        left: u32,
        limits: &Limits,
        now_ms: i64,
        effects: &mut Vec<Effect>,
    ) -> IsOver {
        match self.state {
            State::Staging if stage == self.stage() => {
                self.stage_blocks.push(num_blocks);
                self.left = left;
                if num_blocks == 0 || self.is_acked {
                    return self.stage_done(limits, now_ms, effects);
                }
                self.wait(State::Acking, Some(now_ms + limits.ack_ms))
            }
            State::LastStaging if stage == self.stage() => {
                self.stage_blocks.push(num_blocks);
                effects.push(Effect::Tail { id: self.id });
                self.wait(State::Tailing, self.deadline_ms)
            }
            _ => false,
        }
    }

    pub(super) fn acked(&mut self, stage: u32, limits: &Limits, now_ms: i64, effects: &mut Vec<Effect>) -> IsOver {
        match self.state {
            State::Staging if stage == self.stage() => self.is_acked = true,
            State::Acking if stage + 1 == self.stage() => return self.stage_done(limits, now_ms, effects),
            _ => {}
        }
        false
    }

    /// Freezes when little is left, when more stages do not help, or when there were enough.
    fn stage_done(&mut self, limits: &Limits, now_ms: i64, effects: &mut Vec<Effect>) -> IsOver {
        let sent = self.stage_blocks.last().copied().unwrap_or(0);
        let outrun = self.stage() >= 2 && self.left >= sent;
        if self.left <= self.num_choices || outrun || self.stage() >= limits.max_stages {
            return self.freeze(limits, now_ms, effects);
        }
        self.wait(State::Queued, None)
    }

    fn freeze(&mut self, limits: &Limits, now_ms: i64, effects: &mut Vec<Effect>) -> IsOver {
        effects.push(Effect::Freeze { id: self.id });
        self.wait(State::Freezing, Some(now_ms + limits.freeze_ms))
    }

    pub(super) fn frozen(&mut self, effects: &mut Vec<Effect>) -> IsOver {
        match (self.state, self.replay) {
            (State::Freezing, true) => {
                effects.push(Effect::Tail { id: self.id });
                self.wait(State::Tailing, self.deadline_ms)
            }
            (State::Freezing, false) => {
                self.push_stage(true, effects);
                self.wait(State::LastStaging, self.deadline_ms)
            }
            _ => false,
        }
    }

    pub(super) fn tail(
        &mut self,
        manifest: Vec<u8>,
        choices: Vec<Choice>,
        limits: &Limits,
        now_ms: i64,
        effects: &mut Vec<Effect>,
    ) -> IsOver {
        if self.state != State::Tailing {
            return false;
        }
        let num_ids: usize = choices.iter().filter_map(|choice| choice.ids.as_ref()).map(Vec::len).sum();
        if manifest.len() >= MAX_FRAME_LEN / 2 || num_ids >= MAX_FRAME_LEN / 16 {
            return self.abort("its manifest is too long", effects);
        }
        let (id, stage_blocks) = (self.id, self.stage_blocks.clone());
        self.send(Frame::Tail { id, stage_blocks, manifest, choices }, effects);
        self.wait(State::Tailed, Some(now_ms + limits.freeze_ms))
    }

    /// The destination will not take it, or its link is gone.
    pub(super) fn lost(
        &mut self,
        result: MoveResult,
        reason: &str,
        limits: &Limits,
        now_ms: i64,
        effects: &mut Vec<Effect>,
    ) -> IsOver {
        match self.state {
            State::Reclaiming => false,
            State::Tailed => self.reclaim(limits, now_ms, effects),
            _ => {
                self.thaw(self.id.epoch, effects);
                self.over(result, reason, effects)
            }
        }
    }

    /// Gives up before the tail.
    fn abort(&mut self, reason: &str, effects: &mut Vec<Effect>) -> IsOver {
        self.withdraw(effects);
        self.thaw(self.id.epoch, effects);
        self.over(MoveResult::Aborted, reason, effects)
    }

    /// The driver could not do its part; too late once the tail is sent.
    pub(super) fn failed(&mut self, reason: &str, effects: &mut Vec<Effect>) -> IsOver {
        self.state < State::Tailed && self.abort(reason, effects)
    }

    fn reclaim(&mut self, limits: &Limits, now_ms: i64, effects: &mut Vec<Effect>) -> IsOver {
        effects.push(Effect::Send { peer: OWNER, frame: Frame::Reclaim { id: self.id } });
        self.wait(State::Reclaiming, Some(now_ms + limits.claim_ms))
    }

    /// Its deadline has passed.
    pub(super) fn timeout(
        &mut self,
        is_fenced: bool,
        limits: &Limits,
        now_ms: i64,
        effects: &mut Vec<Effect>,
    ) -> IsOver {
        match self.state {
            State::Tailed | State::Reclaiming if is_fenced => self.reclaim(limits, now_ms, effects),
            State::Preparing | State::Acking => self.abort("the destination does not answer", effects),
            _ => self.abort("it took too long to freeze", effects),
        }
    }

    /// The owner gave it back.
    pub(super) fn reclaimed(&mut self, effects: &mut Vec<Effect>) -> IsOver {
        if self.state != State::Reclaiming {
            return false;
        }
        self.withdraw(effects);
        self.thaw(self.id.epoch + 1, effects);
        self.report(MoveResult::Reclaimed, "the destination did not take over in time", effects);
        true
    }

    /// The owner gave it to somebody else, or knows it no more.
    pub(super) fn revoked(&mut self, effects: &mut Vec<Effect>) -> IsOver {
        let (request, attempt, epoch) = (self.id.request, self.id.attempt, self.id.epoch);
        if self.state < State::Tailed {
            self.withdraw(effects);
            effects.push(Effect::Release { request, attempt, epoch });
            self.report(MoveResult::Failed, "the owner took the request away", effects);
        } else {
            effects.push(Effect::Release { request, attempt, epoch });
            self.report(MoveResult::Moved, "", effects);
        }
        true
    }

    /// The request ended here.
    pub(super) fn ended(&mut self, effects: &mut Vec<Effect>) -> IsOver {
        self.withdraw(effects);
        self.over(MoveResult::Ended, "the request ended", effects)
    }

    /// The owner is gone, and with it every stream.
    pub(super) fn owner_lost(&mut self, effects: &mut Vec<Effect>) {
        self.withdraw(effects);
        let (request, attempt, epoch) = (self.id.request, self.id.attempt, self.id.epoch);
        effects.push(Effect::Release { request, attempt, epoch });
        self.report(MoveResult::Failed, "the stream's owner is gone", effects);
    }

    fn withdraw(&self, effects: &mut Vec<Effect>) {
        if self.state != State::Exporting {
            self.send(Frame::Abort { id: self.id }, effects);
        }
    }

    fn thaw(&self, epoch: u32, effects: &mut Vec<Effect>) {
        effects.push(Effect::Thaw { request: self.id.request, attempt: self.id.attempt, epoch });
    }

    /// Tells the owner and the driver.
    fn over(&self, result: MoveResult, reason: &str, effects: &mut Vec<Effect>) -> IsOver {
        let (id, stages, blocks) = (self.id, self.stage(), self.stage_blocks.iter().sum());
        let frame = Frame::Done { id, result, stages, blocks, reason: reason.to_owned() };
        effects.push(Effect::Send { peer: OWNER, frame });
        self.report(result, reason, effects);
        true
    }

    fn report(&self, result: MoveResult, reason: &str, effects: &mut Vec<Effect>) {
        let (id, stages, blocks) = (self.id, self.stage(), self.stage_blocks.iter().sum());
        effects.push(Effect::Done { id, result, stages, blocks, reason: reason.to_owned() });
    }
}
