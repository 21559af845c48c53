//! The invariants of ARCHITECTURE.md that the core can check, each as a sentence. O(everything); for tests and debugging.

use super::{Core, Hold};
use crate::cache::BlockState;
use crate::ids::{BlockId, Label};
use crate::sequence::{Sequence, Status};

impl Core {
    /// Checks every invariant; panics with a sentence that names the first one broken.
    pub fn audit(&self) {
        self.cache.audit();
        self.audit_lists();
        for &slot in &self.running {
            self.audit_sequence(slot);
        }
        self.audit_plans();
        self.audit_blocks();
        self.audit_requests();
    }

    fn audit_lists(&self) {
        let orders: Vec<_> = self.running.iter().map(|&slot| self.seq(slot).order()).collect();
        assert!(orders.is_sorted_by(|a, b| a < b), "the running list is ordered by rank and choice: {orders:?}");
        let mut rows: Vec<u32> = self.running.iter().map(|&slot| self.seq(slot).row).collect();
        rows.extend(&self.free_rows);
        rows.sort_unstable();
        assert!(rows.into_iter().eq(0..self.config.max_num_seqs), "every row is free or has one sequence");
        let held = self.seqs.iter().filter(|seq| seq.status().holds_row()).count();
        assert_eq!(held, self.running.len(), "whoever holds a row is in the running list");
        let is_leaving = |seq: &&Sequence| matches!(seq.status(), Status::Ending | Status::Preempting);
        assert_eq!(self.seqs.iter().filter(is_leaving).count(), self.num_leaving, "leaving sequences are counted");
        let num_waiting = self.seqs.iter().filter(|seq| seq.status() == Status::Waiting).count();
        assert_eq!(num_waiting, self.waiting.len(), "whoever waits is in the queue");
        // Requests, not sequences: choices that were preempted after their fork wait each on its own.
        let limit = (self.config.max_num_waiting + self.config.max_num_seqs) as usize;
        let live = self.by_handle.len();
        assert!(live <= limit, "{live} requests live, the tables are made for {limit}");
        for &(rank, choice, slot) in &self.waiting {
            let seq = self.seq(slot);
            assert_eq!(((rank, choice), Status::Waiting), (seq.order(), seq.status()), "the queue names its sequences");
            assert!(seq.blocks.is_empty() && seq.tail_source.is_none(), "a waiting sequence holds no block");
        }
    }

    fn audit_sequence(&self, slot: u32) {
        let seq = self.seq(slot);
        let block_size = self.config.block_size;
        let room = (seq.blocks.len() + usize::from(seq.tail_source.is_some())) as u32 * block_size;
        assert!(seq.committed_len <= seq.scheduled_len, "slot {slot}: committed before scheduled");
        assert!(seq.scheduled_len <= seq.total_len(), "slot {slot}: planned past its known and sampled tokens");
        assert!(seq.total_len() <= seq.end_len, "slot {slot}: past its declared end");
        assert!(seq.scheduled_len <= room, "slot {slot}: planned past its blocks");
        assert!(seq.tree_len * block_size <= seq.committed_len, "slot {slot}: published before its KV was written");
        assert!(seq.table_len <= seq.blocks.len() as u32, "slot {slot}: the device's table names blocks it never had");
        let path = &seq.blocks[..seq.tree_len as usize];
        for &block in path {
            let label = self.cache.label(block);
            assert!(
                label.is_some_and(|label| label == seq.label || label == Label::PUBLIC),
                "{block:?} of {label:?}: a tenant's exact requests read its own and public exact KV"
            );
            assert_eq!(self.cache.state(block), BlockState::Owned, "{block:?} is in use and must not be evictable");
        }
    }

    fn audit_plans(&self) {
        let mut named = vec![0; self.seqs.len()];
        let mut drawn = vec![0; self.seqs.len()];
        for record in self.records.iter() {
            assert!(record.number != 0 || record.entries.is_empty(), "a plan that is not in flight names nobody");
            for entry in &record.entries {
                named[entry.slot as usize] += 1;
                drawn[entry.slot as usize] += u32::from(entry.draws);
            }
        }
        for (slot, seq) in self.seqs.iter().enumerate() {
            assert_eq!(named[slot], seq.outstanding, "slot {slot}: plans in flight that name it");
            assert_eq!(drawn[slot], seq.samples_in_flight, "slot {slot}: samples in flight");
            assert!(seq.outstanding == 0 || seq.status().holds_row(), "slot {slot} was freed while a plan names it");
        }
    }

    fn audit_blocks(&self) {
        let num_blocks = self.config.num_blocks as usize;
        let mut owners = vec![0; num_blocks];
        let mut in_tree = vec![false; num_blocks];
        let mut own = |block: BlockId| {
            assert_eq!(self.cache.state(block), BlockState::Owned, "{block:?} has an owner");
            assert_eq!(self.cache.label(block), None, "{block:?} is private, so it is not in the tree");
            owners[block.index as usize] += 1;
        };
        for seq in self.running.iter().map(|&slot| self.seq(slot)) {
            seq.blocks[seq.tree_len as usize..].iter().copied().chain(seq.tail_source).for_each(&mut own);
            seq.blocks[..seq.tree_len as usize].iter().for_each(|block| in_tree[block.index as usize] = true);
        }
        let mut tree_holds = 0;
        for hold in self.records.iter().flat_map(|record| &record.holds) {
            match *hold {
                Hold::Private(block) => own(block),
                Hold::InTree(_) => tree_holds += 1,
            }
        }
        for (block, &count) in owners.iter().enumerate() {
            let extra = self.extra_owners[block] as usize;
            assert_eq!(extra, usize::saturating_sub(count, 1), "block {block}: owners beyond the first");
        }
        let counts = self.cache.counts();
        let used = owners.iter().filter(|&&count| count > 0).count() + in_tree.iter().filter(|&&used| used).count();
        assert!(
            counts.owned == used || (tree_holds > 0 && counts.owned > used),
            "{} blocks are owned, sequences and plans account for {used}: the difference has leaked",
            counts.owned
        );
        let total = counts.free + counts.cached + counts.owned + counts.in_transfer;
        assert_eq!(total, num_blocks, "every block is free, cached, owned or in transfer");
    }

    fn audit_requests(&self) {
        let alive = self.requests.iter().flatten().count();
        assert_eq!(alive, self.by_handle.len(), "every request has one handle");
        let mut with_deadline = 0;
        for (index, state) in self.requests.iter().enumerate() {
            let Some(state) = state else { continue };
            assert_eq!(self.by_handle.get(&state.handle), Some(&(index as u32)), "handles find their requests");
            let mine = |seq: &&Sequence| seq.request == index as u32;
            let present = self.seqs.iter().filter(mine).count();
            assert_eq!(present, state.num_present as usize, "request {index}: sequences that exist");
            let is_unfinished = |seq: &&Sequence| !matches!(seq.status(), Status::Ending | Status::Vacant);
            let unfinished = self.seqs.iter().filter(mine).filter(is_unfinished).count();
            let expected = if state.announced { state.num_unfinished } else { 1 };
            assert_eq!(unfinished, expected as usize, "request {index}: choices that have not ended");
            if let Some(deadline) = state.deadline_ms.filter(|_| state.num_unfinished > 0) {
                with_deadline += 1;
                assert!(self.deadlines.contains(&(deadline, index as u32)), "request {index}: its deadline is watched");
            }
        }
        assert_eq!(with_deadline, self.deadlines.len(), "deadlines of ended requests are forgotten");
    }
}
