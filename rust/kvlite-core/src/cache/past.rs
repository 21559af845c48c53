//! `Past`: how often blocks that are gone had been used and until when, so that one that comes back is not new.
//!
//! Owns two numbers under fingerprints of paths, nothing else. A collision or a loss changes the order of eviction, never a
//! hit: whoever looks a block up compares tokens. Never allocates after `new`. Called by `evict.rs`.

/// Places per block of the pool; eight bytes each, where the block's KV takes tens of kilobytes.
const PLACES_PER_BLOCK: usize = 8;

/// Bits of the number of uses.
const USES_BITS: u32 = 8;

/// A table of the size of a power of two, at least 2^8; a place holds what came last (0: nothing yet).
///
/// ```text
///   fingerprint   [ tag: 24 high bits | 8 low bits ]      its place: the low bits, at least 8 of them
///   entry  [ when ][ tag             | uses       ]      so place and tag together are the whole fingerprint
/// ```
pub(super) struct Past {
    entries: Vec<u64>,
}

impl Past {
    pub(super) fn new(num_blocks: usize) -> Past {
        Past { entries: vec![0; (num_blocks * PLACES_PER_BLOCK).next_power_of_two().max(1 << USES_BITS)] }
    }

    /// Remembers `uses`, 1 at least, until `when`, in the place of whatever was there.
    pub(super) fn remember(&mut self, fingerprint: u32, uses: u8, when: u32) {
        let place = self.place(fingerprint);
        let low = ((fingerprint >> USES_BITS) << USES_BITS) | u32::from(uses);
        self.entries[place] = u64::from(when) << 32 | u64::from(low);
    }

    /// Uses and until when, where they are remembered.
    pub(super) fn recall(&self, fingerprint: u32) -> Option<(u8, u32)> {
        let entry = self.entries[self.place(fingerprint)];
        let (low, when) = (entry as u32, (entry >> 32) as u32);
        let is_known = entry != 0 && low >> USES_BITS == fingerprint >> USES_BITS;
        is_known.then_some((low as u8, when))
    }

    fn place(&self, fingerprint: u32) -> usize {
        fingerprint as usize & (self.entries.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_gets_its_own_number_or_none_and_the_last_of_two_in_one_place_stays() {
        let mut past = Past::new(1);
        past.remember(7, 3, u32::MAX);
        assert_eq!([past.recall(7), past.recall(7 + 256), past.recall(8)], [Some((3, u32::MAX)), None, None]);
        past.remember(7 + 256, 9, 0);
        assert_eq!([past.recall(7), past.recall(7 + 256)], [None, Some((9, 0))]);
    }

    #[test]
    fn most_of_as_many_blocks_as_there_are_places_for_half_of_them_is_remembered() {
        let mut past = Past::new(1024);
        let fingerprint = |at: u32| at.wrapping_mul(0x9e37_79b9).rotate_left(13);
        let count = 1024 * PLACES_PER_BLOCK as u32 / 2;
        (0..count).for_each(|at| past.remember(fingerprint(at), 5, at));
        let kept = (0..count).filter(|&at| past.recall(fingerprint(at)) == Some((5, at))).count();
        assert!(kept > count as usize * 3 / 4, "{kept} of {count}");
    }
}
