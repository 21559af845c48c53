//! `Owner`: who owns each request, under which epoch, and how far its streams were delivered.
//!
//! The only arbiter. The epoch of a request goes up by one whenever its owner changes or takes it back, so that whoever speaks
//! under an older one is told so and changes nothing. A claim waits here while tokens of the old owner are still to come.
//! Calls that return no effects leave them for `due`. Called by the binding, on behalf of the front-end.

use std::collections::BTreeMap;

use thiserror::Error;

use super::entry::{Claim, Entry, Order, Swap};
use super::{MoveId, MoveResult};
use crate::sched::frames::{Frame, FrameError};

/// In place of an engine: the request waits for `replay`.
pub const NOBODY: i32 = -1;
/// An order that nobody answers may be given again after this; a source answers within its own time limits.
const ORDER_MS: i64 = 60_000;

/// Why an order, a new request or a replay is refused; nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum OrderError {
    /// No such request.
    #[error("request {request} does not exist")]
    Unknown {
        /// What was given.
        request: u64,
    },
    /// A number that is in use.
    #[error("request {request} exists already")]
    Exists {
        /// What was given.
        request: u64,
    },
    /// A request without choices.
    #[error("num_choices is 0, at least 1 is needed")]
    NoChoices,
    /// Its engine is gone and no other has it yet.
    #[error("request {request} has no engine at the moment: it will be replayed")]
    NoEngine {
        /// The request.
        request: u64,
    },
    /// It needs no replay.
    #[error("request {request} is owned by engine {engine}: it needs no replay")]
    Owned {
        /// The request.
        request: u64,
        /// Its owner.
        engine: i32,
    },
    /// Engines count from 0.
    #[error("engine is {engine}, allowed are numbers from 0 up")]
    Engine {
        /// What was given.
        engine: i32,
    },
    /// To where it is.
    #[error("request {request} is on engine {engine} already")]
    Itself {
        /// The request.
        request: u64,
        /// Its owner.
        engine: i32,
    },
    /// One move at a time.
    #[error("request {request} is moving to engine {to} already")]
    Moving {
        /// The request.
        request: u64,
        /// Where to.
        to: i32,
    },
}

/// What the front-end must do, in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the line of a variant says what its fields are")]
pub enum OwnerEffect {
    /// Hand a frame to an engine's link.
    Send { engine: i32, frame: Frame },
    /// The owner from now on.
    Switch { request: u64, engine: i32, epoch: u32 },
    /// Tokens of the old owner that came with a claim.
    Deliver { request: u64, choice: u32, position: u32, ids: Vec<i32> },
    /// The request's engine is gone: choose one and call `replay`. `preferred` may hold parts of its KV, or is `NOBODY`.
    Replay { request: u64, preferred: i32 },
    /// An order has ended.
    Moved { request: u64, result: MoveResult, to: i32, stages: u32, blocks: u32, reason: String },
}

/// The arbiter of one front-end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    entries: BTreeMap<u64, Entry>,
    due: Vec<OwnerEffect>,
    /// Off only in the control of the checker's tests.
    is_fenced: bool,
}

impl Default for Owner {
    fn default() -> Owner {
        Owner { entries: BTreeMap::new(), due: Vec::new(), is_fenced: true }
    }
}

impl Owner {
    /// No compare-and-swap: grants what is claimed and delivers what anybody sends. What the checker must catch.
    #[cfg(feature = "unfenced")]
    pub fn unfenced(self) -> Owner {
        Owner { is_fenced: false, ..self }
    }

    /// A new request on `engine`; returns its epoch.
    pub fn add(
        &mut self,
        request: u64,
        engine: i32,
        num_choices: usize,
        wants_logprobs: bool,
    ) -> Result<u32, OrderError> {
        if self.entries.contains_key(&request) {
            return Err(OrderError::Exists { request });
        }
        if num_choices == 0 {
            return Err(OrderError::NoChoices);
        }
        let entry = Entry {
            engine: checked(engine)?,
            lost: NOBODY,
            epoch: 0,
            since: 0,
            positions: vec![0; num_choices],
            finished: vec![false; num_choices],
            wants_logprobs,
            attempt: 0,
            order: None,
            parked: None,
            swap: None,
        };
        self.entries.insert(request, entry);
        Ok(0)
    }

    /// Which of `count` tokens from output position `position` on are new: (offset, count); none of a stale engine's.
    /// Errors when there is a gap before them: the engine has lost tokens.
    pub fn tokens(
        &mut self,
        request: u64,
        engine: i32,
        epoch: u32,
        choice: u32,
        position: u32,
        count: u32,
    ) -> Result<(u32, u32), FrameError> {
        let is_fenced = self.is_fenced;
        let Some(entry) = self.entries.get_mut(&request).filter(|entry| !is_fenced || entry.is_current(engine, epoch))
        else {
            return Ok((0, 0));
        };
        let at = choice as usize;
        let (Some(next), Some(&finished)) = (entry.positions.get_mut(at), entry.finished.get(at)) else {
            return Err(FrameError::Protocol { what: "tokens of a choice that the request does not have" });
        };
        let end = position.saturating_add(count);
        if finished || end <= *next {
            return Ok((0, 0));
        }
        if position > *next {
            return Err(FrameError::Protocol { what: "tokens leave a gap behind those before" });
        }
        let offset = *next - position;
        *next = end;
        entry.settle(&mut self.due);
        Ok((offset, count - offset))
    }

    /// A choice has ended. False: the engine is stale, or it had ended.
    pub fn finish(&mut self, request: u64, engine: i32, epoch: u32, choice: u32) -> bool {
        let is_fenced = self.is_fenced;
        let Some(entry) = self.entries.get_mut(&request).filter(|entry| !is_fenced || entry.is_current(engine, epoch))
        else {
            return false;
        };
        let Some(finished) = entry.finished.get_mut(choice as usize).filter(|finished| !**finished) else {
            return false;
        };
        *finished = true;
        entry.settle(&mut self.due);
        true
    }

    /// The request's streams have all ended, or nobody reads them.
    pub fn remove(&mut self, request: u64) {
        if let Some(mut entry) = self.entries.remove(&request) {
            entry.deny_parked(&mut self.due);
            entry.end_order(request, MoveResult::Ended, "the request ended", &mut self.due);
        }
    }

    /// Effects of the calls that return none.
    pub fn due(&mut self) -> Vec<OwnerEffect> {
        std::mem::take(&mut self.due)
    }

    /// What to answer an engine that speaks of a request under an epoch; nothing when it owns it.
    pub fn fence(&self, request: u64, engine: i32, epoch: u32) -> Vec<OwnerEffect> {
        match self.entries.get(&request) {
            Some(entry) if entry.is_current(engine, epoch) => Vec::new(),
            _ => vec![OwnerEffect::Send { engine, frame: Frame::Revoked { request, epoch } }],
        }
    }

    /// Engine (or `NOBODY`) and epoch.
    pub fn owner(&self, request: u64) -> Option<(i32, u32)> {
        self.entries.get(&request).map(|entry| (entry.engine, entry.epoch))
    }

    /// Tokens delivered per choice.
    pub fn positions(&self, request: u64) -> Option<&[u32]> {
        self.entries.get(&request).map(|entry| entry.positions.as_slice())
    }

    /// Where a request is ordered to move to.
    pub fn moving(&self, request: u64) -> Option<i32> {
        self.entries.get(&request)?.order.as_ref().map(|order| order.to)
    }

    /// Orders a move.
    pub fn order(&mut self, request: u64, to: i32, replay: bool, now_ms: i64) -> Result<Vec<OwnerEffect>, OrderError> {
        let to = checked(to)?;
        let entry = self.entries.get_mut(&request).ok_or(OrderError::Unknown { request })?;
        if entry.engine == NOBODY {
            return Err(OrderError::NoEngine { request });
        }
        if entry.engine == to {
            return Err(OrderError::Itself { request, engine: to });
        }
        let is_fresh = |order: &Order| now_ms - order.at_ms < ORDER_MS;
        if let Some(order) = entry.order.as_ref().filter(|order| entry.parked.is_some() || is_fresh(order)) {
            return Err(OrderError::Moving { request, to: order.to });
        }
        let mut effects = Vec::new();
        entry.end_order(request, MoveResult::Failed, "its engine never answered the order", &mut effects);
        entry.attempt += 1;
        entry.order = Some(Order { attempt: entry.attempt, to, at_ms: now_ms });
        let id = MoveId { request, epoch: entry.epoch, attempt: entry.attempt };
        effects.push(OwnerEffect::Send { engine: entry.engine, frame: Frame::Move { id, to, replay } });
        Ok(effects)
    }

    /// A frame from an engine. Errors when an engine may not send it; nothing has changed then.
    pub fn frame(&mut self, engine: i32, frame: Frame) -> Result<Vec<OwnerEffect>, FrameError> {
        match frame {
            Frame::Claim { id, source, stages, blocks, choices } => {
                Ok(self.claim(Claim { id, engine, stages, blocks, choices }, source))
            }
            Frame::Reclaim { id } => Ok(self.reclaim(engine, id)),
            Frame::Done { id, result, stages, blocks, reason } => {
                Ok(self.done(engine, id, (result, stages, blocks, reason)))
            }
            _ => Err(FrameError::Protocol { what: "an engine sent a frame that only others may send to the owner" }),
        }
    }

    fn claim(&mut self, claim: Claim, source: i32) -> Vec<OwnerEffect> {
        let (id, engine) = (claim.id, claim.engine);
        let answer = |frame| vec![OwnerEffect::Send { engine, frame }];
        let Some(entry) = self.entries.get_mut(&id.request) else { return answer(Frame::Denied { id }) };
        let has_it = entry.engine == engine && entry.epoch == id.epoch + 1;
        if has_it && entry.swap == Some(Swap::Granted(id)) {
            return answer(Frame::Granted { id });
        }
        if self.is_fenced && !entry.allows(&claim, source) {
            return answer(Frame::Denied { id });
        }
        let mut effects = Vec::new();
        entry.parked = Some(claim);
        entry.settle(&mut effects);
        effects
    }

    fn reclaim(&mut self, engine: i32, id: MoveId) -> Vec<OwnerEffect> {
        let request = id.request;
        let answer = |frame| OwnerEffect::Send { engine, frame };
        let revoked = answer(Frame::Revoked { request, epoch: id.epoch });
        let Some(entry) = self.entries.get_mut(&request).filter(|entry| entry.engine == engine) else {
            return vec![revoked];
        };
        if entry.epoch == id.epoch + 1 && entry.swap == Some(Swap::Reclaimed(id)) {
            return vec![answer(Frame::Reclaimed { id })];
        }
        if entry.epoch != id.epoch {
            return vec![revoked];
        }
        let mut effects = Vec::new();
        entry.deny_parked(&mut effects);
        entry.epoch += 1;
        entry.swap = Some(Swap::Reclaimed(id));
        effects.push(answer(Frame::Reclaimed { id }));
        effects.push(OwnerEffect::Switch { request, engine, epoch: entry.epoch });
        let reason = "the destination did not take over in time";
        entry.end_order(request, MoveResult::Reclaimed, reason, &mut effects);
        effects
    }

    /// A source has ended a move by itself. Grants and reclaims are known here already.
    fn done(&mut self, engine: i32, id: MoveId, end: (MoveResult, u32, u32, String)) -> Vec<OwnerEffect> {
        let mut effects = Vec::new();
        let Some(entry) = self.entries.get_mut(&id.request) else { return effects };
        let (result, stages, blocks, reason) = end;
        let is_ordered = entry.order.as_ref().is_some_and(|order| order.attempt == id.attempt);
        if entry.engine == engine && is_ordered && !matches!(result, MoveResult::Moved | MoveResult::Reclaimed) {
            entry.deny_parked(&mut effects);
            if let Some(Order { to, .. }) = entry.order.take() {
                effects.push(OwnerEffect::Moved { request: id.request, result, to, stages, blocks, reason });
            }
        }
        effects
    }

    /// The link to an engine has ended: what it owned is taken over by a claim that waits, or has to be replayed.
    pub fn engine_down(&mut self, engine: i32) -> Vec<OwnerEffect> {
        let mut effects = Vec::new();
        for (&request, entry) in &mut self.entries {
            if entry.parked.as_ref().is_some_and(|claim| claim.engine == engine) {
                entry.parked = None;
            }
            if entry.engine != engine {
                continue;
            }
            (entry.engine, entry.lost) = (NOBODY, engine);
            entry.settle(&mut effects);
            if entry.engine == NOBODY {
                let preferred = entry.order.as_ref().map_or(NOBODY, |order| order.to);
                effects.push(OwnerEffect::Replay { request, preferred });
            }
        }
        effects
    }

    /// Gives a request whose engine was lost to another, from what was delivered; returns its epoch.
    pub fn replay(&mut self, request: u64, to: i32) -> Result<u32, OrderError> {
        let to = checked(to)?;
        let entry = self.entries.get_mut(&request).ok_or(OrderError::Unknown { request })?;
        if entry.engine != NOBODY {
            return Err(OrderError::Owned { request, engine: entry.engine });
        }
        entry.deny_parked(&mut self.due);
        entry.end_order(request, MoveResult::Failed, "its engine was lost", &mut self.due);
        entry.epoch += 1;
        (entry.engine, entry.lost, entry.since, entry.swap) = (to, NOBODY, entry.epoch, None);
        Ok(entry.epoch)
    }
}

fn checked(engine: i32) -> Result<i32, OrderError> {
    if engine < 0 { Err(OrderError::Engine { engine }) } else { Ok(engine) }
}
