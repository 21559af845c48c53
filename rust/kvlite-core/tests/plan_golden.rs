//! Golden plans: the layout's offsets and one complete plan, integer by integer. A change here is a change of the
//! contract with `runner/plan.py`; both sides move together.

use kvlite_core::plan::{Header, PlanView, Region};
use kvlite_core::{BlendRequest, Core, CoreConfig, EvictionKind, Layout, PolicyKind, Request, Round, Scope};

fn config() -> CoreConfig {
    CoreConfig {
        num_blocks: 16,
        block_size: 4,
        max_num_seqs: 3,
        max_num_batched_tokens: 8,
        max_model_len: 18,
        max_num_waiting: 2,
        vocab_size: 100,
        enable_prefix_caching: true,
        policy: PolicyKind::Fcfs,
        max_passes: 64,
        eviction: EvictionKind::ReuseWeighted,
        attention_cost_tokens: 1000,
        attention_split_tokens: 256,
        group_cost_tokens: 0,
        host_blocks: 0,
        swap_cost_tokens: 0,
        reserve_tokens: 4,
        watermark_ratio: 1.0,
        segment_cache_ratio: 0.5,
        model_digest: 0,
        canonical_prefix: vec![],
        max_segments: 4,
        hash_seed: 1,
    }
}

fn request(prompt: &[i32], n: u32) -> Request<'_> {
    Request {
        prompt,
        n,
        max_tokens: 4,
        min_tokens: 0,
        stop_token_ids: &[],
        priority: 0,
        deadline_ms: None,
        tenant: 0,
        use_cache: true,
        prompt_logprobs: false,
        blend: None,
    }
}

#[test]
fn regions_keep_their_order_and_offsets() {
    let layout = Layout::new(&config());
    let regions: Vec<_> = layout.regions().iter().map(|r| (r.name, r.offset, r.rows, r.cols)).collect();
    let expected = [
        ("header", 0, 32, 1),
        ("token_ids", 32, 8, 1),
        ("positions", 40, 8, 1),
        ("last_key", 48, 8, 1),
        ("slot_mapping", 56, 8, 1),
        ("segment_slot", 64, 8, 1),
        ("query_start", 72, 4, 1),
        ("context_len", 76, 3, 1),
        ("seq_row", 79, 3, 1),
        ("sample", 82, 11, 3),
        ("block_update", 115, 24, 3),
        ("prefix_group", 187, 3, 3),
        ("group_seqs", 196, 3, 1),
        ("place", 199, 7, 6),
        ("source_blocks", 241, 17, 1),
        ("score", 258, 3, 7),
        ("block_copy", 279, 6, 3),
        ("admitted", 297, 3, 5),
        ("committed", 312, 6, 3),
        ("finished", 330, 5, 3),
        ("done_plan_id", 345, 1, 1),
        ("status", 346, 1, 1),
        ("sampled", 347, 11, 1),
        ("scored", 358, 18, 2),
    ];
    assert_eq!(regions, expected);
    assert_eq!(layout.len(), 394);
}

struct Device {
    core: Core,
    arenas: [Vec<i32>; 2],
    next: usize,
}

impl Device {
    fn new() -> Device {
        let core = Core::new(config()).unwrap();
        let len = core.layout().len();
        Device { core, arenas: [vec![-7; len], vec![-7; len]], next: 0 }
    }

    fn step(&mut self, now_ms: i64) -> usize {
        let idx = self.next;
        let [first, second] = &mut self.arenas;
        self.core.step([first, second], idx, now_ms).unwrap();
        self.core.audit();
        self.next = 1 - idx;
        idx
    }

    fn view(&self, idx: usize) -> PlanView<'_> {
        PlanView::new(self.core.layout(), &self.arenas[idx])
    }

    fn complete(&mut self, idx: usize, ids: &[i32]) {
        let layout = self.core.layout().clone();
        let arena = &mut self.arenas[idx];
        arena[layout.region(Region::Sampled).offset..][..ids.len()].copy_from_slice(ids);
        arena[layout.region(Region::DonePlanId).offset] = arena[Header::PlanId as usize];
    }
}

#[test]
fn one_plan_with_a_prefill_a_fork_and_a_decode_is_exactly_this() {
    let mut device = Device::new();
    let first = device.core.add(&Request { deadline_ms: Some(500), ..request(&[1, 2, 3], 1) }, 0).unwrap();
    let idx = device.step(0);
    let view = device.view(idx);
    assert_eq!(view.flat(Region::TokenIds, 3), [1, 2, 3]);
    assert_eq!(view.rows::<5>(Region::Admitted).collect::<Vec<_>>(), [[first, 0, 0, 0, 0]]);
    device.complete(idx, &[50]);

    let second = device.core.add(&request(&[11, 12, 13, 14, 15, 16], 2), 10).unwrap();
    let idx = device.step(10);
    let view = device.view(idx);
    let header: Vec<i32> = view.flat(Region::Header, 16).to_vec();
    // plan 2: 7 rows, 2 sequences, 3 samples, 2 table entries; 2 admitted, 1 committed; wakes in 490 ms; 3 run, 0 wait
    assert_eq!(header, [2, 7, 2, 3, 2, 0, 0, 0, 0, 0, 2, 1, 0, 490, 3, 0]);
    assert_eq!(view.flat(Region::TokenIds, 7), [50, 11, 12, 13, 14, 15, 16]);
    assert_eq!(view.flat(Region::Positions, 7), [3, 0, 1, 2, 3, 4, 5]);
    assert_eq!(view.flat(Region::LastKey, 7), [3, 0, 1, 2, 3, 4, 5]);
    assert_eq!(view.flat(Region::SegmentSlot, 7), [-1; 7]);
    assert_eq!(view.flat(Region::QueryStart, 3), [0, 1, 7]);
    assert_eq!(view.flat(Region::ContextLen, 2), [4, 6]);
    assert_eq!(view.flat(Region::SeqRow, 2), [0, 1]);
    assert_eq!(view.rows::<3>(Region::Sample).collect::<Vec<_>>(), [[0, 0, 0], [6, 1, 0], [6, 2, 0]]);
    let updates: Vec<_> = view.rows::<3>(Region::BlockUpdate).collect();
    assert_eq!(updates.iter().map(|u| [u[0], u[1]]).collect::<Vec<_>>(), [[1, 0], [1, 1]]);
    let (a, b) = (updates[0][2], updates[1][2]);
    let slots = view.flat(Region::SlotMapping, 7);
    assert_eq!(slots[1..], [a * 4, a * 4 + 1, a * 4 + 2, a * 4 + 3, b * 4, b * 4 + 1]);
    assert_eq!(view.rows::<5>(Region::Admitted).collect::<Vec<_>>(), [[second, 0, 1, 0, 0], [second, 1, 2, 2, 0]]);
    assert_eq!(view.rows::<3>(Region::Committed).collect::<Vec<_>>(), [[0, 0, 50]]);
    device.complete(idx, &[51, 60, 61]);

    let idx = device.step(20);
    let view = device.view(idx);
    assert_eq!(view.flat(Region::TokenIds, 3), [51, 60, 61]);
    assert_eq!(view.flat(Region::ContextLen, 3), [5, 7, 7]);
    let copies: Vec<_> = view.rows::<3>(Region::BlockCopy).collect();
    assert_eq!(copies.len(), 1, "the further choice copies the partly filled prompt block");
    assert_eq!(copies[0][..2], [0, b]);
    let mut tables = vec![Vec::new(); 3];
    view.expand(&mut tables);
    assert_eq!(tables[2], [a as u32, copies[0][2] as u32], "it shares the full one");
    device.complete(idx, &[52, 62, 63]);

    let idx = device.step(600);
    let view = device.view(idx);
    assert_eq!(view.rows::<3>(Region::Committed).count(), 3);
    assert_eq!(view.rows::<3>(Region::Finished).collect::<Vec<_>>(), [[first, 0, 4]], "its deadline passed");
    device.complete(idx, &[64, 65]);

    let idx = device.step(601);
    device.complete(idx, &[66, 67]);
    let idx = device.step(602);
    let view = device.view(idx);
    assert_eq!(view.rows::<3>(Region::Finished).collect::<Vec<_>>(), [[second, 0, 1], [second, 1, 1]]);
    assert_eq!([view.header(Header::NumTokens), view.header(Header::NextWakeMs)], [0, -1]);
}

#[test]
fn a_pipelined_plan_names_the_unknown_token_as_the_devices_own() {
    let mut device = Device::new();
    device.core.add(&request(&[1, 2, 3], 1), 0).unwrap();
    let k = device.step(0);
    let next = device.step(1);
    assert_eq!(device.view(next).flat(Region::TokenIds, 1), [-1]);
    assert_eq!(device.view(next).flat(Region::Positions, 1), [3]);
    device.complete(k, &[40]);
    let after = device.step(2);
    assert_eq!(device.view(after).rows::<3>(Region::Committed).collect::<Vec<_>>(), [[0, 0, 40]]);
    assert_eq!(device.view(after).flat(Region::TokenIds, 1), [-1]);
}

#[test]
fn a_segment_is_made_placed_and_scored_exactly_so() {
    let mut device = Device::new();
    let document = [11, 12, 13, 14, 15];
    device.core.add_segment(&document, 0, false, None, 0).unwrap();
    let idx = device.step(0);
    let view = device.view(idx);
    assert_eq!(view.flat(Region::TokenIds, 5), document, "the canonical prefix is empty here");
    let slots = view.flat(Region::SegmentSlot, 5).to_vec();
    let (a, b) = (slots[0] / 4, slots[4] / 4);
    assert_eq!(slots, [a * 4, a * 4 + 1, a * 4 + 2, a * 4 + 3, b * 4]);
    assert_eq!([view.header(Header::NumSamples), view.header(Header::NumAdmitted)], [0, 0]);
    device.complete(idx, &[]);

    let rounds = [Round { scope: Scope::New, cost: 1.0, ratio: 0.2 }];
    let blend =
        BlendRequest { spans: &[(1, 5)], method_id: 9, ratio: 0.2, rounds: &rounds, scores: None, decode_rows: 0 };
    device.core.add(&Request { blend: Some(blend), ..request(&[1, 11, 12, 13, 14, 15, 2, 3], 1) }, 1).unwrap();
    let idx = device.step(1);
    let view = device.view(idx);
    assert_eq!(view.flat(Region::Header, 10)[1..], [3, 1, 0, 2, 0, 1, 2, 1, 0]);
    assert_eq!(view.flat(Region::Positions, 3), [0, 6, 7]);
    assert_eq!(view.rows::<6>(Region::Place).collect::<Vec<_>>(), [[0, 1, 5, 0, 0, 2]]);
    assert_eq!(view.rows::<1>(Region::SourceBlocks).collect::<Vec<_>>(), [[a], [b]]);
    assert_eq!(view.rows::<7>(Region::Score).collect::<Vec<_>>(), [[0, 1, 2, 1, 6, 9, 0]]);
    let scored = device.core.layout().region(Region::Scored).offset;
    for (at, weight) in [0.0f32, 0.5, 0.25, 0.0, 0.0].into_iter().enumerate() {
        device.arenas[idx][scored + 2 * at] = weight.to_bits() as i32;
        device.arenas[idx][scored + 2 * at + 1] = 1.0f32.to_bits() as i32;
    }
    device.complete(idx, &[]);

    let idx = device.step(2);
    let view = device.view(idx);
    assert_eq!(view.flat(Region::TokenIds, 3), [12, 2, 3], "the best one of five, and new rows that see it");
    assert_eq!(view.flat(Region::Positions, 3), [2, 6, 7]);
    assert_eq!(view.flat(Region::ContextLen, 1), [8]);
    assert_eq!(view.rows::<3>(Region::Sample).collect::<Vec<_>>(), [[2, 0, 0]]);
    device.complete(idx, &[50]);
}
