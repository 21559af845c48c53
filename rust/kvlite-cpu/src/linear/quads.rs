//! Products of some rows where a lane takes two registers of 16 (AVX2): four weight rows share every load of x.
//!
//! With two weight rows, as in `tile`, loads of x bound the product, and they come from the second-level cache. Here
//! K is walked in parts that the first-level cache holds for all rows, four weight rows at a time, half of the lanes at
//! a time; sums wait in memory between two parts:
//!
//! ```text
//!              part of K
//!   4 weights  ========        widened once, then multiplied with every group of 3 rows of x; meanwhile the next part
//!   x, groups  ======== ...    of the weights is fetched: the reader alone does not look so far ahead
//! ```
//!
//! The lanes and their order are those of `tile`, so are the bits. Called by `linear` from `FEWEST_ROWS` rows on.

use std::ops::Range;

use super::{Linear, Packed};
use crate::lanes::{LANES, Lane, fetch, madd, sum, widen};
use crate::{Element, RowsMut};

/// With fewer rows the two streams of `piece_body` are as fast or faster (Zen 3: 0.8x at 4 rows, 1.2x at 16).
pub(super) const FEWEST_ROWS: usize = 12;
/// Rows of a group: with four weight rows, half a lane each, 12 of 16 registers hold sums.
pub(super) const GROUP: usize = 3;
const WEIGHTS: usize = 4;
/// Half of a lane: one register.
const HALF: usize = LANES / 2;
/// Chunks of LANES inputs in a part of K: 8 KiB of weights, and 2 KiB for each row of x.
const PART: usize = 32;

/// Buffers of one thread, kept between calls.
#[derive(Default)]
pub(super) struct Scratch {
    /// The part of four weight rows, [WEIGHTS, PART].
    weights: Vec<Lane>,
    /// [groups, WEIGHTS, GROUP].
    sums: Vec<[Lane; GROUP]>,
}

/// Writes the products of `piece`'s weight rows with all rows of x.
#[inline(always)]
pub(super) fn compute<A: Element, W: Element, const FUSED: bool>(
    args: &Linear<'_, A, W>,
    x: &Packed<'_, f32, LANES>,
    piece: Range<usize>,
    scratch: &mut Scratch,
    out: &RowsMut<'_, A>,
) {
    let Scratch { weights, sums } = scratch;
    weights.resize(WEIGHTS * PART, [0.0; LANES]);
    let stream = piece.start..piece.start + piece.len().div_ceil(2);
    for n in stream.clone().step_by(2) {
        let of = |n: usize| {
            let next = (n + 1).min(stream.end - 1); // of an odd number, the last row is its own neighbour
            [args.pair(n.min(stream.end - 1), &piece), args.pair(next, &piece)]
        };
        let rows = of(n);
        sums.clear();
        sums.resize(x.groups().count() * WEIGHTS, [[0.0; LANES]; GROUP]);
        for start in (0..x.chunks).step_by(PART) {
            let part = start..x.chunks.min(start + PART);
            let (ahead, from) = if part.end < x.chunks { (rows, part.end) } else { (of(n + 2), 0) };
            for (&n, target) in rows.as_flattened().iter().zip(weights.chunks_exact_mut(PART)) {
                let source = &args.weight.row(n)[part.start * LANES..args.x.dim.min(part.end * LANES)];
                widen(source, target[..part.len()].as_flattened_mut());
            }
            for &n in ahead.as_flattened() {
                let row = args.weight.row(n);
                fetch(row, from * LANES, row.len().min((from + PART) * LANES) - from * LANES);
            }
            for ((_, rows, x), sums) in x.groups().zip(sums.chunks_exact_mut(WEIGHTS)) {
                let x = &x[part.start * rows..part.end * rows];
                match rows {
                    1 => add_part::<1, FUSED>(weights, x, sums),
                    2 => add_part::<2, FUSED>(weights, x, sums),
                    _ => add_part::<3, FUSED>(weights, x, sums),
                }
            }
        }
        for ((first, count, _), sums) in x.groups().zip(sums.chunks_exact(WEIGHTS)) {
            for (pair, sums) in rows.iter().zip(sums.chunks_exact(2)) {
                for (r, (&a, &b)) in sums[0].iter().zip(&sums[1]).take(count).enumerate() {
                    args.write([[sum(a)], [sum(b)]], *pair, first + r, out);
                }
            }
        }
    }
}

/// Adds one part of K for `R` rows of x, [part, R], to their sums.
#[inline(always)]
fn add_part<const R: usize, const FUSED: bool>(weights: &[Lane], x: &[Lane], sums: &mut [[Lane; GROUP]]) {
    let (x, _) = x.as_chunks::<R>();
    add_half::<R, 0, FUSED>(weights, x, sums);
    add_half::<R, HALF, FUSED>(weights, x, sums);
}

/// Lanes `FROM..FROM + HALF` of it.
#[inline(always)]
fn add_half<const R: usize, const FROM: usize, const FUSED: bool>(
    weights: &[Lane],
    x: &[[Lane; R]],
    sums: &mut [[Lane; GROUP]],
) {
    let sums: &mut [[Lane; GROUP]; WEIGHTS] = sums.first_chunk_mut().expect("four weight rows");
    let [w0, w1, w2, w3]: [&[Lane]; WEIGHTS] = std::array::from_fn(|w| &weights[w * PART..][..x.len()]);
    let mut acc: [[[f32; HALF]; R]; WEIGHTS] =
        std::array::from_fn(|w| std::array::from_fn(|r| std::array::from_fn(|i| sums[w][r][FROM + i])));
    for ((((x, w0), w1), w2), w3) in x.iter().zip(w0).zip(w1).zip(w2).zip(w3) {
        for (acc, w) in acc.iter_mut().zip([w0, w1, w2, w3]) {
            for (acc, x) in acc.iter_mut().zip(x) {
                *acc = std::array::from_fn(|i| madd::<FUSED>(w[FROM + i], x[FROM + i], acc[i]));
            }
        }
    }
    for (sums, acc) in sums.iter_mut().zip(&acc) {
        for (sums, acc) in sums.iter_mut().zip(acc) {
            sums[FROM..FROM + HALF].copy_from_slice(acc);
        }
    }
}
