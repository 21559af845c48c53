//! `Manifest`: all that another engine needs to go on with a request, as bytes of our own format.
//!
//! Owns the layout: magic, version, body, BLAKE3 over both. Everything is little-endian; every length is checked against
//! the reader's own limits before anything is allocated, so hostile bytes cost their own length at most. What a value may
//! be beyond its length is `import.rs`'s to check. KV travels beside it, not in it.

use std::sync::Arc;

use super::reuse::{MAX_ROUNDS, ReuseReport, SpanOutcome};
use super::{Core, MAX_STOP_TOKEN_IDS};
use crate::blend::{Choice, Origin, Round, Rule, Scope};
use crate::config::CoreConfig;
use crate::error::CoreError;
use crate::ids::Token;
use crate::sequence::Sequence;

const MAGIC: [u8; 4] = *b"KVLM";
const VERSION: u16 = 1;
const DIGEST_LEN: usize = 32;
/// More of them say nothing more.
const MAX_PREEMPTIONS: u32 = 1 << 16;

/// One request at one moment.
#[derive(Clone, Debug)]
pub(super) struct Manifest {
    pub model_digest: u64,
    /// Of the tokens behind which segments are computed.
    pub prefix_digest: u64,
    pub block_size: u32,
    pub vocab_size: u32,
    /// Frozen: nothing of it changes any more.
    pub is_final: bool,
    /// Whether it was ever admitted; before that it has one sequence for all choices.
    pub announced: bool,
    pub use_cache: bool,
    pub prompt_logprobs: bool,
    pub max_tokens: u32,
    pub min_tokens: u32,
    pub priority: i32,
    pub tenant: u32,
    pub time_left_ms: Option<i64>,
    pub stop_token_ids: Vec<Token>,
    pub prompt: Vec<Token>,
    /// Prompt positions whose log-probabilities were delivered.
    pub logprobs_len: u32,
    /// None: that choice has ended.
    pub choices: Vec<Option<ChoiceState>>,
    pub rule: Option<Arc<Rule>>,
    pub report: Option<ReuseReport>,
}

/// One choice that lives.
#[derive(Clone, Debug)]
pub(super) struct ChoiceState {
    pub output: Vec<Token>,
    /// Tokens from position 0 whose KV travels; 0: none does.
    pub kv_len: u32,
    pub preemptions: u32,
    pub blend: Option<BlendState>,
}

impl ChoiceState {
    /// A choice that has computed nothing.
    pub fn fresh(blend: Option<BlendState>) -> ChoiceState {
        ChoiceState { output: Vec::new(), kv_len: 0, preemptions: 0, blend }
    }
}

/// What a blended choice remembers beside its rule.
#[derive(Clone, Debug)]
pub(super) struct BlendState {
    /// Per span, whether it is new text.
    pub holes: Vec<bool>,
    pub attempts: u32,
    pub recipe: Option<RecipeState>,
    /// Rows that decode steps have computed again.
    pub repaired: Vec<u32>,
}

/// A recipe without its number, which is an engine's own.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct RecipeState {
    /// How many of the choice's tokens are part of it.
    pub tokens_len: u32,
    pub reused: Vec<(u32, u32)>,
    pub ran: Vec<Vec<u32>>,
    pub rows: Vec<u32>,
}

impl RecipeState {
    pub fn choice(&self) -> Choice {
        Choice { ran: self.ran.clone(), rows: self.rows.clone() }
    }
}

impl Core {
    /// What a blended sequence takes along.
    pub(super) fn blend_state(&self, seq: &Sequence) -> Option<BlendState> {
        let blend = seq.blend.as_ref()?;
        let recipe = blend.recipe.map(|number| {
            let recipe = self.recipes.get(number);
            RecipeState {
                tokens_len: recipe.tokens_len(),
                reused: recipe.reused.to_vec(),
                ran: recipe.chosen.ran.clone(),
                rows: recipe.chosen.rows.clone(),
            }
        });
        Some(BlendState {
            holes: blend.origins.iter().map(|&origin| origin == Origin::Hole).collect(),
            attempts: blend.attempts,
            recipe,
            repaired: blend.repaired().to_vec(),
        })
    }
}

impl Manifest {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer(MAGIC.to_vec());
        out.0.extend(VERSION.to_le_bytes());
        out.u64(self.model_digest);
        out.u64(self.prefix_digest);
        out.u32(self.block_size);
        out.u32(self.vocab_size);
        for flag in [self.is_final, self.announced, self.use_cache, self.prompt_logprobs] {
            out.flag(flag);
        }
        out.u32(self.max_tokens);
        out.u32(self.min_tokens);
        out.u32(self.priority as u32);
        out.u32(self.tenant);
        out.u64(self.time_left_ms.map_or(u64::MAX, |left| left as u64));
        out.tokens(&self.stop_token_ids);
        out.tokens(&self.prompt);
        out.u32(self.logprobs_len);
        out.flag(self.rule.is_some());
        if let Some(rule) = &self.rule {
            out.rule(rule);
        }
        out.u32(self.choices.len() as u32);
        for choice in &self.choices {
            out.flag(choice.is_some());
            if let Some(choice) = choice {
                out.choice(choice);
            }
        }
        out.flag(self.report.is_some());
        if let Some(report) = &self.report {
            let counts = [report.prefix_tokens, report.blended_tokens];
            let more = [report.recomputed_tokens, report.computed_tokens];
            counts.into_iter().chain(more).for_each(|count| out.u32(count));
            out.u32(report.spans.len() as u32);
            report.spans.iter().for_each(|&outcome| out.0.push(outcome as u8));
        }
        let digest = blake3::hash(&out.0);
        out.0.extend(digest.as_bytes());
        out.0
    }

    /// Reads bytes of any origin. Errors: cut, flipped, of another version, or a length that this engine cannot have.
    pub fn decode(bytes: &[u8], config: &CoreConfig) -> Result<Manifest, CoreError> {
        let body_len = bytes.len().checked_sub(DIGEST_LEN).ok_or(malformed("it is cut short"))?;
        let (body, digest) = bytes.split_at(body_len);
        let start = body.get(..MAGIC.len() + 2).ok_or(malformed("it is cut short"))?;
        if start[..MAGIC.len()] != MAGIC {
            return Err(malformed("it does not begin as a manifest does"));
        }
        if start[MAGIC.len()..] != VERSION.to_le_bytes() {
            return Err(malformed("it is of another version"));
        }
        if blake3::hash(body).as_bytes() != digest {
            return Err(malformed("its digest does not match"));
        }
        let mut input = Reader { rest: &body[start.len()..], config };
        let manifest = input.manifest()?;
        if input.rest.is_empty() { Ok(manifest) } else { Err(malformed("something follows its end")) }
    }
}

/// Tells canonical prefixes apart: KV that was blended behind another one is other KV.
pub(super) fn prefix_digest(config: &CoreConfig) -> u64 {
    let bytes: Vec<u8> = config.canonical_prefix.iter().flat_map(|token| token.to_le_bytes()).collect();
    let digest = blake3::hash(&bytes);
    u64::from_le_bytes(*digest.as_bytes().first_chunk().expect("a digest has 32 bytes"))
}

fn malformed(what: &'static str) -> CoreError {
    CoreError::Manifest { what }
}

struct Writer(Vec<u8>);

impl Writer {
    fn flag(&mut self, value: bool) {
        self.0.push(u8::from(value));
    }

    fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    fn tokens(&mut self, tokens: &[Token]) {
        self.u32(tokens.len() as u32);
        tokens.iter().for_each(|&token| self.u32(token as u32));
    }

    fn rows(&mut self, rows: &[u32]) {
        self.u32(rows.len() as u32);
        rows.iter().for_each(|&row| self.u32(row));
    }

    fn pairs(&mut self, pairs: &[(u32, u32)]) {
        self.u32(pairs.len() as u32);
        pairs.iter().for_each(|&(first, second)| [first, second].into_iter().for_each(|number| self.u32(number)));
    }

    fn rule(&mut self, rule: &Rule) {
        self.pairs(&rule.spans);
        self.u64(rule.ratio.to_bits());
        self.u32(rule.rounds.len() as u32);
        for round in &rule.rounds {
            self.flag(round.scope == Scope::All);
            self.u64(round.cost.to_bits());
            self.u64(round.ratio.to_bits());
        }
        self.flag(rule.scores.is_some());
        if let Some(scores) = &rule.scores {
            self.u32(scores.len() as u32);
            scores.iter().for_each(|score| self.u32(score.to_bits()));
        }
        self.u32(rule.method_id);
        self.u32(rule.decode_rows);
    }

    fn choice(&mut self, choice: &ChoiceState) {
        self.tokens(&choice.output);
        self.u32(choice.kv_len);
        self.u32(choice.preemptions);
        self.flag(choice.blend.is_some());
        let Some(blend) = &choice.blend else { return };
        self.u32(blend.holes.len() as u32);
        blend.holes.iter().for_each(|&hole| self.flag(hole));
        self.u32(blend.attempts);
        self.rows(&blend.repaired);
        self.flag(blend.recipe.is_some());
        if let Some(recipe) = &blend.recipe {
            self.u32(recipe.tokens_len);
            self.pairs(&recipe.reused);
            self.u32(recipe.ran.len() as u32);
            recipe.ran.iter().for_each(|rows| self.rows(rows));
            self.rows(&recipe.rows);
        }
    }
}

struct Reader<'a> {
    rest: &'a [u8],
    config: &'a CoreConfig,
}

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], CoreError> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(malformed("it is cut short"))?;
        self.rest = rest;
        Ok(*taken)
    }

    fn u32(&mut self) -> Result<u32, CoreError> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64, CoreError> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    fn flag(&mut self) -> Result<bool, CoreError> {
        match self.take::<1>()? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(malformed("a flag is neither 0 nor 1")),
        }
    }

    /// At most `max` items, each of which is read by `item`; nothing is allocated for more than the bytes at hand.
    fn list<T>(
        &mut self,
        max: usize,
        item: impl Fn(&mut Reader<'a>) -> Result<T, CoreError>,
    ) -> Result<Vec<T>, CoreError> {
        let count = self.u32()? as usize;
        if count > max || count > self.rest.len() {
            return Err(malformed("a list is longer than the limits of this engine"));
        }
        (0..count).map(|_| item(self)).collect()
    }

    fn tokens(&mut self, max: usize) -> Result<Vec<Token>, CoreError> {
        self.list(max, |input| Ok(input.u32()? as Token))
    }

    fn rows(&mut self) -> Result<Vec<u32>, CoreError> {
        self.list(self.config.max_model_len as usize, Reader::u32)
    }

    fn pairs(&mut self, max: usize) -> Result<Vec<(u32, u32)>, CoreError> {
        self.list(max, |input| Ok((input.u32()?, input.u32()?)))
    }

    fn manifest(&mut self) -> Result<Manifest, CoreError> {
        let max_len = self.config.max_model_len as usize;
        Ok(Manifest {
            model_digest: self.u64()?,
            prefix_digest: self.u64()?,
            block_size: self.u32()?,
            vocab_size: self.u32()?,
            is_final: self.flag()?,
            announced: self.flag()?,
            use_cache: self.flag()?,
            prompt_logprobs: self.flag()?,
            max_tokens: self.u32()?,
            min_tokens: self.u32()?,
            priority: self.u32()? as i32,
            tenant: self.u32()?,
            time_left_ms: i64::try_from(self.u64()?).ok(),
            stop_token_ids: self.tokens(MAX_STOP_TOKEN_IDS)?,
            prompt: self.tokens(max_len)?,
            logprobs_len: self.u32()?,
            rule: if self.flag()? { Some(Arc::new(self.rule()?)) } else { None },
            choices: self.list(self.config.max_num_seqs as usize, |input| {
                Ok(if input.flag()? { Some(input.choice()?) } else { None })
            })?,
            report: if self.flag()? { Some(self.report()?) } else { None },
        })
    }

    fn rule(&mut self) -> Result<Rule, CoreError> {
        let spans = self.pairs(self.config.max_segments as usize)?;
        let ratio = f64::from_bits(self.u64()?);
        let rounds = self.list(MAX_ROUNDS, |input| {
            let scope = if input.flag()? { Scope::All } else { Scope::New };
            Ok(Round { scope, cost: f64::from_bits(input.u64()?), ratio: f64::from_bits(input.u64()?) })
        })?;
        let max_len = self.config.max_model_len as usize;
        let score = |input: &mut Reader<'a>| Ok(f32::from_bits(input.u32()?));
        let scores = if self.flag()? { Some(self.list(max_len, score)?.into()) } else { None };
        let (method_id, decode_rows) = (self.u32()?, self.u32()?);
        Ok(Rule { spans: spans.into(), method_id, ratio, rounds: rounds.into(), scores, decode_rows })
    }

    fn choice(&mut self) -> Result<ChoiceState, CoreError> {
        let output = self.tokens(self.config.max_model_len as usize)?;
        let (kv_len, preemptions) = (self.u32()?, self.u32()?.min(MAX_PREEMPTIONS));
        let blend = if self.flag()? { Some(self.blend()?) } else { None };
        Ok(ChoiceState { output, kv_len, preemptions, blend })
    }

    fn blend(&mut self) -> Result<BlendState, CoreError> {
        let max_segments = self.config.max_segments as usize;
        let holes = self.list(max_segments, Reader::flag)?;
        let (attempts, repaired) = (self.u32()?, self.rows()?);
        let recipe = if self.flag()? {
            let tokens_len = self.u32()?;
            let reused = self.pairs(max_segments)?;
            let ran = self.list(MAX_ROUNDS, Reader::rows)?;
            Some(RecipeState { tokens_len, reused, ran, rows: self.rows()? })
        } else {
            None
        };
        Ok(BlendState { holes, attempts, recipe, repaired })
    }

    fn report(&mut self) -> Result<ReuseReport, CoreError> {
        use SpanOutcome::{Hit, Hole, Made, Prefix, Recipe};
        let [prefix_tokens, blended_tokens] = [self.u32()?, self.u32()?];
        let [recomputed_tokens, computed_tokens] = [self.u32()?, self.u32()?];
        let spans = self.list(self.config.max_segments as usize, |input| {
            let [code] = input.take::<1>()?;
            let known = [Prefix, Hit, Made, Hole, Recipe].into_iter().find(|&outcome| outcome as u8 == code);
            known.ok_or(malformed("a span's outcome is unknown"))
        })?;
        Ok(ReuseReport { prefix_tokens, blended_tokens, recomputed_tokens, computed_tokens, spans: spans.into() })
    }
}
