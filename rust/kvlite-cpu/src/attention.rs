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
//! tile is two matrix products per split. Elsewhere few lines read keys as they lie (`heads`), and tiles of many turn each
//! split's keys once and score them for several lines together (`columns`).

mod columns;
mod groups;
mod heads;
mod parts;
mod plan;
#[cfg(target_arch = "x86_64")]
mod wide;

use std::cell::RefCell;
use std::ops::Range;

pub use self::groups::PrefixGroups;
use self::parts::{Parts, Results};
use self::plan::Tile;
use crate::isa::by_isa;
use crate::lanes::{self, LANES, SCORES, SPLIT, widen};
use crate::view::CacheLayout;
use crate::{BlockTable, Element, Error, Exec, KvCache, Rows, RowsMut};

/// With more (row, head) lines than this a tile copies each split to a contiguous f32 tile first: blocks of a pool lie a
/// power of two apart and would evict each other from the caches between lines.
const PACK_LINES: usize = 4;
/// From so many lines on, turning the keys of a split costs less than it saves.
const COLUMN_LINES: usize = 24;

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
    /// Running (max, sum) per line, then (max, sum) of the current partial results.
    state: Vec<(f32, f32)>,
    /// Running output per line, [rows, group, dim].
    acc: Vec<f32>,
    /// Output of one split for some lines, [lines, dim].
    partial: Vec<f32>,
    /// Scores, then weights, of one split for some lines, [lines, SCORES].
    scores: Vec<f32>,
    keys: Side,
    values: Side,
}

/// Where the K (or V) vectors of the current split lie.
#[derive(Default)]
pub(crate) struct Side {
    /// Start of each key's vector, in the cache or in `packed`.
    pub(crate) offsets: Vec<usize>,
    /// The split as contiguous f32 rows of the padded dim; unused when the cache is read in place.
    packed: Vec<f32>,
    is_packed: bool,
    /// The split as columns (`lanes::turn`), where it was turned.
    pub(crate) columns: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Appends where the vectors of the keys `range` start.
#[inline(always)]
fn find(layout: &CacheLayout, table: &[i32], range: Range<usize>, kv_head: usize, offsets: &mut Vec<usize>) {
    let step = layout.offset(0, 1, 0);
    let mut key = range.start;
    while key < range.end {
        let (block, slot) = (key / layout.block_size, key % layout.block_size);
        let run = (layout.block_size - slot).min(range.end - key);
        let block = table[block] as usize; // checked by `BlockTable::check_keys`
        let first = layout.offset(block, slot, kv_head);
        offsets.extend((0..run).map(|i| first + i * step));
        key += run;
    }
}

impl Side {
    /// Finds the keys `range` of one split (offsets count from `range.start`) and packs them when `pack` or when they
    /// cannot be read in place (other format, dim not whole chunks).
    #[inline(always)]
    pub(crate) fn load<E: Element>(
        &mut self,
        cache: &KvCache<'_, E>,
        table: &[i32],
        range: Range<usize>,
        kv_head: usize,
        pack: bool,
    ) {
        let layout: &CacheLayout = &cache.layout;
        self.offsets.clear();
        find(layout, table, range, kv_head, &mut self.offsets);
        self.is_packed = pack || E::as_f32(cache.values).is_none() || !layout.dim.is_multiple_of(LANES);
        if self.is_packed {
            let dim = layout.dim.next_multiple_of(LANES);
            self.packed.resize(SPLIT * dim, 0.0);
            for (offset, target) in self.offsets.iter_mut().zip(self.packed.chunks_exact_mut(dim)) {
                widen(&cache.values[*offset..*offset + layout.dim], target);
            }
            for (i, offset) in self.offsets.iter_mut().enumerate() {
                *offset = i * dim;
            }
        }
    }

    /// Turns the split that was loaded and packed.
    #[inline(always)]
    pub(crate) fn turn(&mut self, dim: usize) {
        let keys = self.offsets.len();
        self.columns.resize(SPLIT * dim, 0.0);
        lanes::turn(self.packed[..keys * dim].chunks_exact(dim), dim, &mut self.columns);
    }

    /// The memory that `offsets` count in.
    #[inline(always)]
    pub(crate) fn memory<'a, E: Element>(&'a self, cache: &KvCache<'a, E>) -> &'a [f32] {
        if self.is_packed { &self.packed } else { E::as_f32(cache.values).expect("other formats are packed") }
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
    scratch.start(lines, group, dim);
    for line in 0..lines {
        let place = (tile.rows.at(line / group), kv_head * group + line % group);
        widen(args.q.head(place.0, place.1), &mut scratch.q[line * dim..][..dim]);
        results.resume(tile.begun, line, kv_head, &mut scratch.state[line], &mut scratch.acc[line * dim..][..dim]);
    }
    let turns = lines >= COLUMN_LINES;
    if turns {
        scratch.turn_queries(dim);
    }
    let table = args.block_table.row(args.seq_row[tile.sequence] as usize);
    let mut split = tile.keys.start / SPLIT * SPLIT;
    while split < tile.keys.end {
        let range = split.max(tile.keys.start)..tile.keys.end.min(split + SPLIT);
        let pack = lines > PACK_LINES;
        scratch.keys.load(&args.k_cache, table, range.clone(), kv_head, pack);
        scratch.values.load(&args.v_cache, table, range.clone(), kv_head, pack);
        let seen = |row: usize| {
            let visible = args.visible(tile.sequence, row);
            let keys = visible.start.max(range.start)..visible.end.min(range.end);
            keys.start.saturating_sub(range.start)..keys.end.saturating_sub(range.start)
        };
        if turns {
            scratch.keys.turn(dim);
            let lines = (0..lines).map(|line| (line, seen(tile.rows.at(line / group))));
            columns::tile_split::<E, FUSED>(args, scratch, lines);
        } else {
            for i in 0..tile.rows.len() {
                let keys = seen(tile.rows.at(i));
                if !keys.is_empty() {
                    heads::row_split::<E, FUSED>(args, scratch, i * group..(i + 1) * group, keys);
                }
            }
        }
        split += SPLIT;
    }
    for line in 0..lines {
        let place = (tile.rows.at(line / group), kv_head * group + line % group);
        results.write(line, place, scratch.state[line], &scratch.acc[line * dim..][..dim]);
    }
}

impl Scratch {
    fn start(&mut self, lines: usize, group: usize, dim: usize) {
        self.q.resize(lines * dim, 0.0);
        self.acc.clear();
        self.acc.resize(lines * dim, 0.0);
        self.state.clear();
        self.state.resize(lines, (f32::NEG_INFINITY, 0.0));
        self.partial.resize(group.max(columns::LINES) * dim, 0.0);
        self.scores.resize(group.max(columns::LINES) * SCORES, 0.0);
    }

    /// Puts the dimensions of every query into the order of turned keys.
    #[inline(always)]
    fn turn_queries(&mut self, dim: usize) {
        let mut turned = vec![0.0; dim];
        for q in self.q.chunks_exact_mut(dim) {
            for (at, value) in turned.iter_mut().enumerate() {
                *value = q[lanes::turned(at, dim)];
            }
            q.copy_from_slice(&turned);
        }
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
