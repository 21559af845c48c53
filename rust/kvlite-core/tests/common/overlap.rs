//! The rule that makes pipelining safe, checked on plans alone: a block named by a plan that has not completed, or read by
//! a copy of the same plan, is written by nobody but the sequence in whose table it already was.

use std::collections::{BTreeMap, BTreeSet};

use kvlite_core::plan::{Header, PlanView, Region};

/// Block tables as planned so far, and the blocks that plans in flight name.
pub struct Overlap {
    block_size: u32,
    tables: Vec<Vec<u32>>,
    in_flight: Vec<BTreeSet<u32>>,
    /// Blocks of segments that plans in flight write, and for which row.
    making: Vec<BTreeMap<u32, usize>>,
}

impl Overlap {
    pub fn new(num_rows: usize, block_size: u32) -> Overlap {
        Overlap { block_size, tables: vec![Vec::new(); num_rows], in_flight: Vec::new(), making: Vec::new() }
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
            self.assert_unread(target, usize::MAX);
        }
        let listed = plan.flat(Region::SourceBlocks, plan.header(Header::NumSourceBlocks) as usize);
        let placed_from: BTreeSet<u32> = listed.iter().map(|&block| block as u32).collect();
        for [row, position, len, ..] in plan.rows::<6>(Region::Place) {
            for at in position as u32 / self.block_size..((position + len) as u32).div_ceil(self.block_size) {
                let block = self.tables[row as usize][at as usize];
                assert!(!placed_from.contains(&block), "block {block} is placed from and into");
                if !before[row as usize].contains(&block) {
                    self.assert_unread(block, row as usize);
                }
                named.insert(block);
            }
        }
        let mut making = BTreeMap::new();
        let num_tokens = plan.header(Header::NumTokens) as usize;
        let num_seqs = plan.header(Header::NumSeqs) as usize;
        let starts = plan.flat(Region::QueryStart, num_seqs + 1);
        let slots = plan.flat(Region::SlotMapping, num_tokens);
        let segment_slots = plan.flat(Region::SegmentSlot, num_tokens);
        let lens = plan.flat(Region::ContextLen, num_seqs);
        for (seq, &row) in plan.flat(Region::SeqRow, num_seqs).iter().enumerate() {
            let row = row as usize;
            let rows = starts[seq] as usize..starts[seq + 1] as usize;
            for &slot in segment_slots[rows.clone()].iter().filter(|&&slot| slot >= 0) {
                let block = slot as u32 / self.block_size;
                self.assert_unread(block, row);
                assert!(!placed_from.contains(&block), "block {block} is placed from before it is complete");
                making.insert(block, row);
            }
            for &slot in &slots[rows] {
                let block = slot as u32 / self.block_size;
                assert!(!placed_from.contains(&block), "a segment's block {block} is written");
                if !before[row].contains(&block) {
                    self.assert_unread(block, row);
                    assert!(!sources.contains(&block), "block {block} is read by a copy of this plan");
                }
            }
            let read = &self.tables[row][..(lens[seq] as u32).div_ceil(self.block_size) as usize];
            named.extend(read.iter().copied().filter(|&block| block != u32::MAX));
        }
        named.extend(sources);
        named.extend(placed_from);
        self.in_flight.push(named);
        self.making.push(making);
    }

    /// The oldest plan in flight has completed.
    pub fn complete(&mut self) {
        self.in_flight.remove(0);
        self.making.remove(0);
    }

    /// Nobody but `row` may be told of this block: a plan in flight might name it.
    pub fn assert_unread(&self, block: u32, row: usize) {
        let is_made = |making: &BTreeMap<u32, usize>| making.get(&block).is_some_and(|&maker| maker != row);
        let is_named = self.in_flight.iter().any(|named| named.contains(&block)) || self.making.iter().any(is_made);
        assert!(!is_named, "block {block} was given away while a plan in flight names it");
    }
}
