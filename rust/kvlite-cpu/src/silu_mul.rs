//! `silu_mul`: SiLU of one half of a projection times its other half.
//!
//! Twin of `kernels/silu_mul`: fp32 inside, rounded once.

use std::ops::Range;

use crate::error::expect_len;
use crate::isa::by_isa;
use crate::lanes::exp;
use crate::view::by_row;
use crate::{Element, Error, Exec, Rows, RowsCells};

/// Multiply-adds that an exponential and a division cost.
const EXP_WORK: usize = 16;

/// out = gate / (1 + e^-gate) * up; `gate_up` [T, 1, 2F], the gate first · `out` [T, 1, F].
///
/// Errors before anything is written when shapes disagree.
pub fn silu_mul<E: Element>(exec: &Exec, gate_up: &Rows<'_, E>, out: &RowsCells<'_, E>) -> Result<(), Error> {
    expect_len("rows of out", out.rows, gate_up.rows)?;
    expect_len("heads of out", out.heads, gate_up.heads)?;
    expect_len("columns of gate_up", gate_up.dim, 2 * out.dim)?;
    let work = out.rows * out.heads * out.dim * EXP_WORK;
    by_row(&exec.threads, [*out], work, |rows, [out]| gate(exec.isa, gate_up, out, rows));
    Ok(())
}

by_isa!(gate<E> = gate_body(gate_up: &Rows<'_, E>, out: &RowsCells<'_, E>, rows: Range<usize>));

#[inline(always)]
fn gate_body<E: Element, const FUSED: bool>(gate_up: &Rows<'_, E>, out: &RowsCells<'_, E>, rows: Range<usize>) {
    for (row, head) in rows.flat_map(|row| (0..out.heads).map(move |head| (row, head))) {
        let (gate, up) = gate_up.head(row, head).split_at(out.dim);
        for ((out, gate), up) in out.head(row, head).iter().zip(gate).zip(up) {
            let gate = gate.to_f32();
            out.set(E::from_f32(gate / (1.0 + exp::<FUSED>(-gate)) * up.to_f32()));
        }
    }
}
