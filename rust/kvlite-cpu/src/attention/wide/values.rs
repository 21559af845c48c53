//! Values of a split, read where they lie in the cache: weights of some lines meet them as a product.
//!
//! Called by `wide`.

use std::ops::Range;

use super::product::{Lying, add_product};
use super::words::word;
use crate::Element;
use crate::lanes::{Ahead, Lane};

/// Values of a split.
#[derive(Clone, Copy)]
pub(super) struct Values<'a, E> {
    pub(super) cache: &'a [E],
    pub(super) dim: usize,
    /// Where each starts.
    pub(super) offsets: &'a [usize],
}

impl<E: Element> Values<'_, E> {
    /// `sums` [G, dim] += weights x values of `keys`; what is `ahead` is asked for meanwhile.
    ///
    /// Where `keys` begin or end within a word, the other half's weight is 0, and the seen value stands for the other too,
    /// which may be NaN.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx2,fma")]
    pub(super) fn add<const G: usize, const P: usize, const NATIVE: bool>(
        self,
        weights: [&[u32]; G],
        keys: Range<usize>,
        ahead: &mut Ahead,
        sums: &mut [Lane],
    ) {
        let stride = sums.len() / G;
        let mut add = |words: Range<usize>, offsets: &[usize]| {
            let weights = weights.map(|weights| &weights[words.clone()]);
            let mut values = Lying { cache: self.cache, dim: self.dim, offsets, ahead: &mut *ahead };
            add_product::<G, P, NATIVE>(weights, &mut values, 0..stride / 2, (&mut *sums, stride));
        };
        let whole = keys.start.div_ceil(word(NATIVE))..keys.end / word(NATIVE);
        if keys.start < whole.start * word(NATIVE) && !keys.is_empty() {
            add(whole.start - 1..whole.start, &[self.offsets[keys.start]; 2]);
        }
        if !whole.is_empty() {
            let keys = whole.start * word(NATIVE)..whole.end * word(NATIVE);
            add(whole.clone(), &self.offsets[keys]);
        }
        if whole.end * word(NATIVE) < keys.end && !keys.is_empty() {
            add(whole.end..whole.end + 1, &[self.offsets[keys.end - 1]; 2]);
        }
    }
}
