//! `FreeMap`: which blocks are free, and where the next run of them should start.
//!
//! Owns one bit per block and two summaries with one bit per 64 blocks, so that a search costs O(num_blocks / 4096) words
//! however full the pool is. Knows neither states nor names; `blocks.rs` keeps both in step with it.
//! Next-fit over whole groups of 64: a new run gets room to grow before it meets its neighbour, which is what keeps the
//! blocks of one sequence contiguous although sequences grow by turns, one block at a time.

/// Blocks per word of the map.
const WORD: usize = u64::BITS as usize;

/// The set of free blocks.
pub(super) struct FreeMap {
    /// Bit `b % 64` of word `b / 64`: block `b` is free.
    words: Vec<u64>,
    /// Bit `w % 64` of word `w / 64`: word `w` has a free block.
    some: Vec<u64>,
    /// Bit `w % 64` of word `w / 64`: every block of word `w` is free.
    whole: Vec<u64>,
    /// Blocks in the pool; the last word may be cut short.
    num_blocks: usize,
    /// Word at which the last run started; the next search begins here, so that freed blocks rest before they are reused.
    cursor: usize,
}

impl FreeMap {
    /// All of `num_blocks` free.
    pub(super) fn new(num_blocks: usize) -> FreeMap {
        let num_words = num_blocks.div_ceil(WORD);
        let summary = vec![0; num_words.div_ceil(WORD)];
        let mut map =
            FreeMap { words: vec![0; num_words], some: summary.clone(), whole: summary, num_blocks, cursor: 0 };
        for block in 0..num_blocks {
            map.insert(block as u32);
        }
        map
    }

    /// Whether `block` exists and is free.
    pub(super) fn contains(&self, block: u32) -> bool {
        let block = block as usize;
        block < self.num_blocks && self.words[block / WORD] >> (block % WORD) & 1 == 1
    }

    /// Marks a block that is not free as free.
    pub(super) fn insert(&mut self, block: u32) {
        let (word, bit) = (block as usize / WORD, 1 << (block as usize % WORD));
        self.words[word] |= bit;
        set(&mut self.some, word);
        if self.words[word] == self.all_of(word) {
            set(&mut self.whole, word);
        }
    }

    /// Marks a free block as taken.
    pub(super) fn remove(&mut self, block: u32) {
        let (word, bit) = (block as usize / WORD, 1 << (block as usize % WORD));
        self.words[word] &= !bit;
        clear(&mut self.whole, word);
        if self.words[word] == 0 {
            clear(&mut self.some, word);
        }
    }

    /// The free block at which a new run should start: the next wholly free word, else the next word with a free block.
    pub(super) fn start_of_run(&mut self) -> Option<u32> {
        let word = next(&self.whole, self.cursor).or_else(|| next(&self.some, self.cursor))?;
        self.cursor = word;
        Some((word * WORD) as u32 + self.words[word].trailing_zeros())
    }

    /// Checks the summaries and the unused bits; returns the number of free blocks.
    pub(super) fn audit(&self) -> usize {
        for (word, &bits) in self.words.iter().enumerate() {
            assert!(bits & !self.all_of(word) == 0, "word {word} of the free map names blocks beyond the pool");
            assert!(get(&self.some, word) == (bits != 0), "word {word} is wrong in the summary of free blocks");
            assert!(
                get(&self.whole, word) == (bits == self.all_of(word)),
                "word {word} is wrong in the summary of runs"
            );
        }
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The bits of `word` that stand for blocks.
    fn all_of(&self, word: usize) -> u64 {
        let len = (self.num_blocks - word * WORD).min(WORD);
        u64::MAX >> (WORD - len)
    }
}

fn get(bits: &[u64], at: usize) -> bool {
    bits[at / WORD] >> (at % WORD) & 1 == 1
}

fn set(bits: &mut [u64], at: usize) {
    bits[at / WORD] |= 1 << (at % WORD);
}

fn clear(bits: &mut [u64], at: usize) {
    bits[at / WORD] &= !(1 << (at % WORD));
}

/// First set bit at or after `from`, going round once.
fn next(bits: &[u64], from: usize) -> Option<usize> {
    let start = from / WORD;
    let head = bits[start] & (u64::MAX << (from % WORD));
    if head != 0 {
        return Some(start * WORD + head.trailing_zeros() as usize);
    }
    // `start` comes last again, for its bits below `from`.
    (start + 1..bits.len())
        .chain(0..=start)
        .find(|&word| bits[word] != 0)
        .map(|word| word * WORD + bits[word].trailing_zeros() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_search_goes_round_and_finds_the_only_free_block_behind_the_cursor() {
        let mut map = FreeMap::new(9000);
        for block in 0..9000 {
            map.remove(block);
        }
        assert_eq!(map.start_of_run(), None);
        for block in [8999, 4097, 4096, 63, 0] {
            map.insert(block);
            assert_eq!(map.start_of_run(), Some(block));
            map.remove(block);
        }
        assert_eq!(map.audit(), 0);
    }

    #[test]
    fn a_new_run_starts_in_a_word_of_its_own_while_there_is_one() {
        let mut map = FreeMap::new(130);
        for expected in [0, 64, 128] {
            let block = map.start_of_run().expect("free blocks are left");
            assert_eq!(block, expected);
            map.remove(block);
        }
        assert_eq!(map.start_of_run(), Some(129), "no word is whole: the next free block after the cursor");
    }

    #[test]
    fn a_block_beyond_the_pool_is_never_free() {
        let map = FreeMap::new(65);
        assert!(map.contains(64) && !map.contains(65) && !map.contains(128));
        assert_eq!(map.audit(), 65);
    }
}
