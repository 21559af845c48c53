//! Orders of admission in a whole engine: what each is for, and what it may not do to anybody.

mod common;

use common::Asked;
use common::engine::{Engine, small_config};
use common::workload::POLICIES;
use kvlite_core::{CoreConfig, CoreError, PolicyKind};

const COMPARING: [PolicyKind; 3] = [PolicyKind::HitRate, PolicyKind::CacheAware, PolicyKind::Fair];

fn prompt(salt: i32, len: usize) -> Vec<i32> {
    (0..len as i32).map(|at| (at * 7 + salt * 13) % 90).collect()
}

/// 50 tokens of which 48 are cached once `warm` has run.
fn hit(own: i32) -> Asked {
    Asked::new(&[prompt(1, 48), vec![90 + own % 10, own % 7]].concat(), 2)
}

fn cold(salt: i32) -> Asked {
    Asked::new(&prompt(salt, 40), 2)
}

/// One row, so that requests are admitted one by one; the prefix of `hit` is in the cache for `tenant`.
fn warm(policy: PolicyKind, max_passes: u32, tenants: &[u32]) -> Engine {
    let config =
        CoreConfig { max_num_seqs: 1, num_blocks: 64, max_num_waiting: 64, policy, max_passes, ..small_config() };
    let mut engine = Engine::new(config);
    for &tenant in tenants {
        engine.add(Asked { tenant, ..hit(0) }).unwrap();
        engine.drain(100);
    }
    engine
}

/// Handles in the order in which they are admitted until nothing lives.
fn order(engine: &mut Engine, handles: &[i32]) -> Vec<i32> {
    let mut admitted = Vec::new();
    while engine.num_live() > 0 {
        engine.turn();
        for &handle in handles {
            if engine.told[&handle].admitted && !admitted.contains(&handle) {
                admitted.push(handle);
            }
        }
    }
    admitted
}

#[test]
fn a_cold_request_among_a_flood_of_hits_is_passed_as_often_as_the_bound_says_and_no_more() {
    for policy in COMPARING {
        let mut engine = warm(policy, 5, &[0]);
        let first = engine.add(hit(1)).unwrap();
        let waits = engine.add(cold(2)).unwrap();
        let mut handles = vec![first, waits];
        handles.extend((2..5).map(|own| engine.add(hit(own)).unwrap()));
        for own in 5..40 {
            handles.push(engine.add(hit(own)).unwrap()); // The flood goes on while it waits.
            engine.turn();
        }
        let admitted = order(&mut engine, &handles);
        let place = admitted.iter().position(|&handle| handle == waits);
        assert_eq!(engine.told[&waits].passes, 5, "{policy:?}");
        assert!(place.is_some_and(|place| place <= 6), "{policy:?}: {place:?} of {admitted:?}");
    }
}

#[test]
fn hits_go_before_a_cold_request_and_arrival_decides_among_equals() {
    for policy in COMPARING {
        let mut engine = warm(policy, 64, &[0]);
        let running = engine.add(hit(9)).unwrap();
        engine.turn();
        let handles = [cold(2), hit(1), cold(3), hit(2)].map(|asked| engine.add(asked).unwrap());
        let expected = [running, handles[1], handles[3], handles[0], handles[2]];
        assert_eq!(order(&mut engine, &[&[running][..], &handles].concat()), expected, "{policy:?}");
    }
}

#[test]
fn by_share_a_long_prompt_of_hits_goes_first_and_by_work_a_short_cold_one() {
    for (policy, short_first) in [(PolicyKind::HitRate, false), (PolicyKind::CacheAware, true)] {
        let mut engine = warm(policy, 64, &[0]);
        let running = engine.add(hit(9)).unwrap();
        engine.turn();
        let long = engine.add(Asked::new(&[prompt(1, 48), prompt(5, 10)].concat(), 2)).unwrap();
        let short = engine.add(Asked::new(&prompt(6, 5), 2)).unwrap();
        let admitted = order(&mut engine, &[running, long, short]);
        assert_eq!(admitted[1] == short, short_first, "{policy:?}");
    }
}

#[test]
fn whoever_was_chosen_and_does_not_fit_is_passed_by_nobody_who_would() {
    for policy in COMPARING {
        let config = CoreConfig { policy, max_passes: 2, num_blocks: 24, max_num_waiting: 64, ..small_config() };
        let mut engine = Engine::new(config);
        engine.add(Asked::new(&prompt(2, 40), 20)).unwrap(); // Leaves too little for the large one, for long.
        engine.turn();
        let large = engine.add(Asked::new(&prompt(3, 57), 3)).unwrap();
        let small = |own: i32| Asked::new(&prompt(own, 3), 2);
        let handles: Vec<i32> = (0..30).map(|own| engine.add(small(own)).unwrap()).collect();
        let mut waited = 0;
        while !engine.told[&large].admitted {
            engine.turn();
            waited += 1;
            assert!(waited < 60, "{policy:?}: the large one starves");
        }
        let before = handles.iter().filter(|handle| engine.told[handle].admitted).count();
        let expected = if policy == PolicyKind::HitRate { 0 } else { 2 }; // Nobody's share is better than its own.
        assert!(waited > 15 && before == expected, "{policy:?}: {before} small ones in {waited} steps");
        engine.drain(300);
    }
}

#[test]
fn no_tenant_is_displaced_by_the_hits_of_another() {
    let tenants_in_order = |policy| {
        let mut engine = warm(policy, 64, &[0, 1]);
        let mut handles = vec![engine.add(hit(9)).unwrap()];
        engine.turn();
        for own in 0..20 {
            let (tenant, asked) = match own % 5 {
                0 => (0, cold(10 + own)),
                1 => (1, cold(10 + own)),
                2 => (1, hit(own)),
                _ => (0, hit(own)),
            };
            handles.push(engine.add(Asked { tenant, ..asked }).unwrap());
        }
        let admitted = order(&mut engine, &handles);
        let tenants: Vec<u32> = admitted.iter().map(|handle| engine.asked[handle].tenant).collect();
        (admitted, tenants)
    };
    let (by_arrival, expected) = tenants_in_order(PolicyKind::Fcfs);
    for policy in [PolicyKind::HitRate, PolicyKind::CacheAware] {
        let (admitted, tenants) = tenants_in_order(policy);
        assert_eq!(tenants, expected, "{policy:?}: turns of tenants are those of arrival");
        assert_ne!(admitted, by_arrival, "{policy:?} chooses within them");
    }
}

/// What a request has got, as `fair` counts it.
fn service(engine: &Engine, tenant: u32) -> i64 {
    let of = |(handle, asked): (&i32, &Asked)| {
        let told = &engine.told[handle];
        let prompt = if told.admitted { asked.prompt.len() as i64 - i64::from(told.cached_len[0]) } else { 0 };
        if asked.tenant == tenant { prompt + 2 * told.outputs[0].len() as i64 } else { 0 }
    };
    engine.asked.iter().map(of).sum()
}

#[test]
fn two_tenants_that_wait_get_equal_service_though_one_floods() {
    let largest = |policy| {
        let mut engine = warm(policy, 64, &[]);
        for own in 0..40 {
            engine.add(Asked { use_cache: false, ..Asked::new(&prompt(own, 10 + own as usize % 5), 4) }).unwrap();
        }
        let quiet = || Asked { tenant: 1, use_cache: false, ..Asked::new(&prompt(3, 6), 2) };
        let mut waiting = [engine.add(quiet()).unwrap(), engine.add(quiet()).unwrap()];
        let mut largest = 0;
        for _ in 0..150 {
            engine.turn();
            for handle in &mut waiting {
                if engine.told[handle].admitted {
                    *handle = engine.add(quiet()).unwrap();
                }
            }
            largest = largest.max((service(&engine, 0) - service(&engine, 1)).abs());
        }
        engine.drain(1000);
        largest
    };
    let bound = 2 * (14 + 2 * 4); // Twice the largest request's prompt and output.
    let (fair, by_arrival) = (largest(PolicyKind::Fair), largest(PolicyKind::Fcfs));
    assert!(fair <= bound, "{fair} tokens apart, the bound is {bound}");
    assert!(by_arrival > 4 * bound, "the flood is one: {by_arrival} tokens apart by arrival");
}

#[test]
fn idleness_earns_no_service() {
    let mut engine = warm(PolicyKind::Fair, 64, &[]);
    let ask = |tenant, salt| Asked { tenant, use_cache: false, ..Asked::new(&prompt(salt, 10), 4) };
    for salt in 0..12 {
        engine.add(ask(0, salt)).unwrap();
    }
    while engine.told.values().filter(|told| told.admitted).count() < 9 {
        engine.turn();
    }
    let mut handles: Vec<i32> = engine.told.iter().filter(|(_, told)| !told.admitted).map(|(&at, _)| at).collect();
    handles.extend((0..6).map(|salt| engine.add(ask(1, salt)).unwrap()));
    let admitted = order(&mut engine, &handles);
    let early = admitted[..6].iter().filter(|handle| engine.asked[handle].tenant == 1).count();
    assert!((3..=4).contains(&early), "{early} of 6 turns are the newcomer's: they take turns from its first on");
}

#[test]
fn a_flood_of_ever_new_tenants_starves_nobody() {
    let mut engine = warm(PolicyKind::Fair, 64, &[]);
    let ask = |tenant, len| Asked { tenant, use_cache: false, ..Asked::new(&prompt(tenant as i32, len), 2) };
    // Tenant 0 is ahead by the 60 tokens of its first request, and has another one.
    engine.add(Asked { max_tokens: 4, ..ask(0, 56) }).unwrap();
    engine.turn();
    let waits = engine.add(ask(0, 8)).unwrap();
    let mut newcomers = Vec::new();
    while !engine.told[&waits].admitted {
        let waiting = newcomers.iter().filter(|handle| !engine.told[handle].admitted).count();
        for _ in waiting..3 {
            newcomers.push(engine.add(ask(1 + newcomers.len() as u32, 8)).unwrap());
        }
        engine.turn();
        assert!(newcomers.len() < 50, "tenant 0 starves");
    }
    // Its lead and one request, from each of the 3 that wait and the 1 that runs; a request is 8 + 2 * 2 tokens.
    let served = newcomers.iter().filter(|handle| engine.told[handle].admitted).count();
    let (lead, request) = (56 + 2 * 4, 12);
    assert!(served > 3 && served <= 4 * (lead + request) / request, "{served} newcomers before it");
    engine.drain(300);
}

#[test]
fn a_level_of_priority_is_known_to_one_policy_and_refused_by_the_others() {
    for policy in POLICIES {
        let mut engine = warm(policy, 64, &[]);
        let added = engine.add(Asked { priority: -1, ..cold(2) });
        match policy {
            PolicyKind::Priority => assert!(added.is_ok()),
            _ => assert_eq!(added, Err(CoreError::Priority { priority: -1 }), "{policy:?}"),
        }
        engine.drain(50);
    }
}

#[test]
fn under_priority_the_urgent_go_first() {
    let mut engine = warm(PolicyKind::Priority, 64, &[]);
    let running = engine.add(cold(1)).unwrap();
    engine.turn();
    let ask = |priority| Asked { priority, ..cold(priority + 5) };
    let handles = [1, 0, -1, 0].map(|priority| engine.add(ask(priority)).unwrap());
    let [low, normal, urgent, later] = handles;
    assert_eq!(order(&mut engine, &[&[running][..], &handles].concat()), [running, urgent, normal, later, low]);
}

#[test]
fn the_prefix_that_the_next_candidate_hits_is_evicted_last() {
    for policy in COMPARING {
        let mut engine = Engine::new(CoreConfig { max_num_seqs: 1, num_blocks: 24, policy, ..small_config() });
        for salt in [1, 2] {
            engine.add(Asked::new(&prompt(salt, 33), 1)).unwrap(); // 8 blocks each, the first the oldest in the cache.
            engine.drain(50);
        }
        engine.add(Asked::new(&prompt(3, 20), 30)).unwrap(); // Takes 13 of 24, so it evicts 5.
        engine.turn();
        engine.add(Asked::new(&prompt(4, 60), 1)).unwrap();
        let next = engine.add(Asked::new(&prompt(1, 33), 1)).unwrap();
        engine.drain(200);
        assert_eq!(engine.told[&next].cached_len, [32], "{policy:?}");
    }
}

#[test]
fn eviction_takes_what_is_needed_last_by_level_and_not_by_arrival() {
    for (policy, expected) in [(PolicyKind::Fcfs, [16, 8]), (PolicyKind::Priority, [8, 16])] {
        let config = CoreConfig { max_num_seqs: 1, num_blocks: 12, policy, ..small_config() };
        let mut engine = Engine::new(config);
        let asked = |salt: i32, priority: i32| Asked { priority, ..Asked::new(&prompt(salt, 17), 1) };
        for salt in [2, 3] {
            engine.add(asked(salt, 0)).unwrap();
            engine.drain(20);
        }
        engine.add(Asked::new(&prompt(4, 4), 20)).unwrap(); // Six blocks; four are free.
        engine.turn();
        let lower = i32::from(policy == PolicyKind::Priority);
        let waiting = [(2, lower), (3, 0)].map(|(salt, priority)| engine.add(asked(salt, priority)).unwrap());
        engine.drain(50);
        let cached = waiting.map(|handle| engine.told[&handle].cached_len[0]);
        assert_eq!(cached, expected, "{policy:?}");
    }
}
