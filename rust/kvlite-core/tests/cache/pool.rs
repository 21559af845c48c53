//! What is free, cached, in use or evicted, and where new blocks lie.

use super::*;

#[test]
fn a_pool_full_of_cached_blocks_is_available_to_the_last_one() {
    let mut cache = Cache::new(&config(100));
    for first in 0..10 {
        remember(&mut cache, tenant(0), &text(first, 10));
    }
    assert_eq!(cache.counts(), BlockCounts { cached: 100, ..BlockCounts::default() });
    assert_eq!(cache.available(), 100);
    alloc(&mut cache, 100, None);
    assert_eq!(cache.counts(), BlockCounts { owned: 100, ..BlockCounts::default() });
    cache.audit();
}

#[test]
fn eviction_takes_no_more_than_the_free_blocks_lack() {
    let mut cache = Cache::new(&config(10));
    remember(&mut cache, tenant(0), &text(1, 6));
    alloc(&mut cache, 5, None);
    assert_eq!(cache.counts(), BlockCounts { free: 0, cached: 5, owned: 5, in_transfer: 0 });
}

#[test]
fn eviction_takes_the_path_released_first_from_its_tail() {
    let mut cache = Cache::new(&config(6));
    let old = remember(&mut cache, tenant(0), &text(1, 3));
    let new = remember(&mut cache, tenant(0), &text(2, 3));
    for gone in 1..=3 {
        assert_eq!(cache.victim(), Some(old[3 - gone]));
        alloc(&mut cache, 1, None);
        cache.audit();
        assert_eq!(lookup(&cache, tenant(0), &text(1, 3)).0, old[..3 - gone], "the head stays reachable");
    }
    assert_eq!(lookup(&cache, tenant(0), &text(2, 3)).0, new);
}

#[test]
fn a_path_used_again_is_evicted_after_one_that_was_not() {
    let mut cache = Cache::new(&config(4));
    let first = remember(&mut cache, tenant(0), &text(1, 2));
    let second = remember(&mut cache, tenant(0), &text(2, 2));
    cache.pin(first[1]);
    cache.unpin(first[1]);
    assert_eq!(cache.victim(), Some(second[1]));
    alloc(&mut cache, 2, None);
    assert_eq!(lookup(&cache, tenant(0), &text(1, 2)).0, first);
}

#[test]
fn a_pin_on_the_end_protects_every_block_above_it_and_no_sibling() {
    let mut cache = Cache::new(&config(8));
    let ours = publish(&mut cache, tenant(0), &text(1, 3));
    let sibling = alloc(&mut cache, 1, None)[0];
    cache.insert(tenant(0), Some(ours[0]), &[0; BLOCK_SIZE], sibling);
    cache.unpin(sibling);
    assert_eq!(ours.iter().map(|&block| cache.state(block)).collect::<Vec<_>>(), [BlockState::Owned; 3]);
    assert_eq!(cache.state(sibling), BlockState::Cached);
    assert!(!cache.alloc(6, None, &mut Vec::new()), "five blocks are not in use");
    alloc(&mut cache, 5, None);
    assert_eq!(lookup(&cache, tenant(0), &text(1, 3)).0, ours);
    cache.audit();
}

#[test]
fn a_block_with_two_users_stays_in_use_until_both_have_gone() {
    let mut cache = Cache::new(&config(4));
    let blocks = publish(&mut cache, tenant(0), &text(1, 2));
    cache.pin(blocks[1]);
    cache.unpin(blocks[1]);
    assert_eq!(cache.counts().cached, 0);
    cache.unpin(blocks[1]);
    assert_eq!(cache.counts(), BlockCounts { free: 2, cached: 2, ..BlockCounts::default() });
}

#[test]
fn a_failed_alloc_changes_nothing() {
    let mut cache = Cache::new(&config(8));
    remember(&mut cache, tenant(0), &text(1, 3));
    let held = publish(&mut cache, tenant(0), &text(2, 2));
    let (counts, victim) = (cache.counts(), cache.victim());
    let mut out = vec![held[0]];
    assert!(!cache.alloc(7, None, &mut out), "six blocks are available");
    assert_eq!((cache.counts(), cache.victim(), out), (counts, victim, vec![held[0]]));
    assert_eq!(lookup(&cache, tenant(0), &text(1, 3)).0.len(), 3);
}

#[test]
fn a_duplicate_leaves_the_callers_block_to_the_caller_and_pins_the_other() {
    let mut cache = Cache::new(&config(8));
    let stored = remember(&mut cache, tenant(0), &text(1, 2));
    let mine = alloc(&mut cache, 2, None);
    let first = cache.insert(tenant(0), None, &text(1, 2)[..BLOCK_SIZE], mine[0]);
    assert_eq!(first, Inserted::Duplicate(stored[0]));
    let second = cache.insert(tenant(0), Some(stored[0]), &text(1, 2)[BLOCK_SIZE..], mine[1]);
    assert_eq!(second, Inserted::Duplicate(stored[1]));
    cache.unpin(stored[0]);
    assert_eq!(cache.counts(), BlockCounts { free: 4, cached: 0, owned: 4, in_transfer: 0 });
    mine.iter().for_each(|&block| cache.free(block));
    cache.unpin(stored[1]);
    assert_eq!(cache.counts(), BlockCounts { free: 6, cached: 2, owned: 0, in_transfer: 0 });
    cache.audit();
}

#[test]
fn clear_drops_what_is_cached_and_keeps_what_is_in_use() {
    let mut cache = Cache::new(&config(8));
    remember(&mut cache, tenant(0), &text(1, 3));
    let held = publish(&mut cache, tenant(0), &text(2, 2));
    cache.clear();
    cache.audit();
    assert_eq!(cache.counts(), BlockCounts { free: 6, cached: 0, owned: 2, in_transfer: 0 });
    assert_eq!(lookup(&cache, tenant(0), &text(1, 3)), (vec![], None));
    assert_eq!(lookup(&cache, tenant(0), &text(2, 2)).0, held);
}

#[test]
fn with_prefix_caching_off_nothing_is_found_and_released_blocks_are_free_at_once() {
    let mut cache = Cache::new(&CoreConfig { enable_prefix_caching: false, ..config(8) });
    let held = publish(&mut cache, tenant(0), &text(1, 3));
    assert_eq!(lookup(&cache, tenant(0), &text(1, 3)), (vec![], None));
    cache.pin(held[1]);
    cache.unpin(held[2]);
    assert_eq!(cache.counts(), BlockCounts { free: 6, cached: 0, owned: 2, in_transfer: 0 });
    cache.unpin(held[1]);
    assert_eq!(cache.counts().free, 8);
    cache.audit();
}

#[test]
fn an_alloc_continues_the_run_of_the_block_before_it() {
    let mut cache = Cache::new(&config(1000));
    let first = alloc(&mut cache, 70, None);
    assert_eq!(indices(&first), (0..70).collect::<Vec<u32>>());
    let next = alloc(&mut cache, 3, Some(first[69]));
    assert_eq!(indices(&next), [70, 71, 72]);
}

#[test]
fn sequences_that_grow_by_turns_stay_contiguous() {
    let mut cache = Cache::new(&config(1024));
    let mut ends: Vec<BlockId> = (0..8).map(|_| alloc(&mut cache, 1, None)[0]).collect();
    let starts = indices(&ends);
    for _ in 1..64 {
        for end in &mut ends {
            *end = alloc(&mut cache, 1, Some(*end))[0];
        }
    }
    let expected: Vec<u32> = starts.iter().map(|start| start + 63).collect();
    assert_eq!(indices(&ends), expected);
}

#[test]
fn blocks_evicted_for_one_alloc_come_back_as_one_run() {
    let mut cache = Cache::new(&config(256));
    for first in 0..16 {
        remember(&mut cache, tenant(0), &text(first, 16));
    }
    let run = indices(&alloc(&mut cache, 16, None));
    assert!(run.windows(2).all(|pair| pair[1] == pair[0] + 1), "{run:?}");
}

#[test]
fn a_block_in_transfer_is_counted_and_comes_back_to_its_owner() {
    let mut cache = Cache::new(&config(4));
    let block = alloc(&mut cache, 1, None)[0];
    cache.begin_transfer(block);
    assert_eq!(cache.counts(), BlockCounts { free: 3, cached: 0, owned: 0, in_transfer: 1 });
    assert!(!cache.alloc(4, None, &mut Vec::new()));
    cache.audit();
    cache.end_transfer(block);
    cache.free(block);
    assert_eq!(cache.counts().free, 4);
}
