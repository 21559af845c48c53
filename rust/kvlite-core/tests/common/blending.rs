//! The rules of a blend, said once more and naively: what is placed, what each round asks, which rows are computed again.
//!
//! Works on `Naive` alone. The engine's report says which rows were reused; everything else follows from the request.

use super::hashes::{Kv, LAYERS, MAX_SCORING_ROWS, Naive, UNWRITTEN, canonical, depth_of, rotate, value, weight};
use super::{Blend, Scope};

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
    pub chosen: Vec<usize>,
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

/// Which reused rows of `prompt` a rule computes again, in position order.
pub fn choose(canonical_prefix: &[i32], prompt: &[i32], ranges: &[Range], blend: &Blend) -> Vec<usize> {
    let reused = reused_rows(ranges);
    let budget_of = |ratio: f64| budget(ratio, reused.len());
    if budget_of(blend.ratio) == reused.len() {
        return reused;
    }
    if blend.rounds.is_empty() {
        let scores = blend.scores.as_deref().unwrap_or(&[]);
        let score = |row: usize| f64::from(scores.get(row).copied().unwrap_or(0.0));
        return top(&reused, score, budget_of(blend.ratio));
    }
    if budget_of(blend.ratio) == 0 {
        return Vec::new();
    }
    let mut naive = placed(canonical_prefix, prompt, ranges);
    let mut kept = reused.clone();
    for (number, round) in blend.rounds.iter().enumerate() {
        let scores = score(&mut naive, &reused, &kept, round.scope, number);
        kept = top(&kept, |row| scores[row], budget_of(round.ratio));
    }
    kept
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
            for key in 0..row {
                weights[key] += weight(scorer, naive.kv[key][depth - 1]);
            }
        }
    }
    weights.iter().zip(&values).map(|(&weight, &value)| f64::from(weight) * f64::from(value)).collect()
}

/// The `count` best of `rows`: higher score first, then lower position; NaN last. In position order.
fn top(rows: &[usize], score: impl Fn(usize) -> f64, count: usize) -> Vec<usize> {
    let number = |row: usize| Some(score(row)).filter(|score| !score.is_nan()).unwrap_or(f64::NEG_INFINITY);
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
    for row in 0..prompt.len() {
        if reused.binary_search(&row).is_err() || recipe.chosen.contains(&row) {
            naive.compute(row, LAYERS);
        }
    }
    naive
}
