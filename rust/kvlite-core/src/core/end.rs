//! The ways out: abort, finish, deadlines, preemption's release. Whatever a plan in flight names is kept until it completes.
//!
//! `end` decides that a choice is over and reports it exactly once; `sweep` gives back what nobody names any more.

use super::{Core, NO_HANDLE, NO_SLOT};
use crate::sequence::{FinishReason, Sequence, Status};

impl Core {
    /// Ends every choice of a request, wherever it is. False when the handle names nothing that lives (abort twice is fine).
    pub fn abort(&mut self, handle: i32) -> bool {
        match self.by_handle.get(&handle) {
            Some(&request) => self.end_request(request, FinishReason::Cancelled),
            None => false,
        }
    }

    /// Ends one choice of an admitted request on behalf of its stream's owner, who keeps `kept_len` output tokens (a stop
    /// string is seen a step late; what lies beyond only counts as discarded).
    ///
    /// Idempotent: an unknown handle or choice, or one that has ended, is ignored and gives false.
    pub fn finish(&mut self, handle: i32, choice: u32, kept_len: u32, reason: FinishReason) -> bool {
        let Some(&request) = self.by_handle.get(&handle) else { return false };
        let Some(slot) = self.slot_of(request, choice as usize).filter(|_| self.request(request).announced) else {
            return false;
        };
        let output_len = self.seq(slot).output_len();
        let ended = self.end(slot, reason);
        if ended {
            self.stats.discarded_tokens_total += u64::from(output_len.saturating_sub(kept_len));
        }
        ended
    }

    /// Ends the requests whose deadline has come.
    pub(super) fn expire(&mut self, now_ms: i64) {
        while let Some(&(deadline, request)) = self.deadlines.first() {
            if deadline > now_ms {
                break;
            }
            self.end_request(request, FinishReason::Timeout);
        }
    }

    /// Ends every choice that has not ended; false when there was none.
    pub(super) fn end_request(&mut self, request: u32, reason: FinishReason) -> bool {
        let mut ended = false;
        for choice in 0..self.request(request).choices.len() {
            if let Some(slot) = self.slot_of(request, choice) {
                ended |= self.end(slot, reason);
            }
            if self.requests[request as usize].is_none() {
                break; // Its last waiting choice took the request along.
            }
        }
        ended
    }

    /// Ends one choice: reports it, and gives back at once what a waiting one has (nothing but its slot).
    pub(super) fn end(&mut self, slot: u32, reason: FinishReason) -> bool {
        let seq = &mut self.seqs[slot as usize];
        let (status, request, choice) = (seq.status(), seq.request, seq.choice);
        match status {
            Status::Vacant | Status::Ending => return false,
            Status::Waiting => self.leave_queue(slot),
            Status::Outside => self.stop_waiting(slot),
            Status::Shelved => self.num_shelved -= 1,
            Status::Running | Status::Forked | Status::Frozen => {
                seq.become_(Status::Ending);
                self.num_leaving += 1;
            }
            Status::Preempting => seq.become_(Status::Ending),
        }
        let state = self.request_mut(request);
        let (choice, ended) = if state.announced { (choice as i32, 1) } else { (-1, state.num_choices) };
        state.num_unfinished -= ended;
        let (handle, deadline) = (state.handle, state.deadline_ms.filter(|_| state.num_unfinished == 0));
        if let Some(deadline) = deadline {
            self.deadlines.remove(&(deadline, request));
        }
        self.arrange_end(slot, reason);
        if handle != NO_HANDLE {
            self.out_finished.push([handle, choice, reason as i32]);
            self.stats.finished_total[reason as usize] += u64::from(ended);
        }
        if matches!(status, Status::Waiting | Status::Outside | Status::Shelved) {
            self.abandon_maker(slot);
            self.vacate(slot);
        }
        true
    }

    /// Gives back everything of sequences that ended or were preempted and that no plan names any more.
    pub(super) fn sweep(&mut self) {
        if self.num_leaving == 0 {
            return;
        }
        for at in 0..self.running.len() {
            let slot = self.running[at];
            let seq = self.seq(slot);
            if seq.outstanding > 0 {
                continue;
            }
            match seq.status() {
                Status::Ending => {
                    self.give_back(slot);
                    self.abandon_maker(slot);
                    self.vacate(slot);
                }
                Status::Preempting => self.park(slot),
                _ => continue,
            }
            self.num_leaving -= 1;
        }
        self.forget_departed();
    }

    /// Drops from the running list whoever holds no row any more.
    pub(super) fn forget_departed(&mut self) {
        let seqs = &self.seqs;
        self.running.retain(|&slot| seqs[slot as usize].status().holds_row());
    }

    /// Back into the queue at the old rank: what is in the tree stays there as cached, the rest is freed.
    pub(super) fn park(&mut self, slot: u32) {
        self.give_back(slot);
        if let Some(id) = self.seq(slot).makes {
            self.cache.empty_segment(id);
        }
        self.requeue(slot);
        self.seq_mut(slot).preemptions += 1;
    }

    fn requeue(&mut self, slot: u32) {
        let seq = &mut self.seqs[slot as usize];
        seq.become_(Status::Waiting);
        seq.forget_device_state();
        if self.requests[seq.request as usize].as_ref().is_some_and(|state| state.frozen) {
            seq.become_(Status::Shelved);
            self.num_shelved += 1;
        } else {
            self.join_queue(slot);
        }
    }

    /// Returns row and blocks. Choices that waited for this one's prompt go back to the queue, each on its own.
    pub(super) fn give_back(&mut self, slot: u32) {
        self.release_segments(slot);
        let seq = &mut self.seqs[slot as usize];
        let (request, choice, tree_len) = (seq.request, seq.choice, seq.tree_len as usize);
        let mut blocks = std::mem::take(&mut seq.blocks);
        let tail_source = seq.tail_source.take();
        self.num_arrived -= usize::from(std::mem::take(&mut seq.arrived));
        self.free_rows.push(seq.row);
        for block in blocks.drain(tree_len..).rev().chain(tail_source) {
            self.free_private(block);
        }
        if let Some(&cursor) = blocks.last() {
            self.cache.unpin(cursor);
        }
        blocks.clear();
        self.seq_mut(slot).blocks = blocks;
        self.room_epoch += 1;
        if choice > 0 {
            return;
        }
        for choice in 1..self.request(request).choices.len() {
            let Some(fork) = self.slot_of(request, choice) else { continue };
            if self.seq(fork).status() == Status::Forked {
                self.free_rows.push(self.seq(fork).row);
                self.requeue(fork);
            }
        }
    }

    /// Empties a slot; the last one takes the request along.
    pub(super) fn vacate(&mut self, slot: u32) {
        let seq = &mut self.seqs[slot as usize];
        seq.become_(Status::Vacant);
        let (request, choice) = (seq.request, seq.choice as usize);
        if let Some(recipe) = seq.blend.as_ref().and_then(|blend| blend.recipe) {
            self.recipes.release(recipe, &self.cache);
        }
        // Swapped for an empty one, so that a vacant slot keeps no prompt alive.
        *seq = Sequence::vacant();
        self.free_slots.push(slot);
        let state = self.request_mut(request);
        state.choices[choice] = NO_SLOT;
        state.num_present -= 1;
        if state.num_present == 0 {
            let handle = state.handle;
            if handle != NO_HANDLE {
                self.by_handle.remove(&handle);
            }
            self.requests[request as usize] = None;
            self.free_requests.push(request);
        }
    }
}
