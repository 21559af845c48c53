//! A device that runs plans literally: block tables, copies, placements, rows in order, scores, samples.
//!
//! A slot holds the KV of `hashes`, and beside it whose it is. A lost, stale, foreign or badly shared block, a row that was
//! skipped or saw a later one, a segment at the wrong place: each changes what is sampled.

use std::collections::{BTreeMap, BTreeSet};

use kvlite_core::plan::{CopyDirection, Header, PROMPT_LOGPROB, PlanView, Region, SAMPLE};
use kvlite_core::{CoreConfig, Scope};

use super::hashes::{Kv, LAYERS, Row, UNWRITTEN, depth_of, rotate, row, value, weight};
use super::{Asked, PUBLIC};

/// One sampled row, as the device saw it.
#[derive(Clone, Copy, Debug)]
pub struct Drawn {
    pub handle: i32,
    pub choice: u32,
    pub kind: i32,
    pub position: i32,
    pub token: i32,
    /// The hidden state that the token was drawn from.
    pub hidden: u64,
}

/// What a plan writes into its arena.
#[derive(Default)]
pub struct Results {
    pub drawn: Vec<Drawn>,
    /// Weight and value per key of each score entry.
    pub scored: Vec<[f32; 2]>,
    /// Handle, choice, first position and the one behind the last of what was placed.
    pub placed: Vec<(i32, u32, usize, usize)>,
    /// Handle, choice and prompt rows that a decode step computed again.
    pub repaired: Vec<(i32, u32, Vec<usize>)>,
}

/// Rows of one sequence in one plan, and how they run.
struct Scoring {
    first: usize,
    count: usize,
    keys: std::ops::Range<usize>,
    /// None: a decode step asks anew.
    scope: Option<Scope>,
    depth: usize,
    scores: Vec<[f32; 2]>,
}

/// Slots, block tables and last tokens, all changed by plans alone.
pub struct Device {
    block_size: usize,
    vocab_size: u32,
    kv: Vec<Kv>,
    /// Tenant whose request wrote the slot.
    owner: Vec<u32>,
    /// The host tier, slot by slot.
    host: Vec<(Kv, u32)>,
    tables: Vec<Vec<u32>>,
    last_token: Vec<i32>,
    rows: Vec<(i32, u32)>,
    /// Requests of failed plans: a plan made before that was known still names them, over tables that were never set.
    doomed: BTreeSet<i32>,
}

impl Device {
    pub fn new(config: &CoreConfig) -> Device {
        let num_rows = config.max_num_seqs as usize;
        let num_slots = (config.num_blocks * config.block_size) as usize;
        Device {
            block_size: config.block_size as usize,
            vocab_size: config.vocab_size,
            kv: vec![UNWRITTEN; num_slots],
            owner: vec![u32::MAX; num_slots],
            host: vec![(UNWRITTEN, u32::MAX); (config.host_blocks * config.block_size) as usize],
            tables: vec![Vec::new(); num_rows],
            last_token: vec![-1; num_rows],
            rows: vec![(-1, 0); num_rows],
            doomed: BTreeSet::new(),
        }
    }

    /// What another engine copies: KV and writer of each slot of a block.
    pub fn block(&self, block: u32) -> Vec<(Kv, u32)> {
        let slots = block as usize * self.block_size..(block as usize + 1) * self.block_size;
        slots.map(|slot| (self.kv[slot], self.owner[slot])).collect()
    }

    /// A copy from another engine has arrived.
    pub fn fill(&mut self, block: u32, slots: &[(Kv, u32)]) {
        for (at, &(kv, owner)) in slots.iter().enumerate() {
            let slot = block as usize * self.block_size + at;
            (self.kv[slot], self.owner[slot]) = (kv, owner);
        }
    }

    /// Learns who sits in which row; done when the plan is read, which is before it runs. Makers of segments come without a
    /// name: their rows have nobody's, or the last holder's.
    pub fn meet(&mut self, plan: &PlanView<'_>) {
        for [handle, choice, row, _, _] in plan.rows::<5>(Region::Admitted) {
            self.rows[row as usize] = (handle, choice as u32);
        }
    }

    /// (handle, choice) of every row that a plan names, sampled rows of forks included.
    pub fn named(&self, plan: &PlanView<'_>) -> Vec<(i32, u32)> {
        let seqs = plan.flat(Region::SeqRow, plan.header(Header::NumSeqs) as usize).iter().copied();
        let samples = plan.rows::<3>(Region::Sample).map(|sample| sample[1]);
        let touched = plan.rows::<3>(Region::BlockUpdate).map(|update| update[0]);
        let placed = plan.rows::<6>(Region::Place).map(|place| place[0]);
        seqs.chain(samples).chain(touched).chain(placed).map(|row| self.rows[row as usize]).collect()
    }

    /// A plan that broke: nothing of it happened, or (`garbage`) everything it was to write is rubbish.
    pub fn fail(&mut self, plan: &PlanView<'_>, garbage: bool) {
        self.doomed.extend(self.named(plan).into_iter().map(|(handle, _)| handle));
        if !garbage {
            return;
        }
        let num_tokens = plan.header(Header::NumTokens) as usize;
        for region in [Region::SlotMapping, Region::SegmentSlot] {
            for &slot in plan.flat(region, num_tokens).iter().filter(|&&slot| slot >= 0) {
                self.kv[slot as usize] = [0xdead; LAYERS];
            }
        }
        for [direction, _, target] in plan.rows::<3>(Region::BlockCopy) {
            let slots = target as usize * self.block_size..(target as usize + 1) * self.block_size;
            if direction == CopyDirection::ToHost as i32 {
                self.host[slots].fill(([0xdead; LAYERS], u32::MAX));
            } else {
                self.kv[slots].fill([0xdead; LAYERS]);
            }
        }
        let mut tables = self.tables.clone();
        plan.expand(&mut tables);
        for [seq_row, position, len, ..] in plan.rows::<6>(Region::Place) {
            for position in (position as usize)..(position + len) as usize {
                if let Some(&block) =
                    tables[seq_row as usize].get(position / self.block_size).filter(|&&block| block != u32::MAX)
                {
                    self.kv[block as usize * self.block_size + position % self.block_size] = [0xdead; LAYERS];
                }
            }
        }
    }

    /// Runs a plan: table changes, copies, placements, rows in order, samples.
    pub fn run(&mut self, plan: &PlanView<'_>, asked: &BTreeMap<i32, Asked>) -> Results {
        plan.expand(&mut self.tables);
        self.copy_blocks(plan);
        let placed = self.place(plan, asked);
        let num_tokens = plan.header(Header::NumTokens) as usize;
        let num_seqs = plan.header(Header::NumSeqs) as usize;
        let positions = plan.flat(Region::Positions, num_tokens);
        let starts = plan.flat(Region::QueryStart, num_seqs + 1);
        assert_eq!(starts[num_seqs] as usize, num_tokens, "every row belongs to a sequence");
        assert_eq!(plan.flat(Region::LastKey, num_tokens), positions, "rows see up to their own position");
        let stored = plan.flat(Region::SegmentSlot, num_tokens).iter().filter(|&&slot| slot >= 0);
        let mut written: Vec<i32> = plan.flat(Region::SlotMapping, num_tokens).iter().chain(stored).copied().collect();
        written.sort_unstable();
        assert!(written.windows(2).all(|pair| pair[0] != pair[1]), "a slot has one writer");

        let shared = self.shared(plan);
        let mut hidden = vec![0; num_tokens];
        let mut scorings = self.scorings(plan, asked);
        let mut repaired = Vec::new();
        for seq in 0..num_seqs {
            let rows = starts[seq] as usize..starts[seq + 1] as usize;
            assert!(!rows.is_empty(), "a sequence in a plan has rows");
            assert!(positions[rows.clone()].is_sorted_by(|a, b| a < b), "rows of a sequence come in position order");
            assert!(plan.flat(Region::ContextLen, num_seqs)[seq] > positions[rows.end - 1]);
            let seq_row = plan.flat(Region::SeqRow, num_seqs)[seq] as usize;
            if scorings.get(&seq).is_some_and(|scoring| scoring.scope.is_none()) {
                let (handle, choice) = self.rows[seq_row];
                let again = positions[rows.start..rows.end - 1].iter().map(|&position| position as usize).collect();
                repaired.push((handle, choice, again));
            }
            for row in rows {
                hidden[row] = self.compute_row(plan, [seq_row, row], shared[seq], scorings.get_mut(&seq), asked);
            }
        }
        let draw = |[row, seq_row, kind]: [i32; 3]| {
            let (handle, choice) = self.rows[seq_row as usize];
            let hidden = hidden[row as usize];
            assert!(hidden != 0, "rows that are sampled run through every layer");
            let token = asked[&handle].draw(hidden, choice, self.vocab_size);
            if kind == SAMPLE {
                self.last_token[seq_row as usize] = token;
            } else {
                assert_eq!(kind, PROMPT_LOGPROB);
            }
            Drawn { handle, choice, kind, position: positions[row as usize], token, hidden }
        };
        let drawn = plan.rows::<3>(Region::Sample).map(draw).collect();
        let entries = plan.rows::<7>(Region::Score).map(|entry| entry[0] as usize);
        let scored = entries.flat_map(|seq| scorings.remove(&seq).expect("one entry per sequence").scores).collect();
        Results { drawn, scored, placed, repaired }
    }

    /// Copies to the host first, then the others; a plan without rows is not run.
    fn copy_blocks(&mut self, plan: &PlanView<'_>) {
        if plan.header(Header::NumTokens) == 0 {
            return;
        }
        let is_to_host = |row: &[i32; 3]| row[0] == CopyDirection::ToHost as i32;
        let (to_host, others): (Vec<_>, Vec<_>) = plan.rows::<3>(Region::BlockCopy).partition(is_to_host);
        for [_, source, target] in to_host {
            let slots = self.block(source as u32);
            self.host[target as usize * self.block_size..][..self.block_size].copy_from_slice(&slots);
        }
        for [direction, source, target] in others {
            let slots = if direction == CopyDirection::FromHost as i32 {
                self.host[source as usize * self.block_size..][..self.block_size].to_vec()
            } else {
                assert_eq!(direction, CopyDirection::OnDevice as i32, "there are three directions");
                self.block(source as u32)
            };
            self.fill(target as u32, &slots);
        }
    }

    /// Per sequence: whose block table its first keys are read by, and how many. That is the first member's of its group.
    fn shared(&self, plan: &PlanView<'_>) -> Vec<(usize, usize)> {
        let num_seqs = plan.header(Header::NumSeqs) as usize;
        let seq_rows = plan.flat(Region::SeqRow, num_seqs);
        let mut shared = vec![(0, 0); num_seqs];
        let mut next = 0;
        for [first, count, keys] in plan.rows::<3>(Region::PrefixGroup) {
            assert!(first as usize == next && count > 1 && keys > 0, "groups follow each other and share something");
            let members = &plan.flat(Region::GroupSeqs, (first + count) as usize)[next..];
            next += members.len();
            for &seq in members {
                assert_eq!(shared[seq as usize], (0, 0), "a sequence is in one group");
                shared[seq as usize] = (seq_rows[members[0] as usize] as usize, keys as usize);
            }
        }
        shared
    }

    /// Copies rows of segments to where the sequences want them, turned to their new positions.
    fn place(&mut self, plan: &PlanView<'_>, asked: &BTreeMap<i32, Asked>) -> Vec<(i32, u32, usize, usize)> {
        let sources = plan.flat(Region::SourceBlocks, plan.header(Header::NumSourceBlocks) as usize);
        let before = if sources.is_empty() { Vec::new() } else { self.kv.clone() };
        let mut placed = Vec::new();
        let mut targets = BTreeSet::new();
        let mut read = BTreeSet::new();
        for [seq_row, position, len, offset, first, count] in plan.rows::<6>(Region::Place) {
            let blocks = &sources[first as usize..][..count as usize];
            let (handle, choice) = self.rows[seq_row as usize];
            placed.push((handle, choice, position as usize, (position + len) as usize));
            assert!(
                len > 0 && (offset + len) as usize <= blocks.len() * self.block_size,
                "a place stays in its segment"
            );
            for at in 0..len as usize {
                let row = offset as usize + at;
                let source = blocks[row / self.block_size] as usize * self.block_size + row % self.block_size;
                let Some(target) = self.slot(seq_row as usize, position as usize + at) else { continue };
                assert!(targets.insert(target), "a slot is placed into once");
                read.insert(source);
                self.kv[target] = rotate(before[source], position as usize + at);
                self.owner[target] = asked[&handle].tenant;
            }
        }
        assert!(targets.is_disjoint(&read), "no placed slot is the source of another");
        placed
    }

    fn scorings(&self, plan: &PlanView<'_>, asked: &BTreeMap<i32, Asked>) -> BTreeMap<usize, Scoring> {
        let num_seqs = plan.header(Header::NumSeqs) as usize;
        let starts = plan.flat(Region::QueryStart, num_seqs + 1);
        let mut scorings = BTreeMap::new();
        for [seq, first, count, key_start, key_end, method_id, round] in plan.rows::<7>(Region::Score) {
            let rows = starts[seq as usize]..starts[seq as usize + 1];
            assert!(count >= 0 && rows.start <= first && first + count <= rows.end, "scoring rows are rows of theirs");
            let (handle, _) = self.rows[plan.flat(Region::SeqRow, num_seqs)[seq as usize] as usize];
            let blend = asked[&handle].blend.as_ref().expect("only blended requests score");
            assert_eq!(method_id as u32, blend.method_id);
            let scope = blend.rounds.get(round as usize).map(|round| round.scope);
            assert!(scope.is_some() || (blend.decode_rows > 0 && round as usize == blend.rounds.len() && count == 1));
            let keys = key_start as usize..key_end as usize;
            let scores = vec![[0.0; 2]; keys.len()];
            let (first, count, depth) =
                (first as usize, count as usize, scope.map_or(LAYERS, |scope| depth_of(scope, round as usize)));
            let scoring = Scoring { first, count, keys, scope, depth, scores };
            assert!(scorings.insert(seq as usize, scoring).is_none(), "one score entry per sequence and plan");
        }
        scorings
    }

    /// Returns the row's final hidden state; 0 when it left its layers early.
    fn compute_row(
        &mut self,
        plan: &PlanView<'_>,
        [seq_row, at]: [usize; 2],
        (shared_row, shared_keys): (usize, usize),
        scoring: Option<&mut Scoring>,
        asked: &BTreeMap<i32, Asked>,
    ) -> u64 {
        let of = |region: Region| plan.flat(region, at + 1)[at];
        let position = of(Region::Positions) as usize;
        let token = match of(Region::TokenIds) {
            -1 => self.last_token[seq_row],
            id => id,
        };
        let (slot, segment_slot) = (of(Region::SlotMapping) as usize, of(Region::SegmentSlot));
        let holder = self.rows[seq_row].0;
        let is_doomed = self.doomed.contains(&holder);
        assert!(
            self.slot(seq_row, position) == Some(slot) || is_doomed,
            "slot {slot} of row {seq_row} agrees with the device's block table"
        );
        assert!(shared_keys <= position, "a row sees all keys that its group shares");
        let table_of = |at: usize| if at < shared_keys { shared_row } else { seq_row };
        let seen: Vec<usize> = (0..position).map(|at| self.slot(table_of(at), at).unwrap_or(0)).collect();
        let tenant = asked.get(&holder).map_or(PUBLIC, |asked| asked.tenant);
        let foreign = seen.iter().find(|&&slot| ![tenant, PUBLIC].contains(&self.owner[slot]));
        assert!(foreign.is_none() || is_doomed || segment_slot >= 0, "tenant {tenant} reads what another one wrote");

        let depth = scoring.as_ref().map_or(LAYERS, |scoring| scoring.depth);
        let done = row(token, position, depth, |layer, at| self.kv[seen[at]][layer]);
        let (old, stored) = (self.kv[slot], rotate(done.base, position));
        self.kv[slot][..depth].copy_from_slice(&stored[..depth]);
        self.owner[slot] = tenant;
        if segment_slot >= 0 {
            self.kv[segment_slot as usize] = done.base;
        }
        if let Some(scoring) = scoring {
            self.score(scoring, at, done, position, &seen, old, stored);
        }
        if depth == LAYERS { done.hidden } else { 0 }
    }

    #[expect(clippy::too_many_arguments, reason = "one row, before and after")]
    fn score(&self, scoring: &mut Scoring, at: usize, done: Row, position: usize, seen: &[usize], old: Kv, stored: Kv) {
        let (keys, depth) = (scoring.keys.clone(), scoring.depth);
        if scoring.scope == Some(Scope::New) {
            scoring.scores.iter_mut().for_each(|score| score[1] = 1.0);
        } else if scoring.scope.is_some() && keys.contains(&position) {
            let own = &mut scoring.scores[position - keys.start][1];
            *own = own.max(value(stored[depth], old[depth]));
        }
        if (scoring.first..scoring.first + scoring.count).contains(&at) {
            for (score, &slot) in scoring.scores.iter_mut().zip(seen.iter().skip(keys.start)) {
                score[0] += weight(done, self.kv[slot][depth - 1]);
            }
        }
    }

    fn slot(&self, seq_row: usize, position: usize) -> Option<usize> {
        let block = self.tables[seq_row].get(position / self.block_size).filter(|&&block| block != u32::MAX);
        let is_doomed = self.doomed.contains(&self.rows[seq_row].0);
        assert!(block.is_some() || is_doomed, "row {seq_row} has no block for position {position}");
        block.map(|&block| block as usize * self.block_size + position % self.block_size)
    }
}
