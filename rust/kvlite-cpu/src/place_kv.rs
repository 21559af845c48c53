//! `place_kv`: unrotated rows of the pool to other slots, keys turned to their new positions, all layers.
//!
//! Twin of `kernels/place_kv`; turns by the function of `rope`. Bound by memory: tasks are (rows, layer), so that every
//! thread streams. Targets are distinct and no source, so no two tasks meet; that is checked before anything is written.

use std::ops::Range;

use crate::error::expect_len;
use crate::isa::by_isa;
use crate::rope::turn;
use crate::{Element, Error, Exec, PoolMut, Rows};

/// Rows of one task: their tables stay in a cache between K and the next layer.
const TASK_ROWS: usize = 64;

/// Arguments of `place_kv` beside the pool; P rows.
#[derive(Clone, Copy, Debug)]
pub struct PlaceKv<'a> {
    /// [P]: slots to read, in all layers.
    pub source_slot: &'a [i32],
    /// [P]: slots to write; distinct, none of them a source.
    pub target_slot: &'a [i32],
    /// [P]: the position that each row gets.
    pub positions: &'a [i32],
    /// [positions, 1, half].
    pub cos: Rows<'a, f32>,
    /// [positions, 1, half].
    pub sin: Rows<'a, f32>,
}

/// For every row and layer: K of the target = rotated K of the source, in f32, rounded once; V of the target = V of the
/// source. Cost O(slots / 64) beside the rows. Errors before anything is written when lengths disagree, a slot or a
/// position does not exist, or a target is named twice or read as well.
pub fn place_kv<E: Element>(exec: &Exec, args: &PlaceKv<'_>, pool: &mut PoolMut<'_, E>) -> Result<(), Error> {
    check(args, pool)?;
    let rows = args.source_slot.len();
    let chunks = rows.div_ceil(TASK_ROWS);
    let work = rows * pool.layers * 2 * pool.kv_heads * pool.dim;
    let pool = &*pool;
    exec.threads.run(chunks * pool.layers, work, |task| {
        let (first, layer) = (task / pool.layers * TASK_ROWS, task % pool.layers);
        place_rows(exec.isa, args, pool, layer, first..rows.min(first + TASK_ROWS));
    });
    Ok(())
}

fn check<E: Element>(args: &PlaceKv<'_>, pool: &PoolMut<'_, E>) -> Result<(), Error> {
    let (rows, cos, sin) = (args.source_slot.len(), &args.cos, &args.sin);
    expect_len("length of target_slot", args.target_slot.len(), rows)?;
    expect_len("length of positions", args.positions.len(), rows)?;
    expect_len("rows of sin", sin.rows, cos.rows)?;
    expect_len("columns of sin", sin.dim, cos.dim)?;
    if 2 * cos.dim > pool.dim {
        return Err(Error::Shape { name: "columns of cos", found: cos.dim, expected: pool.dim / 2 });
    }
    for (token, &value) in args.positions.iter().enumerate() {
        if usize::try_from(value).map_or(true, |position| position >= cos.rows) {
            return Err(Error::Position { token, value, positions: cos.rows });
        }
    }
    let slots = pool.num_blocks * pool.block_size;
    let mut written = vec![0u64; slots.div_ceil(64)];
    let bit = |slot: usize| (slot / 64, 1u64 << (slot % 64));
    for (name, values) in [("target_slot", args.target_slot), ("source_slot", args.source_slot)] {
        for (row, &value) in values.iter().enumerate() {
            let Some(slot) = usize::try_from(value).ok().filter(|&slot| slot < slots) else {
                return Err(Error::RowSlot { name, row, slot: value, slots });
            };
            let (word, mask) = bit(slot);
            if written[word] & mask != 0 {
                return Err(Error::SharedSlot { name, row, slot: value });
            }
            if name == "target_slot" {
                written[word] |= mask;
            }
        }
    }
    Ok(())
}

by_isa!(place_rows<E> = place_rows_body(
    args: &PlaceKv<'_>,
    pool: &PoolMut<'_, E>,
    layer: usize,
    rows: Range<usize>,
));

#[inline(always)]
fn place_rows_body<E: Element, const FUSED: bool>(
    args: &PlaceKv<'_>,
    pool: &PoolMut<'_, E>,
    layer: usize,
    rows: Range<usize>,
) {
    let half = args.cos.dim;
    for row in rows {
        let (source, target) = (args.source_slot[row] as usize, args.target_slot[row] as usize); // checked by `check`
        let (cos, sin) = (args.cos.row(args.positions[row] as usize), args.sin.row(args.positions[row] as usize));
        for kv_head in 0..pool.kv_heads {
            // SAFETY: `check` found the targets distinct and none of them a source; tasks have distinct (row, layer) pairs.
            #[allow(unsafe_code)]
            let [(k, new_k), (v, new_v)] =
                [0, 1].map(|side| unsafe { pool.source_and_target(layer, side, kv_head, source, target) });
            let ((low, high), (new_low, new_high)) =
                (k[..2 * half].split_at(half), new_k[..2 * half].split_at_mut(half));
            let angles = cos.iter().zip(sin);
            for ((((&a, &b), new_a), new_b), (&cos, &sin)) in
                low.iter().zip(high).zip(new_low).zip(new_high).zip(angles)
            {
                let (turned_a, turned_b) = turn(a.to_f32(), b.to_f32(), cos, sin);
                *new_a = E::from_f32(turned_a);
                *new_b = E::from_f32(turned_b);
            }
            new_k[2 * half..].copy_from_slice(&k[2 * half..]);
            new_v.copy_from_slice(v);
        }
    }
}
