//! Who reads whose blocks: tenants, the public label, recipes.

use super::*;

/// Publishes and lets go; `labels` say whose each block is.
fn remember_as(cache: &mut Cache, labels: &[Label], tokens: &[Token]) -> Vec<BlockId> {
    let mut path: Vec<BlockId> = Vec::new();
    for (tokens, &label) in tokens.chunks_exact(BLOCK_SIZE).zip(labels) {
        let block = alloc(cache, 1, None)[0];
        let end = match cache.insert(label, path.last().copied(), tokens, block) {
            Inserted::New => block,
            Inserted::Duplicate(existing) => {
                cache.free(block);
                existing
            }
        };
        path.last().iter().for_each(|&&parent| cache.unpin(parent));
        path.push(end);
    }
    cache.unpin(*path.last().expect("at least one block"));
    cache.audit();
    path
}

fn recipe_lookup(cache: &Cache, own: Label, recipe: (Label, usize), tokens: &[Token]) -> Vec<BlockId> {
    let mut hits = Vec::new();
    cache.match_prefix(Lookup { own, recipe: Some(recipe) }, tokens, usize::MAX, &mut hits);
    hits
}

#[test]
fn public_blocks_are_read_by_every_tenant_and_stored_once() {
    let mut cache = Cache::new(&config(8));
    let public = remember(&mut cache, Label::PUBLIC, &text(1, 2));
    for label in [tenant(0), tenant(1), Label::PUBLIC] {
        assert_eq!(lookup(&cache, label, &text(1, 2)).0, public);
    }
    assert_eq!(remember_as(&mut cache, &[tenant(3); 2], &text(1, 2)), public, "duplicates of what all may read");
    assert_eq!(cache.counts().cached, 2);
}

#[test]
fn what_a_tenant_adds_below_a_public_prefix_is_its_own() {
    let mut cache = Cache::new(&config(8));
    let public = remember(&mut cache, Label::PUBLIC, &text(1, 1));
    let blocks = remember_as(&mut cache, &[tenant(0); 2], &text(1, 2));
    assert_eq!(blocks[0], public[0]);
    assert_eq!(cache.label(blocks[1]), Some(tenant(0)));
    assert_eq!(lookup(&cache, tenant(0), &text(1, 2)).0, blocks);
    assert_eq!(lookup(&cache, tenant(1), &text(1, 2)), (public.clone(), None), "not even a part of it");
    assert_eq!(lookup(&cache, Label::PUBLIC, &text(1, 2)).0, public);
}

#[test]
fn a_tenant_follows_its_own_block_before_a_public_one_wherever_they_lie() {
    for is_own_first in [true, false] {
        let mut cache = Cache::new(&config(8));
        let prefix = publish(&mut cache, Label::PUBLIC, &text(1, 1))[0];
        let [a, b] = alloc(&mut cache, 2, Some(prefix))[..] else { unreachable!() };
        let (own, public) = if is_own_first { (a, b) } else { (b, a) };
        cache.insert(tenant(0), Some(prefix), &text(1, 2)[BLOCK_SIZE..], own);
        cache.insert(Label::PUBLIC, Some(prefix), &text(1, 2)[BLOCK_SIZE..], public);
        assert_eq!(lookup(&cache, tenant(0), &text(1, 2)).0, [prefix, own], "own first: {is_own_first}");
        assert_eq!(lookup(&cache, tenant(1), &text(1, 2)).0, [prefix, public], "own first: {is_own_first}");
        cache.audit();
    }
}

#[test]
fn what_a_recipe_made_is_found_by_that_recipe_from_its_block_on_and_by_nobody_else() {
    let mut cache = Cache::new(&config(8));
    let (recipe, other) = (Label::recipe(1), Label::recipe(2));
    let blocks = remember_as(&mut cache, &[tenant(0), recipe, recipe], &text(1, 3));
    assert_eq!(recipe_lookup(&cache, tenant(0), (recipe, 1), &text(1, 3)), blocks);
    assert_eq!(lookup(&cache, tenant(0), &text(1, 3)), (blocks[..1].to_vec(), None), "an exact lookup");
    assert_eq!(recipe_lookup(&cache, tenant(0), (other, 1), &text(1, 3)), blocks[..1]);
    assert_eq!(recipe_lookup(&cache, tenant(0), (recipe, 2), &text(1, 3)), blocks[..1], "exact up to block 2");
    assert_eq!(recipe_lookup(&cache, tenant(0), (recipe, 0), &text(1, 3)), [], "blended from the first block on");
    assert_eq!(recipe_lookup(&cache, tenant(1), (recipe, 1), &text(1, 3)), [], "another tenant's exact prefix");
    assert_eq!([cache.labelled(recipe), cache.labelled(other)], [2, 0]);
    cache.clear();
    assert_eq!(cache.labelled(recipe), 0);
}

#[test]
fn exact_and_blended_kv_of_the_same_tokens_lie_side_by_side() {
    let mut cache = Cache::new(&config(8));
    let blended = remember_as(&mut cache, &[Label::recipe(1); 2], &text(1, 2));
    let exact = remember(&mut cache, tenant(0), &text(1, 2));
    assert_eq!(lookup(&cache, tenant(0), &text(1, 2)).0, exact);
    assert_eq!(recipe_lookup(&cache, tenant(0), (Label::recipe(1), 0), &text(1, 2)), blended);
    let mut hits = Vec::new();
    let lookup = Lookup { own: tenant(0), recipe: Some((Label::recipe(1), 1)) };
    let partial = cache.match_prefix(lookup, &text(1, 2), 1, &mut hits);
    assert_eq!((hits, partial), (exact[..1].to_vec(), None), "the exact child is no part of a recipe's path");
}
