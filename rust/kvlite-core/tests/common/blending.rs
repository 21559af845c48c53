//! The rules of a blend, said once more and naively: what is placed, what each round asks, which rows are computed again.
//!
//! Works on `Naive` alone. The device says which rows were placed and where the hit ended; everything else follows from the
//! request, and from the recipes that earlier requests of its tenant have left.

use std::collections::BTreeSet;

use kvlite_core::{MAX_SCORING_ROWS, Scope};

use super::hashes::{Kv, LAYERS, Naive, UNWRITTEN, canonical, depth_of, rotate, value, weight};
use super::{Asked, Blend};

/// Reused rows `start..end` of the span that begins at `span_start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub start: usize,
    pub end: usize,
    pub span_start: usize,
    pub span_end: usize,
}

/// What one prompt takes from segments, and which of those rows are computed again.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    pub ranges: Vec<Range>,
    /// Rounds over all rows leave their mark in the layers that they run through: which reused rows ran, and how deep.
    pub passes: Vec<(Vec<usize>, usize)>,
    pub chosen: Vec<usize>,
}

impl Recipe {
    /// The same with further rows computed again.
    fn with(&self, repaired: &BTreeSet<usize>) -> Recipe {
        let mut recipe = self.clone();
        let left = self.left();
        recipe.chosen.extend(repaired.intersection(&left));
        recipe.chosen.sort_unstable();
        recipe
    }

    /// Reused rows that are not computed again.
    pub fn left(&self) -> BTreeSet<usize> {
        reused_rows(&self.ranges).into_iter().filter(|row| self.chosen.binary_search(row).is_err()).collect()
    }
}

fn placed(canonical_prefix: &[i32], tokens: &[i32], ranges: &[Range]) -> Naive {
    let mut naive = Naive { tokens: tokens.to_vec(), kv: vec![UNWRITTEN; tokens.len()], hidden: vec![0; tokens.len()] };
    for range in ranges {
        let base: Vec<Kv> = canonical(canonical_prefix, &tokens[range.span_start..range.span_end]);
        for position in range.start..range.end {
            naive.kv[position] = rotate(base[position - range.span_start], position);
        }
    }
    naive
}

fn reused_rows(ranges: &[Range]) -> Vec<usize> {
    ranges.iter().flat_map(|range| range.start..range.end).collect()
}

/// ceil(ratio * num_rows), forgiving what doubles lose.
pub fn budget(ratio: f64, num_rows: usize) -> usize {
    ((ratio * num_rows as f64 - 1e-9).ceil().max(0.0) as usize).min(num_rows)
}

/// What a rule does to `prompt`; output that is known already (of a replay) has no say.
pub fn choose(canonical_prefix: &[i32], prompt: &[i32], ranges: Vec<Range>, blend: &Blend) -> Recipe {
    let reused = reused_rows(&ranges);
    let budget_of = |ratio: f64| budget(ratio, reused.len());
    let count = budget_of(blend.ratio);
    if blend.rounds.is_empty() || count == 0 || count == reused.len() {
        let scores = blend.scores.as_deref().unwrap_or(&[]);
        let score = |row: usize| f64::from(scores.get(row).copied().unwrap_or(0.0));
        return Recipe { chosen: top(&reused, score, count), ranges, passes: Vec::new() };
    }
    let mut naive = placed(canonical_prefix, prompt, &ranges);
    let (mut kept, mut passes) = (reused.clone(), Vec::new());
    for (number, round) in blend.rounds.iter().enumerate() {
        if round.scope == Scope::All {
            passes.push((kept.clone(), depth_of(round.scope, number)));
        }
        let scores = score(&mut naive, &reused, &kept, round.scope, number);
        kept = top(&kept, |row| scores[row], budget_of(round.ratio));
    }
    Recipe { ranges, passes, chosen: kept }
}

/// Runs one round over `naive` and scores every position.
fn score(naive: &mut Naive, reused: &[usize], kept: &[usize], scope: Scope, number: usize) -> Vec<f64> {
    let last_reused = *reused.last().expect("a round has rows to score");
    let len = naive.tokens.len();
    let is_new = |row: &usize| reused.binary_search(row).is_err();
    let runs = |row: &usize| is_new(row) || (scope == Scope::All && kept.contains(row));
    let rows: Vec<usize> = (0..len).filter(runs).collect();
    let depth = depth_of(scope, number);
    let asks = |row: usize| scope == Scope::All || (row > last_reused && row + MAX_SCORING_ROWS >= len);
    let mut weights = vec![0.0f32; len];
    let mut values = vec![f32::from(u8::from(scope == Scope::New)); len];
    for row in rows {
        let old = naive.kv[row];
        let scorer = naive.compute(row, depth);
        if scope == Scope::All {
            values[row] = values[row].max(value(rotate(scorer.base, row)[depth], old[depth]));
        }
        if asks(row) {
            for (total, key) in weights.iter_mut().zip(&naive.kv[..row]) {
                *total += weight(scorer, key[depth - 1]);
            }
        }
    }
    weights.iter().zip(&values).map(|(&weight, &value)| f64::from(weight) * f64::from(value)).collect()
}

/// The `count` best of `rows`: higher score first, then lower position; NaN last. In position order.
fn top(rows: &[usize], score: impl Fn(usize) -> f64, count: usize) -> Vec<usize> {
    let number = |row: usize| Some(score(row) + 0.0).filter(|score| !score.is_nan()).unwrap_or(f64::NEG_INFINITY);
    let mut order = rows.to_vec();
    order.sort_by(|&a, &b| number(b).total_cmp(&number(a)).then(a.cmp(&b)));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// The prompt's KV after its blend.
pub fn blended(canonical_prefix: &[i32], prompt: &[i32], recipe: &Recipe) -> Naive {
    let mut naive = placed(canonical_prefix, prompt, &recipe.ranges);
    let reused = reused_rows(&recipe.ranges);
    let last = (recipe.chosen.clone(), LAYERS);
    for (ran, depth) in recipe.passes.iter().chain([&last]) {
        for row in 0..prompt.len() {
            if reused.binary_search(&row).is_err() || ran.binary_search(&row).is_ok() {
                naive.compute(row, *depth);
            }
        }
    }
    naive
}

/// What the device saw of one choice's stay before it drew.
#[derive(Clone, Debug, Default)]
pub struct Stay {
    pub hit: usize,
    /// (start, end), ascending.
    pub placed: Vec<(usize, usize)>,
    /// Rows that decode steps of earlier stays computed again: they are computed again with the chosen ones.
    pub repaired: BTreeSet<usize>,
}

/// A blend that was done: others of its tenant may take its KV over.
#[derive(Clone, PartialEq)]
struct Known {
    tenant: u32,
    rule: (u32, f64, Vec<(u32, u32)>),
    /// Tokens that a follower must begin with.
    tokens: Vec<i32>,
    recipe: Recipe,
}

/// Says what a blended request must have read.
#[derive(Default)]
pub struct Oracle {
    canonical_prefix: Vec<i32>,
    known: Vec<Known>,
    /// Stays that may have left KV without a draw.
    begun: Vec<(Asked, Stay)>,
}

impl Oracle {
    pub fn new(canonical_prefix: &[i32]) -> Oracle {
        Oracle { canonical_prefix: canonical_prefix.to_vec(), ..Oracle::default() }
    }

    /// Learns of a stay whose rows were placed.
    pub fn begin(&mut self, asked: &Asked, stay: &Stay) {
        self.begun.push((asked.clone(), stay.clone()));
    }

    /// The KV of `tokens` (all that were known when the stay began) whose last row ends in `hidden`, and the recipe behind
    /// it: the request's own, or one that it replays (true). None: no rule explains what was read.
    pub fn explain(
        &mut self,
        asked: &Asked,
        stay: &Stay,
        tokens: &[i32],
        hidden: u64,
    ) -> Option<(Naive, Recipe, bool)> {
        let blend = asked.blend.as_ref().expect("a blended request");
        let own = choose(&self.canonical_prefix, &asked.prompt, ranges(blend, &stay.placed), blend);
        let with_repairs = own.with(&stay.repaired);
        let naive = blended(&self.canonical_prefix, tokens, &with_repairs);
        if naive.hidden.last() == Some(&hidden) {
            self.remember(asked, blend, &own);
            return Some((naive, with_repairs, false));
        }
        if let Some(found) = self.find(asked, stay, tokens, hidden) {
            return Some(found);
        }
        for (asked, stay) in std::mem::take(&mut self.begun) {
            let blend = asked.blend.as_ref().expect("only blends are placed");
            let recipe = choose(&self.canonical_prefix, &asked.prompt, ranges(blend, &stay.placed), blend);
            self.remember(&asked, blend, &recipe);
        }
        self.find(asked, stay, tokens, hidden)
    }

    /// A recipe of the tenant that says the same.
    fn find(&self, asked: &Asked, stay: &Stay, tokens: &[i32], hidden: u64) -> Option<(Naive, Recipe, bool)> {
        let blend = asked.blend.as_ref().expect("a blended request");
        let rule = (blend.method_id, blend.ratio, blend.spans.clone());
        let is_open = |known: &&Known| {
            known.tenant == asked.tenant && known.rule == rule && asked.prompt.starts_with(&known.tokens)
        };
        let behind = |range: &Range| (range.start.max(stay.hit), range.end);
        self.known.iter().rev().filter(is_open).find_map(|known| {
            let left: Vec<_> = known.recipe.ranges.iter().map(behind).filter(|(start, end)| start < end).collect();
            let recipe = (left == stay.placed).then(|| known.recipe.with(&stay.repaired))?;
            let naive = blended(&self.canonical_prefix, tokens, &recipe);
            (naive.hidden.last() == Some(&hidden)).then_some((naive, recipe, true))
        })
    }

    /// Learns what another engine's requests of that tenant have left: their KV may come along.
    pub fn learn(&mut self, other: &mut Oracle, asked: &Asked) {
        for (asked, stay) in std::mem::take(&mut other.begun) {
            let blend = asked.blend.as_ref().expect("only blends are placed");
            let recipe = choose(&other.canonical_prefix, &asked.prompt, ranges(blend, &stay.placed), blend);
            other.remember(&asked, blend, &recipe);
        }
        for known in other.known.iter().filter(|known| known.tenant == asked.tenant) {
            if !self.known.contains(known) {
                self.known.push(known.clone());
            }
        }
    }

    fn remember(&mut self, asked: &Asked, blend: &Blend, recipe: &Recipe) {
        if recipe.ranges.is_empty() {
            return;
        }
        let num_reused = reused_rows(&recipe.ranges).len();
        let is_scored = !blend.rounds.is_empty()
            && !matches!(budget(blend.ratio, num_reused), count if count == 0 || count == num_reused);
        let spans_end = blend.spans.last().map_or(0, |&(start, len)| (start + len) as usize);
        let tokens = asked.prompt[..if is_scored { asked.prompt.len() } else { spans_end }].to_vec();
        let rule = (blend.method_id, blend.ratio, blend.spans.clone());
        self.known.push(Known { tenant: asked.tenant, rule, tokens, recipe: recipe.clone() });
    }
}

fn ranges(blend: &Blend, placed: &[(usize, usize)]) -> Vec<Range> {
    let of_span = |&(start, end): &(usize, usize)| {
        let holds = |&&(at, len): &&(u32, u32)| (at as usize..(at + len) as usize).contains(&start);
        let &(at, len) = blend.spans.iter().find(holds).expect("only rows of spans are placed");
        assert!(end <= (at + len) as usize, "rows of one span are placed at once");
        Range { start, end, span_start: at as usize, span_end: (at + len) as usize }
    };
    placed.iter().map(of_span).collect()
}
