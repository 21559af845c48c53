//! One split for every line of a tile, from turned keys: four lines are scored at once, and no sum crosses lanes.
//!
//! Lines of neighbouring rows share the work although their visible keys end at different places: scores of keys that a
//! line does not see are made and not looked at. Same bits as line by line. Called by `attention`.

use std::ops::Range;

use super::{Attention, Scratch, merge, weigh};
use crate::Element;
use crate::lanes::{self, LANES, SCORES};

/// Lines that are scored together.
pub(super) const LINES: usize = 4;

/// A line and the keys of the split that it sees.
type Seen = (usize, Range<usize>);

/// Adds one split to the running result of `lines`; the split's keys are turned, so are the queries.
#[inline(always)]
pub(super) fn tile_split<E: Element, const FUSED: bool>(
    args: &Attention<'_, E>,
    scratch: &mut Scratch,
    lines: impl Iterator<Item = Seen>,
) {
    let mut lines = lines.filter(|(_, keys)| !keys.is_empty());
    while let Some(first) = lines.next() {
        let mut some = [first.clone(), first.clone(), first.clone(), first];
        let mut count = 1;
        for (place, line) in some[1..].iter_mut().zip(&mut lines) {
            *place = line;
            count += 1;
        }
        lines_split::<E, FUSED>(args, scratch, &some, count);
    }
}

/// The first `count` of `some` lines; the others repeat the first one.
#[inline(always)]
fn lines_split<E: Element, const FUSED: bool>(
    args: &Attention<'_, E>,
    scratch: &mut Scratch,
    some: &[Seen; LINES],
    count: usize,
) {
    let dim = args.q.dim.next_multiple_of(LANES);
    let Scratch { q, partial, scores, keys: key_side, values: value_side, .. } = scratch;
    let start = some.iter().map(|(_, keys)| keys.start).min().unwrap_or(0);
    let end = some.iter().map(|(_, keys)| keys.end).max().unwrap_or(0);
    let queries = std::array::from_fn(|i| &q[some[i].0 * dim..][..dim]);
    let chunks = start / LANES..end.div_ceil(LANES);
    lanes::column_scores::<LINES, FUSED>(queries, &key_side.columns, chunks, args.scale, scores);
    let mut new = [(0.0, 0.0); LINES];
    for (i, (_, keys)) in some.iter().enumerate().take(count) {
        new[i] = weigh::<FUSED>(&mut scores[i * SCORES..(i + 1) * SCORES], keys);
    }
    let (memory, offsets) = (value_side.memory(&args.v_cache), &value_side.offsets[..]);
    let partial = &mut partial[..LINES * dim];
    partial.fill(0.0);
    if count == LINES && some.iter().all(|(_, keys)| *keys == some[0].1) {
        lanes::accumulate::<LINES, 16, FUSED>(scores, memory, offsets, dim, some[0].1.clone(), partial);
    } else {
        for (i, (_, keys)) in some.iter().enumerate().take(count) {
            let (scores, partial) = (&scores[i * SCORES..], &mut partial[i * dim..][..dim]);
            lanes::accumulate::<1, 64, FUSED>(scores, memory, offsets, dim, keys.clone(), partial);
        }
    }
    for (i, &(line, _)) in some.iter().enumerate().take(count) {
        let (state, acc) = (&mut scratch.state[line], &mut scratch.acc[line * dim..][..dim]);
        merge::<FUSED>(state, acc, new[i], &scratch.partial[i * dim..][..dim]);
    }
}
