//! `linear`: few rows times a weight matrix, out = x W^T + b. A decode step is this, and reading W is what it costs.
//!
//! Twin of `kernels/linear`. A task owns a run of weight rows and reads it as two streams, each strictly forward; a few
//! weight rows meet every row of x while they are in the first-level cache:
//!
//! ```text
//!   W  first half   n ----------->        w0 . x0  w0 . x1  w0 . x2     a tile: 2 weight rows, a group of rows of x,
//!      second half  n + half ---->        w1 . x0  w1 . x1  w1 . x2     16 partial sums in each product
//! ```
//!
//! From a dozen rows on, where a lane takes two registers, four weight rows meet x together (`quads`). A product always
//! adds the same lanes in the same order, so a row's result depends on that row alone. Many rows have forms of their own:
//! of bf16 (`many`), which adds in the same order where that is asked for, and as f32 (`columns`), where it is not. With AMX
//! every number of rows has one form (`amx`), but one row alone is fastest as a stream, where its bits may differ.

#[cfg(target_arch = "x86_64")]
mod amx;
mod columns;
#[cfg(target_arch = "x86_64")]
mod many;
#[cfg(target_arch = "x86_64")]
mod native;
mod quads;

use std::cell::RefCell;
use std::ops::Range;

use crate::isa::{Isa, Kind, by_isa};
use crate::lanes::{LANES, LINE_BYTES, Lane, fma, sum, widen};
use crate::{Element, Error, Exec, Rows, RowsMut, bf16};

/// Rows of x between two passes over the weights: they stay in the second-level cache.
const BLOCK_ROWS: usize = 32;
/// Tasks per thread: enough to even out a thread that is interrupted, few enough to read far ahead.
const PIECES: usize = 4;
/// Fewer weight rows are no task of their own.
const PIECE_ROWS: usize = 16;
/// Weights, as f32, that meet every row of x before the next ones: half of a first-level cache.
const BLOCK_LEN: usize = 4096;
/// More groups than this share one widening of 16-bit weights; fewer widen them again in registers.
const WIDEN_GROUPS: usize = 3;
/// Most rows of x in a tile: with two weight rows their sums fill 12 of the 32 registers of AVX-512, or with a panel of
/// `columns` 12 of the 16 of AVX2 ...
const GROUP: usize = 6;
/// ... or 24, where a product of two vectors is one instruction and takes its second from memory.
const NATIVE_GROUP: usize = 12;
/// Products of bf16 that one instruction adds to each lane.
const DOT: usize = 2;

thread_local! {
    /// The caller's rows of x, as f32 and as bf16.
    static PACKED: RefCell<(Vec<f32>, Vec<bf16>)> = RefCell::default();
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Buffers of one thread, kept between calls.
#[derive(Default)]
struct Scratch {
    /// A block of weights as f32.
    widened: Vec<f32>,
    quads: quads::Scratch,
    columns: columns::Scratch,
    /// Products of a piece before they are rounded, [rows, weight rows].
    sums: Vec<f32>,
}

/// Arguments of `linear`. T rows, N outputs, K inputs.
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a, A, W> {
    /// [T, 1, K].
    pub x: Rows<'a, A>,
    /// [N, 1, K].
    pub weight: Rows<'a, W>,
    /// [N].
    pub bias: Option<&'a [W]>,
    /// Whether a row's bits depend on that row alone; if not, products of many rows may add K straight on.
    pub invariant: bool,
}

/// Writes `out` [T, N, 1]; sums in fp32, rounded once.
///
/// Cost T * N * K multiply-adds; the weights are read once per 32 rows. Errors before anything is written when shapes
/// disagree.
pub fn linear<A: Element, W: Element>(
    exec: &Exec,
    args: &Linear<'_, A, W>,
    out: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    args.check(out)?;
    let (outputs, out) = (args.weight.rows, &*out);
    let pieces = (exec.threads.count() * PIECES).min(outputs / PIECE_ROWS).max(1);
    let native = exec.isa.has_bf16() && A::as_bf16(&[]).is_some() && W::as_bf16(&[]).is_some();
    #[cfg(target_arch = "x86_64")]
    if native && exec.isa.0 == Kind::Amx && amx::serves(args) && (args.invariant || args.x.rows > 1) {
        amx::compute(exec, args, out);
        return Ok(());
    }
    #[cfg(target_arch = "x86_64")]
    if native && args.x.rows >= many::FEWEST_ROWS {
        many::compute(exec, args, out);
        return Ok(());
    }
    if !native && !args.invariant && args.x.rows >= columns::FEWEST_ROWS {
        PACKED.with_borrow_mut(|(wide, _)| columns::compute(exec, args, &as_f32(&args.x, wide), out));
        return Ok(());
    }
    PACKED.with_borrow_mut(|(wide, narrow)| {
        for start in (0..args.x.rows).step_by(BLOCK_ROWS) {
            let rows = start..args.x.rows.min(start + BLOCK_ROWS);
            let work = rows.len() * outputs * args.x.dim;
            let piece = |task| outputs * task / pieces..outputs * (task + 1) / pieces;
            if native {
                let x = Packed::<_, { DOT * LANES }>::new(args, rows, exec.isa, narrow);
                exec.threads.run(pieces, work, |task| {
                    SCRATCH.with_borrow_mut(|scratch| compute_native(args, &x, piece(task), &mut scratch.sums, out));
                });
            } else {
                let x = Packed::<_, LANES>::new(args, rows, exec.isa, wide);
                exec.threads.run(pieces, work, |task| {
                    SCRATCH.with_borrow_mut(|scratch| compute_piece(exec.isa, args, &x, piece(task), scratch, out));
                });
            }
        }
    });
    Ok(())
}

/// The rows as they lie, or copied to `wide`.
fn as_f32<'a, A: Element>(x: &Rows<'a, A>, wide: &'a mut Vec<f32>) -> Vec<&'a [f32]> {
    if A::as_f32(&[]).is_some() {
        return (0..x.rows).map(|row| A::as_f32(x.row(row)).expect("they are f32")).collect();
    }
    wide.resize(x.rows * x.dim, 0.0);
    if x.dim > 0 {
        wide.chunks_exact_mut(x.dim).enumerate().for_each(|(row, target)| widen(x.row(row), target));
    }
    (0..x.rows).map(|row| &wide[row * x.dim..][..x.dim]).collect()
}

impl<A: Element, W: Element> Linear<'_, A, W> {
    fn check(&self, out: &RowsMut<'_, A>) -> Result<(), Error> {
        let (x, weight) = (&self.x, &self.weight);
        for (name, found, expected) in [
            ("heads of x", x.heads, 1),
            ("heads of weight", weight.heads, 1),
            ("columns of weight", weight.dim, x.dim),
            ("length of bias", self.bias.map_or(weight.rows, <[W]>::len), weight.rows),
            ("rows of out", out.rows, x.rows),
            ("columns of out", out.heads, weight.rows),
            ("last dimension of out", out.dim, 1),
        ] {
            if found != expected {
                return Err(Error::Shape { name, found, expected });
            }
        }
        Ok(())
    }

    /// The second half's twin of weight row `n`; of an odd number, the last row is its own.
    #[inline(always)]
    fn pair(&self, n: usize, piece: &Range<usize>) -> [usize; 2] {
        [n, (n + piece.len().div_ceil(2)).min(piece.end - 1)]
    }

    /// Adds the bias and writes the products of two weight rows with a group of rows of x.
    #[inline(always)]
    fn write<const R: usize>(&self, sums: [[f32; R]; 2], pair: [usize; 2], first: usize, out: &RowsMut<'_, A>) {
        for (sums, n) in sums.into_iter().zip(pair) {
            let bias = self.bias.map_or(0.0, |bias| bias[n].to_f32());
            for (r, sum) in sums.into_iter().enumerate() {
                // SAFETY: tasks have distinct ranges of n.
                #[allow(unsafe_code)]
                unsafe {
                    out.write_head(first + r, n, |_| A::from_f32(sum + bias));
                }
            }
        }
    }
}

/// Rows of x in groups, each [chunks, rows of the group, C]; the last group may be smaller, the last chunk ends in zeros.
struct Packed<'a, P, const C: usize> {
    values: &'a [P],
    first: usize,
    chunks: usize,
    /// Rows of a group: as many as keep the sums of a tile in registers.
    group: usize,
}

impl<'a, P: Element, const C: usize> Packed<'a, P, C> {
    fn new<A: Element, W>(args: &Linear<'_, A, W>, rows: Range<usize>, isa: Isa, values: &'a mut Vec<P>) -> Self {
        let group = match isa.0 {
            // Groups of one size: the last one's weights come from a cache, but its few sums would wait for each other.
            _ if C > LANES => rows.len().div_ceil(rows.len().div_ceil(NATIVE_GROUP)),
            Kind::Avx512 | Kind::Avx512Bf16 | Kind::Amx => GROUP,
            Kind::Avx2 | Kind::Portable => quads::GROUP,
        };
        let chunks = args.x.dim.div_ceil(C).max(1);
        let len = rows.len() * chunks * C;
        values.clear();
        values.resize(len + C, P::default());
        // Or every load of a whole register would touch two lines.
        let aligned = values.as_ptr().align_offset(LINE_BYTES).min(C);
        let values = &mut values[aligned..][..len];
        for (i, row) in rows.clone().enumerate() {
            let start = i / group * group; // first row of its group
            let members = group.min(rows.len() - start);
            let target = &mut values[start * chunks * C..];
            for (c, source) in args.x.row(row).chunks(C).enumerate() {
                let at = (c * members + i - start) * C;
                for (t, s) in target[at..at + source.len()].iter_mut().zip(source) {
                    *t = P::from_f32(s.to_f32());
                }
            }
        }
        Packed { values, first: rows.start, chunks, group }
    }

    /// Each group with its first row and the number of its rows.
    #[inline(always)]
    fn groups(&self) -> impl Iterator<Item = (usize, usize, &'a [[P; C]])> {
        let len = self.chunks * C;
        let groups = self.values.chunks(self.group * len).enumerate();
        groups.map(move |(i, x)| (self.first + i * self.group, x.len() / len, x.as_chunks().0))
    }
}

/// `$tile::<$types, R, FUSED>(...)` with R = `$rows`, 1 to GROUP.
macro_rules! by_rows {
    ($rows:expr, $tile:ident < $($types:ty),* > => $arguments:tt) => {
        match $rows {
            1 => $tile::<$($types,)* 1, FUSED> $arguments,
            2 => $tile::<$($types,)* 2, FUSED> $arguments,
            3 => $tile::<$($types,)* 3, FUSED> $arguments,
            4 => $tile::<$($types,)* 4, FUSED> $arguments,
            5 => $tile::<$($types,)* 5, FUSED> $arguments,
            _ => $tile::<$($types,)* GROUP, FUSED> $arguments,
        }
    };
}
use by_rows;

by_isa!(compute_piece<A, W> = piece_body(
    args: &Linear<'_, A, W>,
    x: &Packed<'_, f32, LANES>,
    piece: Range<usize>,
    scratch: &mut Scratch,
    out: &RowsMut<'_, A>,
));

#[inline(always)]
fn piece_body<A: Element, W: Element, const FUSED: bool>(
    args: &Linear<'_, A, W>,
    x: &Packed<'_, f32, LANES>,
    piece: Range<usize>,
    scratch: &mut Scratch,
    out: &RowsMut<'_, A>,
) {
    let width = x.chunks * LANES;
    if x.group == quads::GROUP && x.values.len() >= quads::FEWEST_ROWS * width {
        return quads::compute::<A, W, FUSED>(args, x, piece, &mut scratch.quads, out);
    }
    let widened = &mut scratch.widened;
    let streams = piece.start..piece.start + piece.len().div_ceil(2);
    let block = (BLOCK_LEN / (2 * width)).max(1);
    let widens = W::as_f32(&[]).is_none() && x.values.len() > WIDEN_GROUPS * x.group * width;
    for start in streams.clone().step_by(block) {
        let block = start..streams.end.min(start + block);
        if widens {
            widened.resize(2 * width * block.len(), 0.0);
            for (n, target) in block.clone().zip(widened.chunks_exact_mut(2 * width)) {
                let [n0, n1] = args.pair(n, &piece);
                widen(args.weight.row(n0), &mut target[..width]);
                widen(args.weight.row(n1), &mut target[width..]);
            }
        }
        for (first, rows, x) in x.groups() {
            for n in block.clone() {
                let pair = args.pair(n, &piece);
                if widens {
                    let (w0, w1) = widened[(n - block.start) * 2 * width..][..2 * width].split_at(width);
                    by_rows!(rows, tile<A, W, f32> => (args, pair, [w0, w1], x, first, out));
                } else {
                    let weights = pair.map(|n| args.weight.row(n));
                    by_rows!(rows, tile<A, W, W> => (args, pair, weights, x, first, out));
                }
            }
        }
    }
}

/// Two weight rows times a group of `R` rows of x, the first of which is row `first`.
#[inline(always)]
fn tile<A: Element, W: Element, E: Element, const R: usize, const FUSED: bool>(
    args: &Linear<'_, A, W>,
    pair: [usize; 2],
    weights: [&[E]; 2],
    x: &[Lane],
    first: usize,
    out: &RowsMut<'_, A>,
) {
    let (x, _) = x.as_chunks::<R>();
    let [(w0, tail0), (w1, tail1)] = weights.map(<[E]>::as_chunks::<LANES>);
    let mut acc = [[[0.0f32; LANES]; R]; 2];
    for ((x, w0), w1) in x.iter().zip(w0).zip(w1) {
        add::<R, FUSED>(&mut acc, x, [w0.map(E::to_f32), w1.map(E::to_f32)]);
    }
    if let Some(x) = x.get(w0.len()) {
        add::<R, FUSED>(&mut acc, x, [padded(tail0), padded(tail1)]);
    }
    args.write(acc.map(|row| row.map(sum)), pair, first, out);
}

#[inline(always)]
fn add<const R: usize, const FUSED: bool>(acc: &mut [[Lane; R]; 2], x: &[Lane; R], w: [Lane; 2]) {
    for (acc, w) in acc.iter_mut().zip(&w) {
        for (acc, x) in acc.iter_mut().zip(x) {
            *acc = fma::<FUSED>(w, x, acc);
        }
    }
}

#[inline(always)]
fn padded<E: Element>(tail: &[E]) -> Lane {
    let mut lanes = [0.0; LANES];
    widen(tail, &mut lanes);
    lanes
}

/// `piece_body` with AVX-512 BF16, which multiplies pairs of bf16 and adds them to f32 lanes.
fn compute_native<A: Element, W: Element>(
    args: &Linear<'_, A, W>,
    x: &Packed<'_, bf16, { DOT * LANES }>,
    piece: Range<usize>,
    sums: &mut Vec<f32>,
    out: &RowsMut<'_, A>,
) {
    let (first, rows) = (x.first, x.values.len() / (x.chunks * DOT * LANES));
    if piece.is_empty() {
        return;
    }
    sums.resize(rows * piece.len(), 0.0);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's `Isa` says that the instructions were found.
    #[allow(unsafe_code)]
    unsafe {
        native::piece(args, x, &piece, sums);
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("the instruction set does not exist here");
    for (row, sums) in sums.chunks_exact_mut(piece.len()).enumerate() {
        for (sum, bias) in sums.iter_mut().zip(args.bias.map_or(&[][..], |bias| &bias[piece.clone()])) {
            *sum += bias.to_f32();
        }
        // SAFETY: tasks have distinct ranges of outputs.
        #[allow(unsafe_code)]
        unsafe {
            out.write_heads(first + row, piece.clone(), |n| A::from_f32(sums[n]));
        }
    }
}
