//! Random configurations and requests that collide: prompts cut from few texts, documents that many requests share.

use kvlite_core::{CoreConfig, EvictionKind, PolicyKind, Round, Scope};

use super::{Asked, Blend, PUBLIC, Rng, mix};

pub const POLICIES: [PolicyKind; 6] = {
    use PolicyKind::{CacheAware, Fair, Fcfs, HitRate, PrefixGrouped, Priority};
    [Priority, Fcfs, HitRate, CacheAware, Fair, PrefixGrouped]
};

pub fn random_config(rng: &mut Rng) -> CoreConfig {
    let block_size = [1, 2, 4, 4, 5][rng.range(0, 4) as usize];
    let max_num_seqs = rng.range(1, 6) as u32;
    let max_model_len = rng.range(6, 48) as u32;
    let vocab_size = [3, 4, 50][rng.range(0, 2) as usize];
    let prefix_len = [0, 1, 3][rng.range(0, 2) as usize];
    let config = CoreConfig {
        num_blocks: rng.range(2, 48) as u32,
        block_size,
        max_num_seqs,
        max_num_batched_tokens: max_num_seqs + rng.range(0, 24) as u32,
        max_model_len,
        max_num_waiting: rng.range(1, 12) as u32,
        vocab_size,
        enable_prefix_caching: !rng.chance(12),
        policy: PolicyKind::Fcfs,
        max_passes: 64,
        eviction: EvictionKind::ReuseWeighted,
        attention_cost_tokens: rng.range(1, 64) as u32,
        attention_split_tokens: 1,
        group_cost_tokens: 0,
        host_blocks: 0,
        swap_cost_tokens: 0,
        reserve_tokens: [0, 0, 2, 8][rng.range(0, 3) as usize],
        watermark_ratio: [1.0, 1.0, 0.9, 0.5][rng.range(0, 3) as usize],
        segment_cache_ratio: [0.5, 0.5, 0.2, 1.0, 0.0][rng.range(0, 4) as usize],
        model_digest: rng.next(),
        canonical_prefix: random_ids(rng, prefix_len, vocab_size),
        max_segments: rng.range(1, 4) as u32,
        hash_seed: rng.next(),
    };
    // Of bits that are random already: a seed stays the scenario that it was.
    let bits = config.model_digest;
    CoreConfig {
        attention_split_tokens: [1, 2, 4, 6][bits as usize % 4],
        group_cost_tokens: [0, 0, 5, i32::MAX as u32][(bits >> 2) as usize % 4],
        policy: POLICIES[(bits >> 8) as usize % POLICIES.len()],
        max_passes: [0, 1, 2, 64][(bits >> 16) as usize % 4],
        eviction: EvictionKind::ALL[(bits >> 4) as usize % 4].1,
        host_blocks: [0, 3, 16, 64][(bits >> 18) as usize % 4],
        swap_cost_tokens: [0, 0, 0, 3 * block_size][(bits >> 6) as usize % 4],
        ..config
    }
}

fn random_ids(rng: &mut Rng, len: usize, vocab_size: u32) -> Vec<i32> {
    (0..len).map(|_| rng.range(0, u64::from(vocab_size) - 1) as i32).collect()
}

/// The rule that stands behind a method id, so that equal ids mean equal rules.
fn rule(method_id: u32, ratio: f64, prompt_len: usize) -> (Vec<Round>, Option<Vec<f32>>) {
    let scopes: &[Scope] = match method_id {
        2 => &[Scope::New],
        3 => &[Scope::All],
        4 => &[Scope::All, Scope::All, Scope::New],
        5 => &[Scope::New, Scope::New],
        6 => &[Scope::New, Scope::All],
        _ => &[],
    };
    let left = |round: usize| (scopes.len() - 1 - round) as f64 / scopes.len() as f64;
    let round = |(number, &scope): (usize, &Scope)| {
        let cost = if scope == Scope::New { 1.0 } else { 0.3 * (number + 1) as f64 };
        Round { scope, cost, ratio: ratio + (1.0 - ratio) * left(number) }
    };
    let score = |position: usize| match mix(position as u64) % 9 {
        0 => f32::NAN,
        1 => -0.0,
        number => number as f32 - 4.0,
    };
    let scores = (method_id == 1).then(|| (0..prompt_len).map(score).collect());
    (scopes.iter().enumerate().map(round).collect(), scores)
}

/// Texts that prompts are cut from, and documents that stand in them.
pub struct Texts {
    texts: Vec<Vec<i32>>,
    documents: Vec<Vec<i32>>,
}

impl Texts {
    pub fn new(rng: &mut Rng, config: &CoreConfig) -> Texts {
        let texts = (0..3).map(|_| random_ids(rng, config.max_model_len as usize, config.vocab_size)).collect();
        let longest = u64::from(config.max_model_len / 2);
        let mut document = || {
            let len = if rng.chance(20) { 1 } else { rng.range(1, longest) };
            random_ids(rng, len as usize, config.vocab_size)
        };
        Texts { texts, documents: (0..5).map(|_| document()).collect() }
    }

    pub fn document(&self, rng: &mut Rng) -> &[i32] {
        &self.documents[rng.range(0, self.documents.len() as u64 - 1) as usize]
    }

    pub fn tenant(&self, rng: &mut Rng) -> u32 {
        if rng.chance(8) { PUBLIC } else { rng.range(0, 1) as u32 }
    }

    /// Every segment that somebody may have pinned by name.
    pub fn all_segments(&self) -> impl Iterator<Item = (u32, Vec<i32>)> {
        self.documents.iter().flat_map(|ids| [0, 1, PUBLIC].map(|tenant| (tenant, ids.clone())))
    }

    pub fn plain(&self, rng: &mut Rng, config: &CoreConfig, now_ms: i64) -> Asked {
        let prompt_len = rng.range(1, u64::from(config.max_model_len) - 1) as usize;
        let text = &self.texts[rng.range(0, 2) as usize];
        let mut prompt = text[..prompt_len].to_vec();
        if rng.chance(40) {
            let own = rng.range(0, prompt_len as u64 - 1) as usize;
            prompt.truncate(own);
            prompt.extend(random_ids(rng, prompt_len - own, config.vocab_size));
        }
        self.asked(rng, config, now_ms, prompt)
    }

    /// Everything but the prompt.
    fn asked(&self, rng: &mut Rng, config: &CoreConfig, now_ms: i64, prompt: Vec<i32>) -> Asked {
        let room = u64::from(config.max_model_len) - prompt.len() as u64;
        let max_tokens = rng.range(1, room) as u32;
        let n = if rng.chance(25) { rng.range(1, u64::from(config.max_num_seqs)) as u32 } else { 1 };
        let stops = if rng.chance(50) { rng.range(1, 2) as usize } else { 0 };
        Asked {
            n,
            max_tokens,
            min_tokens: if rng.chance(20) { rng.range(0, u64::from(max_tokens)) as u32 } else { 0 },
            stop_token_ids: random_ids(rng, stops, config.vocab_size),
            tenant: self.tenant(rng),
            priority: match rng.chance(10).then(|| rng.range(0, 4) as i32 - 2) {
                Some(priority) if config.policy == PolicyKind::Priority => priority,
                _ => 0,
            },
            deadline_ms: rng.chance(10).then(|| now_ms + rng.range(0, 60) as i64),
            use_cache: !rng.chance(10),
            prompt_logprobs: rng.chance(8),
            seed: rng.range(0, 1),
            ..Asked::new(&prompt, max_tokens)
        }
    }

    pub fn precompute(&self, rng: &mut Rng, config: &CoreConfig, now_ms: i64) -> Asked {
        let ids = self.document(rng).to_vec();
        let asked = self.asked(rng, config, now_ms, ids);
        Asked { n: 1, max_tokens: 0, precompute: Some(rng.chance(25)), ..asked }
    }

    /// Documents with text between them and a question behind them.
    pub fn blended(&self, rng: &mut Rng, config: &CoreConfig, now_ms: i64) -> Asked {
        let limit = config.max_model_len as usize - 1;
        let text = &self.texts[rng.range(0, 2) as usize];
        let (mut prompt, mut spans): (Vec<i32>, Vec<(u32, u32)>) = (Vec::new(), Vec::new());
        for _ in 0..rng.range(0, u64::from(config.max_segments)) {
            let len = if rng.chance(50) { rng.range(0, 6) as usize } else { 0 };
            let document = self.document(rng);
            if prompt.len() + len + document.len() > limit {
                continue;
            }
            prompt.extend_from_slice(&text[prompt.len()..][..len]);
            spans.push((prompt.len() as u32, document.len() as u32));
            prompt.extend_from_slice(document);
        }
        let question = if rng.chance(90) { rng.range(1, 6) as usize } else { 0 };
        let question = question.max(usize::from(prompt.is_empty())).min(limit - prompt.len());
        prompt.extend(random_ids(rng, question, config.vocab_size));
        let method_id = rng.range(0, 6) as u32;
        let ratio = [0.0, 1.0, 0.15, 0.3, 0.5, 1.0 / 3.0, 0.999][rng.range(0, 6) as usize];
        let (rounds, scores) = rule(method_id, ratio, prompt.len());
        let asked = self.asked(rng, config, now_ms, prompt);
        let decode_rows = if rng.chance(15) { rng.range(1, 3) as u32 } else { 0 };
        let blend = Blend { spans, method_id, ratio, rounds, scores, decode_rows };
        Asked { prompt_logprobs: asked.prompt_logprobs && rng.chance(10), blend: Some(blend), ..asked }
    }

    /// The next turn of a conversation: the prompt, its answer, a new question.
    pub fn follow_up(rng: &mut Rng, config: &CoreConfig, before: &Asked, output: &[i32]) -> Option<Asked> {
        let mut prompt = [&before.prompt, output].concat();
        let added = rng.range(0, 4) as usize;
        prompt.extend(random_ids(rng, added, config.vocab_size));
        let room = (config.max_model_len as usize).checked_sub(prompt.len() + 1)?;
        let blend = before.blend.as_ref()?;
        let scores = rule(blend.method_id, blend.ratio, prompt.len()).1;
        Some(Asked {
            max_tokens: rng.range(1, room as u64 + 1) as u32,
            min_tokens: 0,
            deadline_ms: None,
            blend: Some(Blend { scores, ..blend.clone() }),
            prompt,
            ..before.clone()
        })
    }
}
