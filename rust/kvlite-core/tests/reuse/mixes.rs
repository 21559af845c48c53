//! Random mixes of everything, audited after every step: nothing hangs, nothing leaks, every request ends once.

use kvlite_core::{CoreConfig, Request, Round, Scope};

use crate::driver::{Driver, blend, config, request, text};

/// splitmix64, small numbers of it.
struct Rng(u64);

impl Rng {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

fn arrive(driver: &mut Driver, rng: &mut Rng) -> Option<i32> {
    let (a, b) = (text(rng.below(3) as i32, 4), text(10 + rng.below(4) as i32, 1 + rng.below(9) as usize));
    if rng.below(6) == 0 {
        return driver.core.add_segment(&b, 0, rng.below(8) == 0, None, driver.now_ms).ok();
    }
    let prompt = [a.clone(), b.clone(), text(20, 3), b.clone(), text(30 + rng.below(9) as i32, 2)].concat();
    let len = b.len() as u32;
    let spans = [(4, len), (7 + len, len)];
    let all = [(Scope::All, 0.5), (Scope::New, 0.25)].map(|(scope, ratio)| Round { scope, cost: 0.4, ratio });
    let rounds = &all[rng.below(3) as usize % 2..];
    let mut asked = blend(&spans[..1 + rng.below(2) as usize], rounds, [0.0, 0.25, 0.25, 1.0][rng.below(4) as usize]);
    asked.method_id = 7;
    asked.decode_rows = [0, 0, 1, 3][rng.below(4) as usize];
    let asked = Request {
        n: 1 + rng.below(3) as u32,
        max_tokens: 1 + rng.below(24) as u32,
        tenant: rng.below(2) as u32,
        use_cache: rng.below(5) > 0,
        deadline_ms: (rng.below(9) == 0).then_some(driver.now_ms + 5),
        ..request(&prompt, (rng.below(8) > 0).then_some(asked))
    };
    driver.core.add(&asked, driver.now_ms).ok()
}

/// Preempted sequences, tokens placed, tokens computed in chunks.
fn run(seed: u64) -> [u64; 3] {
    let mut rng = Rng(seed);
    let num_blocks = 14 + rng.below(8) as u32;
    let max_num_batched_tokens = 4 + rng.below(30) as u32;
    let enable_prefix_caching = rng.below(6) > 0;
    let ratio = [0.2, 0.5, 1.0][rng.below(3) as usize];
    let mut driver = Driver::new(CoreConfig {
        num_blocks,
        max_num_batched_tokens,
        enable_prefix_caching,
        segment_cache_ratio: ratio,
        ..config()
    });
    let mut live = Vec::new();
    for _ in 0..60 {
        if rng.below(3) == 0 {
            live.extend(arrive(&mut driver, &mut rng));
        }
        match rng.below(30) {
            0 if !live.is_empty() => {
                let at = rng.below(live.len() as u64) as usize;
                driver.core.abort(live[at]);
            }
            1 => drop(driver.core.drop_segment(0, &text(10 + rng.below(4) as i32, 1 + rng.below(9) as usize))),
            2 => driver.core.clear_cache(),
            _ => {}
        }
        driver.step();
        if rng.below(2) == 0 {
            driver.step();
            driver.complete_both();
        } else {
            driver.complete(i32::from(rng.below(40) == 0));
        }
        driver.now_ms += 1;
    }
    driver.drain();
    let count = |handle: i32| driver.finished.iter().filter(|end| end[0] == handle).count();
    assert!(live.iter().all(|&handle| (1..=3).contains(&count(handle))), "seed {seed}");
    for pinned in 10..14 {
        for len in 1..10 {
            driver.core.pin_segment(0, &text(pinned, len), false).unwrap();
        }
    }
    driver.core.clear_cache();
    let stats = driver.core.stats();
    assert_eq!((stats.free_blocks, stats.num_segments), (num_blocks as usize, 0), "seed {seed}");
    [stats.preemptions_total, stats.segment_hit_tokens_total, stats.prefill_tokens_total]
}

#[test]
fn any_mix_of_blends_repairs_choices_and_segments_ends_and_leaves_nothing() {
    let sums = (0..300).map(run).reduce(|a, b| [0, 1, 2].map(|at| a[at] + b[at])).unwrap();
    assert!(sums[0] > 300 && sums[1] > 10_000, "preemptions, placed and computed tokens: {sums:?}");
}
