//! Prefix groups: rows of several sequences walk the splits that they share as one tile, and go on alone from there.
//!
//! ```text
//!   sequence 2   [ split 0 | split 1 ]  +  [ split 2 | ..
//!   sequence 5   [     one tile      ]  +  [ split 2 ..          its own tile, begun where the shared one ended
//!   sequence 6   [                   ]  +  [ split 2 | split 3 ..
//! ```
//!
//! Keys of a shared split are read, turned and scored for all rows at once. Splits and their order are those of each row
//! alone, so the bits are too. Called by `attention`.

use super::Attention;
use super::plan::{TILE_ROWS, Tile, TileRows};
use crate::lanes::SPLIT;
use crate::{Element, Error};

/// Which sequences share their first keys.
#[derive(Clone, Copy, Debug)]
pub struct PrefixGroups<'a> {
    /// [G, 3]: first entry of `seqs`, sequences, keys that they share; without sequences it is none.
    pub groups: &'a [[i32; 3]],
    /// [M]: sequences, group by group.
    pub seqs: &'a [i32],
}

/// Takes the shared whole splits out of `tiles`, which are all of a call; returns the tiles that compute those.
///
/// A sequence of more rows than a tile holds keeps its own: they share every key already.
pub(super) fn take_prefixes<E: Element>(args: &Attention<'_, E>, tiles: &mut [Tile]) -> Result<Vec<Tile>, Error> {
    let mut shared = vec![];
    let Some(groups) = args.groups.filter(|groups| args.window == 0 && !groups.groups.is_empty()) else {
        return Ok(shared);
    };
    // By sequence: how many tiles it has, and the last of them.
    let mut tiles_of = vec![(0, 0); args.seq_row.len()];
    for (at, tile) in tiles.iter().enumerate() {
        tiles_of[tile.sequence] = (tiles_of[tile.sequence].0 + 1, at);
    }
    for (index, &[first, count, keys]) in groups.groups.iter().enumerate() {
        let (Some(members), Ok(keys)) = (members(groups.seqs, first, count), usize::try_from(keys)) else {
            return Err(Error::PrefixGroup { index, first, count, keys });
        };
        let mut open: Option<Tile> = None;
        for &seq in members {
            let sequence = usize::try_from(seq).ok().filter(|&seq| seq < tiles_of.len());
            let sequence = sequence.ok_or(Error::GroupSeq { index, seq, sequences: tiles_of.len() })?;
            let leader = members[0] as usize; // in range, or the first round would have ended
            if !args.shares(leader, sequence, keys) {
                return Err(Error::GroupKeys { index, seq, keys });
            }
            let (1, at) = tiles_of[sequence] else { continue };
            let tile = &mut tiles[at];
            if tile.begun.is_some() {
                return Err(Error::GroupSeq { index, seq, sequences: tiles_of.len() });
            }
            let rows: Vec<usize> = (0..tile.rows.len()).map(|row| tile.rows.at(row)).collect();
            if rows.iter().any(|&row| args.visible(sequence, row).end < keys) {
                return Err(Error::GroupKeys { index, seq, keys });
            }
            let whole = 0..keys / SPLIT * SPLIT;
            if whole.is_empty() {
                continue;
            }
            let full = open.take_if(|open| open.rows.len() + rows.len() > TILE_ROWS);
            shared.extend(full);
            let part = shared.len();
            let open = open.get_or_insert_with(|| Tile {
                sequence: leader,
                rows: TileRows::Listed(Vec::with_capacity(TILE_ROWS)),
                keys: whole.clone(),
                part: Some(part),
                begun: None,
            });
            tile.begun = Some((part, open.rows.len()));
            tile.keys.start = whole.end;
            open.rows.extend(rows);
        }
        shared.extend(open);
    }
    Ok(shared)
}

fn members(seqs: &[i32], first: i32, count: i32) -> Option<&[i32]> {
    let (first, count) = (usize::try_from(first).ok()?, usize::try_from(count).ok()?);
    seqs.get(first..first.checked_add(count)?)
}

impl<E: Element> Attention<'_, E> {
    /// Whether the first `keys` keys of two sequences lie in the same blocks.
    fn shares(&self, a: usize, b: usize, keys: usize) -> bool {
        let blocks = keys.div_ceil(self.k_cache.layout.block_size);
        let of = |sequence: usize| self.block_table.row(self.seq_row[sequence] as usize).get(..blocks);
        of(a).is_some() && of(a) == of(b)
    }
}
