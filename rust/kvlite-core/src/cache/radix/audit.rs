//! What must hold in the tree, each as a sentence: links in both directions, hash chains, uniqueness, counts of recipes.
//!
//! O(num_blocks); for tests and debugging. Called by `Cache::audit`.

use super::{NONE, Parent, Tree};

impl Tree {
    /// Checks links in both directions, hash chains and uniqueness.
    pub(in crate::cache) fn audit(&self) {
        let mut num_linked = 0;
        let mut num_children = 0;
        let mut num_of_recipes = 0;
        for block in 0..self.links.len() as u32 {
            let link = &self.links[block as usize];
            let Some(label) = link.label else { continue };
            num_linked += 1;
            num_of_recipes += usize::from(!label.is_exact());
            let found = self.find(link.parent, label, self.tokens(block));
            assert!(found == Some(block), "block {block} is found by its tokens as {found:?}");
            if let Some(parent) = link.parent.as_block() {
                num_children += 1;
                assert!(self.label(parent).is_some(), "block {block} hangs below {parent}, which is not in the tree");
                let depth = self.links[parent as usize].depth + 1;
                assert!(link.depth == depth, "block {block} is at depth {}, not {depth}", link.depth);
            }
            let mut previous = NONE;
            for child in self.children(block) {
                let child_link = &self.links[child as usize];
                assert!(child_link.label.is_some(), "child {child} of {block} is not in the tree");
                assert!(child_link.parent == Parent::block(block), "child {child} of {block} names another parent");
                assert!(child_link.prev_sibling == previous, "child {child} of {block} has a wrong older sibling");
                previous = child;
            }
        }
        // Each linked block below another is met exactly once as a child; so sibling lists neither lose nor share blocks.
        let met: usize = (0..self.links.len() as u32).map(|block| self.children(block).count()).sum();
        assert!(met == num_children, "sibling lists hold {met} blocks, {num_children} blocks name a parent");
        let counted: usize = self.num_labelled.values().sum();
        assert!(counted == num_of_recipes, "{counted} blocks of recipes are counted, {num_of_recipes} are in the tree");
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
}
