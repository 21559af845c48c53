//! One split for some lines of a tile: two small matrix products with all sums in registers.
//!
//! Keys are turned (`Side::turn`), so no sum crosses lanes. Lines of neighbouring rows share the work although their
//! visible keys end at different places: scores of keys that a line does not see are made and not looked at; values that
//! not all lines see are added line by line. A sum runs in ascending order, whoever shares it. Called by `attention`.

use std::ops::Range;

use super::{Attention, Scratch, merge, weigh};
use crate::Element;
use crate::lanes::{Beside, Column, LANES, SCORES, SPLIT};

/// Most lines that are computed together: with AVX2 their sums fill 12 of 16 registers.
pub(super) const LINES: usize = 6;

/// A line and the keys of the split that it sees.
pub(super) type Seen = (usize, Range<usize>);

/// Adds one split to the running results of `lines`, up to LINES.
#[inline(always)]
pub(super) fn add_split<E: Element, B: Beside, const FUSED: bool>(
    args: &Attention<'_, E>,
    scratch: &mut Scratch,
    lines: &[Seen],
    beside: &mut B,
) {
    // Few lines meet several lanes at once, or too few sums would be under way.
    match lines.len() {
        0 => {}
        1 => add::<E, B, 1, 4, FUSED>(args, scratch, lines, beside),
        2 => add::<E, B, 2, 2, FUSED>(args, scratch, lines, beside),
        3 => add::<E, B, 3, 1, FUSED>(args, scratch, lines, beside),
        4 => add::<E, B, 4, 1, FUSED>(args, scratch, lines, beside),
        5 => add::<E, B, 5, 1, FUSED>(args, scratch, lines, beside),
        _ => add::<E, B, LINES, 1, FUSED>(args, scratch, lines, beside),
    }
}

#[inline(always)]
fn add<E: Element, B: Beside, const G: usize, const P: usize, const FUSED: bool>(
    args: &Attention<'_, E>,
    scratch: &mut Scratch,
    lines: &[Seen],
    beside: &mut B,
) {
    let dim = args.q.dim.next_multiple_of(LANES);
    let Scratch { q, partial, scores, keys: key_side, values, state, acc, .. } = scratch;
    let seen: [Range<usize>; G] = std::array::from_fn(|g| lines[g].1.clone());
    let start = seen.iter().map(|keys| keys.start).min().unwrap_or(0);
    let end = seen.iter().map(|keys| keys.end).max().unwrap_or(0);
    let queries = std::array::from_fn(|g| &q[lines[g].0 * dim..][..dim]);
    let mut chunk = start / LANES;
    while chunk * LANES < end {
        let chunks = if chunk + P <= end.div_ceil(LANES) { P } else { 1 };
        if chunks == P {
            score::<B, G, P, FUSED>(queries, &key_side.columns, chunk, args.scale, scores, beside);
        } else {
            score::<B, G, 1, FUSED>(queries, &key_side.columns, chunk, args.scale, scores, beside);
        }
        chunk += chunks;
    }
    let mut new = [(0.0, 0.0); G];
    for (g, new) in new.iter_mut().enumerate() {
        *new = weigh::<FUSED>(&mut scores[g * SCORES..(g + 1) * SCORES], &seen[g]);
    }
    let partial = &mut partial[..G * dim];
    partial.fill(0.0);
    // What all see, and the rest of every line before and after it.
    let common =
        seen.iter().map(|keys| keys.start).max().unwrap_or(0)..seen.iter().map(|keys| keys.end).min().unwrap_or(0);
    let common = common.start..common.end.max(common.start);
    let weights: [&[f32]; G] = std::array::from_fn(|g| &scores[g * SCORES..][..SCORES]);
    for g in 0..G {
        let keys = seen[g].start..seen[g].end.min(common.start);
        accumulate::<B, 1, 4, FUSED>([weights[g]], &values.columns, keys, &mut partial[g * dim..][..dim], beside);
    }
    accumulate::<B, G, P, FUSED>(weights, &values.columns, common.clone(), partial, beside);
    for g in 0..G {
        let keys = seen[g].start.max(common.end)..seen[g].end;
        accumulate::<B, 1, 4, FUSED>([weights[g]], &values.columns, keys, &mut partial[g * dim..][..dim], beside);
    }
    for g in 0..G {
        let line = lines[g].0;
        merge::<FUSED>(&mut state[line], &mut acc[line * dim..][..dim], new[g], &partial[g * dim..][..dim]);
    }
}

/// `scores[g][i] = scale * q[g] . key[i]` for the keys of `P` chunks.
#[inline(always)]
pub(crate) fn score<B: Beside, const G: usize, const P: usize, const FUSED: bool>(
    q: [&[f32]; G],
    keys: &[Column],
    chunk: usize,
    scale: f32,
    scores: &mut [f32],
    beside: &mut B,
) {
    let dim = q[0].len();
    let columns = std::array::from_fn(|p| &keys[(chunk + p) * dim..][..dim]);
    let sums = beside.product::<G, P, FUSED>(q, columns, [[[0.0; LANES]; P]; G]);
    for (g, sums) in sums.iter().enumerate() {
        for (p, sums) in sums.iter().enumerate() {
            let target = &mut scores[g * SCORES + (chunk + p) * LANES..][..LANES];
            target.copy_from_slice(&sums.map(|score| score * scale));
        }
    }
}

/// `sums[g] += weights[g][i] * value[i]` for the keys `keys` of a split, in ascending order.
///
/// `values` as `Side::spread` leaves them · `sums` [G, dim].
#[inline(always)]
fn accumulate<B: Beside, const G: usize, const P: usize, const FUSED: bool>(
    weights: [&[f32]; G],
    values: &[Column],
    keys: Range<usize>,
    sums: &mut [f32],
    beside: &mut B,
) {
    if keys.is_empty() {
        return;
    }
    let weights = weights.map(|weights| &weights[keys.clone()]);
    let panels = sums.len() / G / LANES;
    let mut panel = 0;
    while panel + P <= panels {
        accumulate_panels::<B, G, P, FUSED>(weights, values, keys.start, panel, sums, beside);
        panel += P;
    }
    while panel < panels {
        accumulate_panels::<B, G, 1, FUSED>(weights, values, keys.start, panel, sums, beside);
        panel += 1;
    }
}

#[inline(always)]
fn accumulate_panels<B: Beside, const G: usize, const P: usize, const FUSED: bool>(
    weights: [&[f32]; G],
    values: &[Column],
    first: usize,
    panel: usize,
    sums: &mut [f32],
    beside: &mut B,
) {
    let dim = sums.len() / G;
    let columns = std::array::from_fn(|p| &values[(panel + p) * SPLIT..][first..SPLIT]);
    let old = std::array::from_fn(|g| {
        *sums[g * dim + panel * LANES..][..P * LANES].as_chunks().0.first_chunk().expect("P chunks")
    });
    for (g, new) in beside.product::<G, P, FUSED>(weights, columns, old).iter().enumerate() {
        sums[g * dim + panel * LANES..][..P * LANES].copy_from_slice(new.as_flattened());
    }
}
