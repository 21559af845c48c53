//! `Tree`: token prefix -> blocks. The block is the node: links and tokens lie in flat arrays indexed by block.
//!
//! Owns the edges, the tokens of the blocks in the tree and the hash table that finds a child by its tokens. Must not know
//! states, users or the order of eviction. Invariants: one child per (parent, label, tokens); a block leaves as a leaf; an edge
//! is taken only after comparing the stored label and tokens, whatever the hash says. Called by `Cache` alone.
//!
//! ```text
//!   root ....> [b7 public] --first_child--> [b2 tenant 3] <--siblings--> [b5 recipe 1]   ....> by hash only, ----> by link
//!              "the cat sat"                " on the mat"                " on the mat"
//! ```
//! On the way down labels turn from public to one tenant's and from exact to one recipe's, never back.
//! The root has no sibling list: a part of a first block is not worth a copy. Depth-0 blocks are found by hash alone.

mod audit;
mod relink;

use super::hash::BlockHash;

use rustc_hash::FxHashMap;

use super::NONE;
use crate::ids::{Label, Lookup, Token};

/// Siblings that a search for a partial hit looks at, newest first; bounds the cost of a match below a popular prefix.
pub const MAX_PARTIAL_CANDIDATES: usize = 8;

/// The block size whose compare is inlined.
const USUAL_BLOCK_SIZE: usize = 16;

/// Few chains are longer than one: each block that is walked past is a cache miss, on the way in and on the way out.
const BUCKETS_PER_BLOCK: usize = 4;

/// What a block hangs below: a block, or the root.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Parent(u32);

impl Parent {
    pub(super) const ROOT: Parent = Parent(NONE);

    pub(super) fn block(block: u32) -> Parent {
        Parent(block)
    }

    /// The block, unless this is the root.
    pub(super) fn as_block(self) -> Option<u32> {
        (self != Parent::ROOT).then_some(self.0)
    }
}

/// Labels that a reader accepts at one depth; of two children with the same tokens it takes the first one's.
#[derive(Clone, Copy)]
struct Readable(Label, Label);

#[derive(Clone, Copy)]
struct Link {
    parent: Parent,
    /// Newest child: a path that is being extended is followed without hashing.
    first_child: u32,
    next_sibling: u32,
    prev_sibling: u32,
    next_in_bucket: u32,
    /// Kept so that eviction finds the bucket without reading the tokens. Of the whole path: it moves with the block.
    hash: u32,
    /// Blocks above this one.
    depth: u32,
    /// None while the block is not in the tree.
    label: Option<Label>,
}

impl Link {
    /// Whether no other child of the same parent could be preferred to this one.
    #[inline(always)]
    fn is_first_choice(&self, readable: Readable) -> bool {
        self.label == Some(readable.0)
            || self.label == Some(readable.1) && self.next_sibling == NONE && self.prev_sibling == NONE
    }
}

const UNLINKED: Link = Link {
    parent: Parent::ROOT,
    first_child: NONE,
    next_sibling: NONE,
    prev_sibling: NONE,
    next_in_bucket: NONE,
    hash: 0,
    depth: 0,
    label: None,
};

/// The tree of all tenants and recipes.
pub(super) struct Tree {
    block_size: usize,
    /// Tokens of block `b` at `b * block_size`; meaningless while `b` is not in the tree.
    tokens: Vec<Token>,
    links: Vec<Link>,
    /// First block of each chain; a power of two.
    buckets: Vec<u32>,
    hash: BlockHash,
    /// Blocks by recipe's label; what has none is not in it.
    num_labelled: FxHashMap<Label, usize>,
}

impl Tree {
    pub(super) fn new(num_blocks: usize, block_size: usize, seed: u64) -> Tree {
        Tree {
            block_size,
            tokens: vec![0; num_blocks * block_size],
            links: vec![UNLINKED; num_blocks],
            buckets: vec![NONE; (num_blocks * BUCKETS_PER_BLOCK).next_power_of_two()],
            hash: BlockHash::new(seed),
            num_labelled: FxHashMap::default(),
        }
    }

    pub(super) fn block_size(&self) -> usize {
        self.block_size
    }

    /// The label of a block in the tree; none for others.
    pub(super) fn label(&self, block: u32) -> Option<Label> {
        self.links[block as usize].label
    }

    /// Blocks of a recipe's label.
    pub(super) fn labelled(&self, label: Label) -> usize {
        self.num_labelled.get(&label).copied().unwrap_or(0)
    }

    /// The block above `block`, which is in the tree; none at depth 0.
    pub(super) fn parent(&self, block: u32) -> Option<u32> {
        self.links[block as usize].parent.as_block()
    }

    /// Blocks above `block`, which is in the tree.
    pub(super) fn depth(&self, block: u32) -> u32 {
        self.links[block as usize].depth
    }

    pub(super) fn tokens(&self, block: u32) -> &[Token] {
        let start = block as usize * self.block_size;
        &self.tokens[start..start + self.block_size]
    }

    /// Calls `hit` for each block of a stored path that begins `tokens` and that `lookup` may read, at most `max_blocks`: the
    /// longest, but that a tenant's own block is preferred to a public one with the same tokens. Returns the child of
    /// the last of them that shares most with the tokens behind it (newest first on a tie), and how many: 1 to
    /// `block_size - 1`. Cost: O(blocks hit) compares of `block_size` tokens, one hash where a path leaves the newest branch.
    pub(super) fn walk(
        &self,
        lookup: Lookup,
        tokens: &[Token],
        max_blocks: usize,
        mut hit: impl FnMut(u32),
    ) -> Option<(u32, usize)> {
        let exact = Readable(lookup.own, Label::PUBLIC);
        let (recipe, from_block) =
            lookup.recipe.map_or((exact, usize::MAX), |(label, at)| (Readable(label, label), at));
        let (before, behind) = tokens.split_at(tokens.len().min(from_block.saturating_mul(self.block_size)));
        let (mut last, mut num_hits) = self.follow(NONE, before, max_blocks, exact, &mut hit);
        if num_hits == from_block {
            let max_blocks = max_blocks - num_hits;
            let (end, more) = self.follow(last, behind, max_blocks, recipe, &mut hit);
            (last, num_hits) = (end, num_hits + more);
        }
        if last == NONE {
            return None;
        }
        let readable = if num_hits >= from_block { recipe } else { exact };
        self.partial(last, &tokens[num_hits * self.block_size..], readable)
    }

    /// The walk below `last` (none: the root) through children of readable labels; returns its end and length.
    #[inline(always)]
    fn follow(
        &self,
        mut last: u32,
        tokens: &[Token],
        max_blocks: usize,
        readable: Readable,
        hit: &mut impl FnMut(u32),
    ) -> (u32, usize) {
        let mut num_hits = 0;
        let mut blocks = tokens.chunks_exact(self.block_size).take(max_blocks);
        if last == NONE {
            let Some(first) = blocks.next().and_then(|block| self.find_readable(Parent::ROOT, block, readable)) else {
                return (NONE, 0);
            };
            hit(first);
            (last, num_hits) = (first, 1);
        }
        for block in blocks {
            let next = last + 1;
            let is_child = self.is_child(next, last, block, readable);
            let Some(child) = (if is_child { Some(next) } else { self.child(last, block, readable) }) else { break };
            hit(child);
            num_hits += 1;
            last = child;
        }
        (last, num_hits)
    }

    /// Whether `block`, which need not exist, is the child of `parent` with these tokens that a reader takes; a public block
    /// with siblings is left to `child`, because one of them may be the reader's own.
    ///
    /// Asked of the block behind the parent: it is the child wherever a run goes on, and no load depends on the one before, so
    /// the processor compares several blocks at once instead of following one link after the other.
    #[inline(always)]
    fn is_child(&self, block: u32, parent: u32, tokens: &[Token], readable: Readable) -> bool {
        let index = block as usize;
        let Some(link) = self.links.get(index) else { return false };
        if link.parent != Parent::block(parent) || !link.is_first_choice(readable) {
            return false;
        }
        let Ok(tokens) = <&[Token; USUAL_BLOCK_SIZE]>::try_from(tokens) else { return self.tokens(block) == tokens };
        // Folded rather than compared: a few vector instructions, where `==` is a call that costs as much again.
        let (blocks, _) = self.tokens.as_chunks::<USUAL_BLOCK_SIZE>();
        blocks[index].iter().zip(tokens).fold(0, |difference, (have, want)| difference | (have ^ want)) == 0
    }

    /// The child of `parent` with these tokens that a reader takes.
    fn child(&self, parent: u32, tokens: &[Token], readable: Readable) -> Option<u32> {
        let first = self.links[parent as usize].first_child;
        if first == NONE {
            return None;
        }
        let link = &self.links[first as usize];
        if link.is_first_choice(readable) && self.tokens(first) == tokens {
            return Some(first);
        }
        let has_siblings = link.next_sibling != NONE;
        if has_siblings { self.find_readable(Parent::block(parent), tokens, readable) } else { None }
    }

    fn partial(&self, parent: u32, tokens: &[Token], readable: Readable) -> Option<(u32, usize)> {
        let tokens = &tokens[..tokens.len().min(self.block_size - 1)];
        let mut best = None;
        let mut best_len = 0;
        for candidate in self.children(parent).take(MAX_PARTIAL_CANDIDATES) {
            if best_len == tokens.len() {
                break;
            }
            if !self.label(candidate).is_some_and(|label| label == readable.0 || label == readable.1) {
                continue;
            }
            let len = tokens.iter().zip(self.tokens(candidate)).take_while(|(want, have)| want == have).count();
            if len > best_len {
                (best, best_len) = (Some(candidate), len);
            }
        }
        best.map(|block| (block, best_len))
    }

    /// The block below `parent` with these tokens that a reader takes, by hash.
    fn find_readable(&self, parent: Parent, tokens: &[Token], readable: Readable) -> Option<u32> {
        let Readable(first, second) = readable;
        let found = self.find(parent, first, tokens);
        let is_decided = found.is_some() || first == second || !self.may_have_public(parent);
        if is_decided { found } else { self.find(parent, second, tokens) }
    }

    /// Public blocks have no parents but public ones; saves asking for them elsewhere.
    fn may_have_public(&self, parent: Parent) -> bool {
        parent.as_block().is_none_or(|block| self.label(block) == Some(Label::PUBLIC))
    }

    /// The block of this label below `parent` with these tokens, by hash.
    fn find(&self, parent: Parent, label: Label, tokens: &[Token]) -> Option<u32> {
        self.find_hashed(parent, label, tokens, self.hash_of(parent, label, tokens))
    }

    /// By the parent's hash, not its index: a block that moves to another tier stays the parent that its children know.
    fn hash_of(&self, parent: Parent, label: Label, tokens: &[Token]) -> u32 {
        let above = parent.as_block().map_or(NONE, |block| self.links[block as usize].hash);
        self.hash.of(above, label, tokens)
    }

    fn find_hashed(&self, parent: Parent, label: Label, tokens: &[Token], hash: u32) -> Option<u32> {
        let mut at = self.buckets[self.bucket(hash)];
        while at != NONE {
            let link = &self.links[at as usize];
            let is_edge = link.hash == hash && link.parent == parent && link.label == Some(label);
            if is_edge && self.tokens(at) == tokens {
                return Some(at);
            }
            at = link.next_in_bucket;
        }
        None
    }

    /// Hangs `block` below `parent`, or returns the block that holds these tokens there already (the same label's, or a public
    /// one that an exact label reads, if that one `may_share`) and changes nothing.
    pub(super) fn link(
        &mut self,
        parent: Parent,
        label: Label,
        tokens: &[Token],
        block: u32,
        may_share: impl Fn(u32) -> bool,
    ) -> Result<(), u32> {
        if let Some(above) = parent.as_block().and_then(|parent| self.label(parent)) {
            let may_follow = above == label || above == Label::PUBLIC || above.is_exact() && !label.is_exact();
            assert!(may_follow, "{label:?} KV below {above:?} KV would be read by nobody or by the wrong one");
        }
        let hash = self.hash_of(parent, label, tokens);
        let own = self.find_hashed(parent, label, tokens, hash);
        let has_public = label.is_exact() && label != Label::PUBLIC && self.may_have_public(parent);
        let public = || self.find(parent, Label::PUBLIC, tokens).filter(|&public| may_share(public));
        if let Some(existing) = own.or_else(|| if has_public { public() } else { None }) {
            return Err(existing);
        }
        let start = block as usize * self.block_size;
        self.tokens[start..start + self.block_size].copy_from_slice(tokens);
        let bucket = self.bucket(hash);
        let next_in_bucket = std::mem::replace(&mut self.buckets[bucket], block);
        let (mut next_sibling, mut depth) = (NONE, 0);
        if let Some(parent) = parent.as_block() {
            depth = self.links[parent as usize].depth + 1;
            next_sibling = std::mem::replace(&mut self.links[parent as usize].first_child, block);
        }
        if next_sibling != NONE {
            self.links[next_sibling as usize].prev_sibling = block;
        }
        self.links[block as usize] =
            Link { parent, next_sibling, next_in_bucket, hash, depth, label: Some(label), ..UNLINKED };
        if !label.is_exact() {
            *self.num_labelled.entry(label).or_default() += 1;
        }
        Ok(())
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

    fn bucket(&self, hash: u32) -> usize {
        hash as usize & (self.buckets.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::TenantId;

    fn own() -> Label {
        Label::exact(TenantId(0))
    }

    fn linked(tree: &mut Tree, path: &[(u32, Label, [Token; 2])]) {
        let mut parent = Parent::ROOT;
        for &(block, label, tokens) in path {
            tree.link(parent, label, &tokens, block, |_| true).expect("the path is new");
            parent = Parent::block(block);
        }
    }

    #[test]
    fn blocks_with_one_hash_are_told_apart_by_their_tokens() {
        let mut tree = Tree::new(1, 2, 0);
        tree.buckets.truncate(1); // nine blocks in the one bucket
        tree.links.resize(9, UNLINKED);
        tree.tokens.resize(18, 0);
        for block in 0..9 {
            tree.link(Parent::ROOT, own(), &[block as Token / 3, block as Token % 3], block, |_| true)
                .expect("all tokens differ");
        }
        tree.audit();
        for block in [4, 0, 8, 3] {
            tree.unlink(block);
            tree.audit();
        }
        assert_eq!(tree.find(Parent::ROOT, own(), &[1, 2]), Some(5));
        assert_eq!(tree.find(Parent::ROOT, own(), &[1, 1]), None);
    }

    #[test]
    #[should_panic(expected = "would make the tail behind it unreachable")]
    fn a_block_in_the_middle_of_a_path_cannot_be_taken_out() {
        let mut tree = Tree::new(2, 2, 0);
        linked(&mut tree, &[(0, own(), [1, 1]), (1, own(), [2, 2])]);
        tree.unlink(0);
    }
}
