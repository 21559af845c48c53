//! One split of one row: the query heads of a KV head over keys as they lie, four, two or one head at a time.
//!
//! The plain way; tiles of many lines take `columns`. Called by `attention`.

use std::ops::Range;

use super::{Attention, Scratch, merge, weigh};
use crate::Element;
use crate::lanes::{self, LANES, SCORES};

/// One split of one row: all query heads of the KV head, four, two or one at a time, merged into the running result.
#[inline(always)]
pub(super) fn row_split<E: Element, const FUSED: bool>(
    args: &Attention<'_, E>,
    scratch: &mut Scratch,
    lines: Range<usize>,
    keys: Range<usize>,
) {
    let mut line = lines.start;
    while line < lines.end {
        match lines.end - line {
            4.. => line += heads_split::<E, 4, 1, 16, FUSED>(args, scratch, line, keys.clone()),
            2 | 3 => line += heads_split::<E, 2, 2, 32, FUSED>(args, scratch, line, keys.clone()),
            _ => line += heads_split::<E, 1, 4, 64, FUSED>(args, scratch, line, keys.clone()),
        }
    }
}

/// `G` query heads of one row over one split; returns `G`. `K` keys are scored and `W` value lanes added at once.
#[inline(always)]
fn heads_split<E: Element, const G: usize, const K: usize, const W: usize, const FUSED: bool>(
    args: &Attention<'_, E>,
    scratch: &mut Scratch,
    line: usize,
    keys: Range<usize>,
) -> usize {
    let dim = args.q.dim.next_multiple_of(LANES);
    let Scratch { q, partial, scores, keys: key_side, values: value_side, .. } = scratch;
    let (key_memory, value_memory) = (key_side.memory(&args.k_cache), value_side.memory(&args.v_cache));
    let q = &q[line * dim..(line + G) * dim];
    lanes::scores::<G, K, FUSED>(q, key_memory, &key_side.offsets, dim, keys.clone(), args.scale, scores);
    let mut new = [(0.0, 0.0); G];
    for (g, new) in new.iter_mut().enumerate() {
        *new = weigh::<FUSED>(&mut scores[g * SCORES..(g + 1) * SCORES], &keys);
    }
    let partial = &mut partial[..G * dim];
    partial.fill(0.0);
    lanes::accumulate::<G, W, FUSED>(scores, value_memory, &value_side.offsets, dim, keys, partial);
    for (g, new) in new.into_iter().enumerate() {
        let (state, acc) = (&mut scratch.state[line + g], &mut scratch.acc[(line + g) * dim..][..dim]);
        merge::<FUSED>(state, acc, new, &scratch.partial[g * dim..][..dim]);
    }
    G
}
