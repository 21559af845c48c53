"""Ops at given shapes: inputs, poisoned outputs, and the bytes and operations that no implementation can do without.

Knows no clock and no backend: a case runs with any `Ops`. `timed_small` and `timed_large` are what benches time; `odd`
is what no kernel may get wrong: sizes that fill no tile, windows, mixed batches, rows that see nothing. Two calls give
the same inputs, so that one backend's outputs can be held against another's. Called by `kernels`, `gpu_parts` and the
tests of the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import torch

from kvlite.ops import Ops

from .make_model import SHAPES, Shape

WEIGHT_COPIES = 8
ODD_SHAPES = (
    (Shape("llama", 2, 72, 6, 2, 24, 40, 700), 48),
    (Shape("llama", 3, 200, 7, 1, 16, 1100, 4099), 32),
    (Shape("llama", 2, 1032, 8, 2, 128, 96, 9001), 16),
    (Shape("llama", 2, 128, 14, 2, 64, 300, 515), 80),
)
"""(shape of a model, block size)."""


@dataclass(frozen=True)
class Case:
    """One op at one shape: `run` writes `outputs`; bytes and operations are the least that any implementation needs."""

    name: str
    num_bytes: int
    flops: float
    run: Callable[[Ops], object]
    outputs: list[torch.Tensor]
    spread_bytes: int = 0
    """What calls in a row read before they come back to the same bytes, where that is more than one call reads."""


@dataclass(frozen=True)
class Maker:
    """Random tensors of one device, element type and shape of model; equal makers give the same ones."""

    device: torch.device
    dtype: torch.dtype
    shape: Shape = SHAPES["qwen2-0.5b"]
    block_size: int = 16

    def normal(self, *size: int) -> torch.Tensor:
        """Values of the element type, made where they are used."""
        noise = torch.Generator(self.device).manual_seed(sum(size))
        return torch.randn(size, generator=noise, device=self.device).to(self.dtype)

    def poison(self, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """NaN everywhere: an element that is not written fails the check."""
        return torch.full(size, math.nan, dtype=dtype or self.dtype, device=self.device)

    def ints(self, values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Indices."""
        return torch.tensor(values, dtype=dtype, device=self.device)


def attention(make: Maker, batch: int, context: int, rows: int) -> Case:
    """The last `rows` rows of `batch` sequences over caches of `context` keys in shuffled blocks."""
    kind = "decode" if rows == 1 else "prefill"
    return mixed_attention(make, f"attention_{kind}_{batch}x{context}", [(context, rows)] * batch)


def mixed_attention(make: Maker, name: str, sequences: Sequence[tuple[int, int]], window: int = 0) -> Case:
    """The last rows of sequences given as (context, rows); no context makes a row that sees nothing, as padding is.

    Slots after a context are NaN: whatever reads them shows.
    """
    heads, kv_heads, width, size = make.shape.num_heads, make.shape.num_kv_heads, make.shape.head_dim, make.block_size
    blocks = max(1, *(-(-context // size) for context, _ in sequences))
    pool = make.normal(len(sequences) * blocks, 2, kv_heads, size, width)
    k_cache, v_cache = pool.transpose(2, 3).unbind(1)
    order = torch.randperm(len(sequences) * blocks, generator=torch.Generator().manual_seed(0))
    table = order.to(torch.int32).view(len(sequences), blocks).to(make.device)
    for row, (context, _) in zip(order.view(len(sequences), blocks).tolist(), sequences, strict=True):
        used = -(-context // size)
        pool[row[used:]] = math.nan
        if context % size:
            pool[row[used - 1], :, :, context % size :] = math.nan
    lasts = [context - rows + at for context, rows in sequences for at in range(rows)]
    starts = [sum(rows for _, rows in sequences[:s]) for s in range(len(sequences) + 1)]
    q = make.normal(len(lasts), heads, width)
    out, lse = make.poison(*q.shape), make.poison(*q.shape[:2], dtype=torch.float32)
    query_start, last_key = make.ints(starts), make.ints(lasts)
    lengths, seq_rows = make.ints([context for context, _ in sequences]), make.ints(list(range(len(sequences))))

    def run(ops: Ops) -> None:
        ops.attention(
            q, k_cache, v_cache, table, query_start, lengths, seq_rows, last_key, width**-0.5, window, out, lse
        )  # fmt: skip

    num_bytes = sum(context for context, _ in sequences) * 2 * kv_heads * width * make.dtype.itemsize
    seen = sum(min(last + 1, window or last + 1) for last in lasts)
    return Case(name, num_bytes, 4.0 * seen * heads * width, run, [out, lse])


@dataclass(frozen=True)
class Shared:
    """Decode attention of sequences that share prefixes, three ways over the same memory, one outcome."""

    apart: Case
    together: Case
    told_none: Case
    """With the tables of groups, empty: what a decode graph does for a batch that shares nothing."""


def shared_attention(make: Maker, name: str, sizes: Sequence[int], prefix: int, own_keys: int) -> Shared:
    """One row of each sequence; those of a group, as many as `sizes` says, share `prefix` keys."""
    heads, kv_heads, width, size = make.shape.num_heads, make.shape.num_kv_heads, make.shape.head_dim, make.block_size
    batch, shared, own = sum(sizes), prefix // size, -(-own_keys // size)
    pool = make.normal(len(sizes) * shared + batch * own, 2, kv_heads, size, width)
    k_cache, v_cache = pool.transpose(2, 3).unbind(1)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    owner = torch.tensor([group for group, count in enumerate(sizes) for _ in range(count)])
    first, rest = order.split([len(sizes) * shared, batch * own])
    table = torch.cat([first.view(len(sizes), shared)[owner], rest.view(batch, own)], dim=1).to(make.device)
    q, out = make.normal(batch, heads, width), make.poison(batch, heads, width)
    lse = make.poison(batch, heads, dtype=torch.float32)
    context, rows = prefix + own_keys, list(range(batch))
    arguments = (
        q, k_cache, v_cache, table, make.ints([*rows, batch]), make.ints([context] * batch), make.ints(rows),
        make.ints([context - 1] * batch), width**-0.5, 0, out, lse,
    )  # fmt: skip
    groups = make.ints([0] * 3 * batch).view(batch, 3)
    groups[: len(sizes)] = make.ints([x for g, n in enumerate(sizes) for x in (sum(sizes[:g]), n, prefix)]).view(-1, 3)
    none, members = torch.zeros_like(groups), make.ints(rows)
    bytes_per_key = 2 * kv_heads * width * make.dtype.itemsize
    num_bytes, flops = batch * context * bytes_per_key, 4.0 * batch * context * heads * width
    once = (len(sizes) * prefix + batch * own_keys) * bytes_per_key
    return Shared(
        Case(f"{name}_apart", num_bytes, flops, lambda ops: ops.attention(*arguments), [out, lse]),
        Case(f"{name}_together", once, flops, lambda ops: ops.attention(*arguments, groups, members), [out, lse]),
        Case(f"{name}_told_none", num_bytes, flops, lambda ops: ops.attention(*arguments, none, members), [out, lse]),
    )


def key_mass(make: Maker, rows: int, context: int) -> Case:
    """Mass of every key under the last `rows` rows."""
    heads, kv_heads, width = make.shape.num_heads, make.shape.num_kv_heads, make.shape.head_dim
    blocks = -(-context // make.block_size)
    k_cache = make.normal(blocks, make.block_size, kv_heads, width)
    q = make.normal(rows, heads, width)
    lse = torch.full((rows, heads), 8.0, device=make.device)
    table, wanted = make.ints(list(range(blocks))), make.ints(list(range(rows)))
    last = make.ints([context - rows + at for at in range(rows)])
    out = make.poison(context, dtype=torch.float32)

    def run(ops: Ops) -> None:
        out.copy_(ops.key_mass(q, lse, k_cache, table, wanted, last, 0, context, width**-0.5))

    flops = 2.0 * rows * heads * width * (context - rows // 2)
    num_bytes = context * kv_heads * width * make.dtype.itemsize
    return Case(f"key_mass_{rows}x{context}", num_bytes, flops, run, [out])


def linear(make: Maker, rows: int) -> Case:
    """The gate and up projections; calls go through copies of the weight, as a forward pass goes through layers."""
    width, outputs = make.shape.hidden_size, 2 * make.shape.intermediate_size
    x, weight, out = make.normal(rows, width), make.normal(outputs, width), make.poison(rows, outputs)
    weights = cycle([weight, *(weight.clone() for _ in range(WEIGHT_COPIES - 1))])

    def run(ops: Ops) -> None:
        ops.linear(x, next(weights), None, out)

    flops = 2.0 * rows * outputs * width
    return Case(f"linear_{rows}", weight.nbytes, flops, run, [out], WEIGHT_COPIES * weight.nbytes)


def row_ops(make: Maker, rows: int) -> list[Case]:
    """Ops that treat each row alone."""
    size, block_size = make.dtype.itemsize, make.block_size
    heads, kv_heads, head = make.shape.num_heads, make.shape.num_kv_heads, make.shape.head_dim
    width, wide = make.shape.hidden_size, make.shape.intermediate_size
    k, v = make.normal(rows, kv_heads, head), make.normal(rows, kv_heads, head)
    caches = [make.poison(rows // block_size + 1, block_size, kv_heads, head) for _ in range(2)]
    for cache in caches:
        cache[-1] = 0
    slots = make.ints(list(range(rows)))
    x, weight = make.normal(rows, width), make.normal(width)
    residual, normed, added = make.normal(rows, width), make.poison(rows, width), make.poison(rows, width)
    gate_up, activation = make.normal(rows, 2 * wide), make.poison(rows, wide)
    q_turned, k_turned = make.normal(rows, heads, head), make.normal(rows, kv_heads, head)
    cos, sin = angles(make, rows)
    cases = [
        Case("store_kv", 4 * rows * kv_heads * head * size, 0, lambda ops: ops.store_kv(k, v, *caches, slots), caches),
        Case("rope", 2 * rows * (heads + kv_heads) * head * size, 0,
             lambda ops: ops.rope(q_turned, k_turned, slots, cos, sin), [q_turned, k_turned]),
        Case("rms_norm", 2 * rows * width * size, 0, lambda ops: ops.rms_norm(x, weight, 1e-6, normed), [normed]),
        Case("add_rms_norm", 4 * rows * width * size, 0,
             lambda ops: ops.add_rms_norm(x, residual, weight, 1e-6, added), [residual, added]),
        Case("silu_mul", 3 * rows * wide * size, 0, lambda ops: ops.silu_mul(gate_up, activation), [activation]),
    ]  # fmt: skip
    return [Case(f"{c.name}_{rows}", c.num_bytes, c.flops, c.run, c.outputs) for c in cases]


def angles(make: Maker, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of `rows` positions."""
    half = make.shape.head_dim // 2
    turns = torch.arange(rows)[:, None] * 1e4 ** -(torch.arange(half) / half)
    return turns.cos().to(make.device), turns.sin().to(make.device)


def place_kv(make: Maker, rows: int) -> Case:
    """A segment of `rows` rows to blocks of its own, all layers."""
    size, layers, kv_heads, width = make.block_size, make.shape.num_layers, make.shape.num_kv_heads, make.shape.head_dim
    blocks = -(-rows // size)
    pool = make.normal(2 * blocks, layers, 2, kv_heads, size, width)
    pool[blocks:] = math.nan
    positions = make.ints(list(range(rows)))
    source, target = positions, positions + blocks * size
    tables = angles(make, rows)
    placed = pool[blocks : blocks + rows // size]

    def run(ops: Ops) -> None:
        ops.place_kv(pool, source, target, positions, *tables)

    num_bytes = 4 * rows * layers * kv_heads * width * make.dtype.itemsize
    return Case(f"place_kv_{rows}", num_bytes, 0, run, [placed])


def sample(make: Maker, rows: int, temperature: float, top_p: float) -> Case:
    """A token for each row of logits; the outputs are ids."""
    vocab, noise = make.shape.vocab_size, torch.Generator(make.device).manual_seed(rows)
    logits = torch.randn(rows, vocab, generator=noise, device=make.device) * 3
    fill = {"dtype": torch.float32, "device": make.device}
    options = [torch.full((rows,), temperature, **fill), make.ints([0] * rows), torch.full((rows,), top_p, **fill)]
    options += [torch.zeros(rows, **fill), *(make.ints(list(range(rows)), torch.int64) for _ in range(2))]
    out = make.ints([-1] * rows)
    name = f"sample_{'greedy' if temperature == 0 else 'top_p'}_{rows}"
    return Case(name, 4 * rows * vocab, 0, lambda ops: out.copy_(ops.sample(logits, *options)), [out])


def timed_small(make: Maker) -> Iterator[Case]:
    """What `bench kernels` times: sizes of a small model on a CPU."""
    for batch, context, rows in ((1, 1024, 1), (8, 1024, 1), (1, 512, 512)):
        yield attention(make, batch, context, rows)
    yield key_mass(make, 32, 1024)
    for rows in (1, 8, 32, 512):
        yield linear(make, rows)
    yield from (*row_ops(make, 1), *row_ops(make, 512), place_kv(make, 512))
    yield from (sample(make, 8, 0.0, 1.0), sample(make, 8, 1.0, 0.9))


def timed_large(make: Maker) -> Iterator[Case]:
    """What `bench gpu` times: decode batches and long prompts of a large model."""
    for batch, context in ((1, 1024), (32, 1024), (128, 1024), (256, 1024), (1, 8192), (1, 32_768)):
        yield attention(make, batch, context, 1)
    for rows in (2048, 8192):
        yield attention(make, 1, rows, rows)
    yield key_mass(make, 32, 8192)
    for rows in (1, 32, 128, 256, 2048, 8192):
        yield linear(make, rows)
    yield from (*row_ops(make, 1), *row_ops(make, 128), *row_ops(make, 8192), place_kv(make, 2048))
    yield from (sample(make, 1, 0.0, 1.0), sample(make, 256, 0.0, 1.0), sample(make, 256, 1.0, 0.9))


def odd(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """What no kernel may get wrong, over every shape of ODD_SHAPES; names say which."""
    for shape, block_size in ODD_SHAPES:
        make = Maker(device, dtype, shape, block_size)
        mixed = [(20, 3), (7, 1), (300, 37), (0, 1), (41, 1), (150, 150)]
        decode = [(700, 1), (7, 1), (0, 1), (1, 1), (256, 1), (257, 1)]
        found = [mixed_attention(make, f"attention_{kind}_window_{window}", batch, window)
                 for kind, batch in (("mixed", mixed), ("decode", decode)) for window in (0, 70)]  # fmt: skip
        prefix = -(-300 // block_size) * block_size
        found.append(shared_attention(make, "attention_shared", (5, 1), prefix, 40).together)
        found += [key_mass(make, 5, 77), linear(make, 5), place_kv(make, 2 * block_size + 5)]
        found += [*row_ops(make, 3), *row_ops(make, 33), sample(make, 3, 0.0, 1.0), sample(make, 5, 1.0, 0.9)]
        for case in found:
            yield replace(case, name=f"{case.name}_d{shape.head_dim}")
