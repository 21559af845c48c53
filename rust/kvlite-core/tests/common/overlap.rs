//! The rule that makes pipelining safe, checked on plans alone: a block named by a plan that has not completed, or read by
//! a copy of the same plan, is written by nobody but the sequence in whose table it already was.

use std::collections::{BTreeMap, BTreeSet};

use kvlite_core::plan::{CopyDirection, Header, PlanView, Region};

/// Added to the number of a block of the host, which none of the pool reaches.
const HOST: u32 = 1 << 31;

/// Block tables as planned so far, and the blocks that plans in flight name.
pub struct Overlap {
    block_size: u32,
    tables: Vec<Vec<u32>>,
    in_flight: Vec<BTreeSet<u32>>,
    /// Blocks of segments that plans in flight write, and for which row.
    making: Vec<BTreeMap<u32, usize>>,
    /// Blocks of the host that plans in flight write.
    to_host: Vec<BTreeSet<u32>>,
}

impl Overlap {
    pub fn new(num_rows: usize, block_size: u32) -> Overlap {
        let tables = vec![Vec::new(); num_rows];
        Overlap { block_size, tables, in_flight: Vec::new(), making: Vec::new(), to_host: Vec::new() }
    }

    /// Takes in the newest plan.
    pub fn plan(&mut self, plan: &PlanView<'_>) {
        for [_, _, row, _, _] in plan.rows::<5>(Region::Admitted) {
            self.tables[row as usize].clear();
        }
        let before = self.tables.clone();
        plan.expand(&mut self.tables);

        let mut named = BTreeSet::new();
        let (sources, to_host) = self.copies(plan);
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
        named.extend(&to_host);
        self.to_host.push(to_host);
        named.extend(placed_from);
        self.in_flight.push(named);
        self.making.push(making);
    }

    /// The oldest plan in flight has completed.
    pub fn complete(&mut self) {
        self.in_flight.remove(0);
        self.making.remove(0);
        self.to_host.remove(0);
    }

    /// Blocks that copies read where they stay, and those of the host that copies write. Copies to the host come before the others;
    /// apart from that they may run in any order.
    fn copies(&self, plan: &PlanView<'_>) -> (BTreeSet<u32>, BTreeSet<u32>) {
        let (mut sources, mut targets, mut to_host, mut gone) = Default::default();
        for [direction, source, target] in plan.rows::<3>(Region::BlockCopy) {
            let [mut source, target] = [source, target].map(|block| block as u32);
            if direction == CopyDirection::ToHost as i32 {
                assert!(BTreeSet::insert(&mut gone, source), "block {source} goes to the host once");
                assert!(BTreeSet::insert(&mut to_host, HOST + target), "host block {target} is copied into once");
                continue;
            }
            if direction == CopyDirection::FromHost as i32 {
                source += HOST;
                let arrives = self.to_host.iter().any(|targets| targets.contains(&source));
                assert!(!arrives, "{source} is read before the plan that writes it is done");
            }
            BTreeSet::insert(&mut sources, source);
            assert!(BTreeSet::insert(&mut targets, target), "block {target} is copied into once");
        }
        assert!(sources.is_disjoint(&targets), "what one copy reads another one writes");
        assert!(sources.is_disjoint(&to_host) && sources.is_disjoint(&gone), "what eviction took is read");
        targets.iter().chain(&to_host).for_each(|&target| self.assert_unread(target, usize::MAX));
        (sources, to_host)
    }

    /// Nobody but `row` may be told of this block: a plan in flight might name it.
    pub fn assert_unread(&self, block: u32, row: usize) {
        let is_made = |making: &BTreeMap<u32, usize>| making.get(&block).is_some_and(|&maker| maker != row);
        let is_named = self.in_flight.iter().any(|named| named.contains(&block)) || self.making.iter().any(is_made);
        assert!(!is_named, "block {block} was given away while a plan in flight names it");
    }
}
