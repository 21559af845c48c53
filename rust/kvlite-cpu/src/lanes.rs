//! The inner loops: dot products, softmax of one split, weighted sums of values.
//!
//! Written over fixed arrays of lanes so that LLVM turns them into vector instructions of whatever width the caller is
//! compiled for; all are `inline(always)` into `by_isa!` bodies. Every sum has one order, given by indices alone:
//! dot products add lane-wise and then as a tree, values add key by key. Vectors are padded to `LANES` by the caller.

use std::cell::Cell;
use std::ops::Range;

use crate::Element;

/// Lanes of one accumulator; vectors of the head dimension are padded to a multiple of it.
pub(crate) const LANES: usize = 16;
/// Keys of one softmax split. Splits start at multiples of it, so partial results do not depend on the query.
pub(crate) const SPLIT: usize = 256;
/// Row length of a score buffer: one split and room to pad it.
pub(crate) const SCORES: usize = SPLIT + LANES;
/// Keys whose values stay in the first-level cache between passes over the head dimension.
const VALUE_KEYS: usize = 32;

#[inline(always)]
pub(crate) fn madd<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// One accumulator. Written with `from_fn` and no index arithmetic inside, or LLVM takes it apart into scalars.
pub(crate) type Lane = [f32; LANES];

#[inline(always)]
pub(crate) fn fma<const FUSED: bool>(a: &Lane, b: &Lane, c: &Lane) -> Lane {
    std::array::from_fn(|i| madd::<FUSED>(a[i], b[i], c[i]))
}

/// Tree sum: halves are added until one lane is left.
#[inline(always)]
pub(crate) fn sum(lanes: Lane) -> f32 {
    let a: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let b: [f32; 4] = std::array::from_fn(|i| a[i] + a[i + 4]);
    let c: [f32; 2] = std::array::from_fn(|i| b[i] + b[i + 2]);
    c[0] + c[1]
}

/// Copies to f32 and fills the rest of `target` with zeros.
#[inline(always)]
pub(crate) fn widen<E: Element>(source: &[E], target: &mut [f32]) {
    let (head, tail) = target.split_at_mut(source.len());
    for (t, &s) in head.iter_mut().zip(source) {
        *t = s.to_f32();
    }
    tail.fill(0.0);
}

/// Whole lanes of cells, as f32.
#[inline(always)]
pub(crate) fn read<E: Element>(cells: &[Cell<E>; LANES]) -> Lane {
    std::array::from_fn(|i| cells[i].get().to_f32())
}

/// Writes whole lanes, each rounded once.
#[inline(always)]
pub(crate) fn write<E: Element>(cells: &[Cell<E>; LANES], lanes: Lane) {
    let rounded = lanes.map(E::from_f32);
    for (cell, value) in cells.iter().zip(rounded) {
        cell.set(value);
    }
}

/// e^x within 2e-7 relative (measured in the tests); 0 below -87.3, infinity above 88.3, NaN stays NaN.
///
/// Cody-Waite reduction by ln 2 and the degree-5 polynomial of Cephes `expf` (S. Moshier, netlib.org/cephes).
#[inline(always)]
pub(crate) fn exp<const FUSED: bool>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    let shifted = madd::<FUSED>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = madd::<FUSED>(n, -0.693_359_4, x);
    let r = madd::<FUSED>(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4;
    p = madd::<FUSED>(p, r, 1.398_199_9e-3);
    p = madd::<FUSED>(p, r, 8.333_452e-3);
    p = madd::<FUSED>(p, r, 4.166_579_6e-2);
    p = madd::<FUSED>(p, r, 0.166_666_65);
    p = madd::<FUSED>(p, r, 0.5);
    p = madd::<FUSED>(p * r, r, r) + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23); // 2^n
    let y = if x < -87.3 { 0.0 } else { p * power };
    if x > 88.3 { f32::INFINITY } else { y }
}

/// Scores of `G` query vectors against keys `range` of a split: `scores[g][i] = scale * q[g] . key[i]`.
///
/// `q` [G, dim], padded · key i at `keys[offsets[i]..][..dim]` · `scores` [G, SCORES].
#[inline(always)]
pub(crate) fn scores<const G: usize, const K: usize, const FUSED: bool>(
    q: &[f32],
    keys: &[f32],
    offsets: &[usize],
    dim: usize,
    range: Range<usize>,
    scale: f32,
    scores: &mut [f32],
) {
    let mut i = range.start;
    while i + K <= range.end {
        dots::<G, K, FUSED>(q, keys, &offsets[i..i + K], dim, scale, &mut scores[i..]);
        i += K;
    }
    while i < range.end {
        dots::<G, 1, FUSED>(q, keys, &offsets[i..i + 1], dim, scale, &mut scores[i..]);
        i += 1;
    }
}

/// `G * K` dot products at once: enough independent sums to keep the multiply-add units busy.
#[inline(always)]
fn dots<const G: usize, const K: usize, const FUSED: bool>(
    q: &[f32],
    keys: &[f32],
    offsets: &[usize],
    dim: usize,
    scale: f32,
    scores: &mut [f32],
) {
    let q: [&[Lane]; G] = std::array::from_fn(|g| q[g * dim..(g + 1) * dim].as_chunks().0);
    let k: [&[Lane]; K] = std::array::from_fn(|i| keys[offsets[i]..offsets[i] + dim].as_chunks().0);
    let mut acc = [[[0.0f32; LANES]; K]; G];
    for c in 0..dim / LANES {
        for i in 0..K {
            for g in 0..G {
                acc[g][i] = fma::<FUSED>(&q[g][c], &k[i][c], &acc[g][i]);
            }
        }
    }
    for g in 0..G {
        for i in 0..K {
            scores[g * SCORES + i] = sum(acc[g][i]) * scale;
        }
    }
}

/// Lanes in the order in which `sum` pairs them.
pub(crate) const PAIRED: [usize; LANES] = [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15];

/// Key vectors turned into columns, so that scores need no sum across lanes: per chunk of LANES keys, [dim][LANES], the
/// dimensions in the order of `turned`. `keys` yields vectors of the padded dim; `columns` has room for whole chunks.
#[inline(always)]
pub(crate) fn turn<'a>(keys: impl Iterator<Item = &'a [f32]>, dim: usize, columns: &mut [f32]) {
    let chunks = dim / LANES;
    let (columns, _) = columns.as_chunks_mut::<LANES>();
    for (i, key) in keys.enumerate() {
        let block = &mut columns[i / LANES * dim..][..dim];
        for (c, key) in key.as_chunks::<LANES>().0.iter().enumerate() {
            for (at, &lane) in PAIRED.iter().enumerate() {
                block[at * chunks + c][i % LANES] = key[lane];
            }
        }
    }
}

/// The dimension at place `at` of a turned vector: those that `dots` adds in one lane follow each other.
#[inline(always)]
pub(crate) fn turned(at: usize, dim: usize) -> usize {
    let chunks = dim / LANES;
    at % chunks * LANES + PAIRED[at / chunks]
}

/// As `scores`, bit by bit, of turned query vectors against `chunks` of turned keys.
#[inline(always)]
pub(crate) fn column_scores<const G: usize, const FUSED: bool>(
    q: [&[f32]; G],
    columns: &[f32],
    chunks: Range<usize>,
    scale: f32,
    scores: &mut [f32],
) {
    match q[0].len() / LANES {
        4 => of_columns::<G, 4, FUSED>(q, columns, chunks, scale, scores),
        8 => of_columns::<G, 8, FUSED>(q, columns, chunks, scale, scores),
        _ => of_columns::<G, 0, FUSED>(q, columns, chunks, scale, scores),
    }
}

/// `D` chunks of LANES dimensions; 0 = as many as there are.
#[inline(always)]
fn of_columns<const G: usize, const D: usize, const FUSED: bool>(
    q: [&[f32]; G],
    columns: &[f32],
    chunks: Range<usize>,
    scale: f32,
    scores: &mut [f32],
) {
    let len = if D > 0 { D } else { q[0].len() / LANES };
    let (columns, _) = columns.as_chunks::<LANES>();
    // Lanes are added in pairs, pairs in pairs: a sum waits at each level for the other half.
    let mut waiting = [[[0.0; LANES]; G]; LANES.ilog2() as usize];
    for chunk in chunks {
        for (at, keys) in columns[chunk * len * LANES..(chunk + 1) * len * LANES].chunks_exact(len).enumerate() {
            let q: [&[f32]; G] = std::array::from_fn(|g| &q[g][at * len..][..len]);
            let mut acc = [[0.0; LANES]; G];
            for c in 0..len {
                for g in 0..G {
                    acc[g] = fma::<FUSED>(&[q[g][c]; LANES], &keys[c], &acc[g]);
                }
            }
            let mut level = 0;
            while at >> level & 1 == 1 {
                for g in 0..G {
                    acc[g] = plus(&waiting[level][g], &acc[g]);
                }
                level += 1;
            }
            match waiting.get_mut(level) {
                Some(place) => *place = acc,
                None => {
                    for (g, total) in acc.iter().enumerate() {
                        let target = &mut scores[g * SCORES + chunk * LANES..][..LANES];
                        target.copy_from_slice(&total.map(|score| score * scale));
                    }
                }
            }
        }
    }
}

/// Lane by lane.
#[inline(always)]
pub(crate) fn plus(a: &Lane, b: &Lane) -> Lane {
    std::array::from_fn(|i| a[i] + b[i])
}

/// Turns scores into weights `exp(score - max)` in place; returns (max, sum of weights).
///
/// `scores` holds whole chunks, padded with -infinity. A NaN score makes the sum NaN.
#[inline(always)]
pub(crate) fn softmax<const FUSED: bool>(scores: &mut [f32]) -> (f32, f32) {
    let (chunks, rest) = scores.as_chunks_mut::<LANES>();
    debug_assert!(rest.is_empty());
    let mut max = [f32::NEG_INFINITY; LANES];
    for chunk in chunks.iter() {
        for lane in 0..LANES {
            max[lane] = if chunk[lane] > max[lane] { chunk[lane] } else { max[lane] };
        }
    }
    let max = max.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    let mut total = [0.0f32; LANES];
    for chunk in chunks.iter_mut() {
        for lane in 0..LANES {
            chunk[lane] = exp::<FUSED>(chunk[lane] - max);
            total[lane] += chunk[lane];
        }
    }
    (max, sum(total))
}

/// `acc[g] += weights[g][i] * value[i]` for keys `range` of a split, in ascending order of keys.
///
/// `weights` [G, SCORES] · value i at `values[offsets[i]..][..dim]` · `acc` [G, dim]. `W * G` lanes stay in registers.
#[inline(always)]
pub(crate) fn accumulate<const G: usize, const W: usize, const FUSED: bool>(
    weights: &[f32],
    values: &[f32],
    offsets: &[usize],
    dim: usize,
    range: Range<usize>,
    acc: &mut [f32],
) {
    let mut first = range.start;
    while first < range.end {
        let keys = first..range.end.min(first + VALUE_KEYS);
        first = keys.end;
        let mut column = 0;
        while column + W <= dim {
            columns::<G, W, FUSED>(weights, values, offsets, (dim, column), keys.clone(), acc);
            column += W;
        }
        while column < dim {
            columns::<G, LANES, FUSED>(weights, values, offsets, (dim, column), keys.clone(), acc);
            column += LANES;
        }
    }
}

#[inline(always)]
fn columns<const G: usize, const W: usize, const FUSED: bool>(
    weights: &[f32],
    values: &[f32],
    offsets: &[usize],
    (dim, column): (usize, usize),
    keys: Range<usize>,
    acc: &mut [f32],
) {
    let weights: [&[f32]; G] = std::array::from_fn(|g| &weights[g * SCORES + keys.start..g * SCORES + keys.end]);
    let offsets = &offsets[keys.clone()];
    let mut sums: [[f32; W]; G] = std::array::from_fn(|g| {
        *acc[g * dim + column..].first_chunk().expect("accumulators are padded to whole chunks")
    });
    for (i, &offset) in offsets.iter().enumerate() {
        let value: &[f32; W] = values[offset + column..].first_chunk().expect("values are padded to whole chunks");
        for g in 0..G {
            let weight = weights[g][i];
            for lane in 0..W {
                sums[g][lane] = madd::<FUSED>(weight, value[lane], sums[g][lane]);
            }
        }
    }
    for g in 0..G {
        acc[g * dim + column..][..W].copy_from_slice(&sums[g]);
    }
}

/// `acc = acc * keep + new * add`, element by element.
#[inline(always)]
pub(crate) fn blend<const FUSED: bool>(acc: &mut [f32], keep: f32, new: &[f32], add: f32) {
    for (a, &n) in acc.iter_mut().zip(new) {
        *a = madd::<FUSED>(*a, keep, n * add);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worst_error<const FUSED: bool>() -> f64 {
        let mut worst = 0.0f64;
        let mut x = -87.2f32;
        while x < 88.3 {
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp::<FUSED>(x)) - exact).abs() / exact);
            x += 1.7e-4;
        }
        worst
    }

    #[test]
    fn exp_is_within_2e_7_of_the_exact_value() {
        assert!(worst_error::<true>() <= 2e-7, "fused {:e}", worst_error::<true>());
        assert!(worst_error::<false>() <= 2e-7, "unfused {:e}", worst_error::<false>());
    }

    #[test]
    fn exp_keeps_zero_infinities_and_nan() {
        assert_eq!(exp::<true>(0.0), 1.0);
        assert_eq!(exp::<true>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<false>(-1e30), 0.0);
        assert_eq!(exp::<true>(f32::INFINITY), f32::INFINITY);
        assert!(exp::<true>(f32::NAN).is_nan());
    }
}
