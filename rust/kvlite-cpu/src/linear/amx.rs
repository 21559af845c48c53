//! Products of bf16 with AMX: 16 weight rows meet 16 rows of x in one instruction, for every number of rows of x.
//!
//! The weights are taken as they lie: a tile is 64 bytes of 16 rows. x is turned once per call, so that a tile holds 16 pairs
//! of K of 16 rows. A sum goes on from chunk to chunk of K, whatever the other rows are: bits of a row depend on that row
//! alone. A block of weight rows comes from memory once, and from the second-level cache for every further row of x:
//!
//! ```text
//!   x, once per call         [16 rows][chunk of K][16 pairs][16 rows]
//!   a block of weight rows   4 tiles, in the second-level cache:  4 x 1 (16 rows of x or fewer) or twice 2 x 2 tiles of sums
//! ```
//!
//! Called by `linear`.

use std::cell::RefCell;
use std::ops::Range;

use super::many::{Pairs, transpose, turn, write_turned};
use super::native::padded;
use super::{DOT, LINE_BYTES, Linear, PIECES};
use crate::lanes::LANES;
use crate::tiles::{Tile, Tiles};
use crate::{Element, Exec, RowsMut, bf16};

/// Weight rows that meet all of x, in tiles.
const BLOCK: usize = 4;
/// Bytes of x that are packed at once: they stay in a second-level cache of 2 MiB.
const PACKED_BYTES: usize = 1280 << 10;

thread_local! {
    /// The caller's rows of x.
    static PACKED: RefCell<Vec<Tile>> = const { RefCell::new(Vec::new()) };
}

/// 16 weight rows: where they lie, the bytes from row to row, and the chunk of K that is no whole one, zeros behind it.
struct Weights {
    start: *const u8,
    stride: usize,
    tail: Tile,
}

/// Whether there are 16 weight rows to take.
pub(super) fn serves<A: Element, W: Element>(args: &Linear<'_, A, W>) -> bool {
    args.weight.rows >= LANES
}

/// `linear` of bf16 on a machine with AMX, where `serves` says so.
pub(super) fn compute<A: Element, W: Element>(exec: &Exec, args: &Linear<'_, A, W>, out: &RowsMut<'_, A>) {
    let (outputs, inputs) = (args.weight.rows, args.x.dim);
    let chunks = inputs.div_ceil(DOT * LANES).max(1);
    let groups = outputs.div_ceil(LANES);
    let pieces = (exec.threads.count() * PIECES).min(groups.div_ceil(BLOCK));
    let block_rows = (PACKED_BYTES / size_of::<Tile>() / chunks * LANES).next_multiple_of(2 * LANES).max(2 * LANES);
    for start in (0..args.x.rows).step_by(block_rows) {
        let rows = start..args.x.rows.min(start + block_rows);
        PACKED.with_borrow_mut(|packed| {
            packed.resize(rows.len().div_ceil(LANES) * chunks, Tile::zeros());
            let parts: Vec<_> = packed.chunks_exact_mut(chunks).map(std::sync::Mutex::new).collect();
            exec.threads.run(parts.len(), rows.len() * inputs, |group| {
                let first = rows.start + group * LANES;
                let mut part = parts[group].lock().expect("each is locked once");
                // SAFETY: the caller's `Isa` says that the instructions were found.
                #[allow(unsafe_code)]
                unsafe {
                    turn(&args.x, &(first..rows.end.min(first + LANES)), |chunk, pairs| part[chunk] = Tile(pairs));
                }
            });
            let x: &[Tile] = packed;
            exec.threads.run(pieces, rows.len() * outputs * inputs, |task| {
                let piece = groups * task / pieces * LANES..outputs.min(groups * (task + 1) / pieces * LANES);
                // SAFETY: as above.
                #[allow(unsafe_code)]
                unsafe {
                    compute_piece(args, rows.start, x, chunks, piece, out);
                }
            });
        });
    }
}

/// The products of the weight rows `piece` with `x`, rows from `first_row` on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
fn compute_piece<A: Element, W: Element>(
    args: &Linear<'_, A, W>,
    first_row: usize,
    x: &[Tile],
    chunks: usize,
    piece: Range<usize>,
    out: &RowsMut<'_, A>,
) {
    let groups: Vec<&[Tile]> = x.chunks_exact(chunks).collect();
    let whole = args.x.dim / (DOT * LANES);
    let mut sums = [Tile::zeros(); BLOCK];
    // SAFETY: the caller's `Isa` says that there are tiles.
    #[allow(unsafe_code)]
    let tiles = unsafe { Tiles::new() };
    for first in piece.clone().step_by(BLOCK * LANES) {
        let count = (piece.end - first).div_ceil(LANES).min(BLOCK);
        // The last tile is the last 16 rows, and those behind it are it again: their sums are made and written twice.
        let starts: [usize; BLOCK] = std::array::from_fn(|i| (first + i * LANES).min(piece.end - LANES));
        let weights = starts.map(|start| weights_from(args, start));
        for (g, group) in groups.chunks(2).enumerate() {
            let row = first_row + 2 * g * LANES;
            match *group {
                [x] => {
                    add_four(&tiles, &weights, whole, x, &mut sums);
                    for (sums, start) in sums.iter().zip(starts).take(count) {
                        write_turned(args, row, start..start + LANES, transpose(sums.0), out);
                    }
                }
                [x0, x1] => {
                    for half in (0..count).step_by(2) {
                        add_square(&tiles, [&weights[half], &weights[half + 1]], whole, [x0, x1], &mut sums);
                        for (i, sums) in sums.iter().enumerate() {
                            let start = starts[half + i / 2];
                            write_turned(args, row + i % 2 * LANES, start..start + LANES, transpose(sums.0), out);
                        }
                    }
                }
                _ => unreachable!("chunks of two"),
            }
        }
    }
}

/// The 16 weight rows from `start` on.
fn weights_from<A, W: Element>(args: &Linear<'_, A, W>, start: usize) -> Weights {
    let row = |i: usize| W::as_bf16(args.weight.row(start + i)).expect("the weights are bf16");
    let mut tail = Tile::zeros();
    for (i, target) in tail.0.iter_mut().enumerate() {
        let (_, rest) = row(i).as_chunks::<{ DOT * LANES }>();
        let padded = padded(rest);
        // SAFETY: both are 64 bytes in which every bit pattern is a value.
        #[allow(unsafe_code)]
        unsafe {
            *target = std::mem::transmute::<[bf16; DOT * LANES], Pairs>(padded);
        }
    }
    Weights { start: row(0).as_ptr().cast(), stride: row(1).as_ptr().addr() - row(0).as_ptr().addr(), tail }
}

/// `sums` of four times 16 weight rows with 16 rows of x.
#[inline(always)]
fn add_four(tiles: &Tiles, weights: &[Weights; BLOCK], whole: usize, x: &[Tile], sums: &mut [Tile; BLOCK]) {
    let starts = weights.each_ref().map(|weights| weights.start);
    tiles.clear();
    // SAFETY: each side is 16 rows of 64 bytes of x or of weights.
    #[allow(unsafe_code)]
    unsafe {
        for (chunk, x) in x[..whole].iter().enumerate() {
            let left = starts.map(|start| start.wrapping_add(chunk * LINE_BYTES));
            tiles.add_column(left, weights[0].stride, x.start(), LINE_BYTES);
        }
        if let Some(x) = x.get(whole) {
            tiles.add_column(weights.each_ref().map(|weights| weights.tail.start()), LINE_BYTES, x.start(), LINE_BYTES);
        }
    }
    store(tiles, sums);
}

/// `sums` [16 weight rows, 16 rows of x] of twice 16 weight rows with 32 rows of x.
#[inline(always)]
fn add_square(tiles: &Tiles, weights: [&Weights; 2], whole: usize, x: [&[Tile]; 2], sums: &mut [Tile; BLOCK]) {
    let starts = weights.map(|weights| weights.start);
    tiles.clear();
    // SAFETY: each side is 16 rows of 64 bytes of x or of weights.
    #[allow(unsafe_code)]
    unsafe {
        for (chunk, (x0, x1)) in x[0][..whole].iter().zip(&x[1][..whole]).enumerate() {
            let left = starts.map(|start| start.wrapping_add(chunk * LINE_BYTES));
            tiles.add_square(left, weights[0].stride, [x0.start(), x1.start()], LINE_BYTES);
        }
        if let [Some(x0), Some(x1)] = x.map(|x| x.get(whole)) {
            let left = weights.map(|weights| weights.tail.start());
            tiles.add_square(left, LINE_BYTES, [x0.start(), x1.start()], LINE_BYTES);
        }
    }
    store(tiles, sums);
}

#[inline(always)]
fn store(tiles: &Tiles, sums: &mut [Tile; BLOCK]) {
    let targets = sums.each_mut().map(|sums| (&raw mut *sums).cast());
    // SAFETY: each is a tile.
    #[allow(unsafe_code)]
    unsafe {
        tiles.store(targets, LINE_BYTES);
    }
}
