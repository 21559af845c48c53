//! Who goes first: by the past of blocks, and by who waits.

use super::*;
use kvlite_core::EvictionKind;
use kvlite_core::Waiter;
use kvlite_core::cache::MAX_WATCHED;

fn waiter(number: i64) -> Waiter {
    Waiter { rank: (number, 0), choice: 0, slot: number as u32 }
}

fn watch(cache: &mut Cache, number: i64, tokens: &[Token]) {
    cache.watch(waiter(number), Lookup::exact(tenant(0)), tokens);
    cache.audit();
}

/// Blocks as eviction takes them, one after the other.
fn evicted(cache: &mut Cache, count: usize) -> Vec<BlockId> {
    let free = cache.counts().free;
    alloc(cache, free, None);
    (0..count)
        .map(|_| {
            let victim = cache.victim().expect("something is cached");
            alloc(cache, 1, None);
            cache.audit();
            victim
        })
        .collect()
}

fn cache_by(eviction: EvictionKind, num_blocks: u32) -> Cache {
    Cache::new(&CoreConfig { eviction, ..config(num_blocks) })
}

#[test]
fn a_block_that_was_used_twice_outlives_newer_ones_by_reuse_and_not_by_recency() {
    for (eviction, outlives) in [(EvictionKind::ReuseWeighted, true), (EvictionKind::Lru, false)] {
        let mut cache = cache_by(eviction, 4);
        let used = remember(&mut cache, tenant(0), &text(1, 1))[0];
        cache.pin(used);
        cache.unpin(used);
        let new = remember(&mut cache, tenant(0), &text(2, 1))[0];
        assert_eq!(cache.victim(), Some(if outlives { new } else { used }), "{eviction:?}");
    }
}

#[test]
fn what_was_used_before_it_was_evicted_is_not_new_when_it_comes_back() {
    let mut cache = cache_by(EvictionKind::ReuseWeighted, 2);
    for uses in 1..4 {
        let back = remember(&mut cache, tenant(0), &text(1, 1))[0];
        assert_eq!(cache.uses(back), uses);
        let private = alloc(&mut cache, 2, None);
        private.into_iter().for_each(|block| cache.free(block));
    }
    let other_tenant = remember(&mut cache, tenant(1), &text(1, 1))[0];
    assert_eq!(cache.uses(other_tenant), 1, "the past of a block is its tenant's");
}

#[test]
fn shallow_blocks_stay_by_depth_and_deep_ones_by_cost() {
    for (eviction, deep_first) in [(EvictionKind::DepthDiscounted, true), (EvictionKind::CostAware, false)] {
        let mut cache = cache_by(eviction, 5);
        let (shallow, deep) = if deep_first {
            let shallow = remember(&mut cache, tenant(0), &text(1, 1));
            (shallow, remember(&mut cache, tenant(0), &text(2, 4)))
        } else {
            let deep = remember(&mut cache, tenant(0), &text(2, 4));
            (remember(&mut cache, tenant(0), &text(1, 1)), deep)
        };
        let expected = if deep_first { deep[3] } else { shallow[0] };
        assert_eq!(cache.victim(), Some(expected), "{eviction:?}: not the one that was released first");
    }
}

#[test]
fn what_nobody_waits_for_goes_first_then_what_is_needed_last_and_always_the_tail() {
    let mut cache = Cache::new(&config(8));
    let soon = remember(&mut cache, tenant(0), &text(1, 2));
    let late = remember(&mut cache, tenant(0), &text(2, 2));
    let unwanted = remember(&mut cache, tenant(0), &text(3, 2));
    watch(&mut cache, 2, &text(2, 2));
    watch(&mut cache, 1, &text(1, 2));
    let expected = [&unwanted, &late, &soon].map(|path| [path[1], path[0]]).concat();
    assert_eq!(evicted(&mut cache, 6), expected);
    assert!(cache.watched().all(|(_, at)| at.is_none()), "whoever waited for it is back at the root");
}

#[test]
fn a_prefix_that_several_wait_for_is_needed_when_the_first_of_them_is_served() {
    let mut cache = Cache::new(&config(8));
    let shared = remember(&mut cache, tenant(0), &text(1, 1))[0];
    let other = remember(&mut cache, tenant(0), &text(2, 1))[0];
    for (number, first) in [(3, 1), (2, 2), (1, 1)] {
        watch(&mut cache, number, &text(first, 1));
    }
    assert_eq!(cache.victim(), Some(other));
    assert!(cache.unwatch(waiter(1)));
    cache.audit();
    assert_eq!(cache.victim(), Some(shared), "waiter 3 is later than waiter 2");
    assert!(cache.unwatch(waiter(3)) && !cache.unwatch(waiter(3)));
    assert_eq!(evicted(&mut cache, 2), [shared, other], "shared is wanted by nobody now");
}

#[test]
fn what_is_needed_last_is_another_block_once_others_are_to_be_served_first() {
    let mut cache = Cache::new(&config(8));
    let path = [1, 2, 3].map(|number| remember(&mut cache, tenant(0), &text(number, 1))[0]);
    (1..4).for_each(|number| watch(&mut cache, number.into(), &text(number, 1)));
    cache.reorder(|old| Waiter { rank: (i64::from(old.slot + 1) % 3, 0), ..old }); // 2, 3, 1
    cache.audit();
    assert_eq!(cache.last_watched().map(|waiter| waiter.slot), Some(1));
    assert_eq!(evicted(&mut cache, 3), [path[0], path[2], path[1]]);
}

#[test]
fn who_waits_is_followed_as_the_path_grows_and_a_tenant_wants_nothing_of_another() {
    let mut cache = Cache::new(&config(8));
    let tokens = text(1, 2);
    watch(&mut cache, 1, &tokens);
    cache.watch(waiter(2), Lookup::exact(tenant(1)), &tokens);
    let path = publish(&mut cache, tenant(0), &tokens);
    for &block in &path {
        cache.follow(block, |waiter| (Lookup::exact(tenant(u32::from(waiter.slot == 2))), &tokens));
        cache.audit();
    }
    assert!(cache.watched().map(|(_, at)| at).eq([Some(path[1]), None]));
}

#[test]
fn as_many_as_are_watched_may_wait_for_one_block() {
    let mut cache = Cache::new(&config(4));
    let block = remember(&mut cache, tenant(0), &text(1, 1))[0];
    (0..MAX_WATCHED as i64).for_each(|number| cache.watch(waiter(number), Lookup::exact(tenant(0)), &text(1, 1)));
    assert_eq!((cache.num_watched(), cache.last_watched()), (MAX_WATCHED, Some(waiter(MAX_WATCHED as i64 - 1))));
    assert_eq!(evicted(&mut cache, 1), [block]);
    (0..MAX_WATCHED as i64).for_each(|number| assert!(cache.unwatch(waiter(number))));
    cache.audit();
}
