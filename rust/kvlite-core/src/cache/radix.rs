//! `Tree`: token prefix -> blocks. The block is the node: links and tokens lie in flat arrays indexed by block.
//!
//! Owns the edges, the tokens of the blocks in the tree and the hash table that finds a child by its tokens. Must not know
//! states, users or the order of eviction. Invariants: one child per (parent, tokens); a block leaves as a leaf; an edge is
//! taken only after comparing the stored tokens, whatever the hash says. Called by `Cache` alone.
//!
//! ```text
//!   tenant 0 ....> [b7] --first_child--> [b2] <--siblings--> [b5]      ....> by hash only, ----> by link
//!                  "the cat sat"         " on the mat"       " in the hat"
//! ```
//! Roots have no sibling list: there is no array over tenants to hang it on (tenants are not bounded, blocks are), and a part
//! of a first block is not worth a copy. Depth-0 blocks are found by hash alone.

use super::hash::BlockHash;
use super::{NONE, Provenance};
use crate::ids::{Namespace, Token};

/// Siblings that a search for a partial hit looks at, newest first; bounds the cost of a match below a popular prefix.
pub const MAX_PARTIAL_CANDIDATES: usize = 8;

/// The block size whose compare is inlined.
const USUAL_BLOCK_SIZE: usize = 16;

/// What a block hangs below: a block, or the root of a namespace (high bit set).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Parent(u32);

const ROOT_BIT: u32 = 1 << 31;

impl Parent {
    pub(super) fn root(namespace: Namespace) -> Parent {
        Parent(namespace.number() | ROOT_BIT)
    }

    pub(super) fn block(block: u32) -> Parent {
        Parent(block)
    }

    /// The block, unless this is a root.
    pub(super) fn as_block(self) -> Option<u32> {
        (self.0 & ROOT_BIT == 0).then_some(self.0)
    }
}

#[derive(Clone, Copy)]
struct Link {
    parent: Parent,
    /// Newest child: a path that is being extended is followed without hashing.
    first_child: u32,
    next_sibling: u32,
    prev_sibling: u32,
    next_in_bucket: u32,
    /// Kept so that eviction finds the bucket without reading the tokens.
    hash: u32,
    /// What the KV of the block is worth; none while the block is not in the tree.
    provenance: Option<Provenance>,
}

const UNLINKED: Link = Link {
    parent: Parent(NONE),
    first_child: NONE,
    next_sibling: NONE,
    prev_sibling: NONE,
    next_in_bucket: NONE,
    hash: 0,
    provenance: None,
};

/// The tree over all namespaces.
pub(super) struct Tree {
    block_size: usize,
    /// Tokens of block `b` at `b * block_size`; meaningless while `b` is not in the tree.
    tokens: Vec<Token>,
    links: Vec<Link>,
    /// First block of each chain; a power of two, at least one bucket per block.
    buckets: Vec<u32>,
    hash: BlockHash,
}

impl Tree {
    pub(super) fn new(num_blocks: usize, block_size: usize, seed: u64) -> Tree {
        Tree {
            block_size,
            tokens: vec![0; num_blocks * block_size],
            links: vec![UNLINKED; num_blocks],
            buckets: vec![NONE; num_blocks.next_power_of_two()],
            hash: BlockHash::new(seed),
        }
    }

    pub(super) fn block_size(&self) -> usize {
        self.block_size
    }

    /// The provenance of a block in the tree; none for others.
    pub(super) fn provenance(&self, block: u32) -> Option<Provenance> {
        self.links[block as usize].provenance
    }

    /// The block above `block`, which is in the tree; none at depth 0.
    pub(super) fn parent(&self, block: u32) -> Option<u32> {
        self.links[block as usize].parent.as_block()
    }

    pub(super) fn tokens(&self, block: u32) -> &[Token] {
        let start = block as usize * self.block_size;
        &self.tokens[start..start + self.block_size]
    }

    /// Calls `hit` for each block of the longest stored path that begins `tokens`, at most `max_blocks`. Returns the child of
    /// the last of them that shares most with the tokens behind it (newest first on a tie), and how many: 1 to
    /// `block_size - 1`. Cost: O(blocks hit) compares of `block_size` tokens, one hash where a path leaves the newest branch.
    pub(super) fn walk(
        &self,
        root: Namespace,
        tokens: &[Token],
        max_blocks: usize,
        mut hit: impl FnMut(u32),
    ) -> Option<(u32, usize)> {
        let mut blocks = tokens.chunks_exact(self.block_size).take(max_blocks);
        let mut last = self.find(Parent::root(root), blocks.next()?)?;
        let mut len = self.block_size;
        hit(self.exact(last));
        for block in blocks {
            let next = last + 1;
            let child = if self.is_child(next, last, block) { Some(next) } else { self.child(last, block) };
            let Some(child) = child else { break };
            hit(self.exact(child));
            len += self.block_size;
            last = child;
        }
        self.partial(last, &tokens[len..])
    }

    /// Whether `block`, which need not exist, is the child of `parent` with these tokens.
    ///
    /// Asked of the block behind the parent: it is the child wherever a run goes on, and no load depends on the one before, so
    /// the processor compares several blocks at once instead of following one link after the other.
    #[inline(always)]
    fn is_child(&self, block: u32, parent: u32, tokens: &[Token]) -> bool {
        let index = block as usize;
        if self.links.get(index).is_none_or(|link| link.parent != Parent::block(parent)) {
            return false;
        }
        let Ok(tokens) = <&[Token; USUAL_BLOCK_SIZE]>::try_from(tokens) else { return self.tokens(block) == tokens };
        // Folded rather than compared: a few vector instructions, where `==` is a call that costs as much again.
        let (blocks, _) = self.tokens.as_chunks::<USUAL_BLOCK_SIZE>();
        blocks[index].iter().zip(tokens).fold(0, |difference, (have, want)| difference | (have ^ want)) == 0
    }

    /// The child of `parent` with these tokens.
    fn child(&self, parent: u32, tokens: &[Token]) -> Option<u32> {
        let first = self.links[parent as usize].first_child;
        if first == NONE {
            return None;
        }
        if self.tokens(first) == tokens {
            return Some(first);
        }
        let has_siblings = self.links[first as usize].next_sibling != NONE;
        if has_siblings { self.find(Parent::block(parent), tokens) } else { None }
    }

    fn partial(&self, parent: u32, tokens: &[Token]) -> Option<(u32, usize)> {
        let tokens = &tokens[..tokens.len().min(self.block_size - 1)];
        let mut best = None;
        let mut best_len = 0;
        let mut candidate = self.links[parent as usize].first_child;
        for _ in 0..MAX_PARTIAL_CANDIDATES {
            if candidate == NONE || best_len == tokens.len() {
                break;
            }
            let len = tokens.iter().zip(self.tokens(candidate)).take_while(|(want, have)| want == have).count();
            if len > best_len {
                (best, best_len) = (Some(candidate), len);
            }
            candidate = self.links[candidate as usize].next_sibling;
        }
        best.map(|block| (self.exact(block), best_len))
    }

    /// Passes on a block that an exact match is about to return.
    fn exact(&self, block: u32) -> u32 {
        let provenance = self.provenance(block);
        assert!(provenance == Some(Provenance::Exact), "block {block} is {provenance:?} under an exact prefix");
        block
    }

    /// The block below `parent` with these tokens, by hash.
    pub(super) fn find(&self, parent: Parent, tokens: &[Token]) -> Option<u32> {
        self.find_hashed(parent, tokens, self.hash.of(parent.0, tokens))
    }

    fn find_hashed(&self, parent: Parent, tokens: &[Token], hash: u32) -> Option<u32> {
        let mut at = self.buckets[self.bucket(hash)];
        while at != NONE {
            let link = &self.links[at as usize];
            if link.hash == hash && link.parent == parent && self.tokens(at) == tokens {
                return Some(at);
            }
            at = link.next_in_bucket;
        }
        None
    }

    /// Hangs `block` below `parent`, or returns the block that already has these tokens there and changes nothing.
    pub(super) fn link(
        &mut self,
        parent: Parent,
        tokens: &[Token],
        block: u32,
        provenance: Provenance,
    ) -> Result<(), u32> {
        let hash = self.hash.of(parent.0, tokens);
        if let Some(existing) = self.find_hashed(parent, tokens, hash) {
            return Err(existing);
        }
        let start = block as usize * self.block_size;
        self.tokens[start..start + self.block_size].copy_from_slice(tokens);
        let bucket = self.bucket(hash);
        let next_in_bucket = std::mem::replace(&mut self.buckets[bucket], block);
        let mut next_sibling = NONE;
        if let Some(parent) = parent.as_block() {
            next_sibling = std::mem::replace(&mut self.links[parent as usize].first_child, block);
        }
        if next_sibling != NONE {
            self.links[next_sibling as usize].prev_sibling = block;
        }
        self.links[block as usize] =
            Link { parent, next_sibling, next_in_bucket, hash, provenance: Some(provenance), ..UNLINKED };
        Ok(())
    }

    /// Takes a leaf out of the tree.
    pub(super) fn unlink(&mut self, block: u32) {
        let link = std::mem::replace(&mut self.links[block as usize], UNLINKED);
        assert!(link.provenance.is_some(), "block {block} is not in the tree");
        assert!(link.first_child == NONE, "evicting block {block} would make the tail behind it unreachable");
        if link.next_sibling != NONE {
            self.links[link.next_sibling as usize].prev_sibling = link.prev_sibling;
        }
        if link.prev_sibling != NONE {
            self.links[link.prev_sibling as usize].next_sibling = link.next_sibling;
        } else if let Some(parent) = link.parent.as_block() {
            self.links[parent as usize].first_child = link.next_sibling;
        }
        let bucket = self.bucket(link.hash);
        if self.buckets[bucket] == block {
            self.buckets[bucket] = link.next_in_bucket;
            return;
        }
        let mut at = self.buckets[bucket];
        while self.links[at as usize].next_in_bucket != block {
            at = self.links[at as usize].next_in_bucket;
        }
        self.links[at as usize].next_in_bucket = link.next_in_bucket;
    }

    /// Children of `block`, newest first.
    pub(super) fn children(&self, block: u32) -> impl Iterator<Item = u32> {
        let mut at = self.links[block as usize].first_child;
        std::iter::from_fn(move || {
            let child = at;
            (child != NONE).then(|| {
                at = self.links[child as usize].next_sibling;
                child
            })
        })
    }

    /// Checks links in both directions, hash chains and uniqueness.
    pub(super) fn audit(&self) {
        let mut num_linked = 0;
        let mut num_children = 0;
        for block in (0..self.links.len() as u32).filter(|&block| self.provenance(block).is_some()) {
            let link = &self.links[block as usize];
            num_linked += 1;
            let found = self.find(link.parent, self.tokens(block));
            assert!(found == Some(block), "block {block} is found by its tokens as {found:?}");
            if let Some(parent) = link.parent.as_block() {
                num_children += 1;
                assert!(
                    self.provenance(parent).is_some(),
                    "block {block} hangs below {parent}, which is not in the tree"
                );
            }
            let mut previous = NONE;
            for child in self.children(block) {
                let child_link = &self.links[child as usize];
                assert!(child_link.provenance.is_some(), "child {child} of {block} is not in the tree");
                assert!(child_link.parent == Parent::block(block), "child {child} of {block} names another parent");
                assert!(child_link.prev_sibling == previous, "child {child} of {block} has a wrong older sibling");
                previous = child;
            }
        }
        // Each linked block below another is met exactly once as a child; so sibling lists neither lose nor share blocks.
        let met: usize = (0..self.links.len() as u32).map(|block| self.children(block).count()).sum();
        assert!(met == num_children, "sibling lists hold {met} blocks, {num_children} blocks name a parent");
        let mut num_chained = 0;
        for &head in &self.buckets {
            let mut at = head;
            while at != NONE {
                num_chained += 1;
                assert!(num_chained <= num_linked, "the hash chains hold more blocks than the tree");
                at = self.links[at as usize].next_in_bucket;
            }
        }
        assert!(num_chained == num_linked, "the hash chains hold {num_chained} blocks, the tree {num_linked}");
    }

    fn bucket(&self, hash: u32) -> usize {
        hash as usize & (self.buckets.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::TenantId;

    fn root() -> Namespace {
        Namespace::exact(TenantId(0))
    }

    fn linked(tree: &mut Tree, path: &[(u32, [Token; 2])]) {
        let mut parent = Parent::root(root());
        for &(block, tokens) in path {
            tree.link(parent, &tokens, block, Provenance::Exact).expect("the path is new");
            parent = Parent::block(block);
        }
    }

    #[test]
    fn blocks_with_one_hash_are_told_apart_by_their_tokens() {
        let mut tree = Tree::new(1, 2, 0);
        tree.links.resize(9, UNLINKED); // nine blocks in the one bucket
        tree.tokens.resize(18, 0);
        for block in 0..9 {
            tree.link(Parent::root(root()), &[block as Token / 3, block as Token % 3], block, Provenance::Exact)
                .expect("all tokens differ");
        }
        tree.audit();
        for block in [4, 0, 8, 3] {
            tree.unlink(block);
            tree.audit();
        }
        assert_eq!(tree.find(Parent::root(root()), &[1, 2]), Some(5));
        assert_eq!(tree.find(Parent::root(root()), &[1, 1]), None);
    }

    #[test]
    #[should_panic(expected = "would make the tail behind it unreachable")]
    fn a_block_in_the_middle_of_a_path_cannot_be_taken_out() {
        let mut tree = Tree::new(2, 2, 0);
        linked(&mut tree, &[(0, [1, 1]), (1, [2, 2])]);
        tree.unlink(0);
    }

    #[test]
    #[should_panic(expected = "block 1 is Some(Blended) under an exact prefix")]
    fn a_blended_block_under_an_exact_prefix_is_never_a_hit() {
        let mut tree = Tree::new(2, 2, 0);
        linked(&mut tree, &[(0, [1, 1]), (1, [2, 2])]);
        tree.links[1].provenance = Some(Provenance::Blended);
        tree.walk(root(), &[1, 1, 2, 2], 2, |_| ());
    }

    #[test]
    #[should_panic(expected = "block 1 is Some(Segment) under an exact prefix")]
    fn a_segment_block_under_an_exact_prefix_is_never_a_partial_hit() {
        let mut tree = Tree::new(2, 2, 0);
        linked(&mut tree, &[(0, [1, 1]), (1, [2, 2])]);
        tree.links[1].provenance = Some(Provenance::Segment);
        tree.walk(root(), &[1, 1, 2, 3], 2, |_| ());
    }
}
