//! Products of bf16 with AVX-512 BF16, which multiplies pairs of bf16 and adds them to f32 lanes.
//!
//! Two weight rows meet up to 12 rows of x in registers; one row of x meets one after the other, because memory is fastest
//! when a thread reads it straight on (1.05x to 1.1x). Weights are fetched ahead, for several rows into the second-level
//! cache, which has more requests under way than the first (1.35x at 8 rows); x is walked in parts that the first-level cache
//! holds, each for a block of weight rows, whose sums wait meanwhile. Called by `linear`.

use std::arch::x86_64::*;

use super::{DOT, Element, LANES, Linear, NATIVE_GROUP, Packed, Range, bf16};
use crate::isa::is_intel;

/// `$tile::<R>(...)` with R = `$rows`, 1 to NATIVE_GROUP.
macro_rules! by_rows {
    ($rows:expr, $tile:ident => $arguments:tt) => {
        match $rows {
            1 => $tile::<1> $arguments,
            2 => $tile::<2> $arguments,
            3 => $tile::<3> $arguments,
            4 => $tile::<4> $arguments,
            5 => $tile::<5> $arguments,
            6 => $tile::<6> $arguments,
            7 => $tile::<7> $arguments,
            8 => $tile::<8> $arguments,
            9 => $tile::<9> $arguments,
            10 => $tile::<10> $arguments,
            11 => $tile::<11> $arguments,
            _ => $tile::<NATIVE_GROUP> $arguments,
        }
    };
}

type Pairs = [bf16; DOT * LANES];
/// Sums across lanes are made so many at a time.
const SUMS: usize = 8;
/// Bytes between a weight and the one that is fetched meanwhile, at least; twice that with several rows. The processor does not
/// look past the end of a page by itself.
const AHEAD: usize = 4096;
/// Pairs of weight rows that meet a part of x while it is in the first-level cache.
const BLOCK: usize = 8;
/// Cache lines of x in a part: less than half of a first-level cache.
const PART_LINES: usize = 320;

/// `sums` [rows of x, weight rows of the piece].
#[target_feature(enable = "avx512bf16,avx512f,avx512vl,avx2,fma")]
pub(super) fn piece<A: Element, W: Element>(
    args: &Linear<'_, A, W>,
    x: &Packed<'_, bf16, { DOT * LANES }>,
    piece: &Range<usize>,
    sums: &mut [f32],
) {
    if x.values.len() == x.chunks * DOT * LANES {
        for (sums, start) in sums.chunks_mut(SUMS).zip(piece.clone().step_by(SUMS)) {
            let (x, rows) = (x.values.as_chunks().0, start..start + sums.len());
            if is_intel() {
                one_row::<_MM_HINT_T0, A, W>(args, x, rows, sums);
            } else {
                one_row::<_MM_HINT_NTA, A, W>(args, x, rows, sums);
            }
        }
        return;
    }
    let streams = piece.start..piece.start + piece.len().div_ceil(2);
    let parts = (x.group * x.chunks).div_ceil(PART_LINES);
    let part = x.chunks.div_ceil(parts);
    // What fits the cache whole needs no second look at the weights.
    let block = if x.values.len() <= PART_LINES * DOT * LANES { 1 } else { BLOCK };
    let ahead = (2 * AHEAD).max(if block == 1 { 0 } else { block * args.weight.dim * size_of::<bf16>() });
    let mut waiting = vec![[_mm512_setzero_ps(); 2 * NATIVE_GROUP]; block];
    for start in streams.clone().step_by(block) {
        let block = start..streams.end.min(start + block);
        for (first, rows, x_group) in x.groups() {
            let target = &mut sums[(first - x.first) * piece.len()..][..rows * piece.len()];
            for chunks in (0..x.chunks).step_by(part).map(|start| start..x.chunks.min(start + part)) {
                for (n, acc) in block.clone().zip(&mut waiting) {
                    let pair = args.pair(n, piece);
                    let weights = pair.map(|n| W::as_bf16(args.weight.row(n)).expect("the weights are bf16"));
                    let pair = pair.map(|n| n - piece.start);
                    by_rows!(rows, tile => (weights, x_group, chunks.clone(), ahead, acc, target, pair));
                }
            }
        }
    }
}

/// Up to SUMS weight rows times one row of x; `target` [weight rows].
///
/// `HINT`: past the outer caches where lines stay until they are used: a step of one row is short, and what runs between two
/// steps finds its own there still. Intel's first-level cache gives such lines one way of each set, which a page fills: what
/// is fetched a page ahead is read twice (4 instead of 16 GB/s on one thread).
#[target_feature(enable = "avx512bf16,avx512f,avx512vl,avx2,fma")]
#[inline(never)]
fn one_row<const HINT: i32, A: Element, W: Element>(
    args: &Linear<'_, A, W>,
    x: &[Pairs],
    rows: Range<usize>,
    target: &mut [f32],
) {
    let mut acc = [_mm512_setzero_ps(); SUMS];
    for (n, acc) in rows.zip(&mut acc) {
        let (weights, tail) = W::as_bf16(args.weight.row(n)).expect("the weights are bf16").as_chunks();
        for (x, w) in x.iter().zip(weights) {
            fetch::<HINT>(w, AHEAD);
            *acc = _mm512_dpbf16_ps(*acc, load(w), load(x));
        }
        if let Some(x) = x.get(weights.len()) {
            *acc = _mm512_dpbf16_ps(*acc, load(&padded(tail)), load(x));
        }
    }
    target.copy_from_slice(&sums_of(acc)[..target.len()]);
}

/// Two weight rows times a group of `R` rows of x; `target` [R, outputs], of which `pair` are written.
///
/// Of a part of the chunks only: sums wait in `waiting` between two parts.
#[target_feature(enable = "avx512bf16,avx512f,avx512vl,avx2,fma")]
#[inline(never)] // inlined into one function, a dozen of these loops spill each other's registers
fn tile<const R: usize>(
    weights: [&[bf16]; 2],
    x: &[Pairs],
    chunks: Range<usize>,
    ahead: usize,
    waiting: &mut [__m512; 2 * NATIVE_GROUP],
    target: &mut [f32],
    pair: [usize; 2],
) {
    let (x, _) = x.as_chunks::<R>();
    let [(w0, tail0), (w1, tail1)] = weights.map(<[bf16]>::as_chunks);
    let mut acc = [[_mm512_setzero_ps(); R]; 2];
    if chunks.start > 0 {
        acc[0].copy_from_slice(&waiting[..R]);
        acc[1].copy_from_slice(&waiting[R..2 * R]);
    }
    let mut add = |x: &[Pairs; R], w: [__m512bh; 2]| {
        for r in 0..R {
            acc[0][r] = _mm512_dpbf16_ps(acc[0][r], w[0], load(&x[r]));
            acc[1][r] = _mm512_dpbf16_ps(acc[1][r], w[1], load(&x[r]));
        }
    };
    let whole = chunks.start..chunks.end.min(w0.len());
    for ((x, w0), w1) in x[whole.clone()].iter().zip(&w0[whole.clone()]).zip(&w1[whole]) {
        fetch::<_MM_HINT_T1>(w0, ahead);
        fetch::<_MM_HINT_T1>(w1, ahead);
        add(x, [load(w0), load(w1)]);
    }
    if chunks.end < x.len() {
        waiting[..R].copy_from_slice(&acc[0]);
        waiting[R..2 * R].copy_from_slice(&acc[1]);
        return;
    }
    if let Some(x) = x.get(w0.len()) {
        add(x, [load(&padded(tail0)), load(&padded(tail1))]);
    }
    let outputs = target.len() / R;
    for (acc, n) in acc.iter().zip(pair) {
        for (part, acc) in acc.chunks(SUMS).enumerate() {
            let sums = sums_of(std::array::from_fn(|i| acc.get(i).copied().unwrap_or(_mm512_setzero_ps())));
            for (r, sum) in sums.into_iter().take(acc.len()).enumerate() {
                target[(part * SUMS + r) * outputs + n] = sum;
            }
        }
    }
}

/// The sum of each one's lanes, bit by bit as `sum` makes it: halves are added, of several vectors at once.
#[target_feature(enable = "avx512f,avx512vl,avx2")]
#[inline]
fn sums_of(acc: [__m512; SUMS]) -> [f32; SUMS] {
    // This order comes out as 0 .. 7.
    let [a, b, c, d, e, f, g, h] = [0, 4, 1, 5, 2, 6, 3, 7].map(|i: usize| {
        let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(acc[i])));
        _mm256_add_ps(_mm512_castps512_ps256(acc[i]), high)
    });
    let quarters = |a, b| _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
    let eighths = |a, b| {
        let (a, b) = (_mm256_castps_pd(a), _mm256_castps_pd(b));
        _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)))
    };
    let (low, high) = (eighths(quarters(a, b), quarters(c, d)), eighths(quarters(e, f), quarters(g, h)));
    let even = _mm256_shuffle_ps::<0b10_00_10_00>(low, high);
    let odd = _mm256_shuffle_ps::<0b11_01_11_01>(low, high);
    let mut sums = [0.0; SUMS];
    // SAFETY: the target holds 8 lanes.
    #[allow(unsafe_code)]
    unsafe {
        _mm256_storeu_ps(sums.as_mut_ptr(), _mm256_add_ps(even, odd));
    }
    sums
}

/// Asks for what the stream of `weights` reads `ahead` bytes later; it may lie past the end.
#[inline(always)]
fn fetch<const HINT: i32>(weights: &Pairs, ahead: usize) {
    let address = weights.as_ptr().wrapping_byte_add(ahead);
    // SAFETY: a prefetch touches no memory that the program can see, at any address.
    #[allow(unsafe_code)]
    unsafe {
        _mm_prefetch::<HINT>(address.cast());
    }
}

#[inline(always)]
fn load(pairs: &Pairs) -> __m512bh {
    // SAFETY: both are 64 bytes in which every bit pattern is a value.
    #[allow(unsafe_code)]
    unsafe {
        std::mem::transmute_copy(pairs)
    }
}

pub(super) fn padded(tail: &[bf16]) -> Pairs {
    let mut pairs = [bf16::ZERO; DOT * LANES];
    pairs[..tail.len()].copy_from_slice(tail);
    pairs
}
