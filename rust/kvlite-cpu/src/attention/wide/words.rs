//! Words: what one 32-bit lane holds, and how vectors in memory become rows of them.
//!
//! Everything here needs AVX-512 F, VL and BW. Called by `wide` and `product`.

use std::arch::x86_64::*;

use crate::Element;
use crate::lanes::{LANES, Lane};

/// Lanes of a panel: two registers.
pub(super) const PANEL: usize = 2 * LANES;

/// Elements of a word: one as f32, or two bf16.
pub(super) const fn word(native: bool) -> usize {
    if native { 2 } else { 1 }
}

/// One word of a whole panel; aligned, or every load of a register would touch two cache lines.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
pub(super) struct Row(pub(super) [[u32; LANES]; 2]);

/// LANES words, the `block`th, of the vector of `dim` elements at `offset` of `memory`; zeros behind its end.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx2,fma")]
#[inline]
pub(super) fn load<E: Element, const NATIVE: bool>(memory: &[E], offset: usize, dim: usize, block: usize) -> __m512i {
    let most = LANES * word(NATIVE);
    let start = dim.min(block * most);
    let count = most.min(dim - start);
    let elements = memory[offset + start..][..count].as_ptr();
    let mask = ((1u64 << count) - 1) as u32;
    // SAFETY: the mask has a bit for each of the elements, which lie in `memory`; no others are touched. E is f32 or has 16
    // bits; what is transmuted is of one size, and every bit pattern is a value.
    #[allow(unsafe_code)]
    unsafe {
        if NATIVE {
            _mm512_maskz_loadu_epi16(mask, elements.cast())
        } else if size_of::<E>() == size_of::<f32>() {
            _mm512_maskz_loadu_epi32(mask as u16, elements.cast())
        } else {
            let halves = _mm256_maskz_loadu_epi16(mask as u16, elements.cast());
            let values = std::mem::transmute_copy::<__m256i, [E; LANES]>(&halves);
            std::mem::transmute::<Lane, __m512i>(values.map(E::to_f32))
        }
    }
}

/// Rows become columns: pairs of words, then pairs of pairs, then quarters.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx2,fma")]
#[inline]
pub(super) fn transposed(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    let mut twos = rows;
    for i in (0..LANES).step_by(2) {
        twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    let mut fours = twos;
    for i in (0..LANES).step_by(4) {
        fours[i] = _mm512_unpacklo_epi64(twos[i], twos[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(twos[i], twos[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(twos[i + 1], twos[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(twos[i + 1], twos[i + 3]);
    }
    let mut columns = fours;
    for i in 0..4 {
        let [a, b, c, d] = [fours[i], fours[i + 4], fours[i + 8], fours[i + 12]];
        let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (even_high, odd_high) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        columns[i] = _mm512_shuffle_i32x4::<0x88>(even, even_high);
        columns[i + 4] = _mm512_shuffle_i32x4::<0x88>(odd, odd_high);
        columns[i + 8] = _mm512_shuffle_i32x4::<0xdd>(even, even_high);
        columns[i + 12] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_high);
    }
    columns
}

/// Pairs of bf16, one of each vector.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx2,fma")]
#[inline]
pub(super) fn interleaved([a, b]: [__m512i; 2]) -> [__m512i; 2] {
    // Places of the first half's pairs in (a, b), two to a word.
    let places = _mm512_set_epi32(
        0x2f_000f, 0x2e_000e, 0x2d_000d, 0x2c_000c, 0x2b_000b, 0x2a_000a, 0x29_0009, 0x28_0008, 0x27_0007, 0x26_0006,
        0x25_0005, 0x24_0004, 0x23_0003, 0x22_0002, 0x21_0001, 0x20_0000,
    );
    let further = _mm512_add_epi32(places, _mm512_set1_epi32(0x10_0010));
    [_mm512_permutex2var_epi16(a, places, b), _mm512_permutex2var_epi16(a, further, b)]
}

/// Defines `fn $name`: the same bytes as another type.
macro_rules! cast {
    ($name:ident, $from:ty, $to:ty) => {
        #[inline(always)]
        pub(super) fn $name(vector: $from) -> $to {
            // SAFETY: both have one size (`transmute` checks), and in both every bit pattern is a value.
            #[allow(unsafe_code)]
            unsafe {
                std::mem::transmute::<$from, $to>(vector)
            }
        }
    };
}

cast!(vectors, Row, [__m512i; 2]);
cast!(lanes_of, __m512i, [u32; LANES]);
cast!(pairs, __m256bh, [u32; LANES / 2]);
cast!(floats, Lane, __m512);
cast!(lane, __m512, Lane);
cast!(bf16s, __m512i, __m512bh);
