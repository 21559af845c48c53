//! Into the queue and out of it; what a policy is told of a sequence that waits.
//!
//! Connects `queue.rs`, which knows numbers, with sequences and the cache. Looks change nothing: whoever is chosen is matched
//! anew when it is admitted. Called by whatever moves sequences, and by `admit.rs` for the next candidate.

use super::Core;
use crate::ids::Waiter;
use crate::sched::policy::Waiting;
use crate::sequence::Sequence;

impl Sequence {
    /// Where it stands in the queue, in slot `slot`.
    pub(super) fn waiter(&self, slot: u32) -> Waiter {
        Waiter { rank: self.rank, choice: self.choice, slot }
    }

    /// Where it stands among those whom the cache watches.
    pub(super) fn watcher(&self, slot: u32) -> Waiter {
        Waiter { rank: (self.turn, self.rank.1), choice: self.choice, slot }
    }
}

impl Core {
    pub(super) fn join_queue(&mut self, slot: u32) {
        let seq = &self.seqs[slot as usize];
        self.queue.insert(seq.tenant(), seq.waiter(slot), seq.tokens.len() as u32);
        self.arrange_arrival(slot);
        self.watch(slot);
    }

    /// Without having been admitted; nothing happens if it is outside the queue.
    pub(super) fn leave_queue(&mut self, slot: u32) {
        let seq = &self.seqs[slot as usize];
        self.queue.remove(seq.tenant(), seq.waiter(slot));
        self.arrange_departure(slot);
        self.unwatch(slot);
    }

    /// Who comes next. Asks the cache only where the policy compares and nobody was chosen before, and then a
    /// bounded number of times per step.
    pub(super) fn candidate(&mut self) -> Option<u32> {
        if self.arranged.is_on() {
            return self.next_arranged();
        }
        if let Some(slot) = self.queue.settled() {
            return Some(slot);
        }
        let mut slots = std::mem::take(&mut self.scratch_looks);
        self.queue.stalest(&mut slots);
        for slot in slots.drain(..) {
            let waiting = self.look(slot);
            let seq = &self.seqs[slot as usize];
            self.queue.saw(seq.tenant(), seq.waiter(slot), &waiting);
        }
        self.scratch_looks = slots;
        self.queue.best()
    }

    /// What the cache has for a waiting sequence now. O(hits); a blend with holes or missing segments counts those as new.
    fn look(&mut self, slot: u32) -> Waiting {
        let is_blend = self.seq(slot).blend.is_some();
        let partial = if is_blend { self.survey(slot, true).0 } else { self.find_prefix(slot, true) };
        let hits = (self.scratch_hits.len() + self.scratch_host.len()) as u32 * self.config.block_size;
        self.waiting(slot, hits + partial.map_or(0, |hit| hit.len))
    }

    /// A surveyed sequence as a policy sees it, with `cached` tokens of hits.
    pub(super) fn waiting(&self, slot: u32, cached: u32) -> Waiting {
        let seq = self.seq(slot);
        let (blended, ratio) = match &seq.blend {
            Some(blend) => (blend.num_reused() as u32, blend.rule.ratio),
            None => (0, 0.0),
        };
        let recomputed = (f64::from(blended) * ratio).ceil() as u32;
        Waiting { known: seq.tokens.len() as u32, cached, blended, recomputed }
    }
}
