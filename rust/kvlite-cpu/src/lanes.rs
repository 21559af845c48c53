//! The inner loops: products of lines with columns, softmax of one split.
//!
//! Written over fixed arrays of lanes so that LLVM turns them into vector instructions of whatever width the caller is
//! compiled for; all are `inline(always)` into `by_isa!` bodies. Every sum has one order, given by indices alone. Vectors
//! are padded to `LANES` by the caller.

use std::cell::Cell;
use std::ops::Range;

use crate::Element;

/// Lanes of one accumulator; vectors of the head dimension are padded to a multiple of it.
pub(crate) const LANES: usize = 16;
/// Keys of one softmax split. Splits start at multiples of it, so partial results do not depend on the query.
pub(crate) const SPLIT: usize = 256;
/// Row length of a score buffer: one split and room to pad it.
pub(crate) const SCORES: usize = SPLIT + LANES;

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

/// Lanes in the order in which `sum` pairs them.
pub(crate) const PAIRED: [usize; LANES] = [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15];

/// LANES values that a product meets together. Aligned, or every load of them would touch two cache lines.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
pub(crate) struct Column(pub(crate) Lane);

/// Half of a lane: a register of AVX2.
const HALF: usize = LANES / 2;

/// Turns LANES vectors into columns, [dim]; the length of the vectors is a multiple of LANES.
#[inline(always)]
pub(crate) fn turn<const FUSED: bool>(vectors: [&[f32]; LANES], columns: &mut [Column]) {
    for (d, columns) in columns.chunks_exact_mut(HALF).enumerate() {
        let columns: &mut [Column; HALF] = columns.try_into().expect("chunks of HALF");
        for half in 0..2 {
            // No `from_fn`: where LLVM does not inline it, it is compiled without the caller's instructions.
            let mut rows = [&[0.0; HALF]; HALF];
            for (i, row) in rows.iter_mut().enumerate() {
                let vector = &vectors[half * HALF + i][d * HALF..];
                *row = vector.first_chunk().expect("vectors are padded to whole chunks");
            }
            transpose::<FUSED>(rows, columns, half * HALF);
        }
    }
}

/// `rows[i][j]` becomes `columns[j][first + i]`.
#[inline(always)]
fn transpose<const FUSED: bool>(rows: [&[f32; HALF]; HALF], columns: &mut [Column; HALF], first: usize) {
    #[cfg(target_arch = "x86_64")]
    if FUSED {
        // SAFETY: on this architecture `by_isa` fuses only where AVX2 was found.
        #[allow(unsafe_code)]
        return unsafe { transpose_avx2(rows, columns, first) };
    }
    for (i, row) in rows.into_iter().enumerate() {
        for (column, &value) in columns.iter_mut().zip(row) {
            column.0[first + i] = value;
        }
    }
}

/// Pairs of rows, then pairs of pairs, then halves change places.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
#[inline]
fn transpose_avx2(rows: [&[f32; HALF]; HALF], columns: &mut [Column; HALF], first: usize) {
    use std::arch::x86_64::*;
    let mut twos = [_mm256_setzero_ps(); HALF];
    for i in (0..HALF).step_by(2) {
        // SAFETY: each is HALF floats.
        #[allow(unsafe_code)]
        let (a, b) = unsafe { (_mm256_loadu_ps(rows[i].as_ptr()), _mm256_loadu_ps(rows[i + 1].as_ptr())) };
        twos[i] = _mm256_unpacklo_ps(a, b);
        twos[i + 1] = _mm256_unpackhi_ps(a, b);
    }
    let mut fours = twos;
    for i in (0..HALF).step_by(4) {
        fours[i] = _mm256_shuffle_ps::<0x44>(twos[i], twos[i + 2]);
        fours[i + 1] = _mm256_shuffle_ps::<0xee>(twos[i], twos[i + 2]);
        fours[i + 2] = _mm256_shuffle_ps::<0x44>(twos[i + 1], twos[i + 3]);
        fours[i + 3] = _mm256_shuffle_ps::<0xee>(twos[i + 1], twos[i + 3]);
    }
    for i in 0..HALF / 2 {
        let low = _mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4]);
        let high = _mm256_permute2f128_ps::<0x31>(fours[i], fours[i + 4]);
        for (column, value) in [(i, low), (i + 4, high)] {
            let target: &mut [f32; HALF] = columns[column].0[first..].first_chunk_mut().expect("one of two halves");
            // SAFETY: it is HALF floats.
            #[allow(unsafe_code)]
            unsafe {
                _mm256_storeu_ps(target.as_mut_ptr(), value);
            }
        }
    }
}

/// `sums[g][p] += left[g][k] * right[p][k]` for every k of the left side, in ascending order.
#[inline(always)]
pub(crate) fn product<const G: usize, const P: usize, const FUSED: bool>(
    left: [&[f32]; G],
    right: [&[Column]; P],
    mut sums: [[Lane; P]; G],
) -> [[Lane; P]; G] {
    let len = left[0].len();
    let left: [&[f32]; G] = std::array::from_fn(|g| &left[g][..len]);
    let right: [&[Column]; P] = std::array::from_fn(|p| &right[p][..len]);
    for k in 0..len {
        for g in 0..G {
            let factor = [left[g][k]; LANES];
            for p in 0..P {
                sums[g][p] = fma::<FUSED>(&factor, &right[p][k].0, &sums[g][p]);
            }
        }
    }
    sums
}

/// What is done beside a product.
pub(crate) trait Beside {
    /// `product`, and that.
    fn product<const G: usize, const P: usize, const FUSED: bool>(
        &mut self,
        left: [&[f32]; G],
        right: [&[Column]; P],
        sums: [[Lane; P]; G],
    ) -> [[Lane; P]; G];
}

/// Nothing.
impl Beside for () {
    #[inline(always)]
    fn product<const G: usize, const P: usize, const FUSED: bool>(
        &mut self,
        left: [&[f32]; G],
        right: [&[Column]; P],
        sums: [[Lane; P]; G],
    ) -> [[Lane; P]; G] {
        product::<G, P, FUSED>(left, right, sums)
    }
}

impl Beside for Ahead {
    #[inline(always)]
    fn product<const G: usize, const P: usize, const FUSED: bool>(
        &mut self,
        left: [&[f32]; G],
        right: [&[Column]; P],
        mut sums: [[Lane; P]; G],
    ) -> [[Lane; P]; G] {
        let len = left[0].len();
        for start in (0..len).step_by(PACE) {
            self.ask();
            let part = start..len.min(start + PACE);
            let left: [&[f32]; G] = std::array::from_fn(|g| &left[g][part.clone()]);
            let right: [&[Column]; P] = std::array::from_fn(|p| &right[p][part.clone()]);
            sums = product::<G, P, FUSED>(left, right, sums);
        }
        sums
    }
}

/// Steps of a product between two requests of `Ahead`.
pub(crate) const PACE: usize = 8;
/// Of a cache line.
pub(crate) const LINE_BYTES: usize = 64;

/// Memory that is read later, asked for a few cache lines at a time while something else is computed: a processor has only
/// so many requests under way, and one more would hold up the products behind it.
#[derive(Default)]
pub(crate) struct Ahead {
    /// Addresses.
    runs: Vec<Range<usize>>,
    /// Runs that were begun, and what is left of the last one.
    begun: usize,
    rest: Range<usize>,
    /// Lines at a time.
    lines: usize,
}

impl Ahead {
    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.runs.clear();
        (self.begun, self.rest, self.lines) = (0, 0..0, 0);
    }

    /// Memory that comes next.
    pub(crate) fn push<E>(&mut self, memory: &[E]) {
        let Range { start, end } = memory.as_ptr_range();
        match self.runs.last_mut() {
            Some(last) if last.end == start.addr() => last.end = end.addr(),
            _ => self.runs.push(start.addr()..end.addr()),
        }
    }

    /// Everything is to be asked for in so many times.
    pub(crate) fn within(&mut self, times: usize) {
        let lines = self.runs.iter().map(Range::len).sum::<usize>().div_ceil(LINE_BYTES);
        self.lines = lines.div_ceil(times.max(1));
    }

    /// Asks for what it is time for.
    #[inline(always)]
    pub(crate) fn ask(&mut self) {
        for _ in 0..self.lines {
            if self.rest.is_empty() {
                let Some(run) = self.runs.get(self.begun) else {
                    self.lines = 0;
                    return;
                };
                (self.rest, self.begun) = (run.clone(), self.begun + 1);
            }
            prefetch::<2>(std::ptr::without_provenance(self.rest.start));
            self.rest.start += LINE_BYTES;
        }
    }
}

/// Asks for the cache line at an address.
#[inline(always)]
fn prefetch<const HINT: i32>(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch touches no memory that the program can see, at any address.
    #[allow(unsafe_code)]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<HINT>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Asks for `len` elements of `memory` that are read later.
#[inline(always)]
pub(crate) fn fetch<E>(memory: &[E], offset: usize, len: usize) {
    let address = memory.as_ptr().wrapping_add(offset).cast::<u8>();
    for line in 0..(len * size_of::<E>()).div_ceil(LINE_BYTES) {
        prefetch::<3>(address.wrapping_add(line * LINE_BYTES));
    }
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
