//! Freeze and thaw: a request that is about to move keeps everything it has, and no plan names it any more.
//!
//! Choices with a row keep it and their blocks and are nobody's victims; those that wait leave the queue and keep their
//! rank. Ends reach a frozen request as any other (its owner, deadlines, a plan that was in flight). Called by `export.rs`
//! and by the binding.

use super::{Core, RequestState};
use crate::error::CoreError;
use crate::sequence::Status;

impl Core {
    /// No later plan names any choice of this request. Twice is fine.
    ///
    /// Errors: a handle that names nothing that lives, a request that makes a segment.
    pub fn freeze(&mut self, handle: i32) -> Result<(), CoreError> {
        let request = self.movable(handle)?;
        self.request_mut(request).frozen = true;
        for choice in 0..self.request(request).choices.len() {
            let Some(slot) = self.slot_of(request, choice) else { continue };
            match self.seq(slot).status() {
                Status::Running => self.seq_mut(slot).become_(Status::Frozen),
                Status::Preempting => {
                    self.seq_mut(slot).become_(Status::Frozen); // Its blocks are worth more where it goes.
                    self.num_leaving -= 1;
                }
                Status::Waiting | Status::Outside => self.shelve(slot),
                // A fork that waits for choice 0 is named by no plan before choice 0 goes on.
                Status::Forked | Status::Frozen | Status::Shelved | Status::Ending | Status::Vacant => {}
            }
        }
        Ok(())
    }

    fn shelve(&mut self, slot: u32) {
        if self.seq(slot).status() == Status::Outside {
            self.stop_waiting(slot);
            let blend = self.seq_mut(slot).blend.as_mut().expect("only blends wait for segments");
            blend.attempts -= 1; // It has not been served.
        } else {
            self.leave_queue(slot);
        }
        self.seq_mut(slot).become_(Status::Shelved);
        self.num_shelved += 1;
    }

    /// Whether the request is frozen and no plan in flight names it either: its tokens are final, and every end of a choice
    /// was reported.
    ///
    /// Errors: as `freeze`.
    pub fn is_frozen(&self, handle: i32) -> Result<bool, CoreError> {
        let request = self.movable(handle)?;
        Ok(self.is_at_rest(request) && self.out_finished.iter().all(|row| row[0] != handle))
    }

    /// Whether it is frozen and no plan in flight names it.
    pub(super) fn is_at_rest(&self, request: u32) -> bool {
        let state = self.request(request);
        let slots = (0..state.choices.len()).filter_map(|choice| self.slot_of(request, choice));
        state.frozen && slots.into_iter().all(|slot| self.seq(slot).outstanding == 0)
    }

    /// Back to where it was: rows go on, those that waited take their place in the queue again.
    pub(super) fn thaw(&mut self, request: u32) {
        if !std::mem::take(&mut self.request_mut(request).frozen) {
            return;
        }
        for choice in 0..self.request(request).choices.len() {
            let Some(slot) = self.slot_of(request, choice) else { continue };
            match self.seq(slot).status() {
                Status::Frozen => self.seq_mut(slot).become_(Status::Running),
                Status::Shelved => {
                    self.num_shelved -= 1;
                    self.seq_mut(slot).become_(Status::Waiting);
                    self.join_queue(slot);
                }
                _ => {}
            }
        }
        self.refused = None; // The head of the queue may be another one now.
    }

    /// The index of a request that lives and may move.
    pub(super) fn movable(&self, handle: i32) -> Result<u32, CoreError> {
        let alive = |&&request: &&u32| self.request(request).num_unfinished > 0;
        let request = *self.by_handle.get(&handle).filter(alive).ok_or(CoreError::UnknownHandle { handle })?;
        match self.request(request) {
            RequestState { precomputes: true, .. } => Err(CoreError::MakesSegment { handle }),
            _ => Ok(request),
        }
    }
}
