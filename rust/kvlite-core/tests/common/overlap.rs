//! The rule that makes pipelining safe, checked on plans alone: a block named by a plan that has not completed, or read by
//! a copy of the same plan, is written by nobody but the sequence in whose table it already was.

use std::collections::BTreeSet;

use kvlite_core::plan::{Header, PlanView, Region};

/// Block tables as planned so far, and the blocks that plans in flight name.
pub struct Overlap {
    block_size: u32,
    tables: Vec<Vec<u32>>,
    in_flight: Vec<BTreeSet<u32>>,
}

impl Overlap {
    pub fn new(num_rows: usize, block_size: u32) -> Overlap {
        Overlap { block_size, tables: vec![Vec::new(); num_rows], in_flight: Vec::new() }
    }

    /// Takes in the newest plan.
    pub fn plan(&mut self, plan: &PlanView<'_>) {
        for [_, _, row, _, _] in plan.rows::<5>(Region::Admitted) {
            self.tables[row as usize].clear();
        }
        let before = self.tables.clone();
        plan.expand(&mut self.tables);

        let mut named = BTreeSet::new();
        let mut sources = BTreeSet::new();
        let mut targets = BTreeSet::new();
        for [_, source, target] in plan.rows::<3>(Region::BlockCopy) {
            sources.insert(source as u32);
            assert!(targets.insert(target as u32), "block {target} is copied into once");
        }
        assert!(sources.is_disjoint(&targets), "copies of one plan may run in any order");
        for &target in &targets {
            self.assert_unread(target);
        }
        let num_tokens = plan.header(Header::NumTokens) as usize;
        let num_seqs = plan.header(Header::NumSeqs) as usize;
        let starts = plan.flat(Region::QueryStart, num_seqs + 1);
        let slots = plan.flat(Region::SlotMapping, num_tokens);
        for (seq, &row) in plan.flat(Region::SeqRow, num_seqs).iter().enumerate() {
            let row = row as usize;
            for &slot in &slots[starts[seq] as usize..starts[seq + 1] as usize] {
                let block = slot as u32 / self.block_size;
                if !before[row].contains(&block) {
                    self.assert_unread(block);
                    assert!(!sources.contains(&block), "block {block} is read by a copy of this plan");
                }
            }
            named.extend(self.tables[row].iter().copied().filter(|&block| block != u32::MAX));
        }
        named.extend(sources);
        self.in_flight.push(named);
    }

    /// The oldest plan in flight has completed.
    pub fn complete(&mut self) {
        self.in_flight.remove(0);
    }

    fn assert_unread(&self, block: u32) {
        let is_named = self.in_flight.iter().any(|named| named.contains(&block));
        assert!(!is_named, "block {block} was given away while a plan in flight names it");
    }
}
