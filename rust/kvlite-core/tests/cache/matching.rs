//! What a lookup finds: full hits, partial hits, tenants, provenance.

use super::*;

#[test]
fn a_published_path_is_found_whole_and_up_to_where_it_differs() {
    let mut cache = Cache::new(&config(8));
    let blocks = remember(&mut cache, tenant(0), &text(1, 3));
    assert_eq!(lookup(&cache, tenant(0), &text(1, 3)), (blocks.clone(), None));
    let mut other = text(1, 3);
    other[BLOCK_SIZE] = 0;
    assert_eq!(lookup(&cache, tenant(0), &other), (blocks[..1].to_vec(), None));
    assert_eq!(lookup(&cache, tenant(0), &text(2, 3)), (vec![], None));
    assert_eq!(lookup(&cache, tenant(0), &[]), (vec![], None));
}

#[test]
fn a_match_returns_at_most_the_blocks_it_was_allowed_and_a_part_of_the_next() {
    let mut cache = Cache::new(&config(8));
    let blocks = remember(&mut cache, tenant(0), &text(1, 3));
    let mut hits = Vec::new();
    let partial = cache.match_prefix(Lookup::exact(tenant(0)), &text(1, 3), 2, &mut hits);
    assert_eq!(hits, blocks[..2]);
    assert_eq!(partial, Some(PartialHit { block: blocks[2], len: BLOCK_SIZE as u32 - 1 }), "never a whole block");
    hits.clear();
    assert_eq!(cache.match_prefix(Lookup::exact(tenant(0)), &text(1, 3), 0, &mut hits), None);
    assert!(hits.is_empty());
}

#[test]
fn a_match_without_the_last_token_of_k_blocks_hits_k_minus_1_and_most_of_the_last() {
    let mut cache = Cache::new(&config(8));
    let blocks = remember(&mut cache, tenant(0), &text(1, 2));
    let (hits, partial) = lookup(&cache, tenant(0), &text(1, 2)[..2 * BLOCK_SIZE - 1]);
    assert_eq!(hits, blocks[..1]);
    assert_eq!(partial, Some(PartialHit { block: blocks[1], len: BLOCK_SIZE as u32 - 1 }));
}

#[test]
fn a_match_appends_and_leaves_earlier_hits_alone() {
    let mut cache = Cache::new(&config(8));
    let blocks = remember(&mut cache, tenant(0), &text(1, 1));
    let mut hits = blocks.clone();
    cache.match_prefix(Lookup::exact(tenant(0)), &text(1, 1), 9, &mut hits);
    assert_eq!(hits, [blocks[0], blocks[0]]);
}

#[test]
fn the_partial_hit_is_the_child_that_shares_most_and_the_newest_of_equals() {
    let mut cache = Cache::new(&config(8));
    let root = publish(&mut cache, tenant(0), &[9, 9, 9, 9])[0];
    let children = alloc(&mut cache, 3, None);
    for (block, tokens) in children.iter().zip([[1, 2, 3, 4], [1, 2, 0, 0], [1, 2, 3, 5]]) {
        cache.insert(tenant(0), Some(root), &tokens, *block);
    }
    let partial = |tokens: &[Token]| lookup(&cache, tenant(0), &[&[9, 9, 9, 9], tokens].concat()).1;
    assert_eq!(partial(&[1, 2, 3, 6]), Some(PartialHit { block: children[2], len: 3 }));
    assert_eq!(partial(&[1, 2, 0]), Some(PartialHit { block: children[1], len: 3 }));
    assert_eq!(partial(&[1]), Some(PartialHit { block: children[2], len: 1 }));
    assert_eq!(partial(&[1, 2, 9]), Some(PartialHit { block: children[2], len: 2 }));
    assert_eq!(partial(&[2, 2, 3, 4]), None);
    assert_eq!(partial(&[]), None);
}

#[test]
fn a_partial_hit_is_sought_among_the_newest_children_only() {
    let mut cache = Cache::new(&config(32));
    let root = publish(&mut cache, tenant(0), &[9, 9, 9, 9])[0];
    let children = alloc(&mut cache, MAX_PARTIAL_CANDIDATES + 1, None);
    for (at, &block) in children.iter().enumerate() {
        cache.insert(tenant(0), Some(root), &[at as Token, 1, 1, 1], block);
    }
    let partial = |first| lookup(&cache, tenant(0), &[9, 9, 9, 9, first, 1]).1;
    assert_eq!(partial(0), None, "the oldest child is one too many");
    assert_eq!(partial(1), Some(PartialHit { block: children[1], len: 2 }));
    let whole = lookup(&cache, tenant(0), &[9, 9, 9, 9, 0, 1, 1, 1]).0;
    assert_eq!(whole, [root, children[0]], "a full hit is found however many siblings it has");
}

#[test]
fn one_tenant_never_sees_the_blocks_of_another() {
    let mut cache = Cache::new(&config(8));
    let ours = remember(&mut cache, tenant(0), &text(1, 2));
    assert_eq!(lookup(&cache, tenant(1), &text(1, 2)), (vec![], None));
    let theirs = remember(&mut cache, tenant(1), &text(1, 2));
    assert!(ours.iter().all(|block| !theirs.contains(block)), "the same text is stored once per tenant");
    assert_eq!(lookup(&cache, tenant(1), &text(1, 2)).0, theirs);
}

#[test]
fn the_label_is_known_for_blocks_in_the_tree_only() {
    let mut cache = Cache::new(&config(4));
    let block = alloc(&mut cache, 1, None)[0];
    assert_eq!(cache.label(block), None);
    cache.insert(tenant(0), None, &[1; BLOCK_SIZE], block);
    assert_eq!(cache.label(block), Some(tenant(0)));
}
