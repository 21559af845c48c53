//! `Blend`: how one sequence blends segments into its prompt: which rows are placed, scored, computed again, in what order.
//!
//! Owns row lists and the choice of rows, pure functions of lengths and scores. Must not know plans, budgets or the cache:
//! segments are names here. Rows are positions in the prompt; lists ascend. Used by `core` through `Sequence::blend`.
//!
//! ```text
//!   hit |  new  [ reused A ] new [ reused B ]  new (question)        place A, B -> score rounds -> recompute
//!   rows of a round: new ones (Scope::New) or all behind the hit (Scope::All); of the recompute: new and chosen ones
//! ```

mod rule;

use std::ops::Range;
use std::sync::Arc;

use crate::cache::SegmentId;

pub(crate) use rule::{Origin, Rule};
pub use rule::{Round, Scope};

/// Rows that score the reused ones in a round over new rows, at most.
pub const MAX_SCORING_ROWS: usize = 64;
/// Placing a row costs as much as attending to so many keys.
const PLACE_KEYS: u64 = 32;
/// Subtracted from ratio * rows before rounding up: what doubles lose must not buy a row.
const RATIO_TOLERANCE: f64 = 1e-9;

/// Rows `start..end` of the prompt, placed from a segment's row `offset` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reused {
    pub start: u32,
    pub end: u32,
    pub offset: u32,
    pub segment: SegmentId,
}

/// Where a stay on the device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Not admitted.
    Idle,
    /// In this round.
    Score(usize),
    /// Computing chosen and new rows.
    Recompute,
    /// An ordinary sequence from here on.
    Done,
}

/// What a rule has decided about the reused rows.
#[derive(Debug, PartialEq)]
pub(crate) struct Choice {
    /// Per round that was run: reused rows that ran in it. Shallow layers of those keep what the round stored, so that
    /// whoever wants the same KV runs them again.
    pub ran: Vec<Vec<u32>>,
    /// Rows computed again in all layers.
    pub rows: Vec<u32>,
}

/// Everything that a blended sequence remembers beside its counters.
#[derive(Debug)]
pub(crate) struct Blend {
    pub rule: Arc<Rule>,
    /// One per span.
    pub origins: Box<[Origin]>,
    /// Segments being made that it waits for, outside the queue.
    pub waits: Vec<SegmentId>,
    /// Times it went outside the queue.
    pub attempts: u32,
    /// What it makes, once its rows are chosen; held in the table of recipes.
    pub recipe: Option<u32>,
    pub stage: Stage,
    /// Rows to place in this stay, behind the hit.
    pub reused: Vec<Reused>,
    /// Whether a plan has placed them.
    pub placed: bool,
    /// Whether it still counts as a user of its segments.
    pub uses_segments: bool,
    /// Rows of the stage, and how many of them are planned.
    pub rows: Vec<u32>,
    pub next: usize,
    /// Plans in flight whose scores have not been read.
    pub unread: u32,
    /// First position that stages to come run: behind the hit, and behind what a round has finished; and known tokens,
    /// of this stay.
    from: u32,
    len: u32,
    /// Of those, how many its rounds see: the prompt's.
    round_len: u32,
    kept: Vec<u32>,
    /// Of this stay's own rounds, as in `Choice`.
    ran: Vec<Vec<u32>>,
    /// A choice that was made before: its rounds over all rows run again, unread.
    replayed: Option<Arc<Choice>>,
    /// Per position of the hull: weight, value.
    scored: Vec<(f64, f32)>,
    /// Reused rows that no pass has computed again; empty where decode steps repair none.
    open: Vec<u32>,
    /// Rows that decode steps have computed again; a later stay does so at once.
    repaired: Vec<u32>,
}

/// ceil(ratio * rows).
pub(crate) fn budget_of(ratio: f64, rows: usize) -> usize {
    ((ratio * rows as f64 - RATIO_TOLERANCE).ceil().max(0.0) as usize).min(rows)
}

impl Blend {
    pub fn new(rule: Arc<Rule>) -> Blend {
        let origins = vec![Origin::Store; rule.spans.len()].into();
        Blend {
            rule,
            origins,
            waits: Vec::new(),
            attempts: 0,
            recipe: None,
            stage: Stage::Idle,
            reused: Vec::new(),
            placed: false,
            uses_segments: false,
            rows: Vec::new(),
            next: 0,
            unread: 0,
            from: 0,
            len: 0,
            round_len: 0,
            kept: Vec::new(),
            ran: Vec::new(),
            replayed: None,
            scored: Vec::new(),
            open: Vec::new(),
            repaired: Vec::new(),
        }
    }

    /// For a further choice: the same rule and holes, nothing of the stay.
    pub fn fork(&self) -> Blend {
        Blend { origins: self.origins.clone(), ..Blend::new(Arc::clone(&self.rule)) }
    }

    /// As another engine left it: with its KV here there is nothing left to do, else a new stay begins.
    pub fn arrived(rule: Arc<Rule>, holes: &[bool], attempts: u32, repaired: &[u32], is_done: bool) -> Blend {
        let origin = |&hole: &bool| if hole { Origin::Hole } else { Origin::Store };
        Blend {
            origins: holes.iter().map(origin).collect(),
            // Other segments are here: it may wait for them as if it had come first.
            attempts: if is_done { attempts } else { 0 },
            repaired: repaired.to_vec(),
            stage: if is_done { Stage::Done } else { Stage::Idle },
            ..Blend::new(rule)
        }
    }

    /// Rows that decode steps have computed again.
    pub fn repaired(&self) -> &[u32] {
        &self.repaired
    }

    /// Whether rows are still placed, scored or computed again.
    pub fn is_active(&self) -> bool {
        matches!(self.stage, Stage::Score(_) | Stage::Recompute)
    }

    pub fn num_reused(&self) -> usize {
        self.reused.iter().map(|range| (range.end - range.start) as usize).sum()
    }

    /// What placing costs, in keys attended to.
    pub fn place_cost(&self) -> u64 {
        PLACE_KEYS * self.num_reused() as u64
    }

    /// What one row costs that scores in `round`, beside its pass through the model, in keys attended to: its products with
    /// the keys once more, their values not. Rounds over all rows look at few layers.
    pub fn score_keys(&self, round: usize) -> u64 {
        match self.rule.rounds[round].scope {
            Scope::New => self.hull().len() as u64 / 2,
            Scope::All => 0,
        }
    }

    /// Of `chosen`, how many are reused in this stay.
    pub fn num_kept(&self, chosen: &[u32]) -> usize {
        self.reused.iter().map(|range| within(chosen, range).len()).sum()
    }

    /// From the first reused position to the one behind the last.
    pub fn hull(&self) -> Range<u32> {
        let start = self.reused.first().map_or(0, |range| range.start);
        start..self.reused.last().map_or(start, |range| range.end)
    }

    /// Starts a stay over `len` known tokens behind `hit`; `reused` is set. Returns the choice if it is known without
    /// scoring: all rows, none, or those that static scores choose. Of a request that has output (a replay) the prompt's
    /// tokens score alone, as when it began.
    pub fn begin(&mut self, hit: u32, len: u32, prompt_len: u32) -> Option<Choice> {
        (self.from, self.len, self.round_len) = (hit, len, prompt_len.min(len));
        self.kept = self.reused.iter().flat_map(|range| range.start..range.end).collect();
        let rule = Arc::clone(&self.rule);
        let budget = budget_of(rule.ratio, self.kept.len());
        if budget == self.kept.len() || budget == 0 || rule.rounds.is_empty() {
            let scores = rule.scores.as_deref().unwrap_or(&[]);
            let score = |row: u32| scores.get(row as usize).map_or(0.0, |&score| f64::from(score));
            return Some(Choice { ran: Vec::new(), rows: best(std::mem::take(&mut self.kept), score, budget) });
        }
        self.start_round(0);
        None
    }

    /// Starts a stay in which nothing is left to choose.
    pub fn replay(&mut self, hit: u32, len: u32, choice: Arc<Choice>) {
        (self.from, self.len, self.round_len) = (hit, len, len);
        self.replayed = Some(choice);
        self.replay_from(0);
    }

    /// The next round over all rows that left its mark, or the rows to compute again.
    fn replay_from(&mut self, round: usize) {
        let choice = Arc::clone(self.replayed.as_ref().expect("a replay"));
        let leaves_a_mark = |&round: &usize| self.rule.rounds[round].scope == Scope::All;
        match (round..choice.ran.len()).find(leaves_a_mark) {
            Some(round) => {
                self.kept.clone_from(&choice.ran[round]);
                self.start_round(round);
            }
            None => {
                self.recompute(&self.with_repaired(&choice.rows));
            }
        }
    }

    fn start_round(&mut self, round: usize) {
        let kept: &[u32] = if self.rule.rounds[round].scope == Scope::All { &self.kept } else { &[] };
        self.rows = list(&self.reused, kept, self.from, self.round_len);
        if self.replayed.is_none() {
            self.ran.push(kept.to_vec());
        }
        self.next = 0;
        self.stage = Stage::Score(round);
        self.scored.clear();
        self.scored.resize(self.hull().len(), (0.0, f32::NEG_INFINITY));
    }

    /// Of `rows`, the first that scores in this round.
    pub fn first_scoring(&self, round: usize) -> usize {
        match self.rule.rounds[round].scope {
            Scope::All => 0,
            Scope::New => {
                let behind = self.rows.partition_point(|&row| row < self.hull().end);
                behind.max(self.rows.len().saturating_sub(MAX_SCORING_ROWS))
            }
        }
    }

    /// Reads one answer of the runner: (weight, value) as float32 bits per position of the hull. Weights of several
    /// chunks add up, values take the maximum; NaN stays.
    pub fn add_scores(&mut self, answer: &[i32]) {
        for ((weight, value), pair) in self.scored.iter_mut().zip(answer.chunks_exact(2)) {
            let [new_weight, new_value] = [pair[0], pair[1]].map(|bits| f32::from_bits(bits as u32));
            *weight += f64::from(new_weight);
            *value = if value.is_nan() || new_value.is_nan() { f32::NAN } else { value.max(new_value) };
        }
    }

    /// Whether the round's rows are all planned and all its scores read.
    pub fn is_round_over(&self) -> bool {
        matches!(self.stage, Stage::Score(_)) && self.unread == 0 && self.next == self.rows.len()
    }

    /// Keeps the best rows; starts the next round, or returns the choice.
    pub fn finish_round(&mut self) -> Option<Choice> {
        let Stage::Score(round) = self.stage else { panic!("a round is finished while it runs") };
        if self.replayed.is_some() {
            self.replay_from(round + 1);
            return None;
        }
        let count = budget_of(self.rule.rounds[round].ratio, self.num_reused());
        let start = self.hull().start;
        if self.rule.rounds[round].scope == Scope::New {
            self.from = start; // Rows before the first reused one saw exact keys alone, in every layer.
        }
        let scored = &self.scored;
        self.kept = best(std::mem::take(&mut self.kept), |row| product(scored, start, row), count);
        if round + 1 == self.rule.rounds.len() {
            return Some(Choice { ran: std::mem::take(&mut self.ran), rows: std::mem::take(&mut self.kept) });
        }
        self.start_round(round + 1);
        None
    }

    /// Starts to compute `chosen` and the new rows.
    pub fn recompute(&mut self, chosen: &[u32]) {
        self.rows = list(&self.reused, chosen, self.from, self.len);
        self.next = 0;
        self.stage = Stage::Recompute;
        if self.rule.decode_rows > 0 {
            let reused = self.reused.iter().flat_map(|range| range.start..range.end);
            self.open = reused.filter(|row| chosen.binary_search(row).is_err()).collect();
            self.scored.resize(self.hull().len(), (0.0, 1.0)); // Without a round, what decode steps weigh counts alone.
        } else {
            self.scored = Vec::new();
        }
    }

    /// `chosen`, and the rows that decode steps of earlier stays have computed again.
    pub fn with_repaired(&self, chosen: &[u32]) -> Vec<u32> {
        let mut rows = [chosen, &self.repaired].concat();
        rows.sort_unstable();
        rows.dedup(); // A choice made anew may name a row that was repaired.
        rows
    }

    /// The reused rows that the next decode step computes again: the best `decode_rows` of those that nobody has.
    pub fn repairs(&self) -> Vec<u32> {
        let count = (self.rule.decode_rows as usize).min(self.open.len());
        let start = self.hull().start;
        best(self.open.clone(), |row| product(&self.scored, start, row), count)
    }

    /// Notes that a plan repairs `rows`.
    pub fn repair(&mut self, rows: &[u32]) {
        self.open.retain(|row| rows.binary_search(row).is_err());
        self.repaired.extend_from_slice(rows);
    }

    /// Reads the weights that the newest decode row gives; values stay.
    pub fn rescore(&mut self, answer: &[i32]) {
        for ((weight, _), pair) in self.scored.iter_mut().zip(answer.chunks_exact(2)) {
            *weight = f64::from(f32::from_bits(pair[0] as u32));
        }
    }

    /// Nothing is left to place, score or repair.
    pub fn end_stage(&mut self) {
        self.stage = Stage::Done;
        (self.rows, self.kept, self.next) = (Vec::new(), Vec::new(), 0);
        (self.ran, self.replayed) = (Vec::new(), None);
    }

    /// Forgets the stay; rule, holes and recipe remain.
    pub fn leave(&mut self) {
        assert!(self.unread == 0 && !self.uses_segments, "a stay is given back when no plan names it");
        self.end_stage();
        self.stage = Stage::Idle;
        self.reused.clear();
        self.open.clear();
        if self.recipe.is_none() {
            self.repaired.clear();
        }
        self.scored = Vec::new();
        self.placed = false;
    }
}

/// Weight times value of `row`.
fn product(scored: &[(f64, f32)], start: u32, row: u32) -> f64 {
    let (weight, value) = scored[(row - start) as usize];
    weight * f64::from(value)
}

/// The part of the ascending `rows` inside `range`.
fn within<'a>(rows: &'a [u32], range: &Reused) -> &'a [u32] {
    let start = rows.partition_point(|&row| row < range.start);
    &rows[start..rows.partition_point(|&row| row < range.end)]
}

/// Rows of `first..len` that are not reused, and of the reused ones those in `kept`.
fn list(reused: &[Reused], kept: &[u32], first: u32, len: u32) -> Vec<u32> {
    let (mut rows, mut at) = (Vec::new(), first);
    for range in reused {
        rows.extend(at..range.start);
        rows.extend_from_slice(within(kept, range));
        at = range.end;
    }
    rows.extend(at..len);
    rows
}

/// The `count` best of `rows`: the higher score first, then the lower position; NaN last. Ascending. O(rows).
fn best(mut rows: Vec<u32>, score: impl Fn(u32) -> f64, count: usize) -> Vec<u32> {
    let number = |row: u32| Some(score(row)).filter(|score| !score.is_nan()).unwrap_or(f64::NEG_INFINITY);
    if count < rows.len() {
        // Adding 0.0 makes the two zeros one.
        rows.select_nth_unstable_by(count, |&a, &b| (number(b) + 0.0).total_cmp(&(number(a) + 0.0)).then(a.cmp(&b)));
        rows.truncate(count);
    }
    rows.sort_unstable();
    rows
}
