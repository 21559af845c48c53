//! `wide` with AMX: 16 lines at a time meet the keys, then the values, of a split as tiles.
//!
//! ```text
//!   scores [16 lines, 64 keys] = q [16 lines, dim]       x keys [dim, 64 keys], turned
//!   output [16 lines, 64 dims] = weights [16 lines, 256] x values [256, 64 dims], pairs of keys side by side
//! ```
//!
//! A line alone costs what 16 do. Keys that a line does not see have weight 0, and where there is no key values are 0: to a
//! sum, adding nothing and adding 0 are the same. But 0 times what is not finite is NaN, so where there is such a value lines
//! meet only what they see, one by one. Products are short beside what memory takes, so the next split is asked for all
//! through this one. Called by `wide`.

use std::arch::x86_64::*;
use std::ops::Range;

use super::words::{PANEL, Row, interleaved, load, word};
use super::{Scratch, Walk, merge, weights_of};
use crate::attention::parts::Results;
use crate::lanes::{LANES, LINE_BYTES, SCORES, SPLIT};
use crate::tiles::{Tile, Tiles};
use crate::{Element, bf16};

/// Tiles that one left tile meets.
const RIGHT: usize = 4;
/// Keys of one tile of weights.
const CHUNK: usize = LANES * word(true);
/// Bytes from one line's weights to the next one's.
const WEIGHT_BYTES: usize = SPLIT / word(true) * size_of::<u32>();

impl<E: Element> Walk<'_, '_, E> {
    /// As `run`.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx2,fma")]
    pub(super) fn run_tiles(mut self, results: &mut Results<'_, '_, E>) {
        self.start::<true>(results);
        let dim = self.dim();
        self.scratch.values.resize(SPLIT / CHUNK * dim / LANES, Tile::zeros());
        // SAFETY: `compute_tile` comes here only on a machine with AMX.
        #[allow(unsafe_code)]
        let tiles = unsafe { Tiles::new() };
        let groups = self.lines().div_ceil(LANES) * (SPLIT / CHUNK / 2 + SPLIT / LANES / RIGHT);
        let times = SPLIT / CHUNK + self.lines() + groups;
        for split in self.splits() {
            let keys = self.begin_split::<true>(split, times);
            let finite = self.pack_values(keys);
            for first in (0..self.lines()).step_by(LANES) {
                let lines = first..self.lines().min(first + LANES);
                self.score_tiles(&tiles, lines.clone(), split);
                if finite {
                    self.add_tiles(&tiles, lines, split);
                    continue;
                }
                for line in lines {
                    self.pack_values(self.seen(line, split));
                    self.add_tiles(&tiles, line..line + 1, split);
                }
            }
        }
        drop(tiles);
        self.write(results);
    }

    /// Those of the split's values, pairs of keys side by side, zeros beside them; returns whether all are finite.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx2,fma")]
    #[inline(never)]
    fn pack_values(&mut self, keys: Range<usize>) -> bool {
        let (cache, dim) = (self.args.v_cache.values, self.args.q.dim);
        let blocks = self.dim() / PANEL;
        let Scratch { value_offsets, values, ahead, .. } = &mut *self.scratch;
        let mut largest = _mm512_setzero_si512();
        for chunk in keys.start / CHUNK..keys.end.div_ceil(CHUNK) {
            ahead.ask();
            let tiles = &mut values[chunk * 2 * blocks..][..2 * blocks];
            for pair in 0..LANES {
                let key = chunk * CHUNK + pair * 2;
                for (block, tiles) in tiles.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                    let value = |key: usize| match keys.contains(&key) {
                        true => load::<E, true>(cache, value_offsets[key], dim, block),
                        false => _mm512_setzero_si512(),
                    };
                    let both = [value(key), value(key + 1)];
                    for values in both {
                        largest = _mm512_max_epu16(largest, _mm512_and_si512(values, _mm512_set1_epi16(i16::MAX)));
                    }
                    [tiles[0].0[pair], tiles[1].0[pair]] = interleaved(both);
                }
            }
        }
        _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(bf16::INFINITY.to_bits() as i16)) == 0
    }

    /// Weights of up to LANES lines in the split.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx2,fma")]
    #[inline(never)]
    fn score_tiles(&mut self, tiles: &Tiles, lines: Range<usize>, split: usize) {
        const STEP: usize = RIGHT * LANES;
        let words = self.words::<true>();
        let common = self.seen_by_any(lines.clone(), split);
        for step in common.start / STEP..common.end.div_ceil(STEP) {
            let Scratch { q, keys, scores, ahead, .. } = &mut *self.scratch;
            ahead.ask();
            let q = &q[lines.start * words..][..LANES * words];
            tiles.clear();
            for block in 0..words / LANES {
                let right = std::array::from_fn(|i| {
                    let half = step * RIGHT + i; // of a panel
                    (&raw const keys[half / 2 * words + block * LANES].0[half % 2]).cast()
                });
                // SAFETY: `q` has LANES lines, and each panel as many words as a line.
                #[allow(unsafe_code)]
                unsafe {
                    let left = (&raw const q[block * LANES]).cast();
                    tiles.add_row(left, words * size_of::<u32>(), right, size_of::<Row>());
                }
            }
            let targets = std::array::from_fn(|i| &raw mut scores[step * STEP + i * LANES]);
            // SAFETY: `scores` has LANES rows of SCORES.
            #[allow(unsafe_code)]
            unsafe {
                tiles.store(targets, SCORES * size_of::<f32>());
            }
        }
        for (g, line) in lines.enumerate() {
            let keys = self.seen(line, split);
            let Scratch { scores, weights, new, ahead, .. } = &mut *self.scratch;
            ahead.ask();
            let weights = &mut weights[line * SPLIT / word(true)..][..SPLIT / word(true)];
            if keys.is_empty() {
                weights.fill(0);
            } else {
                new[line] = weights_of::<true>(&mut scores[g * SCORES..][..SCORES], &keys, self.args.scale, weights);
            }
        }
    }

    /// Adds the split to the running results of up to LANES lines.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx2,fma")]
    #[inline(never)]
    fn add_tiles(&mut self, tiles: &Tiles, lines: Range<usize>, split: usize) {
        let dim = self.dim();
        let common = self.seen_by_any(lines.clone(), split);
        let across = dim / LANES;
        for column in (0..across).step_by(RIGHT) {
            // Those behind the last one are the last one again.
            let columns: [_; RIGHT] = std::array::from_fn(|i| (column + i).min(across - 1));
            let Scratch { values, weights, partial, ahead, .. } = &mut *self.scratch;
            tiles.clear();
            for chunk in common.start / CHUNK..common.end.div_ceil(CHUNK) {
                if chunk % 2 == 0 {
                    ahead.ask();
                }
                let right = columns.map(|column| values[chunk * across + column].start());
                let left =
                    &raw const weights[lines.start * SPLIT / word(true)..][..LANES * SPLIT / word(true)][chunk * LANES];
                // SAFETY: there are weights of LANES lines.
                #[allow(unsafe_code)]
                unsafe {
                    tiles.add_row(left.cast(), WEIGHT_BYTES, right, LINE_BYTES);
                }
            }
            let targets = columns.map(|column| &raw mut partial[column * LANES]);
            // SAFETY: `partial` has LANES rows of `dim`.
            #[allow(unsafe_code)]
            unsafe {
                tiles.store(targets, dim * size_of::<f32>());
            }
        }
        for (g, line) in lines.enumerate() {
            if !self.seen(line, split).is_empty() {
                let Scratch { partial, new, state, acc, .. } = &mut *self.scratch;
                let acc = &mut acc[line * dim..][..dim];
                merge::<true>(&mut state[line], acc, new[line], &partial[g * dim..][..dim]);
            }
        }
    }

    /// From the first key of the split that any of the lines sees to the last.
    fn seen_by_any(&self, lines: Range<usize>, split: usize) -> Range<usize> {
        let seen = lines.map(|line| self.seen(line, split)).filter(|keys| !keys.is_empty());
        seen.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0)
    }
}
