//! Tiles with AVX-512: a split is two small matrix products, for one decode row and for a tile of a prefill alike.
//!
//! ```text
//!   scores [lines, keys] = q [lines, dim] x keys [dim, keys]
//!   output [lines, dim] += weights [lines, keys] x values [keys, dim]
//! ```
//!
//! Keys are turned as they are read, so no sum crosses lanes; values are read in place. With AVX-512 BF16, scores of bf16
//! are exact products summed in f32 and weights are rounded to bf16, as the GPU kernels round them; elsewhere all is f32.
//! A sum runs in ascending order wherever its tile begins and ends, and two keys always share the same word. With AMX both
//! products are made of tiles (`tiles`). Called by `attention`.

mod product;
mod tiles;
mod values;
mod words;

use std::cell::RefCell;
use std::ops::Range;

use self::product::{ASK_WORDS, Turned, add_product, round};
use self::values::Values;
use self::words::{PANEL, Row, lanes_of, load, transposed, word};
use super::parts::Results;
use super::plan;
use super::{AHEAD, Attention, find, find_runs, merge, weigh};
use crate::isa::{Isa, Kind};
use crate::lanes::{Ahead, LANES, SCORES, SPLIT, fetch};
use crate::tiles::Tile;
use crate::{Element, KvCache};

/// Most lines that meet a panel together: their sums fill 16 of 32 registers.
const LINES: usize = 8;
/// Buffers of one thread, kept between tasks and calls.
#[derive(Default)]
struct Scratch {
    /// Queries of the tile, [lines, words].
    q: Vec<u32>,
    /// Where the keys of the split that any line sees start; 0 for those before.
    key_offsets: Vec<usize>,
    /// As `key_offsets`.
    value_offsets: Vec<usize>,
    /// The split's keys, [panels of keys, words].
    keys: Vec<Row>,
    /// The split's values where tiles want them turned, [chunks of keys, dim / LANES].
    values: Vec<Tile>,
    /// Scores, then weights, of some lines, [LANES, SCORES].
    scores: Vec<f32>,
    /// Weights of the split, [lines, words of keys].
    weights: Vec<u32>,
    /// (max, sum) of the split per line.
    new: Vec<(f32, f32)>,
    /// Output of the split for some lines, [LANES, dim].
    partial: Vec<f32>,
    /// Running (max, sum) per line.
    state: Vec<(f32, f32)>,
    /// Running output per line, [lines, dim].
    acc: Vec<f32>,
    /// What the next split reads.
    ahead: Ahead,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Whether words are pairs.
fn is_native<E: Element>(isa: Isa) -> bool {
    isa.has_bf16() && E::as_bf16(&[]).is_some()
}

/// Whether it computes every tile of a model with `group` query heads per KV head. One head alone, as f32, is faster where
/// nothing is turned.
pub(super) fn serves<E: Element>(isa: Isa, group: usize) -> bool {
    is_native::<E>(isa) || matches!(isa.0, Kind::Avx512 | Kind::Avx512Bf16 | Kind::Amx) && group > 1
}

/// As `attention::compute_tile`, where `serves` says so.
pub(super) fn compute_tile<E: Element>(
    isa: Isa,
    args: &Attention<'_, E>,
    tile: &plan::Tile,
    kv_head: usize,
    results: &mut Results<'_, '_, E>,
) {
    assert!(matches!(isa.0, Kind::Avx512 | Kind::Avx512Bf16 | Kind::Amx));
    SCRATCH.with_borrow_mut(|scratch| {
        let walk = Walk { args, tile, kv_head, scratch };
        // SAFETY: an `Isa` is made only after its instructions were detected (`Isa::available`), and this is one of two.
        #[allow(unsafe_code)]
        unsafe {
            match is_native::<E>(isa) {
                true if isa.0 == Kind::Amx => walk.run_tiles(results),
                true => walk.run::<true>(results),
                false => walk.run::<false>(results),
            }
        }
    });
}

/// `$self.$name::<G, P, NATIVE>(...)` for G = `$lines`: few lines meet two panels at once, or too few sums would be under
/// way.
macro_rules! by_lines {
    ($lines:expr, $self:ident . $name:ident $arguments:tt) => {
        match $lines {
            1 => $self.$name::<1, 2, NATIVE> $arguments,
            2 => $self.$name::<2, 2, NATIVE> $arguments,
            3 => $self.$name::<3, 2, NATIVE> $arguments,
            4 => $self.$name::<4, 2, NATIVE> $arguments,
            5 => $self.$name::<5, 1, NATIVE> $arguments,
            6 => $self.$name::<6, 1, NATIVE> $arguments,
            7 => $self.$name::<7, 1, NATIVE> $arguments,
            _ => $self.$name::<LINES, 1, NATIVE> $arguments,
        }
    };
}

/// A tile's way over its splits.
struct Walk<'a, 'e, E> {
    args: &'a Attention<'e, E>,
    tile: &'a plan::Tile,
    kv_head: usize,
    scratch: &'a mut Scratch,
}

impl<'a, E: Element> Walk<'a, '_, E> {
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx2,fma")]
    fn run<const NATIVE: bool>(mut self, results: &mut Results<'_, '_, E>) {
        self.start::<NATIVE>(results);
        let lines = self.lines();
        let panels = SPLIT / PANEL + self.dim() / PANEL * (SPLIT / word(NATIVE) / ASK_WORDS);
        for split in self.splits() {
            self.begin_split::<NATIVE>(split, lines.div_ceil(LINES) * panels);
            for first in (0..lines).step_by(LINES) {
                by_lines!(lines - first, self.score_lines(first, split));
            }
            for first in (0..lines).step_by(LINES) {
                by_lines!(lines - first, self.add_lines(first, split));
            }
        }
        self.write(results);
    }

    /// The block table of the tile's keys.
    fn table(&self) -> &'a [i32] {
        self.args.block_table.row(self.args.seq_row[self.tile.sequence] as usize)
    }

    /// Where the splits of the tile start.
    fn splits(&self) -> impl Iterator<Item = usize> + use<E> {
        (self.tile.keys.start / SPLIT * SPLIT..self.tile.keys.end).step_by(SPLIT)
    }

    /// Finds the keys and values of a split and turns the keys; returns which of the split's there are. What is read after
    /// them is asked for meanwhile, and so many `times` later on.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx2,fma")]
    fn begin_split<const NATIVE: bool>(&mut self, split: usize, times: usize) -> Range<usize> {
        let is_first = split <= self.tile.keys.start;
        let squares = SPLIT / LANES * (self.words::<NATIVE>() / LANES);
        let keys = self.find_keys(split);
        self.look_ahead(split, is_first, squares + times);
        self.turn_keys::<NATIVE>(keys.clone(), is_first);
        keys
    }

    /// Finds the keys and values of a split; returns which of the split's there are.
    fn find_keys(&mut self, split: usize) -> Range<usize> {
        let (args, tile) = (self.args, self.tile);
        let keys = split.max(tile.keys.start)..tile.keys.end.min(split + SPLIT);
        let table = self.table();
        for (layout, offsets) in [
            (&args.k_cache.layout, &mut self.scratch.key_offsets),
            (&args.v_cache.layout, &mut self.scratch.value_offsets),
        ] {
            offsets.clear();
            offsets.resize(keys.start - split, 0);
            find(layout, table, keys.clone(), self.kv_head, offsets);
        }
        keys.start - split..keys.end - split
    }

    /// Notes what is read after the keys of the split at `split`: its values, if it is the first one, and the next split;
    /// all of it is asked for in so many `times`.
    fn look_ahead(&mut self, split: usize, first: bool, times: usize) {
        let (args, keys, table) = (self.args, self.tile.keys.clone(), self.table());
        let ahead = &mut self.scratch.ahead;
        ahead.clear();
        let mut ask = |cache: &KvCache<'_, E>, start: usize| {
            let (layout, step) = (&cache.layout, cache.layout.offset(0, 1, 0));
            let range = start.max(keys.start)..keys.end.min(split + 2 * SPLIT);
            find_runs(layout, table, range, self.kv_head, |first, run| {
                if step == layout.dim {
                    ahead.push(&cache.values[first..][..run * step]);
                } else {
                    (0..run).for_each(|i| ahead.push(&cache.values[first + i * step..][..layout.dim]));
                }
            });
        };
        ask(&args.v_cache, if first { split } else { split + SPLIT });
        ask(&args.k_cache, split + SPLIT);
        ahead.within(times);
    }

    fn write(self, results: &mut Results<'_, '_, E>) {
        let (group, dim) = (self.group(), self.dim());
        for line in 0..self.lines() {
            let place = (self.tile.rows.at(line / group), self.kv_head * group + line % group);
            results.write(line, place, self.scratch.state[line], &self.scratch.acc[line * dim..][..dim]);
        }
    }

    fn group(&self) -> usize {
        self.args.q.heads / self.args.k_cache.layout.kv_heads
    }

    fn lines(&self) -> usize {
        self.tile.rows.len() * self.group()
    }

    /// The head dimension in whole panels.
    fn dim(&self) -> usize {
        self.args.q.dim.next_multiple_of(PANEL)
    }

    /// Words of a query, a multiple of LANES.
    fn words<const NATIVE: bool>(&self) -> usize {
        self.args.q.dim.div_ceil(word(NATIVE)).next_multiple_of(LANES)
    }

    /// The keys of the split that `line` sees.
    fn seen(&self, line: usize, split: usize) -> Range<usize> {
        let keys = self.args.visible(self.tile.sequence, self.tile.rows.at(line / self.group()));
        keys.start.clamp(split, split + SPLIT) - split..keys.end.clamp(split, split + SPLIT) - split
    }

    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx2,fma")]
    fn start<const NATIVE: bool>(&mut self, results: &Results<'_, '_, E>) {
        let (lines, group, dim, words) = (self.lines(), self.group(), self.dim(), self.words::<NATIVE>());
        let scratch = &mut *self.scratch;
        // Tiles take LANES lines from any one on; nobody looks at what comes out for those that do not exist.
        let padded = lines + LANES;
        scratch.q.resize(padded * words, 0);
        for (line, target) in scratch.q.chunks_exact_mut(words).enumerate().take(lines) {
            let q = self.args.q.head(self.tile.rows.at(line / group), self.kv_head * group + line % group);
            for (block, target) in target.as_chunks_mut().0.iter_mut().enumerate() {
                *target = lanes_of(load::<E, NATIVE>(q, 0, q.len(), block));
            }
        }
        scratch.keys.resize(SPLIT / PANEL * words, Row::default());
        scratch.scores.resize(LANES * SCORES, 0.0);
        scratch.weights.resize(padded * SPLIT / word(NATIVE), 0);
        scratch.new.resize(lines, (0.0, 0.0));
        scratch.partial.resize(LANES * dim, 0.0);
        scratch.state.clear();
        scratch.state.resize(lines, (f32::NEG_INFINITY, 0.0));
        scratch.acc.clear();
        scratch.acc.resize(lines * dim, 0.0);
        for line in 0..lines {
            let acc = &mut scratch.acc[line * dim..][..dim];
            results.resume(self.tile.begun, line, self.kv_head, &mut scratch.state[line], acc);
        }
    }

    /// Panels of the split's keys; lanes without a key are anything. Asks for those that come soon, if nobody has.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx2,fma")]
    #[inline(never)]
    fn turn_keys<const NATIVE: bool>(&mut self, keys: Range<usize>, asks: bool) {
        let (dim, words) = (self.args.q.dim, self.words::<NATIVE>());
        let cache = self.args.k_cache.values;
        let Scratch { key_offsets, keys: panels, ahead, .. } = &mut *self.scratch;
        for first in (keys.start / LANES * LANES..keys.end).step_by(LANES) {
            if asks {
                let ahead = key_offsets.get(first + AHEAD..).unwrap_or(&[]);
                ahead.iter().take(LANES).for_each(|&offset| fetch(cache, offset, dim));
            }
            let (panel, half) = (&mut panels[first / PANEL * words..][..words], first / LANES % 2);
            // The nearest key stands for those that are not there.
            let offsets: [usize; LANES] =
                std::array::from_fn(|i| key_offsets[(first + i).clamp(keys.start, keys.end - 1)]);
            for (block, rows) in panel.chunks_exact_mut(LANES).enumerate() {
                ahead.ask();
                let square = transposed(offsets.map(|offset| load::<E, NATIVE>(cache, offset, dim, block)));
                for i in 0..LANES {
                    rows[i].0[half] = lanes_of(square[i]);
                }
            }
        }
    }

    /// Weights of `G` lines in the split.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx2,fma")]
    #[inline(never)]
    fn score_lines<const G: usize, const P: usize, const NATIVE: bool>(&mut self, first: usize, split: usize) {
        let words = self.words::<NATIVE>();
        let seen: [Range<usize>; G] = std::array::from_fn(|g| self.seen(first + g, split));
        let Scratch { q, keys, scores, weights, new, ahead, .. } = &mut *self.scratch;
        let seeing = || seen.iter().filter(|keys| !keys.is_empty());
        let start = seeing().map(|keys| keys.start / PANEL).min().unwrap_or(0);
        let end = seeing().map(|keys| keys.end.div_ceil(PANEL)).max().unwrap_or(0);
        let q = std::array::from_fn(|g| &q[(first + g) * words..][..words]);
        for scores in scores.chunks_exact_mut(SCORES).take(G) {
            scores[start * PANEL..end * PANEL].fill(0.0);
        }
        let mut right = Turned { rows: keys, words, ahead };
        add_product::<G, P, NATIVE>(q, &mut right, start..end, (scores.as_chunks_mut().0, SCORES / LANES));
        for (g, keys) in seen.iter().enumerate().filter(|(_, keys)| !keys.is_empty()) {
            let scores = &mut scores[g * SCORES..][..SCORES];
            let len = SPLIT / word(NATIVE);
            new[first + g] =
                weights_of::<NATIVE>(scores, keys, self.args.scale, &mut weights[(first + g) * len..][..len]);
        }
    }

    /// Adds the split to the running results of `G` lines.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx2,fma")]
    #[inline(never)]
    fn add_lines<const G: usize, const P: usize, const NATIVE: bool>(&mut self, first: usize, split: usize) {
        let (dim, len) = (self.dim(), SPLIT / word(NATIVE));
        let seen: [Range<usize>; G] = std::array::from_fn(|g| self.seen(first + g, split));
        let Scratch { value_offsets, weights, partial, new, state, acc, ahead, .. } = &mut *self.scratch;
        let values = Values { cache: self.args.v_cache.values, dim: self.args.q.dim, offsets: value_offsets };
        let weights: [&[u32]; G] = std::array::from_fn(|g| &weights[(first + g) * len..][..len]);
        let partial = partial.as_chunks_mut().0;
        let partial = &mut partial[..G * dim / LANES];
        partial.fill([0.0; LANES]);
        if seen.iter().all(|keys| *keys == seen[0]) {
            values.add::<G, P, NATIVE>(weights, seen[0].clone(), ahead, partial);
        } else {
            // What all see, in whole words; the rest of every line before and after it.
            let start = seen.iter().map(|keys| keys.start).max().unwrap_or(0).next_multiple_of(word(NATIVE));
            let end = seen.iter().map(|keys| keys.end).min().unwrap_or(0) / word(NATIVE) * word(NATIVE);
            let common = start..end.max(start);
            for (g, keys) in seen.iter().enumerate() {
                let partial = &mut partial[g * dim / LANES..][..dim / LANES];
                values.add::<1, 2, NATIVE>([weights[g]], keys.start..keys.end.min(common.start), ahead, partial);
            }
            values.add::<G, P, NATIVE>(weights, common.clone(), ahead, partial);
            for (g, keys) in seen.iter().enumerate() {
                let partial = &mut partial[g * dim / LANES..][..dim / LANES];
                values.add::<1, 2, NATIVE>([weights[g]], keys.start.max(common.end)..keys.end, ahead, partial);
            }
        }
        let partial = partial.as_flattened();
        for (g, _) in seen.iter().enumerate().filter(|(_, keys)| !keys.is_empty()) {
            let line = first + g;
            merge::<true>(&mut state[line], &mut acc[line * dim..][..dim], new[line], &partial[g * dim..][..dim]);
        }
    }
}

/// Turns the scores of `keys` into `weights`, those of other keys 0; returns (max, sum).
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx2,fma")]
#[inline]
fn weights_of<const NATIVE: bool>(
    scores: &mut [f32],
    keys: &Range<usize>,
    scale: f32,
    weights: &mut [u32],
) -> (f32, f32) {
    scores[keys.clone()].iter_mut().for_each(|score| *score *= scale);
    let new = weigh::<true>(scores, keys);
    scores[..keys.start].fill(0.0);
    scores[keys.end..].fill(0.0);
    if NATIVE {
        // SAFETY: `compute_tile` sets NATIVE only where the machine has AVX-512 BF16.
        #[allow(unsafe_code)]
        unsafe {
            round(scores, weights);
        }
    } else {
        weights.iter_mut().zip(&*scores).for_each(|(weight, score)| *weight = score.to_bits());
    }
    new
}
