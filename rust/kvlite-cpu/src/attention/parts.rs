//! Results of tasks: rows of the caller, or parts of rows, which are merged or gone on with.
//!
//! A part is one split of a row that was cut, or what the rows of a group have after the keys that they share. Parts are
//! merged in ascending order, as a task that walks all splits merges them, so a row has the same bits whether it was cut
//! or not, alone or in a group. Called by `attention`.

use std::sync::Mutex;

use super::plan::{Cut, Tile};
use super::{Attention, merge};
use crate::isa::{Isa, by_isa};
use crate::{Element, RowsMut};

/// Where a task writes.
pub(super) struct Results<'a, 'v, E> {
    pub(super) out: &'a RowsMut<'v, E>,
    pub(super) lse: &'a RowsMut<'v, f32>,
    /// The task's part, where it has one.
    pub(super) part: Option<&'a mut [f32]>,
    /// What tiles go on from.
    pub(super) begun: &'a Parts,
}

impl<E: Element> Results<'_, '_, E> {
    /// Sets the running result of a line to what its group has computed, where it is in one: `begun` of its tile.
    #[inline(always)]
    pub(super) fn resume(
        &self,
        begun: Option<(usize, usize)>,
        line: usize,
        kv_head: usize,
        state: &mut (f32, f32),
        acc: &mut [f32],
    ) {
        if let Some((part, row)) = begun {
            let dim = self.out.dim;
            let found = &self.begun.of(part, kv_head)[(row * self.begun.group + line) * (dim + 2)..][..dim + 2];
            *state = (found[0], found[1]);
            acc[..dim].copy_from_slice(&found[2..]);
        }
    }

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

/// Parts of a call, [parts, KV heads, rows of the tile, group, (max, sum, output [dim])].
#[derive(Default)]
pub(super) struct Parts {
    values: Vec<f32>,
    /// Where each part begins, and where the last one ends.
    starts: Vec<usize>,
    kv_heads: usize,
    /// Query heads per KV head.
    group: usize,
}

impl Parts {
    /// Of the tiles that have one; those are numbered from 0 on in some order.
    pub(super) fn new<E: Element>(args: &Attention<'_, E>, tiles: &[Tile]) -> Parts {
        let kv_heads = args.k_cache.layout.kv_heads;
        let mut starts = vec![0; 1 + tiles.iter().filter(|tile| tile.part.is_some()).count()];
        for tile in tiles {
            if let Some(part) = tile.part {
                starts[part + 1] = tile.rows.len() * args.q.heads * (args.q.dim + 2);
            }
        }
        for part in 1..starts.len() {
            starts[part] += starts[part - 1];
        }
        let values = vec![0.0; starts[starts.len() - 1]];
        Parts { values, starts, kv_heads, group: args.q.heads / kv_heads }
    }

    /// One for each part and KV head.
    pub(super) fn share(&mut self) -> Vec<Mutex<&mut [f32]>> {
        let mut rest = &mut self.values[..];
        let mut shares = Vec::with_capacity((self.starts.len() - 1) * self.kv_heads);
        for ends in self.starts.windows(2) {
            for _ in 0..self.kv_heads {
                let (share, others) = rest.split_at_mut((ends[1] - ends[0]) / self.kv_heads);
                shares.push(Mutex::new(share));
                rest = others;
            }
        }
        shares
    }

    /// [rows of the tile, group, (max, sum, output)].
    #[inline(always)]
    fn of(&self, part: usize, kv_head: usize) -> &[f32] {
        let (start, end) = (self.starts[part], self.starts[part + 1]);
        let len = (end - start) / self.kv_heads;
        &self.values[start + kv_head * len..][..len]
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
    let (group, dim) = (parts.group, args.q.dim);
    let mut acc = vec![0.0; dim];
    for head in 0..args.q.heads {
        let (kv_head, line) = (head / group, head % group);
        let mut state = (f32::NEG_INFINITY, 0.0);
        acc.fill(0.0);
        results.resume(cut.begun, line, kv_head, &mut state, &mut acc);
        for part in cut.parts.clone() {
            let part = &parts.of(part, kv_head)[line * (dim + 2)..][..dim + 2];
            if part[1] != 0.0 {
                merge::<FUSED>(&mut state, &mut acc, (part[0], part[1]), &part[2..]);
            }
        }
        results.write(0, (cut.row, head), state, &acc);
    }
}
