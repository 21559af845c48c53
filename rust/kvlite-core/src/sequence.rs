//! `Sequence`: one choice of one request: its token ids, counters, blocks and status.
//!
//! Owns the counters' arithmetic and the legal transitions of `Status`. Must not know the cache, the plan or the queues:
//! `core` moves blocks and rows and calls `become_` here. Invariants: committed_len <= scheduled_len <= known tokens +
//! samples in flight; blocks[..tree_len] are in the tree and pinned through their last one, the rest is private.
//! Used by `core` alone.

use crate::blend::Blend;
use crate::cache::SegmentId;
use crate::ids::{BlockId, Label, TenantId, Token};
use crate::sched::batching::{Home, NO_HOME};

/// The policy's number, then the arrival, which makes it unique; smaller is sooner.
pub(crate) type Rank = (i64, u64);

/// Why a choice ended; the number is what crosses the boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum FinishReason {
    /// A stop token, or a stop string seen by the stream's owner.
    Stop = 0,
    /// `max_tokens`.
    Length = 1,
    /// Aborted.
    Cancelled = 2,
    /// A fault of this request or of its plan.
    Error = 3,
    /// Its deadline passed.
    Timeout = 4,
}

impl FinishReason {
    /// The reason with this number, if there is one.
    pub fn from_code(code: i32) -> Option<FinishReason> {
        use FinishReason::{Cancelled, Error, Length, Stop, Timeout};
        [Stop, Length, Cancelled, Error, Timeout].into_iter().find(|&reason| reason as i32 == code)
    }
}

/// Where a sequence is in its life.
///
/// ```text
///   Outside <-> Waiting <-> Shelved               Outside: waits for segments, not in the queue; -> Vacant as Waiting
///   Waiting -> Running -> Ending -> Vacant        Waiting -> Vacant  (ended before it held anything)
///      ^  \       |  ^       ^
///      |   Forked-+--'       |       Forked: holds a row, waits for choice 0 to compute the prompt
///      +------ Preempting ---+       Ending, Preempting: hold everything until no plan names them
///
///   Running, Preempting -> Frozen -> Running, Ending      Frozen, Shelved: about to move to another engine, with a row or
///   Waiting, Outside -> Shelved -> Waiting, Vacant        without; no plan names them from now on
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Vacant,
    Waiting,
    Outside,
    Forked,
    Running,
    Preempting,
    Ending,
    Frozen,
    Shelved,
}

impl Status {
    fn may_become(self, next: Status) -> bool {
        use Status::{Ending, Forked, Frozen, Outside, Preempting, Running, Shelved, Vacant, Waiting};
        matches!(
            (self, next),
            (Vacant, Waiting | Forked)
                | (Waiting, Running | Outside | Shelved | Vacant)
                | (Outside, Waiting | Shelved | Vacant)
                | (Shelved, Waiting | Vacant)
                | (Forked, Running | Waiting | Ending)
                | (Running, Preempting | Waiting | Ending | Frozen)
                | (Preempting, Waiting | Ending | Frozen)
                | (Frozen, Running | Ending)
                | (Ending, Vacant)
        )
    }

    /// Whether the sequence holds a row.
    pub fn holds_row(self) -> bool {
        !matches!(self, Status::Vacant | Status::Waiting | Status::Outside | Status::Shelved)
    }
}

/// The bit of `Sequence::stop_mask` that stands for `id`.
#[inline]
pub(crate) fn stop_bit(id: Token) -> u64 {
    1 << (id as u32 % 64)
}

/// One choice of one request.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// Index of the request's state in `core`.
    pub request: u32,
    /// 0..n of the request.
    pub choice: u32,
    /// Whose exact KV it reads and publishes.
    pub label: Label,
    /// Order among all sequences, smaller first; given by the policy once, kept through preemptions.
    pub rank: Rank,
    /// Its place among those who wait, as the cache is told: the policy's number, or its place in an arranged order.
    pub turn: i64,
    status: Status,
    /// Prompt, then committed output; reserved to its declared end, so that a step never allocates.
    pub tokens: Vec<Token>,
    /// Of `tokens`, how many are the prompt.
    pub prompt_len: u32,
    /// Prompt plus max_tokens: no plan passes it.
    pub end_len: u32,
    /// Bit `id % 64` of every stop id: an id whose bit is clear ends nothing, without a look at the request.
    pub stop_mask: u64,
    /// Row of the device tables; meaningful while `status.holds_row()`.
    pub row: u32,
    /// Tokens named by plans so far; runs ahead of `committed_len` by at most the plans in flight.
    pub scheduled_len: u32,
    /// Tokens whose KV a *completed* plan has written; what the tree may hold.
    pub committed_len: u32,
    /// Sampled by plans that have not completed.
    pub samples_in_flight: u32,
    /// Plans in flight that name this sequence; nothing of it is freed before this is 0.
    pub outstanding: u32,
    /// The plan that named it last, by core-internal number; a sequence is named once per plan.
    pub last_plan: u64,
    /// Block table; reserved to its declared end at admission.
    pub blocks: Vec<BlockId>,
    /// Of `blocks`, how many are in the tree; the last of them is the cursor, the only one pinned.
    pub tree_len: u32,
    /// Of `blocks`, how many were hits: they do not come back to the pool for sure when this sequence ends.
    pub hit_len: u32,
    /// Of `blocks`, how many are hits or copies of public hits on the host: what a tenant's own are copies of may be gone when
    /// they are published, and a public block with these tokens there instead.
    pub found_len: u32,
    /// Of `blocks`, how many the device's table row already shows.
    pub table_len: u32,
    /// The last plan that showed blocks of the tree, by core-internal number: the device has them once it has completed.
    pub shown_by: u64,
    /// The parent's partly filled prompt block, shared until it is copied (or adopted by its last owner).
    pub tail_source: Option<BlockId>,
    /// Known tokens at admission; below this it is in prefill.
    pub prefill_until: u32,
    /// Prompt positions whose log-probabilities a completed plan has delivered.
    pub logprobs_len: u32,
    /// Times preempted; each multiplies the room that admission sets aside for it.
    pub preemptions: u32,
    /// Steps it was held back for a neighbour that computes the same prefix; bounded by `HOLD_LIMIT_STEPS`.
    pub held_steps: u32,
    /// The group of prompts that it was arranged with last; see `sched::batching`.
    pub home: Home,
    /// Whether it came from elsewhere and no plan has announced its row yet.
    pub arrived: bool,
    /// What it reuses from segments, if it asked for that.
    pub blend: Option<Box<Blend>>,
    /// The segment that this sequence computes; no request of a client's then: it draws and publishes nothing.
    pub makes: Option<SegmentId>,
}

impl Sequence {
    /// A waiting sequence with its own copy of `tokens`, reserved to `end_len`.
    pub fn new(request: u32, choice: u32, label: Label, rank: Rank, prompt: &[Token], end_len: u32) -> Sequence {
        let mut tokens = Vec::with_capacity(end_len as usize);
        tokens.extend_from_slice(prompt);
        Sequence {
            request,
            choice,
            label,
            rank,
            turn: rank.0,
            status: Status::Waiting,
            tokens,
            prompt_len: prompt.len() as u32,
            end_len,
            stop_mask: 0,
            row: 0,
            scheduled_len: 0,
            committed_len: 0,
            samples_in_flight: 0,
            outstanding: 0,
            last_plan: 0,
            blocks: Vec::new(),
            tree_len: 0,
            hit_len: 0,
            found_len: 0,
            table_len: 0,
            shown_by: 0,
            tail_source: None,
            prefill_until: 0,
            logprobs_len: 0,
            preemptions: 0,
            held_steps: 0,
            home: NO_HOME,
            arrived: false,
            blend: None,
            makes: None,
        }
    }

    /// What an empty slot of the table holds.
    pub fn vacant() -> Sequence {
        let mut seq = Sequence::new(u32::MAX, 0, Label::exact(TenantId(0)), (0, 0), &[], 0);
        seq.status = Status::Vacant;
        seq
    }

    /// A further choice that starts with a row, before its prompt is computed.
    pub fn forked_from(parent: &Sequence, choice: u32) -> Sequence {
        let prompt = &parent.tokens[..parent.prompt_len as usize];
        let mut fork = Sequence::new(parent.request, choice, parent.label, parent.rank, prompt, parent.end_len);
        fork.stop_mask = parent.stop_mask;
        fork.status = Status::Forked;
        fork.blend = parent.blend.as_ref().map(|blend| Box::new(blend.fork()));
        fork
    }

    /// Current status.
    #[inline]
    pub fn status(&self) -> Status {
        self.status
    }

    /// Moves to `next`; panics on a transition that the picture does not have.
    pub fn become_(&mut self, next: Status) {
        assert!(self.status.may_become(next), "a sequence never goes from {:?} to {next:?}", self.status);
        self.status = next;
    }

    /// Who asked.
    #[inline]
    pub fn tenant(&self) -> TenantId {
        TenantId(self.label.number())
    }

    /// Output tokens known.
    #[inline]
    pub fn output_len(&self) -> u32 {
        self.tokens.len() as u32 - self.prompt_len
    }

    /// Known tokens plus those being sampled.
    #[inline]
    pub fn total_len(&self) -> u32 {
        self.tokens.len() as u32 + self.samples_in_flight
    }

    /// Tokens that a plan could compute now: 1 for a decode, more for a prefill, 0 when its end is already planned.
    #[inline]
    pub fn schedulable(&self) -> u32 {
        if self.total_len() < self.end_len { self.total_len() - self.scheduled_len } else { 0 }
    }

    /// Whether it still places, scores or repairs reused rows: its rows are listed, not a range.
    #[inline]
    pub fn is_blending(&self) -> bool {
        self.blend.as_ref().is_some_and(|blend| blend.is_active())
    }

    /// Whether decode steps write into blocks of the prompt.
    pub fn repairs(&self) -> bool {
        self.blend.as_ref().is_some_and(|blend| blend.rule.decode_rows > 0)
    }

    /// Tokens from position 0 that no blend touches.
    pub fn exact_len(&self) -> usize {
        let first = self.blend.as_ref().and_then(|blend| blend.rule.spans.first());
        first.map_or(usize::MAX, |&(start, _)| start as usize)
    }

    /// The block that holds its positions from `index * block_size` on; a fork may still share its parent's last one.
    pub fn block_at(&self, index: u32) -> BlockId {
        let own = self.blocks.get(index as usize).copied();
        own.or(self.tail_source).expect("rows that were computed have a block")
    }

    /// The slot of `position` in its own blocks.
    pub fn slot_at(&self, position: u32, block_size: u32) -> u32 {
        self.blocks[(position / block_size) as usize].index * block_size + position % block_size
    }

    /// Whether its known tokens are still being computed for the first time since admission.
    pub fn in_prefill(&self) -> bool {
        self.committed_len < self.prefill_until
    }

    /// Order in every list: rank, then choice.
    #[inline]
    pub fn order(&self) -> (Rank, u32) {
        (self.rank, self.choice)
    }

    /// Forgets everything that belongs to a stay on the device; tokens and output remain.
    pub fn forget_device_state(&mut self) {
        assert!(self.blocks.is_empty() && self.tail_source.is_none(), "blocks are given back first");
        assert!(self.outstanding == 0 && self.samples_in_flight == 0, "a plan still names this sequence");
        self.scheduled_len = 0;
        self.committed_len = 0;
        self.tree_len = 0;
        self.hit_len = 0;
        self.found_len = 0;
        self.table_len = 0;
        self.shown_by = 0;
        self.prefill_until = 0;
        self.held_steps = 0;
        if let Some(blend) = &mut self.blend {
            blend.leave();
        }
    }
}
