//! Speed of the prefix cache at block size 16, in a tree of about 1,000 leaves. `cargo bench -p kvlite-core --bench radix`
//!
//! Physics: a match reads 4 bytes asked and 4 bytes stored per token, streamed, 0.1 ns per token from level-2 cache; the compare,
//! the checks and the push cost 3-4 ns per block. In contiguous blocks nothing waits for a link; scattered blocks add one
//! level-2 or level-3 load each, 5-15 ns. An insert hashes 64 bytes, copies them and touches four more lines: 30-50 ns per
//! block. An eviction touches seven lines in places nobody foresaw, one of them in a table of 64 bytes per block (what is
//! remembered of it): about 30 ns while they lie in level 2. Where all that is cached is wanted, one more list is kept.
//! Targets: full-hit match <= 1 ns per token, eviction <= 50 ns per block. Results are checked before any time is taken.
//! The last line is one JSON object; each figure is the median of criterion's samples.

use std::cell::RefCell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::Criterion;
use kvlite_core::Waiter;
use kvlite_core::cache::{Cache, Inserted, MAX_WATCHED};
use kvlite_core::{BlockId, CoreConfig, EvictionKind, Label, Lookup, PolicyKind, TenantId, Token};

const BLOCK_SIZE: usize = 16;
const NUM_LEAVES: usize = 1_000;
const BLOCKS_PER_LEAF: usize = 16;
const EVICTED_AT_ONCE: usize = 64;

fn label() -> Label {
    Label::exact(TenantId(0))
}

/// Tokens of document `id`: no two documents begin alike.
fn document(id: usize, num_blocks: usize) -> Vec<Token> {
    (0..num_blocks * BLOCK_SIZE).map(|at| ((at * 31 + id * 7919) % 151_000) as Token).collect()
}

/// A pool that the fixture fills but for `num_free` blocks.
struct Fixture {
    cache: Cache,
    blocks: Vec<BlockId>,
    /// Documents made so far; makes each one new.
    num_documents: usize,
}

impl Fixture {
    fn new(num_blocks: usize) -> Fixture {
        let config = CoreConfig {
            num_blocks: num_blocks as u32,
            block_size: BLOCK_SIZE as u32,
            max_num_seqs: 256,
            max_num_batched_tokens: 8192,
            max_model_len: 40_000,
            max_num_waiting: 256,
            vocab_size: 151_000,
            enable_prefix_caching: true,
            policy: PolicyKind::Fcfs,
            max_passes: 64,
            eviction: EvictionKind::ReuseWeighted,
            attention_cost_tokens: 1,
            attention_split_tokens: 256,
            group_cost_tokens: 0,
            host_blocks: 0,
            swap_cost_tokens: 0,
            reserve_tokens: 0,
            watermark_ratio: 1.0,
            segment_cache_ratio: 0.5,
            model_digest: 0,
            canonical_prefix: vec![],
            max_segments: 4,
            hash_seed: 7,
        };
        Fixture { cache: Cache::new(&config), blocks: Vec::with_capacity(num_blocks), num_documents: 0 }
    }

    fn next_document(&mut self, num_blocks: usize) -> Vec<Token> {
        self.num_documents += 1;
        document(self.num_documents, num_blocks)
    }

    /// Publishes `tokens` block by block into `blocks`, moving the pin along; returns the pinned end.
    fn insert(&mut self, tokens: &[Token], blocks: &[BlockId]) -> BlockId {
        let mut parent = None;
        for (tokens, &block) in tokens.chunks_exact(BLOCK_SIZE).zip(blocks) {
            let done = self.cache.insert(label(), parent, tokens, block);
            assert_eq!(done, Inserted::New);
            if let Some(parent) = parent.replace(block) {
                self.cache.unpin(parent);
            }
        }
        parent.expect("a document has at least one block")
    }

    /// Computes and releases a new document of `num_blocks` blocks.
    fn remember(&mut self, num_blocks: usize) -> Vec<Token> {
        let tokens = self.next_document(num_blocks);
        let mut blocks = std::mem::take(&mut self.blocks);
        blocks.clear();
        assert!(self.cache.alloc(num_blocks, None, &mut blocks));
        let end = self.insert(&tokens, &blocks);
        self.cache.unpin(end);
        self.blocks = blocks;
        tokens
    }

    fn remember_leaves(&mut self) {
        for _ in 0..NUM_LEAVES {
            self.remember(BLOCKS_PER_LEAF);
        }
    }

    /// Leaves every block on the free list in an order that no run survives.
    fn scatter(&mut self) {
        let mut blocks = Vec::new();
        assert!(self.cache.alloc(self.cache.available(), None, &mut blocks));
        let len = blocks.len();
        let end = {
            let mut order: Vec<usize> = (0..len).collect();
            order.sort_by_key(|&at| (at.wrapping_mul(0x9e37_79b1)) & 0xffff_ffff);
            order.into_iter().map(|at| blocks[at]).collect::<Vec<_>>()
        };
        self.blocks = end;
    }
}

/// Collects one figure per measurement, per unit of work.
#[derive(Default)]
struct Figures(RefCell<Vec<(&'static str, f64)>>);

impl Figures {
    /// Lets criterion sample `timed`, which runs a number of times and returns the time that counts, and records the median.
    fn measure(
        &self,
        criterion: &mut Criterion,
        name: &'static str,
        units: usize,
        mut timed: impl FnMut(u64) -> Duration,
    ) {
        let samples = RefCell::new(Vec::new());
        criterion.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| {
                let elapsed = timed(iterations);
                samples.borrow_mut().push(elapsed.as_secs_f64() * 1e9 / iterations as f64 / units as f64);
                elapsed
            });
        });
        let mut samples = samples.into_inner();
        if samples.is_empty() {
            return; // left out by a filter on the command line
        }
        samples.sort_by(f64::total_cmp);
        self.0.borrow_mut().push((name, samples[samples.len() / 2]));
    }
}

fn bench_match(
    criterion: &mut Criterion,
    figures: &Figures,
    name: &'static str,
    num_blocks: usize,
    is_scattered: bool,
) {
    let mut fixture = Fixture::new(NUM_LEAVES * BLOCKS_PER_LEAF + num_blocks);
    let tokens = if is_scattered {
        fixture.scatter();
        let tokens = fixture.next_document(num_blocks);
        let blocks = std::mem::take(&mut fixture.blocks);
        fixture.insert(&tokens, &blocks[..num_blocks]);
        for &block in &blocks[num_blocks..] {
            fixture.cache.free(block);
        }
        tokens
    } else {
        fixture.remember(num_blocks)
    };
    fixture.remember_leaves();
    let mut hits = Vec::with_capacity(num_blocks);
    fixture.cache.match_prefix(Lookup::exact(label()), &tokens, usize::MAX, &mut hits);
    assert_eq!(hits.len(), num_blocks, "the whole document is in the tree");
    figures.measure(criterion, name, num_blocks * BLOCK_SIZE, |iterations| {
        let start = Instant::now();
        for _ in 0..iterations {
            hits.clear();
            black_box(fixture.cache.match_prefix(Lookup::exact(label()), black_box(&tokens), usize::MAX, &mut hits));
        }
        start.elapsed()
    });
}

fn bench_insert(criterion: &mut Criterion, figures: &Figures) {
    const NUM_BLOCKS: usize = 128;
    let mut fixture = Fixture::new(NUM_LEAVES * BLOCKS_PER_LEAF + NUM_BLOCKS);
    fixture.remember_leaves();
    let mut blocks = Vec::with_capacity(NUM_BLOCKS);
    figures.measure(criterion, "insert_ns_per_token", NUM_BLOCKS * BLOCK_SIZE, |iterations| {
        let mut total = Duration::ZERO;
        for _ in 0..iterations {
            let tokens = fixture.next_document(NUM_BLOCKS);
            blocks.clear();
            assert!(fixture.cache.alloc(NUM_BLOCKS, None, &mut blocks));
            let start = Instant::now();
            let end = fixture.insert(&tokens, &blocks);
            total += start.elapsed();
            fixture.cache.unpin(end);
        }
        total
    });
}

fn bench_evict(criterion: &mut Criterion, figures: &Figures) {
    let mut fixture = Fixture::new(NUM_LEAVES * BLOCKS_PER_LEAF);
    fixture.remember_leaves();
    let mut blocks = Vec::with_capacity(EVICTED_AT_ONCE);
    figures.measure(criterion, "evict_ns_per_block", EVICTED_AT_ONCE, |iterations| {
        let mut total = Duration::ZERO;
        for _ in 0..iterations {
            assert_eq!(fixture.cache.counts().free, 0, "each block must be evicted for");
            let tokens = fixture.next_document(EVICTED_AT_ONCE);
            blocks.clear();
            let start = Instant::now();
            assert!(fixture.cache.alloc(EVICTED_AT_ONCE, None, &mut blocks));
            total += start.elapsed();
            for leaf in 0..EVICTED_AT_ONCE / BLOCKS_PER_LEAF {
                let at = leaf * BLOCKS_PER_LEAF;
                let end = fixture.insert(&tokens[at * BLOCK_SIZE..], &blocks[at..at + BLOCKS_PER_LEAF]);
                fixture.cache.unpin(end);
            }
        }
        total
    });
}

/// Each block is wanted by one of as many waiting requests as are watched: the ends of the last waiters' paths go first.
fn bench_evict_wanted(criterion: &mut Criterion, figures: &Figures) {
    let mut fixture = Fixture::new(MAX_WATCHED * BLOCKS_PER_LEAF);
    let documents: Vec<Vec<Token>> = (0..MAX_WATCHED).map(|_| fixture.remember(BLOCKS_PER_LEAF)).collect();
    for (at, tokens) in documents.iter().enumerate() {
        let waiter = Waiter { rank: (at as i64, 0), choice: 0, slot: at as u32 };
        fixture.cache.watch(waiter, Lookup::exact(label()), tokens);
    }
    let mut blocks = Vec::with_capacity(EVICTED_AT_ONCE);
    figures.measure(criterion, "evict_wanted_ns_per_block", EVICTED_AT_ONCE, |iterations| {
        let mut total = Duration::ZERO;
        for _ in 0..iterations {
            assert_eq!(fixture.cache.counts().free, 0, "each block must be evicted for");
            blocks.clear();
            let start = Instant::now();
            assert!(fixture.cache.alloc(EVICTED_AT_ONCE, None, &mut blocks));
            total += start.elapsed();
            let gone = &documents[MAX_WATCHED - EVICTED_AT_ONCE / BLOCKS_PER_LEAF..];
            for (tokens, blocks) in gone.iter().zip(blocks.chunks_exact(BLOCKS_PER_LEAF)) {
                let end = fixture.insert(tokens, blocks);
                for &block in blocks {
                    let asked = |waiter: Waiter| (Lookup::exact(label()), &documents[waiter.slot as usize][..]);
                    fixture.cache.follow(block, asked);
                }
                fixture.cache.unpin(end);
            }
        }
        total
    });
    assert!(fixture.cache.watched().all(|(_, at)| at.is_some()), "whoever waits was followed");
}

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500))
        .sample_size(30)
        .configure_from_args();
    let figures = Figures::default();
    bench_match(&mut criterion, &figures, "match_ns_per_token_2k", 2_048 / BLOCK_SIZE, false);
    bench_match(&mut criterion, &figures, "match_ns_per_token_32k", 32_768 / BLOCK_SIZE, false);
    bench_match(&mut criterion, &figures, "match_ns_per_token_32k_scattered", 32_768 / BLOCK_SIZE, true);
    bench_insert(&mut criterion, &figures);
    bench_evict(&mut criterion, &figures);
    bench_evict_wanted(&mut criterion, &figures);
    criterion.final_summary();
    let figures: Vec<String> = figures.0.take().iter().map(|(name, ns)| format!("\"{name}\": {ns:.3}")).collect();
    println!("{{{}}}", figures.join(", "));
}
