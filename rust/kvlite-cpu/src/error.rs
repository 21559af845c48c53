//! `Error`: what a caller of an op can get wrong, one sentence per variant. Nothing has been written when one is returned.

use thiserror::Error;

/// Errors unless `found` is `expected`.
pub(crate) fn expect_len(name: &'static str, found: usize, expected: usize) -> Result<(), Error> {
    if found == expected { Ok(()) } else { Err(Error::Shape { name, found, expected }) }
}

/// A refused argument, with its value and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// A length or a shape that disagrees with the others.
    #[error("{name} is {found}, expected {expected}")]
    Shape {
        /// The argument and dimension.
        name: &'static str,
        /// What was given.
        found: usize,
        /// What the other arguments ask for.
        expected: usize,
    },
    /// Strides that reach past the end of the memory, or that would make elements overlap.
    #[error("{name}: shape and strides do not fit its {len} elements")]
    Extent {
        /// The argument.
        name: &'static str,
        /// Elements of the memory.
        len: usize,
    },
    /// Query heads are not a multiple of KV heads.
    #[error("{heads} query heads cannot share {kv_heads} KV heads evenly")]
    HeadGroups {
        /// Query heads.
        heads: usize,
        /// KV heads.
        kv_heads: usize,
    },
    /// `query_start` does not rise from a row to a row.
    #[error("query_start[{index}] is {value}, allowed are {low} to {high}")]
    QueryStart {
        /// Position in `query_start`.
        index: usize,
        /// What was given.
        value: i32,
        /// Smallest allowed value.
        low: usize,
        /// Largest allowed value.
        high: usize,
    },
    /// A sequence names a row that the block table lacks.
    #[error("seq_row[{sequence}] is {value}, the block table has {rows} rows")]
    SeqRow {
        /// Position in `seq_row`.
        sequence: usize,
        /// What was given.
        value: i32,
        /// Rows of the block table.
        rows: usize,
    },
    /// More context than the block table can name.
    #[error("context_len[{sequence}] is {value}, a row of the block table holds 0 to {limit} tokens")]
    ContextLen {
        /// Position in `context_len`.
        sequence: usize,
        /// What was given.
        value: i32,
        /// Tokens of one block table row.
        limit: usize,
    },
    /// A visible key lies in a block outside the pool.
    #[error("block_table[{row}, {index}] is {block}, the pool has {num_blocks} blocks")]
    Block {
        /// Row of the block table.
        row: usize,
        /// Position in that row.
        index: usize,
        /// What was given.
        block: i32,
        /// Blocks of the pool.
        num_blocks: usize,
    },
    /// A group outside `group_seqs`, or with a negative number of keys.
    #[error("prefix_group[{index}] is [{first}, {count}, {keys}], which group_seqs does not hold")]
    PrefixGroup {
        /// Row of `prefix_group`.
        index: usize,
        /// Its first entry of `group_seqs`.
        first: i32,
        /// Its sequences.
        count: i32,
        /// Its keys.
        keys: i32,
    },
    /// A group names a sequence that is not there, or is in a group already.
    #[error("prefix_group[{index}] names sequence {seq}, which is in another one or none of the {sequences}")]
    GroupSeq {
        /// Row of `prefix_group`.
        index: usize,
        /// What was given.
        seq: i32,
        /// Sequences of the call.
        sequences: usize,
    },
    /// A sequence of a group has other keys than its first one, or rows that do not see them.
    #[error(
        "prefix_group[{index}] says that sequence {seq} shares {keys} keys, but other blocks hold them or a row sees fewer"
    )]
    GroupKeys {
        /// Row of `prefix_group`.
        index: usize,
        /// The sequence.
        seq: i32,
        /// Keys of the group.
        keys: usize,
    },
    /// A slot outside the pool.
    #[error("slot_mapping[{token}] is {slot}, allowed are -1 (skipped) to {last}")]
    Slot {
        /// Position in `slot_mapping`.
        token: usize,
        /// What was given.
        slot: i32,
        /// The last slot of the pool.
        last: usize,
    },
    /// A slot outside the pool, of a row that is placed.
    #[error("{name}[{row}] is {slot}, the pool has {slots} slots")]
    RowSlot {
        /// `source_slot` or `target_slot`.
        name: &'static str,
        /// Position in it.
        row: usize,
        /// What was given.
        slot: i32,
        /// Slots of the pool.
        slots: usize,
    },
    /// A slot that two rows would write, or that one would read while another writes it.
    #[error("{name}[{row}] is {slot}, which another row of target_slot writes")]
    SharedSlot {
        /// `source_slot` or `target_slot`.
        name: &'static str,
        /// Position in it.
        row: usize,
        /// What was given.
        slot: i32,
    },
    /// A scoring row outside the query.
    #[error("rows[{index}] is {value}, the query has {num_rows} rows")]
    QueryRow {
        /// Position in `rows`.
        index: usize,
        /// What was given.
        value: i32,
        /// Rows of the query.
        num_rows: usize,
    },
    /// A key range that no block table row can hold.
    #[error("key range {start}..{end} does not lie within 0..{limit}")]
    KeyRange {
        /// First key.
        start: usize,
        /// One past the last key.
        end: usize,
        /// Tokens of one block table row.
        limit: usize,
    },
    /// A token beyond the tables of cos and sin.
    #[error("positions[{token}] is {value}, the tables have {positions} positions")]
    Position {
        /// Position in `positions`.
        token: usize,
        /// What was given.
        value: i32,
        /// Rows of the tables.
        positions: usize,
    },
}
