//! The invariants of ARCHITECTURE.md that the core can check, each as a sentence. O(everything); for tests and debugging.

use std::collections::{BTreeMap, BTreeSet};

use super::{Core, Hold, NO_HANDLE};
use crate::cache::{BlockState, SegmentId, SegmentState};
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
        self.audit_reuse();
        self.audit_moves();
        self.audit_watched();
    }

    /// Whoever is about to leave is in no queue, whoever arrives holds what it was promised.
    fn audit_moves(&self) {
        let mut num_arrived = 0;
        for (slot, seq) in self.seqs.iter().enumerate().filter(|(_, seq)| seq.status() != Status::Vacant) {
            let is_frozen = self.request(seq.request).frozen;
            let (moves, status) = (matches!(seq.status(), Status::Frozen | Status::Shelved), seq.status());
            let stays = matches!(status, Status::Running | Status::Waiting | Status::Outside | Status::Preempting);
            assert!(if is_frozen { !stays } else { !moves }, "slot {slot} is {status:?}, frozen: {is_frozen}");
            num_arrived += usize::from(seq.arrived && status.holds_row());
        }
        assert_eq!(num_arrived, self.num_arrived, "rows of imported sequences that no plan has named");
        let mut in_transfer = 0;
        for (ticket, arrival) in &self.arrivals {
            let copies = arrival.landed.values().filter(|landing| !landing.filled);
            let copying: Vec<_> = copies.map(|landing| self.cache.state(landing.block)).collect();
            in_transfer += copying.len();
            assert!(copying.iter().all(|&state| state == BlockState::InTransfer), "ticket {ticket}: copies under way");
            let is_empty = arrival.rows.is_empty() && arrival.spare.is_empty() && arrival.hits.is_empty();
            assert!(!arrival.is_cancelled || is_empty, "ticket {ticket} is cancelled and waits for copies alone");
            assert!(!arrival.is_cancelled || !copying.is_empty(), "ticket {ticket} is cancelled and waits for nothing");
        }
        assert_eq!(in_transfer, self.cache.counts().in_transfer, "blocks in transfer belong to arrivals");
    }

    /// Makers, waiters, users of segments and holders of recipes all agree.
    fn audit_reuse(&self) {
        let mut making = 0;
        let mut holders = BTreeMap::new();
        let mut users = BTreeMap::new();
        for (slot, seq) in self.seqs.iter().enumerate() {
            let slot = slot as u32;
            if let Some(id) = seq.makes.filter(|id| self.makers.get(id).is_some_and(|maker| maker.slot == slot)) {
                making += 1;
                let state = self.cache.segment(id).state;
                let has_blocks = seq.status().holds_row();
                let expected = if has_blocks { SegmentState::Making } else { SegmentState::Wanted };
                assert_eq!(state, expected, "{id:?} and its maker in slot {slot} are equally far");
            }
            let Some(blend) = &seq.blend else { continue };
            for id in &blend.waits {
                let maker = self.makers.get(id);
                assert!(
                    maker.is_some_and(|maker| maker.waiters.contains(&slot)),
                    "slot {slot} waits for {id:?}'s maker"
                );
            }
            assert_eq!(!blend.waits.is_empty(), seq.status() == Status::Outside, "slot {slot}: who waits is outside");
            blend.recipe.iter().for_each(|&number| *holders.entry(number).or_insert(0) += 1);
            if blend.uses_segments {
                assert!(seq.status().holds_row(), "slot {slot} uses segments without a row");
                blend.reused.iter().for_each(|range| *users.entry(range.segment).or_insert(0) += 1);
            }
        }
        assert_eq!(making, self.makers.len(), "every maker has its sequence");
        for (id, maker) in &self.makers {
            assert!(self.cache.segment(*id).state != SegmentState::Ready, "{id:?} is ready and has a maker");
            let waits = |&slot: &u32| self.seqs[slot as usize].blend.as_ref().is_some_and(|b| b.waits.contains(id));
            assert!(maker.waiters.iter().all(waits), "{id:?}: who is listed as waiting does wait");
            let is_needed = !maker.waiters.is_empty() || self.cache.segment(*id).pinned;
            let is_ending = self.seq(maker.slot).status() == Status::Ending;
            assert!(is_needed || is_ending, "{id:?} is made for nobody");
        }
        for (id, count) in users {
            assert_eq!(self.cache.segment(id).users, count, "{id:?}: sequences that place it");
        }
        for (number, recipe) in self.recipes.iter() {
            let count = holders.remove(&number).unwrap_or(0);
            assert_eq!(recipe.holders, count, "recipe {number}: sequences that go by it");
        }
        assert!(holders.is_empty(), "sequences hold recipes that are gone: {holders:?}");
    }

    fn audit_lists(&self) {
        let orders: Vec<_> = self.running.iter().map(|&slot| self.seq(slot).order()).collect();
        assert!(orders.is_sorted_by(|a, b| a < b), "the running list is ordered by rank and choice: {orders:?}");
        let mut rows: Vec<u32> = self.running.iter().map(|&slot| self.seq(slot).row).collect();
        rows.extend(&self.free_rows);
        rows.extend(self.arrivals.values().flat_map(|arrival| &arrival.rows));
        rows.sort_unstable();
        assert!(rows.into_iter().eq(0..self.config.max_num_seqs), "every row is free or has one sequence");
        let held = self.seqs.iter().filter(|seq| seq.status().holds_row()).count();
        assert_eq!(held, self.running.len(), "whoever holds a row is in the running list");
        let is_leaving = |seq: &&Sequence| matches!(seq.status(), Status::Ending | Status::Preempting);
        assert_eq!(self.seqs.iter().filter(is_leaving).count(), self.num_leaving, "leaving sequences are counted");
        let num_waiting = self.seqs.iter().filter(|seq| seq.status() == Status::Waiting).count();
        assert_eq!(num_waiting, self.queue.len(), "whoever waits is in the queue");
        let num_outside = self.seqs.iter().filter(|seq| seq.status() == Status::Outside).count();
        assert_eq!(num_outside, self.num_outside, "whoever waits for segments is counted");
        let num_shelved = self.seqs.iter().filter(|seq| seq.status() == Status::Shelved).count();
        assert_eq!(num_shelved, self.num_shelved, "whoever was frozen while it waited is counted");
        // Requests, not sequences: choices that were preempted after their fork wait each on its own.
        let limit = (self.config.max_num_waiting + self.config.max_num_seqs) as usize;
        let live = self.by_handle.len() + self.arrivals.len();
        assert!(live <= limit, "{live} requests live, the tables are made for {limit}");
        self.queue.audit();
        for slot in self.queue.slots() {
            let seq = self.seq(slot);
            let is_here = self.queue.holds(seq.tenant(), seq.waiter(slot));
            assert!(is_here && seq.status() == Status::Waiting, "the queue names its sequences");
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
        for (at, &block) in path.iter().enumerate() {
            let label = self.cache.label(block).expect("a path lies in the tree");
            let expected = self.label_of(seq, at).unwrap_or(seq.label);
            assert!(
                label == expected || (expected.is_exact() && label == Label::PUBLIC),
                "{block:?} is {label:?}, slot {slot} reads {expected:?}: exact KV of its own or public, else one recipe's"
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
        for arrival in self.arrivals.values() {
            let filled = arrival.landed.values().filter(|landing| landing.filled).map(|landing| landing.block);
            filled.chain(arrival.spare.iter().copied()).for_each(&mut own);
            arrival.hits.iter().for_each(|block| in_tree[block.index as usize] = true);
        }
        let (mut tree_holds, mut read, mut written) = (0, BTreeSet::new(), Vec::new());
        let of_plans = self.records.iter().flat_map(|record| &record.holds);
        for hold in of_plans.chain(self.exports.values().flatten()) {
            match *hold {
                Hold::Private(block) => own(block),
                Hold::InTree(_) => tree_holds += 1,
                Hold::HostRead(block) => drop(read.insert(block.index)),
                Hold::HostWrite(block) => written.push(block),
            }
        }
        for (block, &count) in owners.iter().enumerate() {
            let extra = self.extra_owners[block] as usize;
            assert_eq!(extra, usize::saturating_sub(count, 1), "block {block}: owners beyond the first");
        }
        let (counts, host) = (self.cache.counts(), self.cache.host_counts());
        assert_eq!(host.owned, read.len(), "blocks of the host in use are read by plans in flight");
        assert_eq!(host.in_transfer, written.len(), "blocks of the host in transfer are written by plans in flight");
        assert!(written.iter().all(|&block| self.cache.is_arriving(block)), "a block of the host is ready too early");
        let used = owners.iter().filter(|&&count| count > 0).count() + in_tree.iter().filter(|&&used| used).count();
        let blends = self.seqs.iter().filter_map(|seq| seq.blend.as_ref()).filter(|blend| blend.uses_segments);
        let placed = blends.flat_map(|blend| blend.reused.iter().map(|range| range.segment));
        let in_use: BTreeSet<SegmentId> = placed.chain(self.makers.keys().copied()).collect();
        let used = used + in_use.iter().map(|&id| self.cache.segment(id).blocks.len()).sum::<usize>();
        let most = used + self.cache.pinned_blocks();
        assert!(
            counts.owned >= used && (tree_holds > 0 || counts.owned <= most),
            "{} blocks are owned, sequences, plans and segments account for {used} to {most}: the difference has leaked",
            counts.owned
        );
        let total = counts.free + counts.cached + counts.owned + counts.in_transfer;
        assert_eq!(total, num_blocks, "every block is free, cached, owned or in transfer");
    }

    fn audit_requests(&self) {
        let alive = self.requests.iter().flatten().count();
        let own = self.requests.iter().flatten().filter(|state| state.handle == NO_HANDLE).count();
        assert_eq!(alive, self.by_handle.len() + own, "every request of a client has one handle");
        let mut with_deadline = 0;
        for (index, state) in self.requests.iter().enumerate() {
            let Some(state) = state else { continue };
            let known = self.by_handle.get(&state.handle);
            assert!(
                known == Some(&(index as u32)) || (known, state.handle) == (None, NO_HANDLE),
                "handles find their requests"
            );
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
