"""The compiled part: the core that decides, and the CPU twins of the kernels.

Arrays are NumPy arrays, read and written in place. Nobody else writes an array while a call uses it. A name that starts
with an underscore exists here only.
"""

from collections.abc import Sequence
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
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_waiting: int
    vocab_size: int
    enable_prefix_caching: bool
    policy: str
    attention_cost_tokens: int
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
    num_segments: int
    segment_blocks: int
    pinned_blocks: int
    num_recipes: int
    steps_total: int
    requests_total: int
    preemptions_total: int
    prompt_tokens_total: int
    prefix_hit_tokens_total: int
    segment_hit_tokens_total: int
    blended_tokens_total: int
    recomputed_tokens_total: int
    segments_made_total: int
    prefill_tokens_total: int
    generated_tokens_total: int
    discarded_tokens_total: int
    failed_plans_total: int
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
    ) -> int:
        """Queues a request; returns its handle. Raises InvalidArgument or CapacityError; nothing has changed then.

        `deadline_ms` and `now_ms` are on the clock of `step`. O(prompt).
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
) -> None:
    """Writes `out` [T, H, D] and `lse` [T, H] for the rows of every sequence; see kernels/attention.

    q [T, H, D], rows strided · caches [B, block_size, KH, D], the last dimension contiguous · block_table [R, NB] ·
    query_start [S+1] · context_len, seq_row [S] · last_key [T]. Raises InvalidArgument before anything is written.
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
) -> None:
    """Writes `out` [T, N] = x [T, K] weight [N, K]^T + bias [N]; see kernels/linear.

    x and out are of `dtype`, weight and bias of `weight_dtype`: the same, or any beside float32. A row's bits depend on
    that row alone. Raises InvalidArgument before anything is written.
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

def cpu_num_threads() -> int:
    """Threads that share one call, the caller's included; at first as many as the machine has."""

def cpu_set_num_threads(num_threads: int) -> None:
    """Sets the threads that share one call; results stay the same bit for bit. Raises InvalidArgument."""

def cpu_isa() -> str:
    """The instruction set in use: "portable", "avx2", "avx512" or "avx512_bf16"."""
