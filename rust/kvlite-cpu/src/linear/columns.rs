//! Products of many rows where all is f32 in registers: weights are turned once and then meet every row of x.
//!
//! ```text
//!   16 weight rows, turned   k: w0 w1 .. w15      as many as a second-level cache holds, a part of K at a time
//!   6 rows of x              x0[k] .. x5[k]       each in every lane: 12 registers of sums with AVX2
//! ```
//!
//! A sum runs over K in ascending order, so a row's bits depend on that row alone, but they are not those of `tile` and
//! `quads`: `invariant` products do not come here. Called by `linear` from `FEWEST_ROWS` rows on.

use std::ops::Range;

use super::{GROUP, Linear, by_rows};
use crate::isa::by_isa;
use crate::lanes::{Column, LANES, Lane, fetch, product, turn, widen};
use crate::{Element, Exec, RowsMut};

/// With fewer rows turning costs more than it saves.
pub(super) const FEWEST_ROWS: usize = 16;
/// Rows of x that turned weights serve: their sums wait in the second-level cache between two parts of K.
const BLOCK_ROWS: usize = 512;
/// Inputs in a part of K: a group's rows of it stay in the first-level cache while every panel of a task meets them.
const PART: usize = 1024;
/// Turned weights of a task: with some rows of x they stay in the second-level cache.
const PIECE_BYTES: usize = 320 << 10;
/// Inputs that are widened before they are turned: 16 rows of them stay in the first-level cache.
const WIDENED: usize = 128;

/// Buffers of one thread, kept between calls.
#[derive(Default)]
pub(super) struct Scratch {
    /// A part of a task's weights, turned: [panels of LANES weight rows, PART].
    columns: Vec<Column>,
    /// LANES weight rows as f32, [LANES, WIDENED].
    widened: Vec<f32>,
    /// Of a block of rows, [rows, panels].
    sums: Vec<Lane>,
}

/// `linear` of rows `x` [T, K], which are those of `args` as f32.
pub(super) fn compute<A: Element, W: Element>(
    exec: &Exec,
    args: &Linear<'_, A, W>,
    x: &[&[f32]],
    out: &RowsMut<'_, A>,
) {
    let (outputs, inputs) = (args.weight.rows, args.x.dim);
    let panels = outputs.div_ceil(LANES);
    let of_task = PIECE_BYTES / (PART.min(inputs).max(1) * LANES * size_of::<f32>());
    let pieces = panels.div_ceil(of_task).next_multiple_of(exec.threads.count()).min(panels);
    exec.threads.run(pieces, x.len() * outputs * inputs, |task| {
        let piece = panels * task / pieces..panels * (task + 1) / pieces;
        super::SCRATCH.with_borrow_mut(|scratch| compute_piece(exec.isa, args, x, piece, &mut scratch.columns, out));
    });
}

by_isa!(compute_piece<A, W> = piece_body(
    args: &Linear<'_, A, W>,
    x: &[&[f32]],
    panels: Range<usize>,
    scratch: &mut Scratch,
    out: &RowsMut<'_, A>,
));

#[inline(always)]
fn piece_body<A: Element, W: Element, const FUSED: bool>(
    args: &Linear<'_, A, W>,
    x: &[&[f32]],
    panels: Range<usize>,
    scratch: &mut Scratch,
    out: &RowsMut<'_, A>,
) {
    let Scratch { columns, widened, sums } = scratch;
    widened.resize(LANES * WIDENED, 0.0);
    columns.resize(panels.len() * PART, Column::default());
    for (block, x) in x.chunks(BLOCK_ROWS).enumerate() {
        sums.clear();
        sums.resize(x.len() * panels.len(), [0.0; LANES]);
        for start in (0..args.x.dim).step_by(PART) {
            let part = start..args.x.dim.min(start + PART);
            for (panel, columns) in panels.clone().zip(columns.chunks_exact_mut(PART)) {
                turn_panel::<A, W, FUSED>(args, panel, &part, widened, columns);
            }
            let groups = x.len().div_ceil(GROUP);
            for i in 0..groups {
                let rows = x.len() * i / groups..x.len() * (i + 1) / groups;
                let sums = &mut sums[rows.start * panels.len()..rows.end * panels.len()];
                by_rows!(rows.len(), add<> => (&x[rows], &part, columns, sums));
            }
        }
        for (row, sums) in sums.chunks_exact(panels.len()).enumerate() {
            write(args, block * BLOCK_ROWS + row, &panels, sums.as_flattened(), out);
        }
    }
}

/// Turns a part of LANES weight rows; the last row stands for those that do not exist.
#[inline(always)]
fn turn_panel<A: Element, W: Element, const FUSED: bool>(
    args: &Linear<'_, A, W>,
    panel: usize,
    part: &Range<usize>,
    widened: &mut [f32],
    columns: &mut [Column],
) {
    let last = args.weight.rows - 1;
    for (start, columns) in part.clone().step_by(WIDENED).zip(columns.chunks_mut(WIDENED)) {
        let len = WIDENED.min(part.end - start);
        let padded = len.next_multiple_of(LANES);
        for (i, target) in widened.chunks_exact_mut(WIDENED).enumerate() {
            // The same part of the next panel: rows lie so far apart that the reader alone does not look ahead.
            fetch(args.weight.row(last.min((panel + 1) * LANES + i)), start, len);
            widen(&args.weight.row(last.min(panel * LANES + i))[start..start + len], &mut target[..padded]);
        }
        turn::<FUSED>(std::array::from_fn(|i| &widened[i * WIDENED..][..padded]), &mut columns[..padded]);
    }
}

/// Adds a part of K to the sums of `G` rows of x with every panel, [G, panels].
#[inline(always)]
fn add<const G: usize, const FUSED: bool>(x: &[&[f32]], part: &Range<usize>, columns: &[Column], sums: &mut [Lane]) {
    let panels = sums.len() / G;
    let x: [&[f32]; G] = std::array::from_fn(|g| &x[g][part.clone()]);
    for (panel, columns) in columns.chunks_exact(PART).enumerate().take(panels) {
        let old = std::array::from_fn(|g| [sums[g * panels + panel]]);
        for (g, [new]) in product::<G, 1, FUSED>(x, [columns], old).into_iter().enumerate() {
            sums[g * panels + panel] = new;
        }
    }
}

/// Writes the outputs of `panels` for one row, the bias added.
#[inline(always)]
fn write<A: Element, W: Element>(
    args: &Linear<'_, A, W>,
    row: usize,
    panels: &Range<usize>,
    sums: &[f32],
    out: &RowsMut<'_, A>,
) {
    let outputs = panels.start * LANES..args.weight.rows.min(panels.end * LANES);
    // SAFETY: tasks have distinct ranges of outputs.
    #[allow(unsafe_code)]
    let target = unsafe { out.heads_mut(row, outputs.clone()) };
    match args.bias.map(|bias| &bias[outputs]) {
        Some(bias) => {
            let sums = sums.iter().zip(bias);
            target.iter_mut().zip(sums).for_each(|(target, (sum, bias))| *target = A::from_f32(sum + bias.to_f32()));
        }
        None => target.iter_mut().zip(sums).for_each(|(target, &sum)| *target = A::from_f32(sum)),
    }
}
