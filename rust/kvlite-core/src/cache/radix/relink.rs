//! How blocks leave the tree, and how one takes another's place: what eviction and the host tier do.

use super::{NONE, Parent, Tree, UNLINKED};

impl Tree {
    /// Takes a leaf out of the tree.
    pub(in crate::cache) fn unlink(&mut self, block: u32) {
        let link = self.links[block as usize];
        let label = link.label.unwrap_or_else(|| panic!("block {block} is not in the tree"));
        self.links[block as usize].label = None; // The rest is written anew when it comes back.
        assert!(link.first_child == NONE, "evicting block {block} would make the tail behind it unreachable");
        if link.next_sibling != NONE {
            self.links[link.next_sibling as usize].prev_sibling = link.prev_sibling;
        }
        if link.prev_sibling != NONE {
            self.links[link.prev_sibling as usize].next_sibling = link.next_sibling;
        } else if let Some(parent) = link.parent.as_block() {
            self.links[parent as usize].first_child = link.next_sibling;
        }
        if !label.is_exact() {
            let left = self.num_labelled.get_mut(&label).expect("each block of a recipe is counted");
            *left -= 1;
            if *left == 0 {
                self.num_labelled.remove(&label);
            }
        }
        self.replace_in_bucket(link.hash, block, link.next_in_bucket);
    }

    /// `to`, which is not in the tree, takes the place of `from`, which leaves: label, tokens, neighbours and children.
    /// O(block_size + children + length of the bucket's chain).
    pub(in crate::cache) fn replace(&mut self, from: u32, to: u32) {
        let link = std::mem::replace(&mut self.links[from as usize], UNLINKED);
        assert!(link.label.is_some(), "block {from} is not in the tree");
        assert!(self.links[to as usize].label.is_none(), "block {to} has a place in the tree already");
        self.links[to as usize] = link;
        let (from_start, to_start) = (from as usize * self.block_size, to as usize * self.block_size);
        self.tokens.copy_within(from_start..from_start + self.block_size, to_start);
        if link.next_sibling != NONE {
            self.links[link.next_sibling as usize].prev_sibling = to;
        }
        if link.prev_sibling != NONE {
            self.links[link.prev_sibling as usize].next_sibling = to;
        } else if let Some(parent) = link.parent.as_block() {
            self.links[parent as usize].first_child = to;
        }
        let mut child = link.first_child;
        while child != NONE {
            let link = &mut self.links[child as usize];
            link.parent = Parent::block(to);
            child = link.next_sibling;
        }
        self.replace_in_bucket(link.hash, from, to);
    }

    /// What pointed at `from` in the chain of `hash` points at `to` from now on.
    fn replace_in_bucket(&mut self, hash: u32, from: u32, to: u32) {
        let bucket = self.bucket(hash);
        if self.buckets[bucket] == from {
            self.buckets[bucket] = to;
            return;
        }
        let mut at = self.buckets[bucket];
        while self.links[at as usize].next_in_bucket != from {
            at = self.links[at as usize].next_in_bucket;
        }
        self.links[at as usize].next_in_bucket = to;
    }
}
