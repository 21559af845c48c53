//! Which sequences of a plan read a shared prefix once, together.
//!
//! Owns nothing but scratch: paths of blocks in, groups out. Sequences that share a block share all before it, so sorted
//! paths form a tree, built from the lengths that neighbours have in common. Each sequence is in one group at most, so that
//! attention deals with two chunks: the group's and its own. A group at depth d costs one read of d blocks and `cost`; each
//! member saves its own, and joins the deepest group above it. With a the depth of the nearest group above v:
//!
//! ```text
//!   G(v, a) = max( closed: sum over children c of G(c, a)    + a * (sequences that hang on v itself),
//!                  open:   sum over children c of G(c, d(v)) + d(v) * (those) - d(v) - cost )
//! ```
//!
//! The question is BatchLLM's (arXiv 2412.03594, section 4). Its rule joins whole subtrees or none, and misses that a
//! sequence which its neighbours' group leaves out can join one further up. O(n log n) comparisons of O(log blocks), and one
//! step for every pair of a node and a node above it. Called by `core::schedule`.

use super::common_len;
use crate::ids::BlockId;

/// Sequences that share their first blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// First of its members in `Groups::members`.
    pub first: u32,
    /// At least two.
    pub count: u32,
    /// Blocks that all of them begin with: a multiple of the unit.
    pub blocks: u32,
}

/// Groups found last, and the buffers of the search.
#[derive(Debug, Default)]
pub struct Groups {
    groups: Vec<Group>,
    members: Vec<u32>,
    /// Paths, sorted.
    order: Vec<u32>,
    /// Children before parents, the root last.
    nodes: Vec<Node>,
    /// Nodes that the next path may still belong to, the root first.
    pending: Vec<Node>,
    /// G of the header for every node and node above it, from the root on.
    gains: Vec<i64>,
    /// By place in `order`: the node whose group the path is in; the root's is none.
    homes: Vec<u32>,
}

/// Paths that have `depth` blocks in common: a run of `order`, made of the runs of its children and of lone paths.
#[derive(Clone, Copy, Debug)]
struct Node {
    depth: u32,
    start: u32,
    end: u32,
    first_child: u32,
    next_sibling: u32,
    parent: u32,
    /// Nodes above it.
    level: u32,
    /// Its first entry in `gains`.
    gains: u32,
    /// G of a group here, whatever is above.
    open_gain: i64,
    /// Its own number, or that of the nearest node above with a group; the root's where there is none.
    home: u32,
    /// Members of its group.
    count: u32,
}

const NONE: u32 = u32::MAX;

impl Node {
    fn at(depth: u32, start: u32) -> Node {
        let (first_child, next_sibling, parent, home) = (NONE, NONE, NONE, NONE);
        let (level, gains, open_gain, count) = (0, 0, 0, 0);
        Node { depth, start, end: start, first_child, next_sibling, parent, level, gains, open_gain, home, count }
    }
}

impl Groups {
    /// Buffers for `count` paths; more grow them.
    pub fn for_paths(count: usize) -> Groups {
        Groups {
            groups: Vec::with_capacity(count),
            members: Vec::with_capacity(count),
            order: Vec::with_capacity(count),
            nodes: Vec::with_capacity(count),
            pending: Vec::with_capacity(count),
            gains: Vec::with_capacity(8 * count),
            homes: Vec::with_capacity(count),
        }
    }

    /// Finds the groups among `paths(0..count)`: those that save most blocks, a group costing `cost` of them. Only whole
    /// `unit`s of blocks are shared.
    pub fn find<'a>(&mut self, count: usize, paths: impl Fn(usize) -> &'a [BlockId], unit: u32, cost: u32) {
        self.order.clear();
        self.order.extend((0..count as u32).filter(|&i| paths(i as usize).len() >= unit as usize));
        self.order.sort_unstable_by(|&a, &b| {
            let (a, b) = (paths(a as usize), paths(b as usize));
            let common = common_len(a, b);
            a.get(common).map(|block| block.index).cmp(&b.get(common).map(|block| block.index))
        });
        self.build(|i| paths(i as usize), unit);
        self.weigh(cost);
        self.choose();
        self.list();
    }

    /// Those found last.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Indices of paths, group by group.
    pub fn members(&self) -> &[u32] {
        &self.members
    }

    /// The tree over sorted paths.
    fn build<'a>(&mut self, path: impl Fn(u32) -> &'a [BlockId], unit: u32) {
        self.nodes.clear();
        if self.order.is_empty() {
            return;
        }
        self.pending.push(Node::at(0, 0));
        for at in 1..self.order.len() as u32 {
            let common = common_len(path(self.order[at as usize - 1]), path(self.order[at as usize])) as u32;
            let depth = common / unit * unit;
            let (mut start, mut child) = (at - 1, NONE);
            // The next path leaves deeper nodes.
            while let Some(node) = self.pending.pop_if(|node| node.depth > depth) {
                start = node.start;
                child = self.finish(node, at);
                if self.pending.last().is_some_and(|above| above.depth >= depth) {
                    self.adopt(child);
                    child = NONE;
                }
            }
            if self.pending.last().is_some_and(|above| above.depth < depth) {
                self.pending.push(Node { first_child: child, ..Node::at(depth, start) });
            }
        }
        while let Some(node) = self.pending.pop() {
            let child = self.finish(node, self.order.len() as u32);
            self.adopt(child);
        }
    }

    fn finish(&mut self, node: Node, end: u32) -> u32 {
        self.nodes.push(Node { end, ..node });
        self.nodes.len() as u32 - 1
    }

    /// Hangs a finished node below the last pending one, if there is any.
    fn adopt(&mut self, child: u32) {
        if let Some(above) = self.pending.last_mut() {
            self.nodes[child as usize].next_sibling = above.first_child;
            above.first_child = child;
        }
    }

    fn children(&self, node: &Node) -> impl Iterator<Item = &Node> {
        let next = |child: u32| self.nodes.get(child as usize);
        std::iter::successors(next(node.first_child), move |child| next(child.next_sibling))
    }

    /// G of a node without a group, below one at `level` and `depth`.
    fn closed_gain(&self, node: &Node, level: u32, depth: u32) -> i64 {
        let mut lone = i64::from(node.end - node.start);
        let mut gain = 0;
        for child in self.children(node) {
            lone -= i64::from(child.end - child.start);
            gain += self.gains[(child.gains + level) as usize];
        }
        gain + lone * i64::from(depth)
    }

    fn weigh(&mut self, cost: u32) {
        let mut len = 0;
        for at in (0..self.nodes.len()).rev() {
            let Node { level, mut first_child, .. } = self.nodes[at];
            self.nodes[at].gains = len;
            len += level;
            while let Some(child) = self.nodes.get_mut(first_child as usize) {
                (child.parent, child.level, first_child) = (at as u32, level + 1, child.next_sibling);
            }
        }
        self.gains.clear();
        self.gains.resize(len as usize, 0);
        for at in 0..self.nodes.len() {
            let node = self.nodes[at];
            let open = self.closed_gain(&node, node.level, node.depth) - i64::from(node.depth) - i64::from(cost);
            self.nodes[at].open_gain = open;
            let mut above = node.parent;
            while let Some(&Node { level, depth, parent, .. }) = self.nodes.get(above as usize) {
                self.gains[(node.gains + level) as usize] = open.max(self.closed_gain(&node, level, depth));
                above = parent;
            }
        }
    }

    fn choose(&mut self) {
        self.homes.clear();
        self.homes.resize(self.order.len(), NONE);
        for at in (0..self.nodes.len()).rev() {
            let node = self.nodes[at];
            let home = match self.nodes.get(node.parent as usize) {
                None => at as u32,
                Some(above) => {
                    let Node { level, depth, .. } = self.nodes[above.home as usize];
                    let opens = node.open_gain > self.closed_gain(&node, level, depth);
                    if opens { at as u32 } else { above.home }
                }
            };
            self.nodes[at].home = home;
            self.homes[node.start as usize..node.end as usize].fill(home);
        }
    }

    fn list(&mut self) {
        self.groups.clear();
        let Some(root) = self.nodes.len().checked_sub(1) else { return self.members.clear() };
        for &home in &self.homes {
            self.nodes[home as usize].count += 1;
        }
        let mut first = 0;
        for node in &mut self.nodes[..root] {
            let Node { depth: blocks, count, .. } = *node;
            node.count = first; // From here on: where its next member goes.
            if count > 0 {
                self.groups.push(Group { first, count, blocks });
                first += count;
            }
        }
        self.members.clear();
        self.members.resize(first as usize, 0);
        for (&home, &path) in self.homes.iter().zip(&self.order) {
            if home as usize != root {
                let next = &mut self.nodes[home as usize].count;
                self.members[*next as usize] = path;
                *next += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Rng(u64);

    impl Rng {
        fn below(&mut self, n: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % n
        }
    }

    /// A block is named after the path to it, so equal beginnings are equal blocks and nothing else is.
    fn paths(rng: &mut Rng, count: u64, len: u64) -> Vec<Vec<BlockId>> {
        let path = |rng: &mut Rng| {
            let (count, mut name) = (rng.below(len + 1), 1);
            let step = |_| {
                name = name * 3 + rng.below(2) as u32;
                BlockId { index: name, generation: 0 }
            };
            (0..count).map(step).collect::<Vec<_>>()
        };
        (0..count).map(|_| path(rng)).collect()
    }

    fn saved(paths: &[Vec<BlockId>], found: &Groups, unit: u32, cost: u32) -> u64 {
        let mut seen = vec![false; paths.len()];
        let mut next = 0;
        let mut total = 0;
        for group in found.groups() {
            assert!(group.first == next && group.count >= 2 && group.blocks > 0 && group.blocks.is_multiple_of(unit));
            next += group.count;
            let members = &found.members()[group.first as usize..next as usize];
            for &member in members {
                assert!(!std::mem::replace(&mut seen[member as usize], true), "{member} is in two groups");
                let prefix = &paths[member as usize][..group.blocks as usize];
                assert_eq!(prefix, &paths[members[0] as usize][..group.blocks as usize]);
            }
            let gain = u64::from(group.count - 1) * u64::from(group.blocks);
            total += gain.checked_sub(cost.into()).expect("a group pays for itself");
        }
        assert_eq!(next as usize, found.members().len());
        total
    }

    /// The most that any assignment of paths to prefixes of their own saves, by trying all.
    fn best(paths: &[Vec<BlockId>], unit: u32, cost: u32, at: usize, chosen: &mut Vec<Vec<BlockId>>) -> u64 {
        if at == paths.len() {
            let mut prefixes = chosen.clone();
            prefixes.sort_by_key(|prefix| prefix.iter().map(|block| block.index).collect::<Vec<_>>());
            let gain =
                |run: &[Vec<BlockId>]| ((run.len() as u64 - 1) * run[0].len() as u64).saturating_sub(cost.into());
            return prefixes.chunk_by(|a, b| a == b).map(gain).sum();
        }
        let mut most = 0;
        for len in (0..=paths[at].len()).step_by(unit as usize) {
            chosen.push(paths[at][..len].to_vec());
            most = most.max(best(paths, unit, cost, at + 1, chosen));
            chosen.pop();
        }
        most
    }

    #[test]
    fn no_assignment_saves_more() {
        let (mut rng, mut found) = (Rng(7), Groups::default());
        let mut num_groups = 0;
        for round in 0..400 {
            let (unit, cost) = (1 + rng.below(2) as u32, rng.below(4) as u32);
            let paths = paths(&mut rng, 1 + round % 6, 5);
            found.find(paths.len(), |i| &paths[i], unit, cost);
            let most = best(&paths, unit, cost, 0, &mut vec![]);
            assert_eq!(saved(&paths, &found, unit, cost), most, "{paths:?}, unit {unit}, cost {cost}");
            num_groups += found.groups().len();
        }
        assert!(num_groups > 100, "{num_groups}");
    }

    #[test]
    fn many_paths_form_groups_that_hold_together() {
        let (mut rng, mut found) = (Rng(8), Groups::default());
        for _ in 0..50 {
            let paths = paths(&mut rng, 200, 12);
            found.find(paths.len(), |i| &paths[i], 2, 3);
            assert!(saved(&paths, &found, 2, 3) > 0);
        }
    }

    #[test]
    fn nothing_shared_and_nobody_there_are_no_groups() {
        let mut found = Groups::default();
        found.find(0, |_| &[], 4, 0);
        assert!(found.groups().is_empty());
        let block = |index| BlockId { index, generation: 0 };
        let paths = [vec![block(1), block(2)], vec![block(3), block(4)], vec![], vec![block(1), block(5)]];
        found.find(4, |i| &paths[i], 2, 0);
        assert!(found.groups().is_empty(), "a unit is two blocks");
        found.find(4, |i| &paths[i], 1, 0);
        assert_eq!(found.groups(), [Group { first: 0, count: 2, blocks: 1 }]);
        found.find(4, |i| &paths[i], 1, 1);
        assert!(found.groups().is_empty(), "it would save no more than it costs");
    }
}
