//! `key_mass`: attention received by each key of a range, summed over chosen rows and all heads.
//!
//! Twin of `kernels/key_mass`. Exact, without a softmax pass: p = exp(q . k * scale - lse), and `attention` has returned
//! lse. Tasks are splits of 256 keys; a key's sum runs over heads of a KV head, KV heads, then rows, in order.

use std::ops::Range;

use crate::attention::{Side, Split, check_groups, score};
use crate::isa::by_isa;
use crate::lanes::{self, LANES, SCORES, SPLIT, widen};
use crate::{BlockTable, Element, Error, Exec, KvCache, Rows};

/// Query heads, of one row or of several, that read a key together.
const HEADS: usize = 4;

/// Arguments of `key_mass`.
#[derive(Clone, Debug)]
pub struct KeyMass<'a, E> {
    /// [T, H, D].
    pub q: Rows<'a, E>,
    /// [T, H, 1] of `attention` over the same cache.
    pub lse: Rows<'a, f32>,
    /// [B, block_size, KH, D].
    pub k_cache: KvCache<'a, E>,
    /// [1, blocks]: the sequence's row.
    pub block_table: BlockTable<'a>,
    /// Rows of `q` that score.
    pub rows: &'a [i32],
    /// [T]: the largest visible key.
    pub last_key: &'a [i32],
    /// Factor on q . k.
    pub scale: f32,
    /// Keys to score.
    pub keys: Range<usize>,
}

/// Writes `out` [keys]; cost rows * H * D multiply-adds per key. Errors before anything is written when shapes disagree or
/// a key lies outside the pool. A row that saw no key (lse = -infinity) adds nothing.
pub fn key_mass<E: Element>(exec: &Exec, args: &KeyMass<'_, E>, out: &mut [f32]) -> Result<(), Error> {
    check(args, out.len())?;
    let mut chunks: Vec<(Range<usize>, std::sync::Mutex<&mut [f32]>)> = Vec::new();
    let mut rest = out;
    let mut start = args.keys.start;
    while start < args.keys.end {
        let end = args.keys.end.min((start / SPLIT + 1) * SPLIT);
        let (chunk, tail) = rest.split_at_mut(end - start);
        chunks.push((start..end, std::sync::Mutex::new(chunk)));
        (rest, start) = (tail, end);
    }
    let work = args.rows.len() * args.keys.len() * args.q.heads * args.q.dim;
    exec.threads.run(chunks.len(), work, |task| {
        let (keys, out) = &chunks[task];
        compute_split(exec.isa, args, keys.clone(), &mut out.lock().expect("each task has a chunk of its own"));
    });
    Ok(())
}

fn check<E: Element>(args: &KeyMass<'_, E>, out_len: usize) -> Result<(), Error> {
    let (q, cache) = (&args.q, &args.k_cache.layout);
    let (start, end) = (args.keys.start, args.keys.end);
    let limit = args.block_table.blocks * cache.block_size;
    if start > end || end > limit {
        return Err(Error::KeyRange { start, end, limit });
    }
    for (name, found, expected) in [
        ("length of out", out_len, end - start),
        ("rows of lse", args.lse.rows, q.rows),
        ("heads of lse", args.lse.heads, q.heads),
        ("last dimension of lse", args.lse.dim, 1),
        ("length of last_key", args.last_key.len(), q.rows),
        ("head dim of k_cache", cache.dim, q.dim),
        ("rows of block_table_row", args.block_table.rows, 1),
    ] {
        if found != expected {
            return Err(Error::Shape { name, found, expected });
        }
    }
    for (index, &value) in args.rows.iter().enumerate() {
        if usize::try_from(value).map_or(true, |row| row >= q.rows) {
            return Err(Error::QueryRow { index, value, num_rows: q.rows });
        }
    }
    check_groups(q.heads, cache.kv_heads)?;
    args.block_table.check_keys(0, args.keys.clone(), cache.block_size, cache.num_blocks)
}

by_isa!(compute_split<E> = split_body(args: &KeyMass<'_, E>, keys: Range<usize>, out: &mut [f32]));

#[inline(always)]
fn split_body<E: Element, const FUSED: bool>(args: &KeyMass<'_, E>, keys: Range<usize>, out: &mut [f32]) {
    out.fill(0.0);
    let kv_heads = args.k_cache.layout.kv_heads;
    let (group, dim) = (args.q.heads / kv_heads, args.q.dim.next_multiple_of(LANES));
    let mut side = Side::default();
    let (mut q, mut scores) = (vec![0.0; HEADS * dim], vec![0.0; HEADS * SCORES]);
    for kv_head in 0..kv_heads {
        let table = args.block_table.row(0);
        let (start, end) = (keys.start, keys.end);
        side.turn::<E, FUSED>(&Split { cache: &args.k_cache, table, kv_head, start, end, limit: end });
        let lines = args.rows.len() * group;
        for first in (0..lines).step_by(HEADS) {
            let count = HEADS.min(lines - first);
            let mut seen = [0; HEADS];
            for i in 0..count {
                let row = args.rows[(first + i) / group] as usize; // checked by `check`
                let end = (i64::from(args.last_key[row]) + 1).clamp(keys.start as i64, keys.end as i64) as usize;
                seen[i] = end - keys.start;
                widen(args.q.head(row, kv_head * group + (first + i) % group), &mut q[i * dim..][..dim]);
            }
            let chunks = 0..seen.iter().max().copied().unwrap_or(0).div_ceil(LANES);
            let queries: [&[f32]; HEADS] = std::array::from_fn(|i| &q[i * dim..][..dim]);
            for chunk in chunks {
                score::<_, HEADS, 1, FUSED>(queries, &side.columns, chunk, args.scale, &mut scores, &mut ());
            }
            for (i, scores) in scores.chunks_exact(SCORES).enumerate().take(count) {
                let row = args.rows[(first + i) / group] as usize;
                let lse = args.lse.head(row, kv_head * group + (first + i) % group)[0];
                if lse != f32::NEG_INFINITY {
                    for (total, &score) in out[..seen[i]].iter_mut().zip(scores) {
                        *total += lanes::exp::<FUSED>(score - lse);
                    }
                }
            }
        }
    }
}
