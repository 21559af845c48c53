//! What the tasks of a call are: checks every argument, cuts sequences into tiles, and long rows into splits.
//!
//! Knows no instruction set and reads neither queries nor keys. Called by `attention`.

use std::cmp::Reverse;
use std::ops::Range;

use super::{Attention, check_groups};
use crate::lanes::SPLIT;
use crate::{Element, Error, RowsMut};

/// Rows of one task: they share the copy of a split.
pub(super) const TILE_ROWS: usize = 32;

/// Rows that a task computes over one block table, with the keys of it that any of them sees.
#[derive(Clone)]
pub(super) struct Tile {
    /// Whose block table and context it is.
    pub(super) sequence: usize,
    pub(super) rows: TileRows,
    pub(super) keys: Range<usize>,
    /// Its results are no rows of the caller's but this part: of a row that was cut, or the keys that a group shares.
    pub(super) part: Option<usize>,
    /// Its rows go on from where this part of their group left them, its rows from this one on.
    pub(super) begun: Option<(usize, usize)>,
}

/// Rows of a tile.
#[derive(Clone)]
pub(super) enum TileRows {
    /// Of one sequence.
    Run(Range<usize>),
    /// Of a group.
    Listed(Vec<usize>),
}

impl TileRows {
    #[inline(always)]
    pub(super) fn at(&self, index: usize) -> usize {
        match self {
            TileRows::Run(rows) => rows.start + index,
            TileRows::Listed(rows) => rows[index],
        }
    }

    pub(super) fn extend(&mut self, more: Vec<usize>) {
        match self {
            TileRows::Run(rows) => *self = TileRows::Listed(rows.clone().chain(more).collect()),
            TileRows::Listed(rows) => rows.extend(more),
        }
    }

    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        match self {
            TileRows::Run(rows) => rows.len(),
            TileRows::Listed(rows) => rows.len(),
        }
    }
}

impl Tile {
    /// In visible keys: bytes of one row, multiply-adds of many.
    pub(super) fn cost(&self) -> usize {
        self.rows.len() * self.keys.len()
    }
}

/// A row that was cut.
pub(super) struct Cut {
    pub(super) row: usize,
    pub(super) parts: Range<usize>,
    /// As `Tile::begun`.
    pub(super) begun: Option<(usize, usize)>,
}

/// Cuts rows into splits that would keep one thread busy while others have nothing left; the longest tasks come first.
///
/// A cut row costs its partial results and what is not fetched ahead. So none is cut where the long ones share the threads
/// evenly: one sequence of two KV heads on two threads, say.
pub(super) fn cut(mut tiles: Vec<Tile>, kv_heads: usize, threads: usize) -> (Vec<Tile>, Vec<Cut>) {
    tiles.sort_unstable_by_key(|tile| Reverse(tile.cost()));
    let share = tiles.iter().map(Tile::cost).sum::<usize>() * kv_heads / threads;
    let long = tiles.iter().take_while(|tile| tile.cost() > share / 4).count();
    let rounds = (long * kv_heads).div_ceil(threads);
    if long == 0 || rounds * tiles[0].cost() <= share + share / 8 {
        return (tiles, vec![]);
    }
    let (mut cuts, mut parts) = (vec![], 0);
    let (mut whole, mut pieces) = (vec![], vec![]);
    for (i, tile) in tiles.into_iter().enumerate() {
        if i >= long || tile.rows.len() > 1 {
            whole.push(tile);
            continue;
        }
        let first = parts;
        let mut start = tile.keys.start;
        while start < tile.keys.end {
            let end = tile.keys.end.min((start / SPLIT + 1) * SPLIT);
            pieces.push(Tile { keys: start..end, part: Some(parts), begun: None, ..tile.clone() });
            (start, parts) = (end, parts + 1);
        }
        cuts.push(Cut { row: tile.rows.at(0), parts: first..parts, begun: tile.begun });
    }
    whole.extend(pieces);
    whole.sort_unstable_by_key(|tile| Reverse(tile.cost()));
    (whole, cuts)
}

impl<E: Element> Attention<'_, E> {
    /// Checks every argument and cuts the sequences into tiles.
    pub(super) fn plan(&self, out: &RowsMut<'_, E>, lse: &RowsMut<'_, f32>) -> Result<Vec<Tile>, Error> {
        self.check_shapes(out, lse)?;
        let cache = self.k_cache.layout;
        let limit = self.block_table.blocks * cache.block_size;
        let mut tiles = Vec::with_capacity(self.seq_row.len());
        self.check_start(0, 0)?;
        for sequence in 0..self.seq_row.len() {
            let first = self.check_start(sequence, 0)?;
            let last = self.check_start(sequence + 1, first)?;
            let value = self.seq_row[sequence];
            let row = usize::try_from(value).ok().filter(|&row| row < self.block_table.rows);
            let row = row.ok_or(Error::SeqRow { sequence, value, rows: self.block_table.rows })?;
            let value = self.context_len[sequence];
            if value < 0 || value as usize > limit {
                return Err(Error::ContextLen { sequence, value, limit });
            }
            let mut seen = Range { start: limit, end: 0 };
            for start in (first..last).step_by(TILE_ROWS) {
                let rows = start..last.min(start + TILE_ROWS);
                let mut keys = Range { start: limit, end: 0 };
                for visible in rows.clone().map(|row| self.visible(sequence, row)).filter(|keys| !keys.is_empty()) {
                    keys = keys.start.min(visible.start)..keys.end.max(visible.end);
                }
                seen = seen.start.min(keys.start)..seen.end.max(keys.end);
                tiles.push(Tile { sequence, rows: TileRows::Run(rows), keys, part: None, begun: None });
            }
            self.block_table.check_keys(row, seen, cache.block_size, cache.num_blocks)?;
        }
        Ok(tiles)
    }

    fn check_shapes(&self, out: &RowsMut<'_, E>, lse: &RowsMut<'_, f32>) -> Result<(), Error> {
        let (q, k, v) = (&self.q, &self.k_cache.layout, &self.v_cache.layout);
        let sequences = self.seq_row.len();
        for (name, found, expected) in [
            ("rows of out", out.rows, q.rows),
            ("heads of out", out.heads, q.heads),
            ("head dim of out", out.dim, q.dim),
            ("rows of lse", lse.rows, q.rows),
            ("heads of lse", lse.heads, q.heads),
            ("last dimension of lse", lse.dim, 1),
            ("length of last_key", self.last_key.len(), q.rows),
            ("length of context_len", self.context_len.len(), sequences),
            ("length of query_start", self.query_start.len(), sequences + 1),
            ("head dim of k_cache", k.dim, q.dim),
            ("head dim of v_cache", v.dim, k.dim),
            ("heads of v_cache", v.kv_heads, k.kv_heads),
            ("block size of v_cache", v.block_size, k.block_size),
            ("blocks of v_cache", v.num_blocks, k.num_blocks),
        ] {
            if found != expected {
                return Err(Error::Shape { name, found, expected });
            }
        }
        check_groups(q.heads, k.kv_heads)
    }

    fn check_start(&self, index: usize, low: usize) -> Result<usize, Error> {
        let (value, high) = (self.query_start[index], self.q.rows);
        let start = usize::try_from(value).ok().filter(|start| (low..=high).contains(start));
        start.ok_or(Error::QueryStart { index, value, low, high })
    }

    /// The keys that a row sees.
    #[inline(always)]
    pub(super) fn visible(&self, sequence: usize, row: usize) -> Range<usize> {
        let end = (i64::from(self.last_key[row]) + 1).clamp(0, i64::from(self.context_len[sequence])) as usize;
        let past_last = (i64::from(self.last_key[row]) + 1).max(0) as usize;
        let start = if self.window == 0 { 0 } else { past_last.saturating_sub(self.window) };
        if start < end { start..end } else { 0..0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(contexts: &[usize]) -> Vec<Tile> {
        let tile = |(row, &end): (usize, &usize)| Tile {
            sequence: row,
            rows: TileRows::Run(row..row + 1),
            keys: 0..end,
            part: None,
            begun: None,
        };
        contexts.iter().enumerate().map(tile).collect()
    }

    #[test]
    fn rows_that_share_the_threads_evenly_stay_whole() {
        for (contexts, kv_heads, threads) in
            [(&[4096][..], 2, 2), (&[4096], 1, 1), (&[1024; 8], 2, 4), (&[64; 3], 8, 2)]
        {
            let (tiles, cuts) = cut(rows(contexts), kv_heads, threads);
            assert!(tiles.len() == contexts.len() && cuts.is_empty(), "{contexts:?} on {threads} threads");
        }
    }

    #[test]
    fn a_long_row_is_cut_at_splits_and_short_ones_are_not() {
        let (tiles, cuts) = cut(rows(&[64, 4000, 64]), 2, 8);
        assert!(cuts.len() == 1 && cuts[0].row == 1 && cuts[0].parts == (0..16));
        assert_eq!(tiles.len(), 2 + 16);
        let mut next = 0;
        let mut parts: Vec<&Tile> = tiles.iter().filter(|tile| tile.part.is_some()).collect();
        parts.sort_by_key(|tile| tile.part);
        for tile in parts {
            assert!(tile.keys.start == next && tile.keys.start.is_multiple_of(SPLIT));
            assert!(tile.rows.len() == 1 && tile.rows.at(0) == 1);
            next = tile.keys.end;
        }
        assert_eq!(next, 4000);
    }
}
