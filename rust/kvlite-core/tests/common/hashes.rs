//! A transformer of three layers in hashes: what its KV and its scores are, without blocks, plans or tensors.
//!
//! The KV of a row in a layer is a hash of the row's hidden state, rotated by its position; the next hidden state is a hash
//! of every visible key. As in a real one, layer 0 depends on token and position alone, and deeper layers on everything
//! before them. `Naive` holds one prompt's KV in a plain array: the oracle, and the definition of a blend.

use kvlite_core::Scope;

use super::mix;

pub const LAYERS: usize = 3;
/// K, V of one row, before or after rotation.
pub type Kv = [u64; LAYERS];

/// What no row has written.
pub const UNWRITTEN: Kv = [u64::MAX; LAYERS];

pub fn rotate(base: Kv, position: usize) -> Kv {
    base.map(|kv| mix(kv ^ mix(position as u64 + 77)))
}

/// One row as its layers leave it.
#[derive(Clone, Copy)]
pub struct Row {
    /// K, V before rotation, of the layers that ran and of the first that did not.
    pub base: Kv,
    pub hidden: u64,
}

/// Runs one row through `depth` layers; `key(layer, position)` is the KV of an earlier row.
pub fn row(token: i32, position: usize, depth: usize, key: impl Fn(usize, usize) -> u64) -> Row {
    let mut hidden = mix(u64::from(token as u32) + 1);
    let mut base = UNWRITTEN;
    for layer in 0..LAYERS {
        base[layer] = mix(hidden ^ (layer as u64) << 56);
        if layer == depth {
            break;
        }
        let own = rotate(base, position)[layer];
        let seen = (0..position).fold(own, |seen, at| mix(seen ^ key(layer, at)));
        hidden = mix(hidden ^ seen);
    }
    Row { base, hidden }
}

/// Layers that a scoring row runs through.
pub fn depth_of(scope: Scope, round: usize) -> usize {
    match scope {
        Scope::New => LAYERS,
        Scope::All => (round + 1).min(LAYERS - 1),
    }
}

/// Attention of a scoring row to one key: small whole numbers, so that sums do not depend on their order, and a rare NaN.
pub fn weight(scorer: Row, key: u64) -> f32 {
    match mix(scorer.hidden ^ key) % 64 {
        0 => f32::NAN,
        number => (number % 8) as f32,
    }
}

/// What a row's own deviation is worth: 1 where it was not looked at.
pub fn value(new: u64, old: u64) -> f32 {
    (mix(new ^ mix(old)) % 5) as f32
}

/// A prompt's KV in one array.
#[derive(Clone, Default)]
pub struct Naive {
    pub tokens: Vec<i32>,
    pub kv: Vec<Kv>,
    /// Final hidden states; what is sampled from.
    pub hidden: Vec<u64>,
}

impl Naive {
    pub fn of(tokens: &[i32]) -> Naive {
        let mut naive = Naive { tokens: tokens.to_vec(), ..Naive::default() };
        naive.settle(tokens.len());
        naive
    }

    /// The first `len` tokens of it.
    pub fn cut(&self, len: usize) -> Naive {
        let (tokens, kv, hidden) = (self.tokens[..len].to_vec(), self.kv[..len].to_vec(), self.hidden[..len].to_vec());
        Naive { tokens, kv, hidden }
    }

    /// Computes what is not there of the first `len` rows, as new text.
    pub fn settle(&mut self, len: usize) {
        for position in self.kv.len()..len {
            self.kv.push(UNWRITTEN);
            self.hidden.push(0);
            self.compute(position, LAYERS);
        }
    }

    /// Runs one row through `depth` layers and keeps what it stores.
    pub fn compute(&mut self, position: usize, depth: usize) -> Row {
        let row = row(self.tokens[position], position, depth, |layer, at| self.kv[at][layer]);
        let stored = rotate(row.base, position);
        self.kv[position][..depth].copy_from_slice(&stored[..depth]);
        self.hidden[position] = row.hidden;
        row
    }
}

/// K, V before rotation of `ids` computed alone behind the canonical prefix.
pub fn canonical(prefix: &[i32], ids: &[i32]) -> Vec<Kv> {
    let alone = Naive::of(&[prefix, ids].concat());
    let base = |position: usize| row(alone.tokens[position], position, LAYERS, |layer, at| alone.kv[at][layer]).base;
    (prefix.len()..alone.tokens.len()).map(base).collect()
}
