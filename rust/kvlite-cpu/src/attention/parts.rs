//! Results of tasks: rows of the caller, or parts of rows that were cut and wait to be merged.
//!
//! A part is one split of one row for one KV head. Parts are merged in ascending order, as a task that walks all splits
//! merges them, so a row has the same bits whether it was cut or not. Called by `attention`.

use std::sync::Mutex;

use super::plan::Cut;
use super::{Attention, merge};
use crate::isa::{Isa, by_isa};
use crate::{Element, RowsMut};

/// Where a task writes.
pub(super) struct Results<'a, 'v, E> {
    pub(super) out: &'a RowsMut<'v, E>,
    pub(super) lse: &'a RowsMut<'v, f32>,
    /// The task's part, where its row was cut.
    pub(super) part: Option<&'a mut [f32]>,
}

impl<E: Element> Results<'_, '_, E> {
    /// Writes the result of one line, which is a (row, head) of the task's tile and KV head.
    #[inline(always)]
    pub(super) fn write(&mut self, line: usize, (row, head): (usize, usize), (max, total): (f32, f32), acc: &[f32]) {
        let acc = &acc[..self.out.dim];
        if let Some(part) = &mut self.part {
            let part = &mut part[line * (acc.len() + 2)..][..acc.len() + 2];
            part[..2].copy_from_slice(&[max, total]);
            part[2..].copy_from_slice(acc);
            return;
        }
        let unseen = total == 0.0; // a visible key adds at least its own exp(0) or NaN
        // SAFETY: tasks are distinct (tile, KV head) pairs, and tiles without a part have distinct rows; `Parts::merge`
        // alone writes the rows of the others, after all tasks. So nobody else has this head.
        #[allow(unsafe_code)]
        unsafe {
            self.out.write_head(row, head, |d| E::from_f32(if unseen { 0.0 } else { acc[d] / total }));
            self.lse.write_head(row, head, |_| if unseen { f32::NEG_INFINITY } else { max + total.ln() });
        }
    }
}

/// Parts of a call, [parts, KV heads, group, (max, sum, output [dim])].
pub(super) struct Parts {
    values: Vec<f32>,
    /// Of one part.
    len: usize,
}

impl Parts {
    pub(super) fn new<E: Element>(args: &Attention<'_, E>, cuts: &[Cut]) -> Parts {
        let kv_heads = args.k_cache.layout.kv_heads;
        let len = args.q.heads / kv_heads * (args.q.dim + 2);
        Parts { values: vec![0.0; cuts.last().map_or(0, |cut| cut.parts.end) * kv_heads * len], len }
    }

    /// One for each task.
    pub(super) fn share(&mut self) -> Vec<Mutex<&mut [f32]>> {
        self.values.chunks_exact_mut(self.len).map(Mutex::new).collect()
    }

    /// Writes the row that was cut.
    pub(super) fn merge<E: Element>(
        &self,
        isa: Isa,
        args: &Attention<'_, E>,
        cut: &Cut,
        results: &mut Results<'_, '_, E>,
    ) {
        merge_parts(isa, args, cut, self, results);
    }
}

by_isa!(merge_parts<E> = merge_body(
    args: &Attention<'_, E>,
    cut: &Cut,
    parts: &Parts,
    results: &mut Results<'_, '_, E>,
));

#[inline(always)]
fn merge_body<E: Element, const FUSED: bool>(
    args: &Attention<'_, E>,
    cut: &Cut,
    parts: &Parts,
    results: &mut Results<'_, '_, E>,
) {
    let (heads, len) = (args.q.heads, args.q.dim + 2);
    let mut acc = vec![0.0; args.q.dim];
    for head in 0..heads {
        let mut state = (f32::NEG_INFINITY, 0.0);
        acc.fill(0.0);
        for part in cut.parts.clone() {
            // Heads of a KV head, KV heads and parts follow each other.
            let part = &parts.values[(part * heads + head) * len..][..len];
            if part[1] != 0.0 {
                merge::<FUSED>(&mut state, &mut acc, (part[0], part[1]), &part[2..]);
            }
        }
        results.write(0, (cut.row, head), state, &acc);
    }
}
