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
//! Called by `linear`. The instructions are written out, for the compiler does not offer them yet; it never uses tiles itself.

use std::arch::asm;
use std::cell::RefCell;
use std::ops::Range;

use super::many::{Pairs, transpose, turn, write_turned};
use super::native::padded;
use super::{DOT, LINE_BYTES, Linear, PIECES};
use crate::lanes::LANES;
use crate::{Element, Exec, RowsMut, bf16};

/// Weight rows that meet all of x, in tiles.
const BLOCK: usize = 4;
/// Bytes of x that are packed at once: they stay in a second-level cache of 2 MiB.
const PACKED_BYTES: usize = 1280 << 10;

/// Rows of weights, pairs of x, or sums: 16 times 64 bytes.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Tile([Pairs; LANES]);

thread_local! {
    /// The caller's rows of x.
    static PACKED: RefCell<Vec<Tile>> = const { RefCell::new(Vec::new()) };
}

/// 16 weight rows: where they lie, the bytes from row to row, and the chunk of K that is no whole one, with zeros behind it.
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
            packed.resize(rows.len().div_ceil(LANES) * chunks, zeros());
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
    let mut sums = [zeros(); BLOCK];
    configure();
    for first in piece.clone().step_by(BLOCK * LANES) {
        let tiles = (piece.end - first).div_ceil(LANES).min(BLOCK);
        // The last tile is the last 16 rows, and those behind it are it again: their sums are made and written twice.
        let starts: [usize; BLOCK] = std::array::from_fn(|i| (first + i * LANES).min(piece.end - LANES));
        let weights = starts.map(|start| weights_from(args, start));
        for (g, group) in groups.chunks(2).enumerate() {
            let row = first_row + 2 * g * LANES;
            match *group {
                [x] => {
                    add_four(&weights, whole, x, &mut sums);
                    for (sums, start) in sums.iter().zip(starts).take(tiles) {
                        write_turned(args, row, start..start + LANES, transpose(sums.0), out);
                    }
                }
                [x0, x1] => {
                    for half in (0..tiles).step_by(2) {
                        add_square([&weights[half], &weights[half + 1]], whole, [x0, x1], &mut sums);
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
    release();
}

/// The 16 weight rows from `start` on.
fn weights_from<A, W: Element>(args: &Linear<'_, A, W>, start: usize) -> Weights {
    let row = |i: usize| W::as_bf16(args.weight.row(start + i)).expect("the weights are bf16");
    let mut tail = zeros();
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
fn add_four(weights: &[Weights; BLOCK], whole: usize, x: &[Tile], sums: &mut [Tile; BLOCK]) {
    let add = |x: &Tile, [a, b, c, d]: [*const u8; BLOCK], stride: usize| {
        // SAFETY: each source is 16 rows of 64 bytes, and so is x; the tiles are configured.
        #[allow(unsafe_code)]
        unsafe {
            asm!(
                "tileloadd tmm4, [{x} + {line}*1]",
                "tileloadd tmm5, [{a} + {stride}*1]",
                "tdpbf16ps tmm0, tmm5, tmm4",
                "tileloadd tmm6, [{b} + {stride}*1]",
                "tdpbf16ps tmm1, tmm6, tmm4",
                "tileloadd tmm7, [{c} + {stride}*1]",
                "tdpbf16ps tmm2, tmm7, tmm4",
                "tileloadd tmm5, [{d} + {stride}*1]",
                "tdpbf16ps tmm3, tmm5, tmm4",
                x = in(reg) x, line = in(reg) LINE_BYTES, stride = in(reg) stride,
                a = in(reg) a, b = in(reg) b, c = in(reg) c, d = in(reg) d,
                options(readonly, nostack, preserves_flags)
            );
        }
    };
    clear();
    let starts = weights.each_ref().map(|weights| weights.start);
    for (chunk, x) in x[..whole].iter().enumerate() {
        add(x, starts.map(|start| start.wrapping_add(chunk * LINE_BYTES)), weights[0].stride);
    }
    if let Some(x) = x.get(whole) {
        add(x, weights.each_ref().map(|weights| (&raw const weights.tail).cast()), LINE_BYTES);
    }
    store(sums);
}

/// `sums` [16 weight rows, 16 rows of x] of twice 16 weight rows with 32 rows of x.
#[inline(always)]
fn add_square(weights: [&Weights; 2], whole: usize, x: [&[Tile]; 2], sums: &mut [Tile; BLOCK]) {
    let add = |[x0, x1]: [&Tile; 2], [a, b]: [*const u8; 2], stride: usize| {
        // SAFETY: each source is 16 rows of 64 bytes, and so is x; the tiles are configured.
        #[allow(unsafe_code)]
        unsafe {
            asm!(
                "tileloadd tmm4, [{x0} + {line}*1]",
                "tileloadd tmm6, [{a} + {stride}*1]",
                "tdpbf16ps tmm0, tmm6, tmm4",
                "tileloadd tmm5, [{x1} + {line}*1]",
                "tdpbf16ps tmm1, tmm6, tmm5",
                "tileloadd tmm7, [{b} + {stride}*1]",
                "tdpbf16ps tmm2, tmm7, tmm4",
                "tdpbf16ps tmm3, tmm7, tmm5",
                x0 = in(reg) x0, x1 = in(reg) x1, line = in(reg) LINE_BYTES, stride = in(reg) stride,
                a = in(reg) a, b = in(reg) b,
                options(readonly, nostack, preserves_flags)
            );
        }
    };
    clear();
    let starts = weights.map(|weights| weights.start);
    for (chunk, (x0, x1)) in x[0][..whole].iter().zip(&x[1][..whole]).enumerate() {
        add([x0, x1], starts.map(|start| start.wrapping_add(chunk * LINE_BYTES)), weights[0].stride);
    }
    if let [Some(x0), Some(x1)] = x.map(|x| x.get(whole)) {
        add([x0, x1], weights.map(|weights| (&raw const weights.tail).cast()), LINE_BYTES);
    }
    store(sums);
}

fn zeros() -> Tile {
    // SAFETY: every bit pattern is a value of it.
    #[allow(unsafe_code)]
    unsafe {
        std::mem::zeroed()
    }
}

/// Every tile is 16 rows of 64 bytes from here on.
fn configure() {
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    row_bytes[..8].fill(LINE_BYTES as u16);
    rows[..8].fill(LANES as u8);
    let config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
    // SAFETY: the caller's `Isa` says that there are tiles; 64 bytes are read.
    #[allow(unsafe_code)]
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &config, options(readonly, nostack, preserves_flags));
    }
}

/// The thread has no tiles any more: the system need not keep them.
fn release() {
    // SAFETY: the caller's `Isa` says that there are tiles.
    #[allow(unsafe_code)]
    unsafe {
        asm!("tilerelease", options(nomem, nostack, preserves_flags));
    }
}

#[inline(always)]
fn clear() {
    // SAFETY: the tiles are configured.
    #[allow(unsafe_code)]
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            options(nomem, nostack, preserves_flags)
        );
    }
}

#[inline(always)]
fn store(sums: &mut [Tile; BLOCK]) {
    // SAFETY: the tiles are configured, and each takes 16 rows of 64 bytes.
    #[allow(unsafe_code)]
    unsafe {
        asm!(
            "tilestored [{p} + {line}*1], tmm0",
            "tilestored [{p} + {line}*1 + 1024], tmm1",
            "tilestored [{p} + {line}*1 + 2048], tmm2",
            "tilestored [{p} + {line}*1 + 3072], tmm3",
            p = in(reg) sums, line = in(reg) LINE_BYTES, options(nostack, preserves_flags)
        );
    }
}
