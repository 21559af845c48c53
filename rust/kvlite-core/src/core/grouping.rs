//! Which sequences of the plan read a shared prefix together: finds groups when the members change, names them in the plan.
//!
//! Members are sequences with few rows whose KV is exact; every row of them sees all blocks that its sequence has in the
//! tree, so any shared part of those may be read once, by the table of one of them. If an earlier plan in flight shows the
//! device those blocks and fails, that table is not there: such a sequence is no member yet. Called by `schedule`, after
//! the last row is written.

use super::Core;
use crate::config::CoreConfig;
use crate::plan::PlanWriter;
use crate::sched::groups::Groups;

/// A sequence with more rows in a plan shares each key among enough of them by itself.
const MAX_ROWS: u32 = 32;
/// `CoreConfig::group_cost_tokens` that no group ever pays for.
const NO_GROUPS: u32 = i32::MAX as u32;

/// What is known of the last plan's groups.
#[derive(Debug, Default)]
pub(super) struct Grouping {
    found: Groups,
    /// (slot, index in the plan) of this plan's sequences that may be in a group.
    members: Vec<(u32, u32)>,
    /// Slots that `found` speaks of.
    searched: Vec<u32>,
    /// A slot has a new sequence, or a block another one's, since `found` was.
    stale: bool,
    /// Blocks whose tokens are whole splits of attention, as few as there can be.
    unit: u32,
    /// What a group must save, in blocks; none: no groups.
    cost: Option<u32>,
}

impl Grouping {
    /// Buffers for as many sequences as may run.
    pub fn new(config: &CoreConfig) -> Grouping {
        let (num_seqs, block_size) = (config.max_num_seqs as usize, config.block_size);
        let (members, searched) = (Vec::with_capacity(num_seqs), Vec::with_capacity(num_seqs));
        let mut unit = 1;
        while !(unit * block_size).is_multiple_of(config.attention_split_tokens) {
            unit += 1;
        }
        let cost = Some(config.group_cost_tokens).filter(|&cost| cost < NO_GROUPS);
        let cost = cost.map(|cost| cost.div_ceil(block_size));
        Grouping { found: Groups::for_paths(num_seqs), members, searched, stale: false, unit, cost }
    }

    /// Sequences or their blocks are not those of the last search.
    pub fn forget(&mut self) {
        self.stale = true;
    }
}

impl Core {
    /// A sequence gets `rows` rows in the plan, as its sequence `index`.
    pub(super) fn may_group(&mut self, slot: u32, rows: u32, index: u32) {
        let seq = &self.seqs[slot as usize];
        let shares = seq.tree_len >= self.grouping.unit && seq.blend.is_none() && seq.makes.is_none();
        let in_flight = || self.records[0].number.max(self.records[1].number);
        let is_shown = || seq.outstanding == 1 || seq.shown_by < in_flight(); // By this plan alone, or before that one.
        if rows <= MAX_ROWS && shares && self.grouping.cost.is_some() && is_shown() {
            self.grouping.members.push((slot, index));
        }
    }

    /// Writes the groups of the sequences that `may_group` named.
    pub(super) fn write_groups(&mut self, plan: &mut PlanWriter<'_>) {
        let block_size = self.config.block_size;
        let Grouping { found, members, searched, stale, unit, cost } = &mut self.grouping;
        if let Some(cost) = cost.filter(|_| members.len() > 1) {
            let slots = members.iter().map(|&(slot, _)| slot);
            if *stale || !slots.clone().eq(searched.iter().copied()) {
                searched.clear();
                searched.extend(slots);
                let path = |i: usize| {
                    let seq = &self.seqs[members[i].0 as usize];
                    &seq.blocks[..seq.tree_len as usize]
                };
                found.find(members.len(), path, *unit, cost);
                *stale = false;
            }
            for group in found.groups() {
                let inside = &found.members()[group.first as usize..][..group.count as usize];
                plan.prefix_group(group.blocks * block_size, inside.iter().map(|&i| members[i as usize].1));
                self.stats.shared_keys_total += u64::from(group.count - 1) * u64::from(group.blocks * block_size);
            }
        }
        members.clear();
    }
}
