//! Recipes: which blended KV is the same, so that it may be found again, and what to replay where it is gone.
//!
//! Owns the table; each recipe's number makes the label of the blocks it made. A recipe is (tenant, method, ratio, spans,
//! reused ranges, tokens up to the end of what was scored, chosen rows). Invariants: equal recipes have one number; a
//! number is free again only when nobody holds it and no block carries its label. Bounded by blocks and live sequences.
//! Called by `blending.rs` and `end.rs`.

use std::hash::Hasher;
use std::sync::Arc;

use rustc_hash::{FxHashMap, FxHasher};

use crate::blend::{Choice, Rule};
use crate::cache::Cache;
use crate::ids::{Label, TenantId, Token};

/// Recipes of one key that a look-up compares, newest first.
const MAX_CANDIDATES: usize = 8;
/// Recipes below which nobody looks for dead ones.
const MIN_SWEEP: usize = 64;

#[derive(Debug)]
pub(super) struct Recipe {
    tenant: TenantId,
    rule: Arc<Rule>,
    /// The prompt up to the end of what was scored; at least to the end of the last span.
    tokens: Box<[Token]>,
    /// (start, end) of reused rows, ascending.
    pub reused: Box<[(u32, u32)]>,
    /// What became of them.
    pub chosen: Arc<Choice>,
    key: u64,
    /// Sequences that make it or may resume with it.
    pub holders: u32,
}

impl Recipe {
    /// The first block that carries its label.
    pub fn first_block(&self, block_size: u32) -> usize {
        (self.reused[0].0 / block_size) as usize
    }

    /// How many tokens of a prompt it goes by.
    pub fn tokens_len(&self) -> u32 {
        self.tokens.len() as u32
    }

    fn has(&self, tenant: TenantId, rule: &Rule) -> bool {
        self.tenant == tenant && self.rule.makes_the_same(rule)
    }
}

/// All recipes by number.
#[derive(Debug, Default)]
pub(super) struct Recipes {
    table: Vec<Option<Recipe>>,
    free: Vec<u32>,
    /// Numbers per key, oldest first.
    by_key: FxHashMap<u64, Vec<u32>>,
    /// Live recipes after the last search for dead ones.
    num_swept: usize,
}

impl Recipes {
    pub fn get(&self, number: u32) -> &Recipe {
        self.table[number as usize].as_ref().expect("a recipe lives while somebody holds it")
    }

    /// All live recipes.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Recipe)> {
        self.table.iter().enumerate().filter_map(|(number, recipe)| Some((number as u32, recipe.as_ref()?)))
    }

    /// Live recipes; some may have lost their last block.
    pub fn len(&self) -> usize {
        self.table.len() - self.free.len()
    }

    /// Recipes whose KV `prompt` under `rule` may take over, newest first.
    pub fn candidates(&self, tenant: TenantId, rule: &Rule, prompt: &[Token]) -> Vec<u32> {
        let numbers = self.by_key.get(&key(tenant, rule, prompt)).map_or(&[][..], |numbers| numbers);
        let fits = |&number: &u32| {
            let recipe = self.get(number);
            recipe.has(tenant, rule) && prompt.starts_with(&recipe.tokens)
        };
        numbers.iter().rev().take(MAX_CANDIDATES).copied().filter(fits).collect()
    }

    /// The number of this recipe, held once more.
    pub fn intern(
        &mut self,
        (tenant, rule): (TenantId, &Arc<Rule>),
        tokens: &[Token],
        reused: Box<[(u32, u32)]>,
        chosen: Choice,
        cache: &Cache,
    ) -> u32 {
        let key = key(tenant, rule, tokens);
        let is_same = |&&number: &&u32| {
            let recipe = self.get(number);
            let same = recipe.has(tenant, rule) && *recipe.tokens == *tokens;
            same && recipe.reused == reused && *recipe.chosen == chosen
        };
        if let Some(&number) = self.by_key.get(&key).and_then(|numbers| numbers.iter().find(is_same)) {
            self.hold(number);
            return number;
        }
        self.sweep(cache);
        let number = self.free.pop().unwrap_or_else(|| {
            self.table.push(None);
            self.table.len() as u32 - 1
        });
        let recipe = Recipe {
            tenant,
            rule: Arc::clone(rule),
            tokens: tokens.into(),
            reused,
            chosen: Arc::new(chosen),
            key,
            holders: 1,
        };
        self.table[number as usize] = Some(recipe);
        self.by_key.entry(key).or_default().push(number);
        number
    }

    /// One more sequence goes by this recipe.
    pub fn hold(&mut self, number: u32) {
        self.table[number as usize].as_mut().expect("only live recipes are found").holders += 1;
    }

    /// One less; without blocks it is forgotten.
    pub fn release(&mut self, number: u32, cache: &Cache) {
        let recipe = self.table[number as usize].as_mut().expect("a recipe lives while somebody holds it");
        recipe.holders -= 1;
        self.retire(number, cache);
    }

    fn retire(&mut self, number: u32, cache: &Cache) {
        let recipe = self.get(number);
        if recipe.holders > 0 || cache.labelled(Label::recipe(number)) > 0 {
            return;
        }
        let key = recipe.key;
        let numbers = self.by_key.get_mut(&key).expect("every recipe is listed under its key");
        numbers.retain(|&other| other != number);
        if numbers.is_empty() {
            self.by_key.remove(&key);
        }
        self.table[number as usize] = None;
        self.free.push(number);
    }

    /// Forgets recipes whose last block was evicted, whenever their number has doubled: amortised O(1).
    fn sweep(&mut self, cache: &Cache) {
        if self.len() < 2 * self.num_swept.max(MIN_SWEEP / 2) {
            return;
        }
        for number in 0..self.table.len() as u32 {
            if self.table[number as usize].is_some() {
                self.retire(number, cache);
            }
        }
        self.num_swept = self.len();
    }
}

/// Hash of what a follow-up must have in common: nominates, the comparison decides.
fn key(tenant: TenantId, rule: &Rule, prompt: &[Token]) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write_u32(tenant.0);
    hasher.write_u32(rule.method_id);
    hasher.write_u64(rule.ratio.to_bits());
    for &(start, len) in &rule.spans {
        hasher.write_u64(u64::from(start) << 32 | u64::from(len));
    }
    for &token in &prompt[..rule.spans_end() as usize] {
        hasher.write_i32(token);
    }
    hasher.finish()
}
