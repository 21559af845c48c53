//! `BlockHash`: a keyed hash of one edge of the tree, that is a parent, a label and the tokens of a block.
//!
//! Owns two secret numbers made from `hash_seed`, so that nobody who chooses prompts can choose collisions. No decision
//! depends on the value: the tree compares tokens whatever it says. Called by `radix.rs`.

use crate::ids::{Label, Token};

/// Folded multiplication, two tokens per factor: 5 multiplications for a block of 16.
pub(super) struct BlockHash {
    keys: [u64; 2],
}

impl BlockHash {
    pub(super) fn new(seed: u64) -> BlockHash {
        let state = fold(seed ^ 0x9e37_79b9_7f4a_7c15, 0xd6e8_feb8_6659_fd93);
        BlockHash { keys: [state, fold(seed ^ 0xe703_7ed1_a0b4_28db, 0xa076_1d64_78bd_642f) | 1] }
    }

    pub(super) fn of(&self, parent: u32, label: Label, tokens: &[Token]) -> u32 {
        let pair = |pair: &[Token]| u64::from(pair[0] as u32) << 32 | u64::from(pair[1] as u32);
        // Folded before a token comes to it, or a label and a first token that differ in the same bits would cancel out.
        let mut state = fold(self.keys[0] ^ (u64::from(label.number()) << 32 | u64::from(parent)), self.keys[1]);
        let quads = tokens.chunks_exact(4);
        let rest = quads.remainder();
        for quad in quads {
            state = fold(state ^ pair(&quad[..2]), self.keys[1] ^ pair(&quad[2..]));
        }
        for &token in rest {
            state = fold(state ^ u64::from(token as u32), self.keys[1]);
        }
        (state ^ state >> 32) as u32
    }
}

/// Both halves of the 128-bit product, xored.
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_depends_on_the_seed_the_parent_the_label_and_every_bit_of_the_tokens() {
        let (hash, tokens, label) = (BlockHash::new(1), [1, 2, 3, 4, 5, 6], Label::PUBLIC);
        for at in 0..tokens.len() {
            for bit in 0..31 {
                let mut other = tokens;
                other[at] ^= 1 << bit;
                assert_ne!(
                    hash.of(0, label, &other),
                    hash.of(0, label, &tokens),
                    "bit {bit} of token {at} does not matter"
                );
            }
        }
        assert_ne!(hash.of(1, label, &tokens), hash.of(0, label, &tokens));
        assert_ne!(hash.of(0, Label::recipe(0), &tokens), hash.of(0, label, &tokens));
        let (own, other) = (hash.of(0, Label::recipe(0), &[1; 16]), hash.of(0, Label::recipe(1), &[0; 16]));
        assert_ne!(own, other, "a label is not one more bit of the first token");
        assert_ne!(BlockHash::new(2).of(0, label, &tokens), hash.of(0, label, &tokens));
    }

    #[test]
    fn blocks_that_differ_little_spread_over_the_buckets() {
        let hash = BlockHash::new(1);
        let mut lens = [0; 1024];
        for at in 0..1024 {
            lens[hash.of(0, Label::PUBLIC, &[at; 16]) as usize % 1024] += 1;
        }
        let longest = lens.into_iter().max();
        assert!(longest <= Some(8), "1,024 blocks in 1,024 buckets, one of which holds {longest:?}");
    }
}
