//! Faults of the caller that stop the program with a sentence instead of corrupting the cache.

use super::*;

#[test]
#[should_panic(expected = "stale block id b0g0")]
fn a_name_that_outlived_its_block_is_caught_when_it_is_pinned() {
    let mut cache = Cache::new(&config(1));
    let old = remember(&mut cache, tenant(0), &text(1, 1))[0];
    cache.clear();
    publish(&mut cache, tenant(0), &text(2, 1));
    cache.pin(old);
}

#[test]
#[should_panic(expected = "stale block id b0g0")]
fn a_block_freed_twice_is_caught() {
    let mut cache = Cache::new(&config(2));
    let block = alloc(&mut cache, 1, None)[0];
    cache.free(block);
    cache.free(block);
}

#[test]
#[should_panic(expected = "stale block id")]
fn a_stale_parent_is_caught_when_a_block_is_inserted_below_it() {
    let mut cache = Cache::new(&config(2));
    let parent = remember(&mut cache, tenant(0), &text(1, 1))[0];
    cache.clear();
    let block = alloc(&mut cache, 1, None)[0];
    cache.insert(tenant(0), Some(parent), &[1; BLOCK_SIZE], block);
}

#[test]
#[should_panic(expected = "which nobody protects from eviction")]
fn a_block_cannot_be_inserted_below_one_that_may_be_evicted() {
    let mut cache = Cache::new(&config(2));
    let parent = remember(&mut cache, tenant(0), &text(1, 1))[0];
    let block = alloc(&mut cache, 1, None)[0];
    cache.insert(tenant(0), Some(parent), &[1; BLOCK_SIZE], block);
}

#[test]
#[should_panic(expected = "is in the tree: unpin it instead")]
fn a_published_block_cannot_be_freed() {
    let mut cache = Cache::new(&config(2));
    let block = publish(&mut cache, tenant(0), &text(1, 1))[0];
    cache.free(block);
}

#[test]
#[should_panic(expected = "is not in the tree")]
fn a_private_block_cannot_be_pinned() {
    let mut cache = Cache::new(&config(2));
    let block = alloc(&mut cache, 1, None)[0];
    cache.pin(block);
}

#[test]
#[should_panic(expected = "unpinned more often than it was pinned")]
fn an_unpin_too_many_is_caught() {
    let mut cache = Cache::new(&config(2));
    let block = remember(&mut cache, tenant(0), &text(1, 1))[0];
    cache.unpin(block);
}

#[test]
#[should_panic(expected = "full blocks only: 3 tokens for blocks of 4")]
fn a_block_that_is_not_full_cannot_be_inserted() {
    let mut cache = Cache::new(&config(2));
    let block = alloc(&mut cache, 1, None)[0];
    cache.insert(tenant(0), None, &[1; BLOCK_SIZE - 1], block);
}

#[test]
#[should_panic(expected = "would be read by nobody or by the wrong one")]
fn public_kv_cannot_be_inserted_below_a_tenants() {
    let mut cache = Cache::new(&config(2));
    let parent = publish(&mut cache, tenant(0), &text(1, 1))[0];
    let block = alloc(&mut cache, 1, None)[0];
    cache.insert(Label::PUBLIC, Some(parent), &[1; BLOCK_SIZE], block);
}

#[test]
#[should_panic(expected = "would be read by nobody or by the wrong one")]
fn exact_kv_cannot_be_inserted_below_what_a_recipe_made() {
    let mut cache = Cache::new(&config(2));
    let parent = publish(&mut cache, Label::recipe(1), &text(1, 1))[0];
    let block = alloc(&mut cache, 1, None)[0];
    cache.insert(tenant(0), Some(parent), &[1; BLOCK_SIZE], block);
}

#[test]
#[should_panic(expected = "is InTransfer, not owned by the caller")]
fn a_block_in_transfer_cannot_be_freed() {
    let mut cache = Cache::new(&config(2));
    let block = alloc(&mut cache, 1, None)[0];
    cache.begin_transfer(block);
    cache.free(block);
}
