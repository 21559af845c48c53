//! The frame that announces blocks: which ones follow as payload, with a digest of each.
//!
//! A stage may come in parts, numbered from 0; the last one says so. The payload itself is never copied here: its length is
//! the number of keys times `block_bytes`, and `verify` compares it block by block.

use super::wire::Reader;
use super::{BLOCKS, FrameError, begin, open, put_id, seal, take_id};
use crate::sched::migrate::MoveId;

/// Bytes of a block's digest.
pub const DIGEST_LEN: usize = 32;
/// Blocks of one part.
const MAX_KEYS: u32 = 1 << 18;

/// The digest of one block.
pub fn digest(block: &[u8]) -> [u8; DIGEST_LEN] {
    *blake3::hash(block).as_bytes()
}

/// One part of a stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlocksFrame {
    /// The move.
    pub id: MoveId,
    /// From 0; the frozen one is the last.
    pub stage: u32,
    /// From 0 within the stage.
    pub part: u32,
    /// No part of this stage follows.
    pub is_last: bool,
    /// Bytes of each block.
    pub block_bytes: u32,
    /// (choice, index of the block in the sequence), in the payload's order.
    pub keys: Vec<(i32, i32)>,
    /// One per key.
    pub digests: Vec<[u8; DIGEST_LEN]>,
}

impl BlocksFrame {
    /// As bytes. Errors when there are more keys than the format allows.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        if self.keys.len() > MAX_KEYS as usize || self.keys.len() != self.digests.len() {
            return Err(FrameError::Value { what: "number of blocks", value: self.keys.len() as i64 });
        }
        let mut to = begin(BLOCKS);
        put_id(&mut to, &self.id);
        to.u32(self.stage);
        to.u32(self.part);
        to.byte(u8::from(self.is_last));
        to.u32(self.block_bytes);
        to.count(self.keys.len());
        for (&(choice, index), digest) in self.keys.iter().zip(&self.digests) {
            to.i32(choice);
            to.i32(index);
            to.bytes.extend_from_slice(digest);
        }
        seal(to)
    }

    /// Parses a BLOCKS frame; another kind is refused.
    pub fn decode(bytes: &[u8]) -> Result<BlocksFrame, FrameError> {
        let (kind, body) = open(bytes)?;
        if kind != BLOCKS {
            return Err(FrameError::Kind { kind });
        }
        let mut from = Reader::new(body);
        let id = take_id(&mut from)?;
        let (stage, part) = (from.u32("stage")?, from.u32("part")?);
        let (is_last, block_bytes) = (from.flag("whether a part is the last")?, from.u32("block_bytes")?);
        let count = from.count(MAX_KEYS, 8 + DIGEST_LEN, "keys")?;
        let (mut keys, mut digests) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for _ in 0..count {
            let (choice, index) = (from.i32("choice")?, from.i32("block index")?);
            if choice < 0 || index < 0 {
                return Err(FrameError::Value { what: "key", value: choice.min(index).into() });
            }
            keys.push((choice, index));
            let mut digest = [0; DIGEST_LEN];
            digest.copy_from_slice(from.take(DIGEST_LEN, "digest")?);
            digests.push(digest);
        }
        from.finish()?;
        Ok(BlocksFrame { id, stage, part, is_last, block_bytes, keys, digests })
    }

    /// Whether `payload` is what the digests say. O(bytes).
    pub fn verify(&self, payload: &[u8]) -> bool {
        let block_bytes = self.block_bytes as usize;
        if self.keys.len().checked_mul(block_bytes) != Some(payload.len()) {
            return false;
        }
        block_bytes == 0
            || payload.chunks_exact(block_bytes).zip(&self.digests).all(|(block, expected)| digest(block) == *expected)
    }
}
