//! `attention`: rows of queries over a paged KV cache; prefill, chunked prefill, blend and decode alike.
//!
//! Twin of `kernels/attention`. Keys are read where they lie, block by block; nothing is gathered per sequence. Every row
//! walks fixed splits of 256 keys with an online softmax and merges them in ascending order:
//!
//! ```text
//!   keys      0 ......... 255 | 256 ....... 511 | 512 .. last_key
//!   row m     (m0, l0, o0)    + (m1, l1, o1)    + (m2, l2, o2)   -> o / l, lse = m + ln l
//! ```
//!
//! so a row's result depends on its query and its visible keys alone. Tasks are (row tile, KV head), or one split of a row
//! that would keep others waiting (`plan`), whose results are merged at the end (`parts`). Rows of a prefix group walk the
//! splits that they share as one tile first (`groups`). A line is one head of one row. With AVX-512 (`wide` says when), a
//! tile is two matrix products per split with instructions of its own; elsewhere it is the same two in plain Rust (`lines`).

mod groups;
mod lines;
mod parts;
mod plan;
#[cfg(target_arch = "x86_64")]
mod wide;

use std::cell::RefCell;
use std::ops::Range;

pub use self::groups::PrefixGroups;
pub(crate) use self::lines::score;
use self::parts::{Parts, Results};
use self::plan::Tile;
use crate::isa::by_isa;
use crate::lanes::{self, Ahead, Column, LANES, SCORES, SPLIT, fetch, widen};
use crate::view::CacheLayout;
use crate::{BlockTable, Element, Error, Exec, KvCache, Rows, RowsMut};

/// Keys between the one that is read and the one that is fetched meanwhile: blocks lie anywhere.
const AHEAD: usize = 32;

/// Groups of lines that compute less than it takes to read their keys and values.
const MEMORY_BOUND: usize = 4;

/// Arguments of `attention`. T rows, H query heads, KH KV heads, S sequences.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a, E> {
    /// [T, H, D].
    pub q: Rows<'a, E>,
    /// [B, block_size, KH, D].
    pub k_cache: KvCache<'a, E>,
    /// [B, block_size, KH, D].
    pub v_cache: KvCache<'a, E>,
    /// [R, blocks].
    pub block_table: BlockTable<'a>,
    /// [S + 1]: rows of sequence s are `query_start[s]..query_start[s + 1]`.
    pub query_start: &'a [i32],
    /// [S]: keys at or past it are invisible.
    pub context_len: &'a [i32],
    /// [S]: the sequence's row in the block table.
    pub seq_row: &'a [i32],
    /// [T]: the largest visible key; negative = none.
    pub last_key: &'a [i32],
    /// Factor on q . k.
    pub scale: f32,
    /// Visible keys up to and with `last_key`; 0 = all.
    pub window: usize,
    /// Which sequences share their first keys; a matter of speed alone, and unused with a window.
    pub groups: Option<PrefixGroups<'a>>,
}

/// Writes `out` [T, H, D] and `lse` [T, H, 1] (natural log of the sum of exponentials) for the rows of every sequence.
///
/// Other rows stay untouched; a row that sees no key gets 0 and -infinity. Cost 2 * H * D multiply-adds per visible key
/// and row. Errors before anything is written when shapes disagree, a visible key lies outside the pool, or sequences of a
/// group do not share what it says.
pub fn attention<E: Element>(
    exec: &Exec,
    args: &Attention<'_, E>,
    out: &mut RowsMut<'_, E>,
    lse: &mut RowsMut<'_, f32>,
) -> Result<(), Error> {
    let mut tiles = args.plan(out, lse)?;
    let shared = groups::take_prefixes(args, &mut tiles)?;
    let (out, lse) = (&*out, &*lse);
    let begun = run(exec, args, &shared, &Parts::default(), out, lse);
    let (tiles, cuts) = plan::cut(tiles, args.k_cache.layout.kv_heads, exec.threads.count());
    let parts = run(exec, args, &tiles, &begun, out, lse);
    for cut in &cuts {
        parts.merge(exec.isa, args, cut, &mut Results { out, lse, part: None, begun: &begun });
    }
    Ok(())
}

/// Computes every tile for every KV head; returns the parts that tiles have.
fn run<E: Element>(
    exec: &Exec,
    args: &Attention<'_, E>,
    tiles: &[Tile],
    begun: &Parts,
    out: &RowsMut<'_, E>,
    lse: &RowsMut<'_, f32>,
) -> Parts {
    let kv_heads = args.k_cache.layout.kv_heads;
    let work = tiles.iter().map(Tile::cost).sum::<usize>() * args.q.heads * args.q.dim * 2;
    let mut parts = Parts::new(args, tiles);
    let shares = parts.share();
    exec.threads.run(tiles.len() * kv_heads, work, |task| {
        let (tile, kv_head) = (&tiles[task / kv_heads], task % kv_heads);
        let mut part = tile.part.map(|part| shares[part * kv_heads + kv_head].lock().expect("a part has one task"));
        let mut results = Results { out, lse, part: part.as_mut().map(|part| &mut ***part), begun };
        #[cfg(target_arch = "x86_64")]
        if wide::serves::<E>(exec.isa, args.q.heads / kv_heads) {
            return wide::compute_tile(exec.isa, args, tile, kv_head, &mut results);
        }
        SCRATCH.with_borrow_mut(|scratch| compute_tile(exec.isa, args, tile, kv_head, scratch, &mut results));
    });
    drop(shares);
    parts
}

/// Errors unless every KV head serves the same number of query heads.
pub(crate) fn check_groups(heads: usize, kv_heads: usize) -> Result<(), Error> {
    if heads == 0 || !heads.is_multiple_of(kv_heads) { Err(Error::HeadGroups { heads, kv_heads }) } else { Ok(()) }
}

/// Buffers of one thread, kept between tasks and calls.
#[derive(Default)]
struct Scratch {
    /// Queries of the tile, [rows, group, dim], f32.
    q: Vec<f32>,
    /// Running (max, sum) per line.
    state: Vec<(f32, f32)>,
    /// Running output per line, [rows, group, dim].
    acc: Vec<f32>,
    /// Output of one split for some lines, [lines, dim].
    partial: Vec<f32>,
    /// Scores, then weights, of one split for some lines, [lines, SCORES].
    scores: Vec<f32>,
    keys: Side,
    values: Side,
    /// The next split's keys and values.
    ahead: Ahead,
}

/// Keys of one split in a sequence's cache.
#[derive(Clone, Copy)]
pub(crate) struct Split<'a, 'e, E> {
    pub(crate) cache: &'a KvCache<'e, E>,
    /// The sequence's row.
    pub(crate) table: &'a [i32],
    pub(crate) kv_head: usize,
    pub(crate) start: usize,
    pub(crate) end: usize,
    /// Keys up to here will be read next.
    pub(crate) limit: usize,
}

/// The keys (or values) of the current split, as f32 in the order in which products read them.
#[derive(Default)]
pub(crate) struct Side {
    /// Start of each key's vector in the cache, and of those behind the split.
    offsets: Vec<usize>,
    /// Some vectors as f32, [LANES, dim].
    rows: Vec<f32>,
    pub(crate) columns: Vec<Column>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Calls `put` with where the vectors of the keys `range` start, block by block: the first one's place, how many there are.
#[inline(always)]
fn find_runs(
    layout: &CacheLayout,
    table: &[i32],
    range: Range<usize>,
    kv_head: usize,
    mut put: impl FnMut(usize, usize),
) {
    let mut key = range.start;
    while key < range.end {
        let (block, slot) = (key / layout.block_size, key % layout.block_size);
        let run = (layout.block_size - slot).min(range.end - key);
        let block = table[block] as usize; // checked by `BlockTable::check_keys`
        put(layout.offset(block, slot, kv_head), run);
        key += run;
    }
}

/// Appends where the vectors of the keys `range` start.
#[inline(always)]
fn find(layout: &CacheLayout, table: &[i32], range: Range<usize>, kv_head: usize, offsets: &mut Vec<usize>) {
    let step = layout.offset(0, 1, 0);
    find_runs(layout, table, range, kv_head, |first, run| offsets.extend((0..run).map(|i| first + i * step)));
}

impl Side {
    /// Loads the keys of `split` as columns [chunks of LANES keys, dim], one dimension of LANES keys each; the last key
    /// stands for those that fill its chunk.
    #[inline(always)]
    pub(crate) fn turn<E: Element, const FUSED: bool>(&mut self, split: &Split<'_, '_, E>) {
        let (cache, dim) = (split.cache, self.find(split));
        let last = split.end - split.start - 1;
        let Side { offsets, rows, columns } = self;
        rows.resize(LANES * dim, 0.0);
        let in_place = E::as_f32(cache.values).filter(|_| cache.layout.dim == dim);
        for (chunk, columns) in columns.chunks_exact_mut(dim).enumerate().take(last / LANES + 1) {
            let ahead = offsets.iter().skip(chunk * LANES + AHEAD).take(LANES);
            ahead.for_each(|&offset| fetch(cache.values, offset, cache.layout.dim));
            let offsets: [usize; LANES] = std::array::from_fn(|i| offsets[last.min(chunk * LANES + i)]);
            if let Some(values) = in_place {
                lanes::turn::<FUSED>(offsets.map(|offset| &values[offset..][..dim]), columns);
            } else {
                for (row, offset) in rows.chunks_exact_mut(dim).zip(offsets) {
                    widen(&cache.values[offset..][..cache.layout.dim], row);
                }
                lanes::turn::<FUSED>(std::array::from_fn(|i| &rows[i * dim..][..dim]), columns);
            }
        }
    }

    /// As `turn`, but columns [dim / LANES, SPLIT], LANES dimensions of one value each.
    #[inline(always)]
    fn spread<E: Element>(&mut self, split: &Split<'_, '_, E>) {
        let (cache, dim) = (split.cache, self.find(split));
        let Side { offsets, columns, .. } = self;
        for key in 0..split.end - split.start {
            if let Some(&ahead) = offsets.get(key + AHEAD) {
                fetch(cache.values, ahead, cache.layout.dim);
            }
            let value = &cache.values[offsets[key]..][..cache.layout.dim];
            let (whole, rest) = value.as_chunks::<LANES>();
            for (panel, lanes) in whole.iter().enumerate() {
                columns[panel * SPLIT + key].0 = lanes.map(E::to_f32);
            }
            if !rest.is_empty() {
                widen(rest, &mut columns[(dim / LANES - 1) * SPLIT + key].0);
            }
        }
    }

    /// Notes the vectors behind `split`, which was loaded.
    #[inline(always)]
    fn ask<E: Element>(&self, split: &Split<'_, '_, E>, ahead: &mut Ahead) {
        for &offset in &self.offsets[split.end - split.start..] {
            ahead.push(&split.cache.values[offset..][..split.cache.layout.dim]);
        }
    }

    /// Finds the vectors of a split and of as many keys behind it; returns the padded dim.
    #[inline(always)]
    fn find<E: Element>(&mut self, split: &Split<'_, '_, E>) -> usize {
        let layout = &split.cache.layout;
        let dim = layout.dim.next_multiple_of(LANES);
        self.offsets.clear();
        let keys = split.start..split.limit.min(split.end + SPLIT);
        find(layout, split.table, keys, split.kv_head, &mut self.offsets);
        self.columns.resize(SPLIT * dim / LANES, Column::default());
        dim
    }
}

by_isa!(compute_tile<E> = tile_body(
    args: &Attention<'_, E>,
    tile: &Tile,
    kv_head: usize,
    scratch: &mut Scratch,
    results: &mut Results<'_, '_, E>,
));

#[inline(always)]
fn tile_body<E: Element, const FUSED: bool>(
    args: &Attention<'_, E>,
    tile: &Tile,
    kv_head: usize,
    scratch: &mut Scratch,
    results: &mut Results<'_, '_, E>,
) {
    let group = args.q.heads / args.k_cache.layout.kv_heads;
    let dim = args.q.dim.next_multiple_of(LANES);
    let lines = tile.rows.len() * group;
    scratch.start(lines, dim);
    for line in 0..lines {
        let place = (tile.rows.at(line / group), kv_head * group + line % group);
        widen(args.q.head(place.0, place.1), &mut scratch.q[line * dim..][..dim]);
        results.resume(tile.begun, line, kv_head, &mut scratch.state[line], &mut scratch.acc[line * dim..][..dim]);
    }
    let table = args.block_table.row(args.seq_row[tile.sequence] as usize);
    // As many groups as there must be, as even as they can be.
    let groups = lines.div_ceil(lines::LINES);
    let asks_ahead = groups <= MEMORY_BOUND;
    let mut ahead = std::mem::take(&mut scratch.ahead);
    let mut split = tile.keys.start / SPLIT * SPLIT;
    while split < tile.keys.end {
        let range = split.max(tile.keys.start)..tile.keys.end.min(split + SPLIT);
        let (start, end, limit) = (range.start, range.end, tile.keys.end);
        let here = |cache| Split { cache, table, kv_head, start, end, limit };
        let (keys, values) = (here(&args.k_cache), here(&args.v_cache));
        scratch.keys.turn::<E, FUSED>(&keys);
        scratch.values.spread(&values);
        if asks_ahead {
            ahead.clear();
            scratch.keys.ask(&keys, &mut ahead);
            scratch.values.ask(&values, &mut ahead);
            ahead.within(groups * 2 * dim * (end - start).div_ceil(LANES) / lanes::PACE);
        }
        let seen = |line: usize| {
            let visible = args.visible(tile.sequence, tile.rows.at(line / group));
            let keys = visible.start.max(range.start)..visible.end.min(range.end);
            keys.start.saturating_sub(range.start)..keys.end.saturating_sub(range.start)
        };
        for i in 0..groups {
            let mut some: [lines::Seen; lines::LINES] = Default::default();
            let mut count = 0;
            for line in lines * i / groups..lines * (i + 1) / groups {
                let keys = seen(line);
                if !keys.is_empty() {
                    some[count] = (line, keys);
                    count += 1;
                }
            }
            if asks_ahead {
                lines::add_split::<E, _, FUSED>(args, scratch, &some[..count], &mut ahead);
            } else {
                lines::add_split::<E, _, FUSED>(args, scratch, &some[..count], &mut ());
            }
        }
        split += SPLIT;
    }
    scratch.ahead = ahead;
    for line in 0..lines {
        let place = (tile.rows.at(line / group), kv_head * group + line % group);
        results.write(line, place, scratch.state[line], &scratch.acc[line * dim..][..dim]);
    }
}

impl Scratch {
    fn start(&mut self, lines: usize, dim: usize) {
        self.q.resize(lines * dim, 0.0);
        self.acc.clear();
        self.acc.resize(lines * dim, 0.0);
        self.state.clear();
        self.state.resize(lines, (f32::NEG_INFINITY, 0.0));
        self.partial.resize(lines::LINES * dim, 0.0);
        self.scores.resize(lines::LINES * SCORES, 0.0);
    }
}

/// Adds a split's output `partial`, with its (max, sum), to a running one.
#[inline(always)]
fn merge<const FUSED: bool>(state: &mut (f32, f32), acc: &mut [f32], new: (f32, f32), partial: &[f32]) {
    let ((max, total), (new_max, new_sum)) = (*state, new);
    let merged = if new_max > max { new_max } else { max };
    let (keep, add) = (lanes::exp::<FUSED>(max - merged), lanes::exp::<FUSED>(new_max - merged));
    *state = (merged, total * keep + new_sum * add);
    lanes::blend::<FUSED>(acc, keep, partial, add);
}

/// Turns the scores of the keys `keys` in a line's score buffer into weights; (max, sum).
#[inline(always)]
fn weigh<const FUSED: bool>(scores: &mut [f32], keys: &Range<usize>) -> (f32, f32) {
    let padded = keys.start..keys.start + keys.len().next_multiple_of(LANES);
    scores[keys.end..padded.end].fill(f32::NEG_INFINITY);
    lanes::softmax::<FUSED>(&mut scores[padded])
}
