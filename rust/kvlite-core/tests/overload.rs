//! Ten times the KV pool is offered at once: nobody is lost or hangs, everybody gets the right tokens, preemptions stay
//! few, and the engine does nine tenths of the work per second that it does at its best with less load.
//!
//! Virtual time: a step costs a fixed part (weights are read once, however many rows there are) and a part per row, so
//! that both small batches and rows that are computed twice show. The device hashes what it reads; the reader checks
//! every token.

mod common;

use common::engine::{Engine, small_config};
use common::workload::POLICIES;
use common::{Asked, Rng};
use kvlite_core::plan::Header;
use kvlite_core::{CoreConfig, FinishReason, PolicyKind};

const NUM_BLOCKS: u32 = 96;
const BLOCK_SIZE: u32 = 4;
const NUM_SEEDS: u64 = 4;
/// What a step costs beside its rows, in rows.
const STEP_COST: u64 = 16;
/// Loads offered at a time, in pools: one that just fits, and those among which the peak of throughput is sought.
const LOADS: [(u32, u32); 4] = [(1, 1), (5, 4), (3, 2), (2, 1)];
const MAX_STEPS: usize = 20_000;

/// Blocks that a request needs at its declared end.
fn blocks(asked: &Asked) -> u32 {
    (asked.prompt.len() as u32 + asked.max_tokens - 1).div_ceil(BLOCK_SIZE)
}

/// Prompts without common beginnings that need ten times the pool together.
fn requests(rng: &mut Rng) -> Vec<Asked> {
    let (mut asked, mut needed) = (Vec::new(), 0);
    while needed < 10 * NUM_BLOCKS {
        let prompt: Vec<i32> = (0..rng.range(4, 32)).map(|_| rng.range(0, 99) as i32).collect();
        asked.push(Asked { seed: rng.next(), ..Asked::new(&prompt, rng.range(4, 32) as u32) });
        needed += blocks(asked.last().expect("just pushed"));
    }
    asked
}

/// What came of one run.
struct Outcome {
    tokens_per_time: f64,
    mean_preemptions: f64,
    most_preemptions: u32,
}

/// Runs all of `offered`, in which as many blocks as `limit` are offered at a time.
fn run(config: &CoreConfig, offered: &[Asked], limit: u32) -> Outcome {
    let mut engine = Engine::new(config.clone());
    let (mut handles, mut time) = (Vec::new(), 0);
    for _ in 0..MAX_STEPS {
        let is_live = |handle: &&i32| engine.told[handle].finished.contains(&None);
        let mut load: u32 = handles.iter().filter(is_live).map(|handle| blocks(&engine.asked[handle])).sum();
        while let Some(next) = offered.get(handles.len()).filter(|&next| load + blocks(next) <= limit) {
            handles.push(engine.add(next.clone()).expect("the queue has room"));
            load += blocks(next);
        }
        if load == 0 {
            break;
        }
        let rows = engine.turn().header(Header::NumTokens) as u64;
        time += STEP_COST + rows;
    }
    engine.drain(3);
    assert_eq!(handles.len(), offered.len(), "nobody is left at the door");
    for (handle, asked) in handles.iter().zip(offered) {
        let told = &engine.told[handle];
        assert_eq!(told.finished, [Some(FinishReason::Length)], "nobody is lost");
        assert_eq!(told.outputs[0].len(), asked.max_tokens as usize);
    }
    let tokens: u32 = offered.iter().map(|asked| asked.max_tokens).sum();
    Outcome {
        tokens_per_time: f64::from(tokens) / time as f64,
        mean_preemptions: engine.core.stats().preemptions_total as f64 / offered.len() as f64,
        most_preemptions: handles.iter().map(|handle| engine.told[handle].resumed).max().unwrap_or(0),
    }
}

fn compare(policy: PolicyKind, reserve_tokens: u32, seed: u64) -> u32 {
    let config = CoreConfig {
        num_blocks: NUM_BLOCKS,
        block_size: BLOCK_SIZE,
        max_num_seqs: 32,
        max_num_batched_tokens: 64,
        max_num_waiting: 256,
        policy,
        reserve_tokens,
        ..small_config()
    };
    let offered = requests(&mut Rng(seed));
    let over = run(&config, &offered, u32::MAX);
    let by_load = LOADS.map(|(numerator, denominator)| {
        over.tokens_per_time / run(&config, &offered, NUM_BLOCKS * numerator / denominator).tokens_per_time
    });
    let goodput = by_load.into_iter().fold(f64::INFINITY, f64::min);
    println!(
        "{policy:?}, {reserve_tokens} tokens of reserve, seed {seed}: {} requests, {:.2} preemptions per request, {} \
         at most, goodput {:.0} % of that of a load that fits, {:.0} % of the peak",
        offered.len(),
        over.mean_preemptions,
        over.most_preemptions,
        100.0 * by_load[0],
        100.0 * goodput
    );
    assert!(over.mean_preemptions <= 2.0, "{} preemptions per request", over.mean_preemptions);
    assert!(goodput >= 0.9, "goodput falls to {goodput:.2} of its peak");
    over.most_preemptions
}

#[test]
fn ten_times_the_pool_is_served_nearly_as_fast_as_at_the_peak_and_nobody_is_lost() {
    for policy in POLICIES {
        for reserve_tokens in [0, 8] {
            let most = (0..NUM_SEEDS).map(|seed| compare(policy, reserve_tokens, seed)).max();
            println!("{policy:?}: {most:?} preemptions of one request at most");
        }
    }
}
