//! The product of `wide`: some lines meet one or two panels of 32 lanes in registers.
//!
//! ```text
//!   left   one word of a line, in every lane     w w w w w w w w     a word: one f32, or two bf16 that one instruction
//!   right  that word's row of a panel, 32 lanes  r0 r1 r2 ... r31    multiplies and adds up
//! ```
//!
//! Each sum runs over its words in ascending order. Knows neither tiles nor splits. Called by `wide`.

use std::arch::x86_64::*;
use std::ops::Range;

use super::words::{Row, bf16s, floats, interleaved, lane, load, pairs, vectors};
use crate::Element;
use crate::lanes::{Ahead, LANES, Lane};

/// Words between two requests for what is ahead.
pub(super) const ASK_WORDS: usize = 8;

/// The right side: word `k` of a panel.
pub(super) trait Right {
    /// # Safety
    /// The machine has AVX-512 F, VL and BW.
    #[allow(unsafe_code)]
    unsafe fn row<const NATIVE: bool>(&mut self, panel: usize, k: usize) -> [__m512i; 2];
}

/// Panels of turned keys, each of so many words; between two panels, what is ahead is asked for.
pub(super) struct Turned<'a> {
    pub(super) rows: &'a [Row],
    pub(super) words: usize,
    pub(super) ahead: &'a mut Ahead,
}

#[allow(unsafe_code)]
impl Right for Turned<'_> {
    #[inline(always)]
    unsafe fn row<const NATIVE: bool>(&mut self, panel: usize, k: usize) -> [__m512i; 2] {
        if k == 0 {
            self.ahead.ask();
        }
        vectors(self.rows[panel * self.words + k])
    }
}

/// Values where they lie in the cache, one or two to a word; every few words, what is ahead is asked for.
pub(super) struct Lying<'a, E> {
    pub(super) cache: &'a [E],
    pub(super) dim: usize,
    pub(super) offsets: &'a [usize],
    pub(super) ahead: &'a mut Ahead,
}

#[allow(unsafe_code)]
impl<E: Element> Right for Lying<'_, E> {
    #[inline(always)]
    unsafe fn row<const NATIVE: bool>(&mut self, panel: usize, k: usize) -> [__m512i; 2] {
        if k.is_multiple_of(ASK_WORDS) {
            self.ahead.ask();
        }
        // SAFETY: the caller's promise.
        unsafe {
            if NATIVE {
                let [a, b] = self.offsets.as_chunks().0[k];
                interleaved([
                    load::<E, NATIVE>(self.cache, a, self.dim, panel),
                    load::<E, NATIVE>(self.cache, b, self.dim, panel),
                ])
            } else {
                let offset = self.offsets[k];
                [
                    load::<E, NATIVE>(self.cache, offset, self.dim, panel * 2),
                    load::<E, NATIVE>(self.cache, offset, self.dim, panel * 2 + 1),
                ]
            }
        }
    }
}

/// `sums[g][n] += left[g][k] * right[n][k]` for every word k and the lanes n of `panels`.
///
/// `left` [G, words] · `sums` rows of `stride` vectors, the first `G`.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx2,fma")]
pub(super) fn add_product<const G: usize, const P: usize, const NATIVE: bool>(
    left: [&[u32]; G],
    right: &mut impl Right,
    panels: Range<usize>,
    (sums, stride): (&mut [Lane], usize),
) {
    let mut panel = panels.start;
    while panel < panels.end {
        if panel + P <= panels.end {
            tile::<G, P, NATIVE>(left, right, panel, sums, stride);
            panel += P;
        } else {
            tile::<G, 1, NATIVE>(left, right, panel, sums, stride);
            panel += 1;
        }
    }
}

#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx2,fma")]
#[inline]
fn tile<const G: usize, const P: usize, const NATIVE: bool>(
    left: [&[u32]; G],
    right: &mut impl Right,
    panel: usize,
    sums: &mut [Lane],
    stride: usize,
) {
    if NATIVE {
        // SAFETY: `wide` sets NATIVE only where the machine has AVX-512 BF16.
        #[allow(unsafe_code)]
        unsafe {
            pair_tile::<G, P, _>(left, right, panel, sums, stride);
        }
    } else {
        float_tile::<G, P, _>(left, right, panel, sums, stride);
    }
}

/// Defines `fn $name`: `G` lines meet `P` panels.
macro_rules! tile {
    ($name:ident, $native:literal, $features:literal, $madd:expr) => {
        #[target_feature(enable = $features)]
        #[inline(never)] // inlined into one function, these loops spill each other's registers
        fn $name<const G: usize, const P: usize, R: Right>(
            left: [&[u32]; G],
            right: &mut R,
            panel: usize,
            sums: &mut [Lane],
            stride: usize,
        ) {
            let len = left[0].len();
            let mut lines = left;
            for g in 0..G {
                lines[g] = &left[g][..len]; // a closure here is not inlined, and every look below checked
            }
            let sums = &mut sums[panel * 2..];
            let mut acc = [[[_mm512_setzero_ps(); 2]; P]; G];
            for g in 0..G {
                for p in 0..P {
                    for half in 0..2 {
                        acc[g][p][half] = floats(sums[g * stride + p * 2 + half]);
                    }
                }
            }
            for k in 0..len {
                let mut rows = [[_mm512_setzero_si512(); 2]; P];
                for p in 0..P {
                    // SAFETY: this function has these features.
                    #[allow(unsafe_code)]
                    unsafe {
                        rows[p] = right.row::<$native>(panel + p, k);
                    }
                }
                for g in 0..G {
                    let spread = _mm512_set1_epi32(lines[g][k] as i32);
                    for p in 0..P {
                        for half in 0..2 {
                            acc[g][p][half] = $madd(acc[g][p][half], spread, rows[p][half]);
                        }
                    }
                }
            }
            for g in 0..G {
                for p in 0..P {
                    for half in 0..2 {
                        sums[g * stride + p * 2 + half] = lane(acc[g][p][half]);
                    }
                }
            }
        }
    };
}

tile!(float_tile, false, "avx512f,avx512vl,avx512bw,avx2,fma", |acc, a, b| {
    _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), acc)
});
tile!(pair_tile, true, "avx512bf16,avx512f,avx512vl,avx512bw,avx2,fma", |acc, a, b| {
    _mm512_dpbf16_ps(acc, bf16s(a), bf16s(b))
});

/// Weights in pairs of bf16, to nearest even.
#[target_feature(enable = "avx512bf16,avx512f,avx512vl,avx512bw,avx2,fma")]
pub(super) fn round(weights: &[f32], words: &mut [u32]) {
    let (words, _) = words.as_chunks_mut::<{ LANES / 2 }>();
    for (words, weights) in words.iter_mut().zip(weights.as_chunks().0) {
        *words = pairs(_mm512_cvtneps_pbh(floats(*weights)));
    }
}
