//! `rope`: rotary position embedding of queries and keys in place.
//!
//! Twin of `kernels/rope`: the frequencies are in the tables, computed in fp32, rounded once. q and k interleave in one QKV
//! matrix, hence cells.

use std::ops::Range;

use crate::error::expect_len;
use crate::isa::by_isa;
use crate::lanes::{LANES, Lane, read, write};
use crate::view::by_row;
use crate::{Element, Error, Exec, Rows, RowsCells};

/// Rotates the first 2 * half dimensions of every head of `q` [T, H, D] and `k` [T, KH, D] in place: pair i is
/// (x[i], x[i + half]).
///
/// `positions` [T] · `cos`, `sin` [P, 1, half]. Errors before anything is written when shapes disagree or a position
/// lies outside the tables.
pub fn rope<E: Element>(
    exec: &Exec,
    q: &RowsCells<'_, E>,
    k: &RowsCells<'_, E>,
    positions: &[i32],
    cos: &Rows<'_, f32>,
    sin: &Rows<'_, f32>,
) -> Result<(), Error> {
    expect_len("rows of k", k.rows, q.rows)?;
    expect_len("head dim of k", k.dim, q.dim)?;
    expect_len("length of positions", positions.len(), q.rows)?;
    expect_len("rows of sin", sin.rows, cos.rows)?;
    expect_len("columns of sin", sin.dim, cos.dim)?;
    if 2 * cos.dim > q.dim {
        return Err(Error::Shape { name: "columns of cos", found: cos.dim, expected: q.dim / 2 });
    }
    for (token, &value) in positions.iter().enumerate() {
        if usize::try_from(value).map_or(true, |position| position >= cos.rows) {
            return Err(Error::Position { token, value, positions: cos.rows });
        }
    }
    let work = q.rows * (q.heads + k.heads) * q.dim * 2;
    by_row(&exec.threads, [*q, *k], work, |rows, [q, k]| {
        rotate(exec.isa, q, rows.clone(), positions, cos, sin);
        rotate(exec.isa, k, rows, positions, cos, sin);
    });
    Ok(())
}

/// One pair turned by its angle. Whoever rotates keys calls this, so that equal inputs give equal bits.
#[inline(always)]
pub(crate) fn turn(a: f32, b: f32, cos: f32, sin: f32) -> (f32, f32) {
    (a * cos - b * sin, b * cos + a * sin)
}

by_isa!(rotate<E> = rotate_body(
    x: &RowsCells<'_, E>,
    rows: Range<usize>,
    positions: &[i32],
    cos: &Rows<'_, f32>,
    sin: &Rows<'_, f32>,
));

#[inline(always)]
fn rotate_body<E: Element, const FUSED: bool>(
    x: &RowsCells<'_, E>,
    rows: Range<usize>,
    positions: &[i32],
    cos: &Rows<'_, f32>,
    sin: &Rows<'_, f32>,
) {
    for row in rows {
        let position = positions[row] as usize;
        let (cos, sin) = (cos.row(position), sin.row(position)); // checked by `rope`
        for head in 0..x.heads {
            let (low, high) = x.head(row, head)[..2 * cos.len()].split_at(cos.len());
            // Whole lanes are read before any is written: cells may share memory, which forbids LLVM to do so by itself.
            let ((lows, low), (highs, high)) = (low.as_chunks(), high.as_chunks());
            let ((cosines, cos), (sines, sin)) = (cos.as_chunks::<LANES>(), sin.as_chunks::<LANES>());
            for (((low, high), cos), sin) in lows.iter().zip(highs).zip(cosines).zip(sines) {
                let (a, b): (Lane, Lane) = (read(low), read(high));
                let turned: [(f32, f32); LANES] = std::array::from_fn(|i| turn(a[i], b[i], cos[i], sin[i]));
                write(low, turned.map(|(a, _)| a));
                write(high, turned.map(|(_, b)| b));
            }
            for (((low, high), &cos), &sin) in low.iter().zip(high).zip(cos).zip(sin) {
                let (a, b) = turn(low.get().to_f32(), high.get().to_f32(), cos, sin);
                low.set(E::from_f32(a));
                high.set(E::from_f32(b));
            }
        }
    }
}
