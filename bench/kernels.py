"""`python -m bench kernels`: each op on each backend that this machine has, against what its arithmetic costs at least.

Physics. An op can be no faster than the bytes that it must move at the rate of a bare read over as many bytes (from
the cache where they fit there), nor than its multiply-adds at the rate of a large matrix product of its element type;
the bound is the larger of the two, both measured in this run. Element-wise ops and decode attention are bound by bytes,
prefill attention and key_mass by arithmetic. `share_CASE_BACKEND` is bound over time; a share above 1 stops the run.

Shapes are those of one layer of Qwen2-0.5B (place_kv: of all), batch and lengths in the name of the case. Correctness
first: every backend must agree with the torch reference on the inputs that are timed, outputs poisoned with NaN before.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from kvlite.ops import Backend, Ops, select

from .errors import BenchError
from .limits import best_s, read_loops, share, use_threads
from .options import DTYPES, torch_dtype
from .report import finish, origin

H, KH, D, W, F, V, L = 14, 2, 64, 896, 4864, 32_768, 24
"""Query heads, KV heads, head width, hidden width, MLP width, vocabulary, layers."""
BLOCK_SIZE = 16
WEIGHT_COPIES = 8
SMALLEST_READ = 1 << 20
"""Below, a timed read shows the cost of its call."""
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
MORE_TURNS = 3
CUDA_CALLS = 20
"""Calls between two synchronisations: a launch is hidden behind the kernel before it."""


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
    """Random tensors of one device and element type; every maker gives the same ones."""

    device: torch.device
    dtype: torch.dtype

    def normal(self, *size: int) -> torch.Tensor:
        """Values of the element type."""
        noise = torch.Generator().manual_seed(sum(size))
        return torch.randn(size, generator=noise).to(self.dtype).to(self.device)

    def poison(self, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """NaN everywhere: an element that is not written fails the check."""
        return torch.full(size, math.nan, dtype=dtype or self.dtype, device=self.device)

    def ints(self, values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Indices."""
        return torch.tensor(values, dtype=dtype, device=self.device)


def attention(make: Maker, batch: int, context: int, rows: int) -> Case:
    """The last `rows` rows of `batch` sequences over caches of `context` keys in shuffled blocks."""
    blocks = -(-context // BLOCK_SIZE)
    pool = make.normal(batch * blocks, 2, BLOCK_SIZE, KH, D)
    order = torch.randperm(batch * blocks, generator=torch.Generator().manual_seed(0))
    table = order.to(torch.int32).view(batch, blocks).to(make.device)
    q = make.normal(batch * rows, H, D)
    starts = make.ints([rows * s for s in range(batch + 1)])
    last = make.ints([context - rows + at for at in range(rows)] * batch)
    out, lse = make.poison(*q.shape), make.poison(batch * rows, H, dtype=torch.float32)
    lengths, seq_rows = make.ints([context] * batch), make.ints(list(range(batch)))
    seen = batch * (rows * (context - rows) + rows * (rows + 1) // 2)

    def run(ops: Ops) -> None:
        ops.attention(
            q, pool[:, 0], pool[:, 1], table, starts, lengths, seq_rows, last, D**-0.5, 0, out, lse
        )  # fmt: skip

    num_bytes = batch * context * 2 * KH * D * make.dtype.itemsize
    kind = "decode" if rows == 1 else "prefill"
    return Case(f"attention_{kind}_{batch}x{context}", num_bytes, 4.0 * seen * H * D, run, [out, lse])


def key_mass(make: Maker, rows: int, context: int) -> Case:
    """Mass of every key under the last `rows` rows."""
    blocks = context // BLOCK_SIZE
    k_cache = make.normal(blocks, BLOCK_SIZE, KH, D)
    q = make.normal(rows, H, D)
    lse = torch.full((rows, H), 8.0, device=make.device)
    table, wanted = make.ints(list(range(blocks))), make.ints(list(range(rows)))
    last = make.ints([context - rows + at for at in range(rows)])
    out = make.poison(context, dtype=torch.float32)

    def run(ops: Ops) -> None:
        out.copy_(ops.key_mass(q, lse, k_cache, table, wanted, last, 0, context, D**-0.5))

    flops = 2.0 * rows * H * D * (context - rows // 2)
    return Case(f"key_mass_{rows}x{context}", context * KH * D * make.dtype.itemsize, flops, run, [out])


def linear(make: Maker, rows: int) -> Case:
    """The gate and up projections; calls go through copies of the weight, as a forward pass goes through layers."""
    x, weight, out = make.normal(rows, W), make.normal(2 * F, W), make.poison(rows, 2 * F)
    weights = cycle([weight, *(weight.clone() for _ in range(WEIGHT_COPIES - 1))])

    def run(ops: Ops) -> None:
        ops.linear(x, next(weights), None, out)

    return Case(f"linear_{rows}", weight.nbytes, 2.0 * rows * 2 * F * W, run, [out], WEIGHT_COPIES * weight.nbytes)


def row_ops(make: Maker, rows: int) -> list[Case]:
    """Ops that treat each row alone."""
    size = make.dtype.itemsize
    k, v = make.normal(rows, KH, D), make.normal(rows, KH, D)
    caches = [make.poison(rows // BLOCK_SIZE + 1, BLOCK_SIZE, KH, D) for _ in range(2)]
    for cache in caches:
        cache[-1] = 0
    slots = make.ints(list(range(rows)))
    x, weight = make.normal(rows, W), make.normal(W)
    residual, normed, added = make.normal(rows, W), make.poison(rows, W), make.poison(rows, W)
    gate_up, activation = make.normal(rows, 2 * F), make.poison(rows, F)
    q_turned, k_turned = make.normal(rows, H, D), make.normal(rows, KH, D)
    angles = torch.arange(rows)[:, None] * 1e4 ** -(torch.arange(D // 2) / (D // 2))
    cos, sin = angles.cos().to(make.device), angles.sin().to(make.device)
    cases = [
        Case("store_kv", 4 * rows * KH * D * size, 0, lambda ops: ops.store_kv(k, v, *caches, slots), caches),
        Case("rope", 2 * rows * (H + KH) * D * size, 0,
             lambda ops: ops.rope(q_turned, k_turned, slots, cos, sin), [q_turned, k_turned]),
        Case("rms_norm", 2 * rows * W * size, 0, lambda ops: ops.rms_norm(x, weight, 1e-6, normed), [normed]),
        Case("add_rms_norm", 4 * rows * W * size, 0,
             lambda ops: ops.add_rms_norm(x, residual, weight, 1e-6, added), [residual, added]),
        Case("silu_mul", 3 * rows * F * size, 0, lambda ops: ops.silu_mul(gate_up, activation), [activation]),
    ]  # fmt: skip
    return [Case(f"{c.name}_{rows}", c.num_bytes, c.flops, c.run, c.outputs) for c in cases]


def place_kv(make: Maker, rows: int) -> Case:
    """A segment of `rows` rows to blocks of its own, all layers."""
    blocks = -(-rows // BLOCK_SIZE)
    pool = make.normal(2 * blocks, L, 2, BLOCK_SIZE, KH, D)
    pool[blocks:] = math.nan
    positions = make.ints(list(range(rows)))
    source, target = positions, positions + blocks * BLOCK_SIZE
    angles = torch.arange(rows)[:, None] * 1e4 ** -(torch.arange(D // 2) / (D // 2))
    tables = angles.cos().to(make.device), angles.sin().to(make.device)
    placed = pool[blocks : blocks + rows // BLOCK_SIZE]

    def run(ops: Ops) -> None:
        ops.place_kv(pool, source, target, positions, *tables)

    return Case(f"place_kv_{rows}", 4 * rows * L * KH * D * make.dtype.itemsize, 0, run, [placed])


def sample(make: Maker, rows: int, temperature: float, top_p: float) -> Case:
    """A token for each row of logits; the outputs are ids."""
    noise = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, V, generator=noise) * 3).to(make.device)
    fill = {"dtype": torch.float32, "device": make.device}
    options = [torch.full((rows,), temperature, **fill), make.ints([0] * rows), torch.full((rows,), top_p, **fill)]
    options += [torch.zeros(rows, **fill), *(make.ints(list(range(rows)), torch.int64) for _ in range(2))]
    out = make.ints([-1] * rows)
    name = "greedy" if temperature == 0 else "top_p"
    return Case(f"sample_{name}_{rows}", rows * V * 4, 0, lambda ops: out.copy_(ops.sample(logits, *options)), [out])


def cases(make: Maker) -> list[Case]:
    """Everything that is timed."""
    found = [attention(make, 1, 1024, 1), attention(make, 8, 1024, 1), attention(make, 1, 512, 512)]
    found += [key_mass(make, 32, 1024), *(linear(make, rows) for rows in (1, 8, 32, 512))]
    found += [*row_ops(make, 1), *row_ops(make, 512), place_kv(make, 512)]
    return [*found, sample(make, 8, 0.0, 1.0), sample(make, 8, 1.0, 0.9)]


def backends(device: torch.device) -> dict[Backend, Ops]:
    """What can run here, the reference first."""
    names: tuple[Backend, ...] = ("reference", "triton") if device.type == "cuda" else ("reference", "cpu")
    return {name: select(device, name) for name in names}


def check(expected: Case, found: Case, backend: str, dtype: torch.dtype) -> None:
    """Outputs of one run each agree within rounding. Raises BenchError."""
    for index, (want, have) in enumerate(zip(expected.outputs, found.outputs, strict=True)):
        bound = TOLERANCE[dtype] * max(float(want.float().abs().nan_to_num().max()), 1.0)
        if not torch.allclose(have.float(), want.float(), rtol=0, atol=bound, equal_nan=False):
            raise BenchError(f"{found.name} on {backend}: output {index} is not the reference's; no speed for it")


class Clock:
    """Times calls on one device, and knows the two rates that bound them."""

    def __init__(self, make: Maker, threads: int, budget_s: float) -> None:
        self.device = make.device
        self._threads = threads
        self._budget_s = budget_s
        side = 8192 if make.device.type == "cuda" else 1024
        square, rows, weight = make.normal(side, side), make.normal(512, W), make.normal(W, 2 * F)
        stored = weight.t().contiguous()
        self._products: list[tuple[float, Callable[[], object]]] = [
            (2.0 * side**3, lambda: torch.mm(square, square)),
            (2.0 * 512 * W * 2 * F, lambda: torch.mm(rows, weight)),
            (2.0 * 512 * W * 2 * F, lambda: torch.mm(rows, stored.t())),
        ]
        self.flop_rate = 0.0
        self._read_rates: dict[int, float] = {}
        self._fresh: set[int] = set()
        self.measure_again()

    def measure_again(self) -> None:
        """New and longer tries for every rate; they can only rise."""
        self._budget_s *= 2
        for flops, product in self._products:
            self.flop_rate = max(self.flop_rate, flops / self.seconds(product))
        self._fresh.clear()

    def seconds(self, run: Callable[[], object]) -> float:
        """The best call; on a GPU, of calls in a row."""
        if self.device.type != "cuda":
            return best_s(run, self._budget_s)

        def many() -> None:
            for _ in range(CUDA_CALLS):
                run()
            torch.cuda.synchronize()

        return best_s(many, self._budget_s) / CUDA_CALLS

    def read_rate(self, size: int) -> float:
        """Bytes per second over as many bytes, rounded down to a power of two: a smaller buffer is read no slower."""
        size = 1 << max(size, SMALLEST_READ).bit_length() - 1
        if size not in self._fresh:
            self._fresh.add(size)
            self._read_rates[size] = max(self._read_rates.get(size, 0.0), self._measured_read_rate(size))
        return self._read_rates[size]

    def _measured_read_rate(self, size: int) -> float:
        if self.device.type == "cuda":
            source = torch.ones(size // 4, device=self.device)
            target = torch.empty_like(source)
            # A copy moves twice as much.
            return 2 * size / self.seconds(lambda: target.copy_(source))
        loops = read_loops(size, self._threads).values()
        return size / min(best_s(loop, self._budget_s) for loop in loops)

    def bound_s(self, case: Case) -> float:
        """The least time of a case."""
        return max(case.num_bytes / self.read_rate(max(case.num_bytes, case.spread_bytes)), case.flops / self.flop_rate)


@torch.inference_mode()
def measure(make: Maker, clock: Clock) -> dict[str, Any]:
    """Check and time of every case on every backend."""
    figures: dict[str, Any] = {}
    references = cases(make)
    for name, ops in backends(make.device).items():
        for case, reference in zip(cases(make), references, strict=True):
            case.run(ops)
            if name == "reference":
                reference.run(ops)
            check(reference, case, name, make.dtype)
            elapsed = clock.seconds(lambda case=case, ops=ops: case.run(ops))
            bound = clock.bound_s(case)
            for _ in range(MORE_TURNS):
                if bound <= elapsed:
                    break
                # Neighbours may have slowed the limit down: it gets more turns before the run fails.
                clock.measure_again()
                bound = clock.bound_s(case)
            found = share(f"{case.name} on {name}", bound, elapsed)
            figures[f"us_{case.name}_{name}"] = round(elapsed * 1e6, 2)
            figures[f"share_{case.name}_{name}"] = round(found, 4)
            print(f"{case.name:26} {name:10} {elapsed * 1e6:10.1f} us  {found:6.3f} of its bound", flush=True)
    return figures


def main(arguments: list[str]) -> int:
    """Every case; the last line is one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m bench kernels", description="each op on each backend")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--budget-s", type=float, default=0.1, help="seconds per figure")
    parser.add_argument("--save", action="store_true", help="also write bench/results/kernels.json")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: there is none on this machine")
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    is_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if is_cuda and options.dtype == "auto" else torch_dtype(options.dtype)
    use_threads(options.threads)
    start = time.perf_counter()
    make = Maker(device, dtype)
    clock = Clock(make, options.threads, options.budget_s)
    figures = origin() | {"device": torch.cuda.get_device_name() if is_cuda else "cpu", "threads": options.threads}
    figures |= {"dtype": str(dtype).removeprefix("torch."), "gemm_gflops": round(clock.flop_rate / 1e9, 1)}
    figures |= measure(make, clock)
    finish("kernels", figures | {"wall_s": round(time.perf_counter() - start, 1)}, options.save)
    return 0
