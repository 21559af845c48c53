//! Products of many rows where all is f32 in registers: weights are turned once and then meet every row of x.
//!
//! ```text
//!   16 weight rows, turned   k: w0 w1 .. w15      a task turns as many as its second-level cache holds
//!   6 rows of x              x0[k] .. x5[k]       each in every lane: 12 registers of sums with AVX2
//! ```
//!
//! A sum runs over K in ascending order, so a row's bits depend on that row alone, but they are not those of `tile` and
//! `quads`: `invariant` products do not come here. Called by `linear` from `FEWEST_ROWS` rows on.

use std::ops::Range;

use super::Linear;
use crate::isa::by_isa;
use crate::lanes::{Column, LANES, fetch, product, turn, widen};
use crate::{Element, Exec, RowsMut};

/// With fewer rows turning costs more than it saves.
pub(super) const FEWEST_ROWS: usize = 20;
/// Rows of x that meet a weight together.
const GROUP: usize = 6;
/// Turned weights of a task: with some rows of x they stay in the second-level cache.
const PIECE_BYTES: usize = 320 << 10;
/// Inputs that are widened before they are turned: 16 rows of them stay in the first-level cache.
const PART: usize = 128;

/// Buffers of one thread, kept between calls.
#[derive(Default)]
pub(super) struct Scratch {
    /// Turned weights of a task, [panels of LANES weight rows, K].
    columns: Vec<Column>,
    /// A part of LANES weight rows as f32, [LANES, PART].
    part: Vec<f32>,
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
    let of_task = (PIECE_BYTES / (inputs * LANES * size_of::<f32>()).max(1)).max(1);
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
    let inputs = args.x.dim.next_multiple_of(LANES).max(LANES);
    scratch.columns.resize(panels.len() * inputs, Column::default());
    scratch.part.resize(LANES * PART, 0.0);
    for (panel, columns) in panels.clone().zip(scratch.columns.chunks_exact_mut(inputs)) {
        turn_panel::<A, W, FUSED>(args, panel, &mut scratch.part, columns);
    }
    let groups = x.len().div_ceil(GROUP);
    for i in 0..groups {
        let rows = x.len() * i / groups..x.len() * (i + 1) / groups;
        for (panel, columns) in panels.clone().zip(scratch.columns.chunks_exact(inputs)) {
            match rows.len() {
                1 => write::<A, W, 1, FUSED>(args, x, rows.start, panel, columns, out),
                2 => write::<A, W, 2, FUSED>(args, x, rows.start, panel, columns, out),
                3 => write::<A, W, 3, FUSED>(args, x, rows.start, panel, columns, out),
                4 => write::<A, W, 4, FUSED>(args, x, rows.start, panel, columns, out),
                5 => write::<A, W, 5, FUSED>(args, x, rows.start, panel, columns, out),
                _ => write::<A, W, GROUP, FUSED>(args, x, rows.start, panel, columns, out),
            }
        }
    }
}

/// Turns LANES weight rows; the last row stands for those that do not exist.
#[inline(always)]
fn turn_panel<A: Element, W: Element, const FUSED: bool>(
    args: &Linear<'_, A, W>,
    panel: usize,
    part: &mut [f32],
    columns: &mut [Column],
) {
    let (last, inputs) = (args.weight.rows - 1, args.x.dim);
    for (start, columns) in (0..inputs).step_by(PART).zip(columns.chunks_mut(PART)) {
        let len = PART.min(inputs - start);
        for (i, target) in part.chunks_exact_mut(PART).enumerate() {
            // The same part of the next panel: rows lie so far apart that the reader alone does not look ahead.
            fetch(args.weight.row(last.min((panel + 1) * LANES + i)), start, len);
            widen(&args.weight.row(last.min(panel * LANES + i))[start..start + len], &mut target[..columns.len()]);
        }
        turn::<FUSED>(std::array::from_fn(|i| &part[i * PART..][..columns.len()]), columns);
    }
}

/// Writes the products of `G` rows of x, the first of which is row `first`, with a panel.
#[inline(always)]
fn write<A: Element, W: Element, const G: usize, const FUSED: bool>(
    args: &Linear<'_, A, W>,
    x: &[&[f32]],
    first: usize,
    panel: usize,
    columns: &[Column],
    out: &RowsMut<'_, A>,
) {
    let sums = product::<G, 1, FUSED>(std::array::from_fn(|g| x[first + g]), [columns], [[[0.0; LANES]; 1]; G]);
    let outputs = panel * LANES..args.weight.rows.min((panel + 1) * LANES);
    for (g, [sums]) in sums.iter().enumerate() {
        let mut sums = *sums;
        if let Some(bias) = args.bias {
            sums.iter_mut().zip(&bias[outputs.clone()]).for_each(|(sum, bias)| *sum += bias.to_f32());
        }
        // SAFETY: tasks have distinct ranges of outputs.
        #[allow(unsafe_code)]
        let target = unsafe { out.heads_mut(first + g, outputs.clone()) };
        target.iter_mut().zip(sums).for_each(|(target, sum)| *target = A::from_f32(sum));
    }
}
