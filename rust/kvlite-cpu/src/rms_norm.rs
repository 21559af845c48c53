//! `rms_norm` and `add_rms_norm`: every head of every row over its root mean square, with the residual added first or not.
//!
//! Twin of `kernels/rms_norm`: fp32 inside, rounded where the reference rounds. Rows may be views into a QKV matrix and may be
//! written in place, hence cells.

use std::ops::Range;

use crate::error::expect_len;
use crate::isa::by_isa;
use crate::lanes::{LANES, Lane, fma, sum};
use crate::view::by_row;
use crate::{Element, Error, Exec, RowsCells};

/// out = weight * round(x / sqrt(mean(x^2) + eps)) for every head of every row; `x` and `out` [T, H, D] may be one.
///
/// `weight` [D]. Errors before anything is written when shapes disagree.
pub fn rms_norm<E: Element>(
    exec: &Exec,
    x: &RowsCells<'_, E>,
    weight: &[E],
    eps: f32,
    out: &RowsCells<'_, E>,
) -> Result<(), Error> {
    check(&[("out", out, x.shape())])?;
    expect_len("length of weight", weight.len(), x.dim)?;
    by_row(&exec.threads, [*x, *out], work(x), |rows, [x, out]| {
        norm(exec.isa, x, None, weight, eps, out, rows);
    });
    Ok(())
}

/// residual = round(residual + x), then out = rms_norm(residual); all [T, H, D].
///
/// Errors before anything is written when shapes disagree.
pub fn add_rms_norm<E: Element>(
    exec: &Exec,
    x: &RowsCells<'_, E>,
    residual: &RowsCells<'_, E>,
    weight: &[E],
    eps: f32,
    out: &RowsCells<'_, E>,
) -> Result<(), Error> {
    check(&[("residual", residual, x.shape()), ("out", out, x.shape())])?;
    expect_len("length of weight", weight.len(), x.dim)?;
    by_row(&exec.threads, [*x, *residual, *out], work(x), |rows, [x, residual, out]| {
        norm(exec.isa, x, Some(residual), weight, eps, out, rows);
    });
    Ok(())
}

fn work<E: Element>(x: &RowsCells<'_, E>) -> usize {
    4 * x.rows * x.heads * x.dim
}

fn check<E: Element>(arguments: &[(&'static str, &RowsCells<'_, E>, [usize; 3])]) -> Result<(), Error> {
    for (name, found, [rows, heads, dim]) in arguments {
        expect_len(name, found.rows, *rows)?;
        expect_len(name, found.heads, *heads)?;
        expect_len(name, found.dim, *dim)?;
    }
    Ok(())
}

by_isa!(norm<E> = norm_body(
    x: &RowsCells<'_, E>,
    residual: Option<&RowsCells<'_, E>>,
    weight: &[E],
    eps: f32,
    out: &RowsCells<'_, E>,
    rows: Range<usize>,
));

#[inline(always)]
fn norm_body<E: Element, const FUSED: bool>(
    x: &RowsCells<'_, E>,
    residual: Option<&RowsCells<'_, E>>,
    weight: &[E],
    eps: f32,
    out: &RowsCells<'_, E>,
    rows: Range<usize>,
) {
    let dim = x.dim;
    let mut values = vec![0.0f32; dim.next_multiple_of(LANES)];
    for (row, head) in rows.flat_map(|row| (0..x.heads).map(move |head| (row, head))) {
        let source = x.head(row, head);
        if let Some(residual) = residual {
            for ((value, x), residual) in values.iter_mut().zip(source).zip(residual.head(row, head)) {
                let sum = E::from_f32(residual.get().to_f32() + x.get().to_f32());
                residual.set(sum);
                *value = sum.to_f32();
            }
        } else {
            for (value, x) in values.iter_mut().zip(source) {
                *value = x.get().to_f32();
            }
        }
        let mut squares: Lane = [0.0; LANES];
        for chunk in values.as_chunks().0 {
            squares = fma::<FUSED>(chunk, chunk, &squares);
        }
        let inverse = 1.0 / (sum(squares) / dim as f32 + eps).sqrt();
        for ((out, value), weight) in out.head(row, head).iter().zip(&values).zip(weight) {
            out.set(E::from_f32(E::from_f32(value * inverse).to_f32() * weight.to_f32()));
        }
    }
}
