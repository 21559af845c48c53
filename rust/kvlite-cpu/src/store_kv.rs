//! `store_kv`: new keys and values to their slots in the paged cache.
//!
//! One thread: a step stores kilobytes, waking another would cost more. Twin of `kernels/store_kv`.

use std::cell::Cell;

use crate::{Element, Error, KvCacheCells, Rows};

/// `cache[slot / block_size, slot % block_size] = row` for K and V; slot -1 is skipped.
///
/// `k`, `v` [T, KH, D] · caches [B, block_size, KH, D] · `slot_mapping` [T]. Errors before anything is written when shapes
/// disagree or a slot lies outside the pool.
pub fn store_kv<E: Element>(
    k: &Rows<'_, E>,
    v: &Rows<'_, E>,
    k_cache: &KvCacheCells<'_, E>,
    v_cache: &KvCacheCells<'_, E>,
    slot_mapping: &[i32],
) -> Result<(), Error> {
    let cache = k_cache.layout;
    for (name, found, expected) in [
        ("rows of v", v.rows, k.rows),
        ("length of slot_mapping", slot_mapping.len(), k.rows),
        ("heads of k", k.heads, cache.kv_heads),
        ("heads of v", v.heads, cache.kv_heads),
        ("head dim of k", k.dim, cache.dim),
        ("head dim of v", v.dim, cache.dim),
        ("blocks of v_cache", v_cache.layout.num_blocks, cache.num_blocks),
        ("block size of v_cache", v_cache.layout.block_size, cache.block_size),
        ("heads of v_cache", v_cache.layout.kv_heads, cache.kv_heads),
        ("head dim of v_cache", v_cache.layout.dim, cache.dim),
    ] {
        if found != expected {
            return Err(Error::Shape { name, found, expected });
        }
    }
    let slots = cache.num_blocks * cache.block_size;
    for (token, &slot) in slot_mapping.iter().enumerate() {
        if slot < -1 || slot >= 0 && slot as usize >= slots {
            return Err(Error::Slot { token, slot, last: slots.saturating_sub(1) });
        }
    }
    for (token, &slot) in slot_mapping.iter().enumerate() {
        let Ok(slot) = usize::try_from(slot) else { continue };
        let (block, within) = (slot / cache.block_size, slot % cache.block_size);
        for head in 0..cache.kv_heads {
            for (rows, cells) in [(k, k_cache), (v, v_cache)] {
                copy(rows.head(token, head), &cells.values[cells.layout.offset(block, within, head)..]);
            }
        }
    }
    Ok(())
}

fn copy<E: Element>(source: &[E], target: &[Cell<E>]) {
    for (cell, &value) in target[..source.len()].iter().zip(source) {
        cell.set(value);
    }
}
