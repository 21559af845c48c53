"""The compiled part: the core that decides, and the CPU twins of the kernels.

Arrays are NumPy arrays, read and written in place. Nobody else writes an array while a call uses it. A name that starts
with an underscore exists here only.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, final

import numpy as np
from numpy.typing import NDArray

_Int32: TypeAlias = NDArray[np.int32]
_Float32: TypeAlias = NDArray[np.float32]
_Stored: TypeAlias = NDArray[Any]
"""float32, or uint16 that holds the bits `dtype` names: "float32", "bfloat16" or "float16"."""
_Round: TypeAlias = tuple[int, float, float]
"""Scope (0 new rows, 1 all rows), cost of one row as a share of a full pass, share of the reused rows kept."""
_Blend: TypeAlias = tuple[_Int32, int, float, Sequence[_Round], _Float32 | None, int]
"""spans [k, 2] (start, len), method_id, ratio, rounds, scores [prompt_len] of a static rule, decode_rows."""

class InvalidArgument(ValueError):
    """The caller's argument cannot be served as given; nothing has changed."""

    param: str
    """Which argument."""

class CapacityError(Exception):
    """A limit is reached now and may not be later; nothing has changed."""

class Fault(RuntimeError):
    """An invariant of ours is broken; the message is the panic's. A core that raised it refuses every later call."""

class _CoreConfig(TypedDict):
    num_blocks: int
    host_blocks: int
    swap_cost_tokens: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_waiting: int
    vocab_size: int
    enable_prefix_caching: bool
    policy: str
    max_passes: int
    eviction: str
    attention_cost_tokens: int
    attention_split_tokens: int
    group_cost_tokens: int
    reserve_tokens: int
    watermark_ratio: float
    hash_seed: int
    canonical_prefix: Sequence[int]
    model_digest: int
    segment_cache_ratio: float
    max_segments: int

class _SegmentInfo(TypedDict):
    len: int
    state: Literal["wanted", "making", "ready"]
    tenant: int
    pinned: bool
    num_users: int
    num_hits: int
    num_blocks: int

class _ReuseReport(TypedDict):
    prefix_tokens: int
    blended_tokens: int
    recomputed_tokens: int
    computed_tokens: int
    spans: list[int]

class _CoreStats(TypedDict):
    num_running: int
    num_waiting: int
    num_requests: int
    free_blocks: int
    cached_blocks: int
    owned_blocks: int
    in_transfer_blocks: int
    host_blocks: int
    num_segments: int
    segment_blocks: int
    pinned_blocks: int
    num_recipes: int
    steps_total: int
    requests_total: int
    preemptions_total: int
    prompt_tokens_total: int
    prefix_hit_tokens_total: int
    host_hit_tokens_total: int
    demoted_blocks_total: int
    promoted_blocks_total: int
    segment_hit_tokens_total: int
    blended_tokens_total: int
    recomputed_tokens_total: int
    segments_made_total: int
    prefill_tokens_total: int
    shared_keys_total: int
    generated_tokens_total: int
    discarded_tokens_total: int
    failed_plans_total: int
    migrations_out_total: int
    migrations_in_total: int
    imports_cancelled_total: int
    finished_total: tuple[int, int, int, int, int]

@final
class Core:
    """Scheduler and KV cache of one engine. Any thread may call; calls run one at a time, long ones without the GIL.

    Every method raises Fault once one of them has panicked.
    """

    def __new__(cls, *, arenas: tuple[_Int32, _Int32], **config: Unpack[_CoreConfig]) -> Core:
        """`arenas`: two int32 arrays of `arena_len` each, kept for life. Raises InvalidArgument."""

    @staticmethod
    def layout(**config: Unpack[_CoreConfig]) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Offset and shape of every region of an arena, by name, in arena order. Raises InvalidArgument."""

    @staticmethod
    def arena_len(**config: Unpack[_CoreConfig]) -> int:
        """Integers in one arena. Raises InvalidArgument."""

    def add(
        self,
        prompt_ids: _Int32,
        *,
        n: int,
        max_tokens: int,
        min_tokens: int,
        stop_token_ids: Sequence[int],
        priority: int,
        deadline_ms: int | None,
        tenant: int,
        use_cache: bool,
        prompt_logprobs: bool,
        now_ms: int,
        blend: _Blend | None = None,
        outputs: Sequence[_Int32 | None] | None = None,
    ) -> int:
        """Queues a request; returns its handle. Raises InvalidArgument or CapacityError; nothing has changed then.

        `deadline_ms` and `now_ms` are on the clock of `step`. `outputs`: what each of the n choices has produced
        elsewhere, None for one that has ended; committed positions go on behind them, and the first admission of each
        such choice has cause IMPORTED (where nothing was produced and nothing ended, that of choice 0; the others are
        forked as usual). O(prompt).
        """

    def add_segment(self, ids: _Int32, *, tenant: int, pinned: bool, deadline_ms: int | None, now_ms: int) -> int:
        """Queues the making of a segment; its handle finishes with stop once it is ready. Raises as `add`."""

    def segment(self, tenant: int, ids: _Int32) -> _SegmentInfo | None:
        """The segment of these ids that `tenant` may read: its own, else a public one."""

    def pin_segment(self, tenant: int, ids: _Int32, pinned: bool) -> bool:
        """Spares a segment from eviction. False: `tenant` has none of its own. CapacityError: requests need it."""

    def drop_segment(self, tenant: int, ids: _Int32) -> bool:
        """Forgets a segment; whoever uses it keeps it until done. False: `tenant` has none of its own."""

    def reuse_report(self, handle: int) -> _ReuseReport | None:
        """Tokens of a live blended request by source, and per span 0 prefix, 1 hit, 2 made, 3 hole, 4 recipe.

        Complete from the step that reports `admitted` with cause new.
        """

    def set_workload(self, is_workload: bool) -> None:
        """While on, all that waits is one workload known as a whole: admitted group by group, whatever the policy."""

    def abort(self, handle: int) -> bool:
        """Ends every choice of a request at the next step; False when it has ended already."""

    def finish(self, handle: int, choice: int, kept_len: int, reason: int) -> bool:
        """Ends one choice on behalf of its stream's owner, who keeps `kept_len` tokens; False when it has ended."""

    def step(self, arena_idx: int, now_ms: int) -> None:
        """Commits every completed plan, then writes the next one into arena `arena_idx`.

        Raises InvalidArgument when the plan in that arena is still incomplete. O(running) without admissions.
        """

    def stats(self) -> _CoreStats:
        """Counters and gauges; `finished_total` counts ends by reason code. O(1)."""

    def audit(self) -> None:
        """Checks every invariant, O(blocks); raises Fault with the first one broken."""

    def clear_cache(self) -> None:
        """Drops every cached block; running sequences keep theirs."""

    def export_begin(self, handle: int) -> bytes:
        """Starts an export; returns the manifest as of now, for `reserve` of the other engine.

        Raises InvalidArgument: a handle that names nothing that lives, a request that makes a segment, one that is
        being exported already. All calls of an export and an import belong between steps; O(blocks of the request).
        """

    def export_stage(self, handle: int, skip_blocks: int) -> tuple[int, _Int32]:
        """A hold, and rows [K, 3] of choice, block index in the sequence, pool block: what can go now and has not gone.

        Full blocks whose KV completed plans have written; once `is_frozen`, partly filled last ones too. The
        destination has the first `skip_blocks` of the prompt. Full blocks of the prompt go once, under choice 0. The
        blocks stay as they are until `transfer_done`. Raises InvalidArgument; CapacityError: too many copies under way.
        """

    def transfer_done(self, hold: int) -> None:
        """The copy of a stage has ended, well or not; also after the request has ended. Raises InvalidArgument."""

    def export_left(self, handle: int) -> int:
        """Blocks that `export_stage` would give out now. Raises as `export_stage`."""

    def freeze(self, handle: int) -> None:
        """No later plan names the request; it keeps rows and blocks, or leaves the queue. Twice is fine.

        It can still end: by `abort`, `finish`, its deadline, or the plan in flight. Raises as `export_begin`.
        """

    def is_frozen(self, handle: int) -> bool:
        """Whether it is frozen and no plan in flight names it either, which takes a `step` after that plan is done."""

    def export_final(self, handle: int) -> bytes:
        """The manifest of a frozen request, for `import_commit`. Raises InvalidArgument when it is not frozen."""

    def export_abort(self, handle: int) -> bool:
        """Thaws: back to where it was, rank included. False: it has ended meanwhile."""

    def export_commit(self, handle: int) -> bool:
        """The request lives elsewhere: rows, blocks, queue places are free, no end is reported, the tree stays cached.

        False: it has ended meanwhile. Raises InvalidArgument when it is not frozen.
        """

    def reserve(
        self, manifest: bytes, now_ms: int, deadline_ms: int | None, *, method_id: int | None = None
    ) -> tuple[int, int]:
        """A ticket, and how many leading blocks of the prompt are here already (for `skip_blocks`).

        Takes rows, and blocks for the tokens known now and two more per choice; for a manifest without KV a place in
        the queue. At `deadline_ms` `step` cancels it. `method_id`: this engine's number of the manifest's reuse method.
        Raises InvalidArgument: damaged, of an engine with another model, block size or vocabulary, or a request that
        can never fit; CapacityError: no room now.
        """

    def import_block(self, ticket: int, choice: int, index: int) -> int:
        """The pool block to write; the same when asked again. CapacityError: beyond the reservation, and no room.

        Nobody else gets the block before `import_filled` or `import_cancel`, even when the reservation expires. A block
        has one copy at a time: the end of the first would free it under a second.
        """

    def import_filled(self, ticket: int, choice: int, index: int) -> None:
        """The bytes of that block are there and verified. InvalidArgument: the reservation expired, it is free."""

    def import_extend(self, ticket: int, deadline_ms: int | None) -> None:
        """Another deadline for a reservation; None: only `import_commit` and `import_cancel` end it (after a claim)."""

    def import_commit(self, ticket: int, manifest: bytes, now_ms: int, *, method_id: int | None = None) -> int:
        """The handle of the request that goes on here; the next plan names its rows with cause IMPORTED.

        A choice without KV or row waits like a preempted one and is named, as IMPORTED too, when it is admitted. Raises
        InvalidArgument, and nothing has changed: a manifest that is not final or of another request, or a block that it
        counts on is neither a hit nor filled.
        """

    def import_cancel(self, ticket: int) -> bool:
        """Gives a reservation back; no copy into its blocks may be under way. False: there is none any more.

        Full exact blocks that were filled, in unbroken order, become cached prefix blocks: a replay hits them.
        """

def cpu_attention(
    q: _Stored,
    k_cache: _Stored,
    v_cache: _Stored,
    block_table: _Int32,
    query_start: _Int32,
    context_len: _Int32,
    seq_row: _Int32,
    last_key: _Int32,
    scale: float,
    window: int,
    out: _Stored,
    lse: _Float32,
    dtype: str = "float32",
    prefix_group: _Int32 | None = None,
    group_seqs: _Int32 | None = None,
) -> None:
    """Writes `out` [T, H, D] and `lse` [T, H] for the rows of every sequence; see kernels/attention.

    q [T, H, D], rows strided · caches [B, block_size, KH, D], the last dimension contiguous · block_table [R, NB] ·
    query_start [S+1] · context_len, seq_row [S] · last_key [T] · prefix_group [G, 3], group_seqs [M]. Raises
    InvalidArgument before anything is written.
    """

def cpu_store_kv(
    k: _Stored,
    v: _Stored,
    k_cache: _Stored,
    v_cache: _Stored,
    slot_mapping: _Int32,
    dtype: str = "float32",
) -> None:
    """Stores k, v [T, KH, D] (rows strided) in their slots; -1 is skipped. Raises InvalidArgument before it writes."""

def cpu_place_kv(
    kv_pool: _Stored,
    source_slot: _Int32,
    target_slot: _Int32,
    positions: _Int32,
    cos: _Float32,
    sin: _Float32,
    dtype: str = "float32",
) -> None:
    """Copies rows of kv_pool [B, L, 2, block_size, KH, D] to other slots, keys rotated; see kernels/place_kv.

    source_slot, target_slot, positions [P] · cos, sin [positions, rot / 2]. Raises InvalidArgument, for a slot that two
    rows would touch too, before anything is written.
    """

def cpu_key_mass(
    q: _Stored,
    lse: _Float32,
    k_cache: _Stored,
    block_table_row: _Int32,
    rows: _Int32,
    last_key: _Int32,
    start: int,
    end: int,
    scale: float,
    out: _Float32,
    dtype: str = "float32",
) -> None:
    """Writes `out` [end - start]: attention that those keys receive from `rows`; see kernels/key_mass.

    Raises InvalidArgument before anything is written.
    """

def cpu_linear(
    x: _Stored,
    weight: _Stored,
    bias: _Stored | None,
    out: _Stored,
    dtype: str = "float32",
    weight_dtype: str = "float32",
    invariant: bool = True,
) -> None:
    """Writes `out` [T, N] = x [T, K] weight [N, K]^T + bias [N]; see kernels/linear.

    x and out are of `dtype`, weight and bias of `weight_dtype`: the same, or any beside float32. A row's bits depend on
    that row alone; if not `invariant`, many rows may be added in a faster order than few. Raises InvalidArgument before
    anything is written.
    """

def cpu_rms_norm(x: _Stored, weight: _Stored, eps: float, out: _Stored, dtype: str = "float32") -> None:
    """Writes `out` = weight [D] * x / rms(x); see kernels/rms_norm. x and out, [T, D] or [T, H, D], may be one.

    Raises InvalidArgument before anything is written.
    """

def cpu_add_rms_norm(
    x: _Stored, residual: _Stored, weight: _Stored, eps: float, out: _Stored, dtype: str = "float32"
) -> None:
    """Adds x to `residual`, then as `cpu_rms_norm` of it; x and out may be one.

    Raises InvalidArgument before anything is written.
    """

def cpu_rope(q: _Stored, k: _Stored, positions: _Int32, cos: _Float32, sin: _Float32, dtype: str = "float32") -> None:
    """Rotates q [T, H, D] and k [T, KH, D] (rows strided) in place; cos, sin [P, rot / 2]; see kernels/rope.

    Raises InvalidArgument, for a position outside the tables too, before anything is written.
    """

def cpu_silu_mul(gate_up: _Stored, out: _Stored, dtype: str = "float32") -> None:
    """Writes `out` [T, F] = silu(gate) * up, gate_up [T, 2F]; see kernels/silu_mul.

    Raises InvalidArgument before anything is written.
    """

def cpu_sample(
    logits: _Stored,
    temperature: _Float32,
    top_k: _Int32,
    top_p: _Float32,
    min_p: _Float32,
    seed: NDArray[np.int64],
    position: NDArray[np.int64],
    token: _Int32,
    dtype: str = "float32",
) -> None:
    """Writes `token` [N] for logits [N, V], -1 for a row without a sound maximum; see kernels/sampling.

    Raises InvalidArgument before anything is written.
    """

@final
class Tape:
    """CPU ops kept instead of computed, with the arrays that they use."""

    @staticmethod
    def record(run: Callable[[], object]) -> Tape:
        """Calls `run` and keeps the CPU ops that it calls on this thread; their arguments are checked now.

        Raises what `run` raises, and InvalidArgument inside of another `record`.
        """

    def replay(self) -> None:
        """Computes all of them, in order. Raises as the first one that fails would; those before it have computed."""

    def __len__(self) -> int: ...

def cpu_num_threads() -> int:
    """Threads that share one call, the caller's included; at first as many as the machine has."""

def cpu_set_num_threads(num_threads: int) -> None:
    """Sets the threads that share one call; results stay the same bit for bit. Raises InvalidArgument."""

def cpu_isa() -> str:
    """The instruction set in use: "portable", "avx2", "avx512", "avx512_bf16" or "amx"."""

class FrameError(ValueError):
    """A migration frame is malformed, or an engine said what the protocol does not allow: close its link."""

_Effect: TypeAlias = tuple[Any, ...]
"""A kind (a constant of `Mover` or of `Owner`) and its items, as the class lists them."""

@final
class Mover:
    """Source and destination side of every move of one engine: a pure machine that says what to do next.

    Every method returns the effects to carry out, in order. `attempt` tells moves of one request apart; give it back
    with the answer: late answers of an older attempt are ignored. Live requests and arriving ones are two tables:
    RESERVE,
    CANCEL and COMMIT concern an arrival, all others the live request.

    (SEND, peer, frame). A peer that cannot be reached: `link_down`.
    (EXPORT, request, attempt, epoch) -> `exported`; None unless the live request has that very epoch.
    (STAGE, request, attempt, epoch, to, stage, skip_blocks, final) -> `staged`, once the BLOCKS frames of the stage
    are with
    the link (none for no blocks) and its copies done. final: partly filled blocks too, the request is frozen.
    (FREEZE, request, attempt) -> `frozen`, once no plan in flight names it. What follows (STAGE final, TAIL) may be
    fetched
    from the core in that same call: nothing changes any more.
    (TAIL, request, attempt) -> `tail`, after every token that it has produced was handed to the owner's link.
    (THAW, request, attempt, epoch): goes on here; its tokens carry `epoch` from now on.
    (RELEASE, request, attempt, epoch): it lives elsewhere. Nothing to do unless the live request's epoch is <= `epoch`.
    (RESERVE, request, attempt, source, manifest, ttl_ms, replay) -> `reserved` | `refused`. The mover keeps the ttl
    and says
    CANCEL itself: the core's deadline is a backstop and must not pass while a claim waits.
    (CANCEL, request, attempt): drop the arrival; one that is still being reserved is dropped when that is done.
    (COMMIT, request, attempt, epoch, manifest, replay): the request lives here now; its tokens carry `epoch`.
    (DONE, request, attempt, result, stages, blocks, reason): the move's end at its source; result: index of RESULTS.
    """

    OWNER: int
    """The peer number of the stream's owner, -1."""
    SEND: int
    EXPORT: int
    STAGE: int
    FREEZE: int
    TAIL: int
    THAW: int
    RELEASE: int
    RESERVE: int
    CANCEL: int
    COMMIT: int
    DONE: int
    RESULTS: tuple[str, ...]
    """moved, refused, aborted, reclaimed, ended, failed."""
    FRAME_KINDS: tuple[str, ...]
    """Names of what `frame_kind` returns: move, prepare, reserved, refused, blocks, ack, tail, abort, claim,
    granted, ..."""
    BLOCKS: int
    """The kind of a BLOCKS frame, the only one that goes to `blocks` and not to `frame`."""

    def __new__(
        cls,
        engine: int,
        *,
        max_moves: int,
        max_inflight_bytes: int,
        block_bytes: int,
        max_stages: int,
        reserve_ms: int,
        ack_ms: int,
        freeze_ms: int,
        claim_ms: int,
    ) -> Mover:
        """max_moves: out and in, each. reserve_ms: a reservation without news. ack_ms: an answer of the destination,
        or the
        freeze. freeze_ms: from the tail to the reclaim. claim_ms: between repeated claims. Raises InvalidArgument."""

    def move(self, request: int, epoch: int, to: int, replay: bool, attempt: int, now_ms: int) -> list[_Effect]:
        """The owner's order, as its MOVE frame gives it to `frame`."""

    def frame(self, peer: int, frame: bytes, now_ms: int) -> list[_Effect]:
        """Any frame but BLOCKS. Raises FrameError."""

    def blocks(self, peer: int, frame: bytes, ok: bool, now_ms: int) -> list[_Effect]:
        """A BLOCKS frame whose payload is stored; not ok: wrong digests, no room, no such arrival. Raises
        FrameError."""

    def link_down(self, peer: int, now_ms: int) -> list[_Effect]:
        """The link to `peer` has ended or cannot be opened. OWNER: every move ends, every request is released."""

    def tick(self, now_ms: int) -> list[_Effect]:
        """What is due by now."""

    def next_wake_ms(self) -> int | None:
        """When `tick` has something to do; None: nothing waits for time."""

    def ended(self, request: int, now_ms: int) -> list[_Effect]:
        """The live request has finished, was cancelled or timed out here; nothing happens when it is not moving."""

    def exported(
        self, request: int, attempt: int, manifest: bytes | None, num_choices: int, now_ms: int
    ) -> list[_Effect]:
        """Answers EXPORT; None: it cannot be moved."""

    def staged(
        self, request: int, attempt: int, stage: int, num_blocks: int, left_after: int, now_ms: int
    ) -> list[_Effect]:
        """Answers STAGE. left_after: blocks that another stage would hold now (`Core.export_left`)."""

    def frozen(self, request: int, attempt: int, now_ms: int) -> list[_Effect]:
        """Answers FREEZE."""

    def tail(
        self,
        request: int,
        attempt: int,
        manifest: bytes,
        positions: Sequence[int],
        outputs: Sequence[Sequence[int] | None],
        now_ms: int,
    ) -> list[_Effect]:
        """Answers TAIL: the final manifest, tokens produced per choice, and their ids; None: that choice has ended."""

    def failed(self, request: int, attempt: int, reason: str, now_ms: int) -> list[_Effect]:
        """Answers any effect of the source that could not be carried out: the move is aborted."""

    def reserved(self, request: int, attempt: int, hit_blocks: int, now_ms: int) -> list[_Effect]:
        """Answers RESERVE. hit_blocks: leading prompt blocks that need not be sent."""

    def refused(self, request: int, attempt: int, reason: str, now_ms: int) -> list[_Effect]:
        """Answers RESERVE, or takes a reservation back before the claim."""

    def moves(self) -> list[tuple[int, int, int, bool, str]]:
        """(request, attempt, peer, whether it leaves, state) of every move under way."""

@final
class Owner:
    """The stream owner's arbiter: which engine owns each request, under which epoch, and how far it was delivered.

    After `tokens`, `finish`, `remove` and `replay` call `due`: a parked claim may be decided.

    (SEND, engine, frame)
    (SWITCH, request, engine, epoch): the current owner from now on. Tell it what happened meanwhile: cancel it,
    finish the
    choices that this side has cut. A REPLAY that waits for an engine is void.
    (DELIVER, request, choice, position, ids): tokens of the old owner that come with the claim.
    (REPLAY, request, preferred): its engine is gone: choose one and call `replay`. preferred: an engine that may
    hold parts
    of its KV, or -1.
    (MOVED, request, result, to, stages, blocks, reason): the end of an order, once for each; result: index of
    `Mover.RESULTS`.
    """

    SEND: int
    SWITCH: int
    DELIVER: int
    REPLAY: int
    MOVED: int

    def __new__(cls) -> Owner: ...
    def add(self, request: int, engine: int, num_choices: int, wants_logprobs: bool) -> int:
        """A new request; returns its first epoch. wants_logprobs: tokens must come from an engine, a claim's ids are
        not
        enough. Raises InvalidArgument."""

    def tokens(self, request: int, engine: int, epoch: int, choice: int, position: int, count: int) -> tuple[int, int]:
        """(offset, count) of what is new in `count` tokens from output position `position` on; count 0: stale (see
        `fence`).

        Raises FrameError for a gap or a choice that there is not.
        """

    def finish(self, request: int, engine: int, epoch: int, choice: int) -> bool:
        """A choice has ended, by its engine's word or by this side's own cut. False: stale, or ended already."""

    def remove(self, request: int) -> None:
        """The stream has ended; whatever is claimed of it later is denied."""

    def due(self) -> list[_Effect]:
        """Effects of calls that return none."""

    def fence(self, request: int, engine: int, epoch: int) -> list[_Effect]:
        """The REVOKED for an engine that speaks of a request under an epoch it does not own; empty: it does own it."""

    def owner(self, request: int) -> tuple[int, int] | None:
        """(engine, epoch), engine -1 while it waits for `replay`; None: no such request."""

    def positions(self, request: int) -> list[int]:
        """Tokens delivered per choice. Raises InvalidArgument for an unknown request."""

    def moving(self, request: int) -> int | None:
        """Where it is ordered to move to."""

    def order(self, request: int, to: int, replay: bool, now_ms: int) -> list[_Effect]:
        """Orders a move. Raises InvalidArgument: unknown, without an engine, to itself, moving already."""

    def frame(self, engine: int, frame: bytes, now_ms: int) -> list[_Effect]:
        """A frame from an engine. Raises FrameError."""

    def engine_down(self, engine: int, now_ms: int) -> list[_Effect]:
        """The link to an engine has ended: what it owned is replayed, unless a claim takes it over."""

    def replay(self, request: int, to: int) -> int:
        """Gives a request to another engine under a new epoch, which it returns. Raises InvalidArgument."""

def encode_blocks(
    request: int,
    epoch: int,
    attempt: int,
    stage: int,
    part: int,
    is_last: bool,
    keys: _Int32,
    pool: NDArray[np.uint8],
    blocks: _Int32,
) -> bytes:
    """A BLOCKS frame: keys [K, 2] (choice, index) and a digest per block of pool [num_blocks, block_bytes], rows
    strided.

    The payload is these K rows, in this order. part counts from 0 within the stage. Reads the rows of `blocks` [K]
    alone,
    without the GIL. Raises InvalidArgument.
    """

def decode_blocks(frame: bytes) -> tuple[int, int, int, int, int, bool, _Int32, bytes]:
    """(request, epoch, attempt, stage, part, is_last, keys [K, 2], digests 32 K). Raises FrameError."""

def verify_blocks(frame: bytes, payload: NDArray[np.uint8]) -> bool:
    """Whether payload (one dimension, packed) is what the frame's digests say, without the GIL. Raises FrameError."""

def frame_kind(frame: bytes) -> int:
    """Index of `Mover.FRAME_KINDS`, from the header alone. Raises FrameError."""

def decide_move(
    *,
    len: int,
    hit: int,
    kv_bytes_per_token: int,
    link_bytes_per_s: float,
    prefill_tokens_per_s: float,
    decode_tokens_per_s: float,
    step_s: float,
) -> tuple[bool, float, float, float]:
    """(copy, copy_s, replay_s, gap_s): whether copying the KV is faster than computing it again at the destination,
    seconds of
    either, and the gap between tokens to expect of the faster one. 0 tokens/s or bytes/s: unknown. Raises
    InvalidArgument."""
