"""Sampling in Triton: row maxima, threshold search, Gumbel-max, merge; no sort, no host synchronisation.

Knows tensors only. A row's token depends on its own logits, seed and position. The hash equals the reference's bit for
bit; logarithm and exponential may differ in the last place, see README.md. Called through `kvlite.ops` ("triton").
"""

import torch
import triton
import triton.language as tl

CHUNK = 4096
_NO_ID: tl.constexpr = tl.constexpr(2147483647)


@triton.jit
def _mix(x):
    """A 32-bit finaliser on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _noise_key(seed, position, stream):
    """One 32-bit key of a row from its int64 seed and position."""
    state = _mix((seed & 0xFFFFFFFF).to(tl.uint32) ^ stream)
    state = _mix(state ^ ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    state = _mix(state ^ (position & 0xFFFFFFFF).to(tl.uint32))
    return _mix(state ^ ((position >> 32) & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def _gumbel(ids, key0, key1):
    """Standard Gumbel noise for int32 ids; small v keep full relative precision (the series)."""
    h = _mix(_mix(ids.to(tl.uint32) ^ key0) ^ key1)
    v = ((h >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10
    v = tl.minimum(v, 0.99999994)
    series = v * (1.0 + v * (0.5 + v * (0.3333333333333333 + v * 0.25)))
    return -tl.log(tl.where(v < 0.015625, series, -tl.log(1.0 - v)))


@triton.jit
def _ordered(x):
    """uint32 in the order of the fp32 values."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True)) ^ 0x80000000


@triton.jit
def row_max_kernel(logits_ptr, part_ptr, part_id_ptr, vocab, row_stride, CHUNK: tl.constexpr):
    """Maximum and its lowest id over one chunk of one row; NaN if the chunk holds one."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row.to(tl.int64) * row_stride + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    faulty = tl.max((x != x).to(tl.int32), 0) > 0
    part = row * tl.num_programs(1) + chunk
    tl.store(part_id_ptr + part, tl.min(tl.where((x == top) & (ids < vocab), ids, _NO_ID), 0))
    tl.store(part_ptr + part, tl.where(faulty, float("nan"), top))


@triton.jit
def _search(
    row_ptr, vocab, top, temperature, floor, goal, MASS: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr
):
    """The largest value t whose weight (count, or with MASS exp mass) over logits >= max(t, floor) reaches goal.

    goal is a count, or with MASS a share of the whole. Four bits of the ordered image of t a pass, eight passes: column
    j of a pass weighs what is at or above pivot j, so the weights fall with j and the last that reaches the goal wins.
    """
    column = tl.arange(0, PIVOTS)
    base = tl.full((), 0, tl.uint32)
    for step in range(8):
        shift = 28 - 4 * step
        pivot = base + (column << shift).to(tl.uint32)
        weight = tl.zeros((BLOCK, PIVOTS), dtype=tl.float32)
        for first in range(0, vocab, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            if MASS:
                value = tl.where((ids < vocab) & (x >= floor), tl.exp(tl.div_rn(x - top, temperature)), 0.0)
            else:
                value = (ids < vocab).to(tl.float32)
            weight += tl.where(_ordered(x)[:, None] >= pivot[None, :], value[:, None], 0.0)
        reached = tl.sum(weight, 0)
        if MASS and step == 0:
            goal = goal * tl.max(reached, 0)
        # A goal of 0 must still keep the most likely id.
        digit = tl.max(tl.where((reached >= goal) & (reached > 0.0), column, 0), 0)
        base += (digit << shift).to(tl.uint32)
    bits = (base ^ 0x80000000).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def threshold_kernel(
    logits_ptr, part_ptr, part_id_ptr, temperature_ptr, top_k_ptr, top_p_ptr, top_ptr, threshold_ptr, token_ptr,
    vocab, num_chunks, row_stride, BLOCK_CHUNKS: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """Per row: the greedy token (or -1), the maximum, and the smallest logit that top-k and top-p keep."""
    row = tl.program_id(0)
    chunk = tl.arange(0, BLOCK_CHUNKS)
    inside = chunk < num_chunks
    part = tl.load(part_ptr + row * num_chunks + chunk, mask=inside, other=float("-inf"))
    part_id = tl.load(part_id_ptr + row * num_chunks + chunk, mask=inside, other=_NO_ID)
    top = tl.max(part, 0)
    faulty = tl.max((part != part).to(tl.int32), 0) > 0
    sound = (top > float("-inf")) & (top < float("inf")) & (faulty == 0)
    token = tl.where(sound, tl.min(tl.where(part == top, part_id, _NO_ID), 0), -1)
    tl.store(token_ptr + row, token)
    tl.store(top_ptr + row, top)

    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    threshold = tl.full((), float("-inf"), tl.float32)
    if sound & (temperature > 0.0):
        if (top_k > 0) & (top_k < vocab):
            threshold = _search(row_ptr, vocab, top, temperature, threshold, top_k.to(tl.float32), False, BLOCK, PIVOTS)
        if top_p < 1.0:
            threshold = _search(row_ptr, vocab, top, temperature, threshold, top_p, True, BLOCK, PIVOTS)
    tl.store(threshold_ptr + row, threshold)


@triton.jit
def pick_kernel(
    logits_ptr, part_ptr, part_id_ptr, temperature_ptr, log_min_p_ptr, seed_ptr, position_ptr, top_ptr, threshold_ptr,
    token_ptr, vocab, row_stride, CHUNK: tl.constexpr,
):  # fmt: skip
    """Best score and its lowest id over one chunk of one sampled row; greedy and faulty rows are skipped."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    if (temperature <= 0.0) | (tl.load(token_ptr + row) < 0):
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row.to(tl.int64) * row_stride + ids, mask=ids < vocab, other=float("-inf"))
    logits = logits.to(tl.float32)
    x = tl.div_rn(logits - tl.load(top_ptr + row), temperature)
    keep = (ids < vocab) & (logits >= tl.load(threshold_ptr + row)) & (x >= tl.load(log_min_p_ptr + row))
    seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    noise = _gumbel(ids, _noise_key(seed, position, 0x9E3779B9), _noise_key(seed, position, 0x243F6A88))
    score = tl.where(keep, x + noise, float("-inf"))
    best = tl.max(score, 0)
    part = row * tl.num_programs(1) + chunk
    tl.store(part_id_ptr + part, tl.min(tl.where(keep & (score == best), ids, _NO_ID), 0))
    tl.store(part_ptr + part, best)


@triton.jit
def merge_kernel(part_ptr, part_id_ptr, temperature_ptr, token_ptr, num_chunks, BLOCK_CHUNKS: tl.constexpr):
    """The sampled token of one row from its chunks."""
    row = tl.program_id(0)
    if (tl.load(temperature_ptr + row) <= 0.0) | (tl.load(token_ptr + row) < 0):
        return
    chunk = tl.arange(0, BLOCK_CHUNKS)
    part = tl.load(part_ptr + row * num_chunks + chunk, mask=chunk < num_chunks, other=float("-inf"))
    part_id = tl.load(part_id_ptr + row * num_chunks + chunk, mask=chunk < num_chunks, other=_NO_ID)
    tl.store(token_ptr + row, tl.min(tl.where(part == tl.max(part, 0), part_id, _NO_ID), 0))


def threshold_config() -> dict[str, int]:
    """Tile and launch sizes of `threshold_kernel`."""
    return {"BLOCK": 1024, "PIVOTS": 16, "num_warps": 16}


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """As `reference.sample`; four launches whatever the rows ask for."""
    assert logits.stride(-1) == 1
    num_rows, vocab = logits.shape
    token = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows == 0:
        return token
    num_chunks = triton.cdiv(vocab, CHUNK)
    block_chunks = triton.next_power_of_2(num_chunks)
    part = torch.empty((num_rows, num_chunks), dtype=torch.float32, device=logits.device)
    part_id = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=logits.device)
    top = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    threshold = torch.empty_like(top)
    row_stride = logits.stride(0)
    row_max_kernel[(num_rows, num_chunks)](logits, part, part_id, vocab, row_stride, CHUNK=CHUNK, num_warps=8)
    threshold_kernel[(num_rows,)](
        logits, part, part_id, temperature, top_k, top_p, top, threshold, token, vocab, num_chunks, row_stride,
        BLOCK_CHUNKS=block_chunks, **threshold_config(),
    )  # fmt: skip
    pick_kernel[(num_rows, num_chunks)](
        logits, part, part_id, temperature, torch.log(min_p), seed, position, top, threshold, token, vocab, row_stride,
        CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip
    merge_kernel[(num_rows,)](part, part_id, temperature, token, num_chunks, BLOCK_CHUNKS=block_chunks, num_warps=1)
    return token
