//! The way in: `Core::add` checks a request completely, then records it; on an error nothing has changed.
//!
//! Last of the two walls (the first is Python's ValidatedRequest): ids, lengths, counts and the pool are checked again.

use super::makers::Maker;
use super::{BlendRequest, Core, NO_HANDLE, NO_SLOT, RequestState};
use crate::blend::Blend;
use crate::config::PolicyKind;
use crate::error::CoreError;
use crate::ids::{Label, TenantId, Token};
use crate::sequence::{Rank, Sequence, Status, stop_bit};

/// Stop token ids that one request may name.
pub const MAX_STOP_TOKEN_IDS: usize = 64;

/// What `Core::add` takes. Lengths in tokens.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// Token ids, each in the vocabulary.
    pub prompt: &'a [Token],
    /// Choices; the prompt is computed once for all.
    pub n: u32,
    /// Output tokens per choice, at least 1.
    pub max_tokens: u32,
    /// Stop ids count only once this many output tokens exist.
    pub min_tokens: u32,
    /// Ids that end a choice; the id itself is part of the output.
    pub stop_token_ids: &'a [Token],
    /// Lower is sooner; 0 unless the policy is `PolicyKind::Priority`.
    pub priority: i32,
    /// On the clock of `step`'s `now_ms`: the request ends with a timeout at the first step at or after it.
    pub deadline_ms: Option<i64>,
    /// Who asks; prefixes are shared within a tenant only.
    pub tenant: u32,
    /// False: takes no prefix hit. What it computes is published all the same.
    pub use_cache: bool,
    /// Every prompt position is computed and asked for its log-probability; implies no hit.
    pub prompt_logprobs: bool,
    /// Spans of the prompt to take from segments; none: an exact request.
    pub blend: Option<BlendRequest<'a>>,
}

impl Request<'_> {
    /// A waiting sequence for `choice`; a blend is the caller's to add.
    pub(super) fn sequence(&self, choice: u32, rank: Rank) -> Sequence {
        let label = Label::exact(TenantId(self.tenant));
        let end_len = self.prompt.len() as u32 + self.max_tokens;
        let mut seq = Sequence::new(0, choice, label, rank, self.prompt, end_len);
        seq.stop_mask = self.stop_token_ids.iter().fold(0, |mask, &id| mask | stop_bit(id));
        seq
    }

    /// The request as the core remembers it, without sequences.
    pub(super) fn state(&self) -> RequestState {
        RequestState {
            stop_token_ids: self.stop_token_ids.into(),
            min_tokens: self.min_tokens,
            priority: self.priority,
            use_cache: self.use_cache && !self.prompt_logprobs,
            prompt_logprobs: self.prompt_logprobs,
            ..RequestState::new(self.n)
        }
    }
}

impl Core {
    /// Queues a request and returns its handle, which names it until the last choice has finished.
    ///
    /// Errors: see `CoreError`; `QueueFull` alone is about capacity. A request must fit alone, one choice at a time: the
    /// choices of `n > 1` share the prompt's blocks, and a choice that finds no block waits and comes back alone, so
    /// blocks(prompt + max_tokens - 1) is what has to be in the pool. O(prompt).
    pub fn add(&mut self, request: &Request<'_>, now_ms: i64) -> Result<i32, CoreError> {
        self.check(request)?;
        self.check_queue()?;
        let rank = self.take_rank(request.priority);
        let mut seq = request.sequence(0, rank);
        seq.blend = request.blend.as_ref().map(|blend| Box::new(Blend::new(blend.rule())));
        let (handle, slot) = self.enlist(seq, request.state(), request.deadline_ms, now_ms);
        self.stats.requests_total += 1;
        self.enqueue(slot);
        Ok(handle)
    }

    /// Puts a waiting sequence into the queue, or outside it: missing segments are sent for at once, and made while others
    /// run.
    pub(super) fn enqueue(&mut self, slot: u32) {
        if self.seq(slot).blend.is_none() || self.prepare(slot, true).is_some() {
            self.join_queue(slot);
        }
    }

    /// The rank of whoever comes now.
    pub(super) fn take_rank(&mut self, priority: i32) -> Rank {
        let arrival = self.take_arrival();
        (self.queue.rank(arrival, priority), self.take_serial())
    }

    /// Stores a request and its first sequence, not yet queued; returns handle and slot. The core's own get no handle.
    pub(super) fn enlist(
        &mut self,
        seq: Sequence,
        state: RequestState,
        deadline_ms: Option<i64>,
        now_ms: i64,
    ) -> (i32, u32) {
        let request = self.register(state, deadline_ms, now_ms);
        (self.request(request).handle, self.join(request, seq))
    }

    /// Stores a request that has no sequence yet; returns its index.
    pub(super) fn register(&mut self, mut state: RequestState, deadline_ms: Option<i64>, now_ms: i64) -> u32 {
        let index = self.free_requests.pop().unwrap_or_else(|| {
            self.requests.push(None);
            self.requests.len() as u32 - 1
        });
        if state.handle != NO_HANDLE {
            state.handle = self.take_handle();
            state.deadline_ms = deadline_ms.map(|deadline| deadline.max(now_ms));
            self.deadlines.extend(state.deadline_ms.map(|deadline| (deadline, index)));
            self.by_handle.insert(state.handle, index);
        }
        self.requests[index as usize] = Some(state);
        index
    }

    /// Gives a choice of a request its sequence; choices come in order.
    pub(super) fn join(&mut self, request: u32, mut seq: Sequence) -> u32 {
        seq.request = request;
        let choice = seq.choice as usize;
        let slot = self.place(seq);
        let state = self.request_mut(request);
        state.choices.resize(choice, NO_SLOT);
        state.choices.push(slot);
        state.num_present += 1;
        slot
    }

    pub(super) fn take_arrival(&mut self) -> u64 {
        self.next_arrival += 1;
        self.next_arrival - 1
    }

    pub(super) fn take_serial(&mut self) -> u64 {
        self.next_serial += 1;
        self.next_serial - 1
    }

    /// What can be said of a request whatever else waits.
    pub(super) fn check(&self, request: &Request<'_>) -> Result<(), CoreError> {
        let config = &self.config;
        let prompt_len = request.prompt.len();
        if prompt_len == 0 {
            return Err(CoreError::EmptyPrompt);
        }
        let max_model_len = config.max_model_len;
        if prompt_len >= max_model_len as usize {
            return Err(CoreError::PromptTooLong { prompt_len, max_model_len });
        }
        if request.max_tokens == 0 {
            return Err(CoreError::NoOutput);
        }
        let max_tokens = request.max_tokens;
        if prompt_len as u64 + u64::from(max_tokens) > u64::from(max_model_len) {
            return Err(CoreError::TooLong { prompt_len, max_tokens, max_model_len });
        }
        if request.min_tokens > max_tokens {
            return Err(CoreError::MinTokens { min_tokens: request.min_tokens, max_tokens });
        }
        if request.n == 0 || request.n > config.max_num_seqs {
            return Err(CoreError::Choices { n: request.n, max: config.max_num_seqs });
        }
        let count = request.stop_token_ids.len();
        if count > MAX_STOP_TOKEN_IDS {
            return Err(CoreError::StopIds { count, max: MAX_STOP_TOKEN_IDS });
        }
        let priority = request.priority;
        if priority != 0 && config.policy != PolicyKind::Priority {
            return Err(CoreError::Priority { priority });
        }
        self.check_tokens(request.prompt, request.tenant)?;
        if let Some(blend) = &request.blend {
            blend.check(prompt_len, config)?;
            if request.prompt_logprobs {
                return Err(CoreError::BlendedLogprobs);
            }
        }
        let needed = (prompt_len as u32 + max_tokens - 1).div_ceil(config.block_size);
        if needed > config.num_blocks {
            return Err(CoreError::NeverFits { needed, total: config.num_blocks });
        }
        let pinned = self.cache.pinned_blocks() as u32;
        if needed + pinned > config.num_blocks {
            return Err(CoreError::Pinned { needed, total: config.num_blocks, pinned });
        }
        Ok(())
    }

    pub(super) fn check_tokens(&self, tokens: &[Token], tenant: u32) -> Result<(), CoreError> {
        if tokens.is_empty() {
            return Err(CoreError::EmptyPrompt);
        }
        if tenant >= 1 << 31 {
            return Err(CoreError::Tenant { tenant });
        }
        let vocab_size = self.config.vocab_size;
        let outside = |&token: &Token| u32::try_from(token).map_or(true, |id| id >= vocab_size);
        match tokens.iter().position(outside) {
            Some(index) => Err(CoreError::OutsideVocabulary { index, token: tokens[index], vocab_size }),
            None => Ok(()),
        }
    }

    /// Ends that nobody has read yet count too: a caller that adds and aborts without a step stays bounded. Makers
    /// do not count: each belongs to somebody who waits.
    pub(super) fn check_queue(&self) -> Result<(), CoreError> {
        let max = self.config.max_num_waiting as usize;
        let waits = |maker: &&Maker| self.seq(maker.slot).status() == Status::Waiting;
        let arriving = self.arrivals.values().filter(|arrival| arrival.rows.is_empty()).count();
        let queued = self.queue.len() + self.num_outside + self.num_shelved + arriving;
        let waiting = queued - self.makers.values().filter(waits).count();
        let unread = self.out_finished.len();
        if waiting >= max || waiting + unread >= max + self.config.max_num_seqs as usize {
            return Err(CoreError::QueueFull { waiting: waiting + unread, max });
        }
        self.check_live()
    }

    /// Rows and places in the queue bound the requests that live; those that arrive count already.
    pub(super) fn check_live(&self) -> Result<(), CoreError> {
        let (live, max) = (self.by_handle.len() + self.arrivals.len(), self.config.max_num_waiting as usize);
        if live >= max + self.config.max_num_seqs as usize {
            return Err(CoreError::QueueFull { waiting: live, max });
        }
        Ok(())
    }

    /// Handles grow; after 2^31 of them they start again at 0 and step over those that still live.
    fn take_handle(&mut self) -> i32 {
        loop {
            let handle = self.next_handle;
            self.next_handle = handle.checked_add(1).unwrap_or(0);
            if !self.by_handle.contains_key(&handle) {
                return handle;
            }
        }
    }

    /// Stores a sequence in a vacant slot.
    pub(super) fn place(&mut self, seq: Sequence) -> u32 {
        match self.free_slots.pop() {
            Some(slot) => {
                self.seqs[slot as usize] = seq;
                slot
            }
            None => {
                self.seqs.push(seq);
                self.seqs.len() as u32 - 1
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_start_again_after_the_last_and_step_over_those_that_live() {
        let mut core = Core::new(crate::config::small()).unwrap();
        let request = Request {
            prompt: &[1],
            n: 1,
            max_tokens: 1,
            min_tokens: 0,
            stop_token_ids: &[],
            priority: 0,
            deadline_ms: None,
            tenant: 0,
            use_cache: true,
            prompt_logprobs: false,
            blend: None,
        };
        assert_eq!(core.add(&request, 0), Ok(0));
        core.next_handle = i32::MAX;
        assert_eq!([core.add(&request, 0), core.add(&request, 0)], [Ok(i32::MAX), Ok(1)]);
        core.audit();
    }
}
