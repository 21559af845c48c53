//! In which order waiting requests are best admitted when all that wait is known: a walk of the tree of their prompts.
//!
//! Owns scratch and what ended members of a group told about output lengths; prompts in, an order out. The tree is compact,
//! at block granularity, one per label. Depth first, whoever shares a prefix comes one after the other on every level, so a
//! cache that keeps the last path alone saves what an infinite one saves; a choice of one prefix per request, as in BatchLLM
//! (arXiv 2412.03594), would tear apart groups that share a shorter one. Among siblings those with more output per prompt
//! token to compute come first (BatchLLM's ratio, shared tokens counted once): later prefill then has decodes beside it.
//!
//! Blocks are compared by a hash of everything up to them; two prompts that collide stand badly in the order, no more, and
//! no order depends on its values. O(tokens + n log n log blocks). Called by `core::arrange`.

use std::cmp::Ordering;

use rustc_hash::FxHashMap;

use super::common_len;
use crate::ids::{Label, Token};

/// Prompts that share this prefix, as `Batching::homes` names it.
pub type Home = u64;

/// The home of who shares nothing with anybody.
pub const NO_HOME: Home = 0;

/// The order found last, and the buffers of the search.
#[derive(Debug, Default)]
pub struct Batching {
    block_size: usize,
    /// Path of every prompt, one after the other: a hash per full block, of all tokens up to its end.
    keys: Vec<u64>,
    prompts: Vec<Prompt>,
    /// Prompts by path.
    sorted: Vec<u32>,
    nodes: Vec<Node>,
    /// Nodes that the next prompt may still belong to, the root first; then those still to be visited.
    pending: Vec<u32>,
    order: Vec<u32>,
    homes: Vec<Home>,
    means: FxHashMap<Home, Mean>,
    overall: Mean,
}

#[derive(Clone, Copy, Debug)]
struct Prompt {
    /// Its path: `keys[start..end]`.
    start: usize,
    end: usize,
    num_tokens: u32,
    max_tokens: u32,
}

/// Output lengths of requests that ended.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    count: u64,
    sum: u64,
}

/// Prompts that have `depth` blocks in common, or a single one.
#[derive(Clone, Copy, Debug)]
struct Node {
    depth: u32,
    /// NONE: it has children.
    prompt: u32,
    first_child: u32,
    next_sibling: u32,
    /// Smallest number of a prompt below.
    first: u32,
    /// Whether somebody runs below.
    is_current: bool,
    /// Estimated output tokens below.
    output: u64,
    /// Prompt tokens to compute below its parent, shared ones once.
    work: u64,
}

const NONE: u32 = u32::MAX;

impl Node {
    fn at(depth: u32, prompt: u32) -> Node {
        let (first_child, next_sibling, is_current) = (NONE, NONE, false);
        Node { depth, prompt, first_child, next_sibling, first: prompt, is_current, output: 0, work: 0 }
    }

    /// Whether it goes before a sibling: who runs, then more output per prompt token, then who came first.
    fn precedence(&self, other: &Node) -> Ordering {
        let scaled = |one: &Node, by: &Node| u128::from(one.output) * u128::from(by.work.max(1));
        let ratio = scaled(other, self).cmp(&scaled(self, other));
        other.is_current.cmp(&self.is_current).then(ratio).then(self.first.cmp(&other.first))
    }
}

impl Batching {
    /// Blocks of `block_size` tokens.
    pub fn new(block_size: u32) -> Batching {
        Batching { block_size: block_size as usize, ..Batching::default() }
    }

    /// Starts over with no prompts.
    pub fn clear(&mut self) {
        self.keys.clear();
        self.prompts.clear();
    }

    /// Adds a prompt of `label`, whose number is the count of those before it; it may draw up to `max_tokens`. O(tokens).
    pub fn add(&mut self, label: Label, tokens: &[Token], max_tokens: u32) {
        let start = self.keys.len();
        let mut state = u64::from(label.number()) + 1;
        for block in tokens.chunks_exact(self.block_size) {
            state = block.iter().fold(state, |state, &token| mix(state, token));
            self.keys.push(state);
        }
        self.prompts.push(Prompt { start, end: self.keys.len(), num_tokens: tokens.len() as u32, max_tokens });
    }

    /// Numbers of the prompts, who comes first at the front. The last `num_running` of them were admitted already: they are
    /// not part of the order, but whoever shares a path with them goes first, and does not compute it.
    pub fn arrange(&mut self, num_running: usize) -> &[u32] {
        self.sorted.clear();
        self.sorted.extend(0..self.prompts.len() as u32);
        let (keys, prompts) = (&self.keys, &self.prompts);
        self.sorted.sort_unstable_by(|&a, &b| {
            let (one, other) = (path(keys, prompts, a), path(keys, prompts, b));
            let common = common_len(one, other);
            one.get(common).cmp(&other.get(common)).then(a.cmp(&b))
        });
        self.homes.clear();
        self.homes.resize(self.prompts.len(), NO_HOME);
        self.build(self.prompts.len() - num_running);
        self.walk();
        self.homes.truncate(self.prompts.len() - num_running);
        let nodes = &self.nodes;
        if self.means.len() > 2 * nodes.len() + 64 {
            let kept: FxHashMap<Home, Mean> =
                self.homes.iter().filter_map(|home| Some((*home, *self.means.get(home)?))).collect();
            self.means = kept;
        }
        &self.order
    }

    /// By number of the prompt: the longest prefix that it shared with others at the last arrangement.
    pub fn homes(&self) -> &[Home] {
        &self.homes
    }

    /// A request of that home ended after `num_tokens` of output.
    pub fn ended(&mut self, home: Home, num_tokens: u32) {
        self.overall.add(num_tokens);
        if home != NO_HOME {
            self.means.entry(home).or_default().add(num_tokens);
        }
    }

    /// Output of a prompt: what members of its group had, else what all had, never more than it may draw.
    fn estimate(&self, home: Home, max_tokens: u32) -> u64 {
        let told = self.means.get(&home).copied().unwrap_or_default().value();
        told.or(self.overall.value()).map_or(max_tokens.into(), |mean| mean.min(max_tokens.into()))
    }

    /// The tree over sorted prompts.
    fn build(&mut self, num_waiting: usize) {
        self.nodes.clear();
        self.pending.clear();
        self.push(Node::at(0, NONE));
        for at in 0..self.sorted.len() {
            let prompt = self.sorted[at];
            if let Some(before) = at.checked_sub(1) {
                let before = path(&self.keys, &self.prompts, self.sorted[before]);
                self.close(common_len(before, path(&self.keys, &self.prompts, prompt)) as u32);
            }
            self.push(Node { is_current: prompt as usize >= num_waiting, ..Node::at(NONE, prompt) });
        }
        self.close(0);
    }

    fn push(&mut self, node: Node) {
        self.pending.push(self.nodes.len() as u32);
        self.nodes.push(node);
    }

    /// The next prompt shares `depth` blocks with the last: nodes below are complete.
    fn close(&mut self, depth: u32) {
        while let Some(&at) = self.pending.last().filter(|&&at| self.nodes[at as usize].depth > depth) {
            self.pending.pop();
            let above = *self.pending.last().expect("the root has depth 0");
            if self.nodes[above as usize].depth < depth {
                self.push(Node::at(depth, NONE));
            }
            self.adopt(at);
        }
    }

    /// Hangs a complete node below the last pending one.
    fn adopt(&mut self, at: u32) {
        let above = *self.pending.last().expect("the root is never complete before the last prompt");
        let (mut node, parent) = (self.nodes[at as usize], self.nodes[above as usize]);
        let shared = u64::from(parent.depth) * self.block_size as u64;
        if let Some(&Prompt { start, num_tokens, max_tokens, .. }) = self.prompts.get(node.prompt as usize) {
            let home = if parent.depth == 0 { NO_HOME } else { self.keys[start + parent.depth as usize - 1] };
            self.homes[node.prompt as usize] = home;
            if !node.is_current {
                (node.output, node.work) = (self.estimate(home, max_tokens), u64::from(num_tokens) - shared);
            }
        } else if !node.is_current {
            node.work += u64::from(node.depth) * self.block_size as u64 - shared;
        }
        node.next_sibling = parent.first_child;
        self.nodes[at as usize] = node;
        let parent = &mut self.nodes[above as usize];
        parent.first_child = at;
        parent.first = parent.first.min(node.first);
        parent.is_current |= node.is_current;
        parent.output += node.output;
        parent.work += node.work;
    }

    /// Prompts depth first.
    fn walk(&mut self) {
        self.order.clear();
        self.pending.clear();
        self.pending.push(0);
        while let Some(at) = self.pending.pop() {
            let Node { prompt, is_current, mut first_child, .. } = self.nodes[at as usize];
            if prompt != NONE && !is_current {
                self.order.push(prompt);
            }
            let start = self.pending.len();
            while let Some(child) = self.nodes.get(first_child as usize) {
                self.pending.push(first_child);
                first_child = child.next_sibling;
            }
            let nodes = &self.nodes;
            // The last is visited next.
            self.pending[start..].sort_unstable_by(|&a, &b| nodes[b as usize].precedence(&nodes[a as usize]));
        }
    }
}

impl Mean {
    fn add(&mut self, num_tokens: u32) {
        self.count += 1;
        self.sum += u64::from(num_tokens);
    }

    /// Rounded up; none of nothing.
    fn value(self) -> Option<u64> {
        (self.count > 0).then(|| self.sum.div_ceil(self.count))
    }
}

fn path<'a>(keys: &'a [u64], prompts: &[Prompt], prompt: u32) -> &'a [u64] {
    let Prompt { start, end, .. } = prompts[prompt as usize];
    &keys[start..end]
}

/// One round of a multiplicative hash.
fn mix(state: u64, token: Token) -> u64 {
    let mixed = (state.rotate_left(5) ^ u64::from(token as u32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ mixed >> 32
}

#[cfg(test)]
mod tests;
