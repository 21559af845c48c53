//! One request as its owner's arbiter knows it: the compare-and-swap, and the claim that waits for it.
//!
//! Knows neither frames' senders nor other requests. Called by `owner`.

use super::owner::{NOBODY, OwnerEffect};
use super::{Choice, MoveId, MoveResult};
use crate::sched::frames::Frame;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Order {
    pub(super) attempt: u32,
    pub(super) to: i32,
    pub(super) at_ms: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Claim {
    pub(super) id: MoveId,
    pub(super) engine: i32,
    pub(super) stages: u32,
    pub(super) blocks: u32,
    pub(super) choices: Vec<Choice>,
}

/// The last compare-and-swap that succeeded, for frames that come again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Swap {
    Granted(MoveId),
    Reclaimed(MoveId),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Entry {
    /// `NOBODY` between the loss of an engine and `replay`.
    pub(super) engine: i32,
    /// The engine that was lost; its request may still arrive elsewhere by a claim.
    pub(super) lost: i32,
    pub(super) epoch: u32,
    /// The oldest epoch under which `engine` has had it without a break: a reclaim changes the epoch, not the engine.
    pub(super) since: u32,
    pub(super) positions: Vec<u32>,
    pub(super) finished: Vec<bool>,
    pub(super) wants_logprobs: bool,
    pub(super) attempt: u32,
    pub(super) order: Option<Order>,
    pub(super) parked: Option<Claim>,
    pub(super) swap: Option<Swap>,
}

impl Entry {
    pub(super) fn is_current(&self, engine: i32, epoch: u32) -> bool {
        self.engine == engine && (self.since..=self.epoch).contains(&epoch)
    }

    /// Whether the old owner's own words are still needed before a claim can be granted.
    fn is_short_of(&self, claim: &Claim) -> bool {
        let mut choices = claim.choices.iter().zip(self.positions.iter().zip(&self.finished));
        choices.any(|(choice, (&position, &finished))| {
            !finished && (choice.ids.is_none() || self.wants_logprobs && position < choice.position)
        })
    }

    /// Whether a claim is what was ordered and loses nothing that was delivered.
    pub(super) fn allows(&self, claim: &Claim, source: i32) -> bool {
        let owns = self.engine == source || self.engine == NOBODY && self.lost == source;
        let ordered =
            self.order.as_ref().is_some_and(|order| order.attempt == claim.id.attempt && order.to == claim.engine);
        let mut choices = claim.choices.iter().zip(self.positions.iter().zip(&self.finished));
        owns && ordered
            && self.epoch == claim.id.epoch
            && claim.choices.len() == self.positions.len()
            && self.finished.contains(&false)
            && choices.all(|(choice, (&position, &finished))| finished || position <= choice.position)
    }

    pub(super) fn end_order(&mut self, request: u64, result: MoveResult, reason: &str, effects: &mut Vec<OwnerEffect>) {
        if let Some(order) = self.order.take() {
            let (to, reason) = (order.to, reason.to_owned());
            effects.push(OwnerEffect::Moved { request, result, to, stages: 0, blocks: 0, reason });
        }
    }

    pub(super) fn deny_parked(&mut self, effects: &mut Vec<OwnerEffect>) {
        if let Some(claim) = self.parked.take() {
            effects.push(OwnerEffect::Send { engine: claim.engine, frame: Frame::Denied { id: claim.id } });
        }
    }

    /// Grants the parked claim when nothing is missing; denies it when nobody is left to send that, or nothing to go on with.
    pub(super) fn settle(&mut self, effects: &mut Vec<OwnerEffect>) {
        let Some(claim) = &self.parked else { return };
        let (is_short, is_live) = (self.is_short_of(claim), self.engine != NOBODY);
        if !self.finished.contains(&false) || is_short && !is_live {
            return self.deny_parked(effects);
        }
        if is_short {
            return;
        }
        if let Some(claim) = self.parked.take() {
            self.grant(claim, effects);
        }
    }

    fn grant(&mut self, claim: Claim, effects: &mut Vec<OwnerEffect>) {
        let request = claim.id.request;
        for (choice, state) in (0..).zip(claim.choices) {
            let at = choice as usize;
            let position = self.positions[at];
            if let Some(ids) = state.ids
                && !self.finished[at]
                && position < state.position
            {
                let ids = ids[position as usize..].to_vec();
                effects.push(OwnerEffect::Deliver { request, choice, position, ids });
                self.positions[at] = state.position;
            }
        }
        let (old, revoked) = (self.engine, self.epoch);
        self.epoch += 1;
        (self.engine, self.lost, self.since) = (claim.engine, NOBODY, self.epoch);
        self.swap = Some(Swap::Granted(claim.id));
        self.order = None;
        effects.push(OwnerEffect::Send { engine: claim.engine, frame: Frame::Granted { id: claim.id } });
        if old != NOBODY {
            effects.push(OwnerEffect::Send { engine: old, frame: Frame::Revoked { request, epoch: revoked } });
        }
        effects.push(OwnerEffect::Switch { request, engine: claim.engine, epoch: self.epoch });
        let (to, stages, blocks) = (claim.engine, claim.stages, claim.blocks);
        effects.push(OwnerEffect::Moved {
            request,
            result: MoveResult::Moved,
            to,
            stages,
            blocks,
            reason: String::new(),
        });
    }
}
