"""`python -m bench limits`: the best rate that any loop reaches on this machine in this run; other figures are shares.

Physics. A decode step reads every weight once: with few rows it cannot end before memory has delivered them, so the
first limit is the rate of a bare read. It depends on how much is read (a model that fits the last cache is read from
there), so the buffer has the size of the model's weights. With many rows each weight is used often and the limit is the
rate of multiply-adds; in between neither is sharp, and the limit is what the best matrix product loop reaches at just
these shapes with just so many rows, its weights far enough apart that no cache holds them between two uses.

Each figure is the best repetition of the best loop: torch, numpy and kvlite's product of one row for reads; torch with
weights as stored and transposed, and kvlite's own op, for products. A loop that beats its limit proves the limit wrong:
a share above 1 stops the scenario. Every product is checked against float64 before it is timed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from kvlite.models import ModelConfig, load_config
from kvlite.ops import LinearOp, select
from kvlite.progress import Bar

from .errors import BenchError
from .options import add_model_options, integers, model_directory, torch_dtype
from .report import finish, origin

SPREAD_BYTES = 256 << 20
"""Copies of a weight are used in turn until they fill this much: more than a last cache holds."""
FEW_ROWS = 64
"""Above, a product is bound by arithmetic, and one copy of its weight is enough."""


@dataclass(frozen=True)
class Product:
    """One weight [outputs, inputs] of the stack, and how often it occurs in a forward pass."""

    name: str
    outputs: int
    inputs: int
    count: int

    @property
    def num_weights(self) -> int:
        """Values in one of them."""
        return self.outputs * self.inputs


def products(config: ModelConfig) -> list[Product]:
    """The linear layers of one forward pass as kvlite joins them (q, k, v; gate, up), the head last."""
    c = config
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return [
        Product("qkv", heads + 2 * kv, c.hidden_size, c.num_layers),
        Product("output", c.hidden_size, heads, c.num_layers),
        Product("gate_up", 2 * c.intermediate_size, c.hidden_size, c.num_layers),
        Product("down", c.hidden_size, c.intermediate_size, c.num_layers),
        Product("head", c.vocab_size, c.hidden_size, 1),
    ]


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize


def prompt_flops(config: ModelConfig, num_weights: int, num_tokens: int) -> float:
    """Floating-point operations of a prompt: linear layers without the head, and causal attention."""
    attention = 2 * config.num_heads * config.head_dim * config.num_layers * num_tokens * num_tokens
    return 2.0 * num_weights * num_tokens + attention


def share(what: str, limit_s: float, measured_s: float) -> float:
    """Limit over measured time. Raises BenchError above 1: then the limit was none, and its shares say nothing."""
    found = limit_s / measured_s
    if found > 1:
        raise BenchError(
            f"{what} took {measured_s * 1e3:.3f} ms, {found:.3f} of its limit of {limit_s * 1e3:.3f} ms: the limit was "
            "measured too low; run on a quiet machine, or give limits.py the loop that is faster"
        )
    return found


def best_s(run: Callable[[], object], budget_s: float, repeats: int = 3) -> float:
    """Seconds of the best call: at least `repeats` of them after one warm-up, then more while the budget lasts."""
    run()
    best, spent, calls = math.inf, 0.0, 0
    while calls < repeats or spent < budget_s:
        start = time.perf_counter()
        run()
        elapsed = time.perf_counter() - start
        best, spent, calls = min(best, elapsed), spent + elapsed, calls + 1
    return best


class Limits:
    """Limits of one model shape, element type and thread count; until `forget`, measuring again can only raise them."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, threads: int, budget_s: float = 0.15) -> None:
        self.dtype = dtype
        self.threads = threads
        self.products = products(config)
        self.loops: dict[str, str] = {}
        """Which loop set each limit."""
        self._budget_s = budget_s
        self._rates: dict[str, float] = {}
        self._copies: dict[Product, Copies] = {}
        self._readers: dict[int, dict[str, Callable[[], object]]] = {}

    def forget(self) -> None:
        """Starts over: neighbours move the memory's rate by a third within minutes; each round has its own limits."""
        self._rates.clear()

    @property
    def weight_bytes(self) -> int:
        """What a decode step reads: every linear layer and the head."""
        return sum(p.num_weights * p.count for p in self.products) * self.dtype.itemsize

    def read_rate(self, size: int | None = None) -> float:
        """Bytes per second of reading `size` bytes over and over (default: the model's weights), the best so far."""
        size = size or self.weight_bytes
        use_threads(self.threads)
        if size not in self._readers:
            self._readers[size] = read_loops(size, self.threads, select(torch.device("cpu")).linear)
        found = {name: size / best_s(loop, self._budget_s) for name, loop in self._readers[size].items()}
        return self._keep(f"read {size}", found)

    def decode_s(self, num_rows: int, kv_bytes: int) -> float:
        """The least time of a decode step of `num_rows` sequences that reads `kv_bytes` of keys and values.

        With one row the weights cost a read; whichever of the bare reads and the products was faster shows how much.
        """
        read_rate = self.read_rate()
        products_s = self.product_s(num_rows, head_rows=num_rows)
        weights_s = products_s if num_rows > 1 else min(products_s, self.weight_bytes / read_rate)
        return weights_s + kv_bytes / read_rate

    def product_s(self, num_rows: int, *, head_rows: int) -> float:
        """Seconds of all linear layers of a forward pass of `num_rows` rows, `head_rows` of them through the head."""
        total = 0.0
        for product in self.products:
            rows = head_rows if product.name == "head" else num_rows
            if rows:
                total += product.count / self.product_rate(product, rows)
        return total

    def product_rate(self, product: Product, num_rows: int) -> float:
        """Calls per second of one product with `num_rows` rows, the best so far."""
        use_threads(self.threads)
        if product not in self._copies:
            self._copies[product] = Copies.of(product, self.dtype, self.weight_bytes)
        copies = self._copies[product].used(num_rows)
        loops = product_loops(product.name, copies, num_rows)
        count = len(copies.stored)
        found = {name: count / best_s(loop, self._budget_s, repeats=2) for name, loop in loops.items()}
        return self._keep(f"{product.name} {num_rows}", found)

    def flop_rate(self, num_rows: int) -> float:
        """Floating-point operations per second over all layers without the head, at `num_rows` rows."""
        flops = sum(2 * p.num_weights * p.count for p in self.products if p.name != "head") * num_rows
        return flops / self.product_s(num_rows, head_rows=0)

    def _keep(self, key: str, found: dict[str, float]) -> float:
        name = max(found, key=lambda known: found[known])
        if found[name] > self._rates.get(key, 0.0):
            self._rates[key] = found[name]
            self.loops[key] = name
        return self._rates[key]


def use_threads(threads: int) -> None:
    """Torch and kvlite's own kernels run with so many threads from now on."""
    # Here, not above: `bench gpu` needs these limits on machines without the compiled extension.
    from kvlite import _core

    torch.set_num_threads(threads)
    if _core.cpu_num_threads() != threads:  # setting them starts new ones
        _core.cpu_set_num_threads(threads)


def read_loops(size: int, threads: int, linear: LinearOp | None = None) -> dict[str, Callable[[], object]]:
    """Ways to read `size` bytes with `threads` threads; `linear` is one more, as a product of one row."""
    buffer = torch.ones(max(size // 4, 4096), dtype=torch.float32)
    rows = buffer[: buffer.numel() // 1024 * 1024].view(-1, 1024)
    vector = torch.ones(1024)
    parts = np.array_split(buffer.numpy().view(np.int32), threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
    weights = buffer.view(torch.bfloat16)[: buffer.numel() // 1024 * 2048].view(-1, 2048)
    x, out = torch.ones(1, 2048, dtype=torch.bfloat16), torch.empty(1, len(weights), dtype=torch.bfloat16)

    def numpy_or() -> int:
        return int(np.bitwise_or.reduce(list(pool.map(np.bitwise_or.reduce, parts))))

    ours = {} if linear is None else {"kvlite": partial(linear, x, weights, None, out)}
    return ours | {
        "torch sum": partial(torch.sum, buffer),
        "torch mv": partial(torch.mv, rows, vector),
        "torch amax": partial(torch.amax, buffer),
        "numpy or": numpy_or,
    }


@dataclass(frozen=True)
class Copies:
    """A random weight, as often as it takes to leave every cache between two uses; as stored and transposed."""

    stored: list[torch.Tensor]
    transposed: list[torch.Tensor]

    @classmethod
    def of(cls, product: Product, dtype: torch.dtype, model_bytes: int) -> Copies:
        """As many as lie between two uses in the model, or fill SPREAD_BYTES: then no cache holds them either."""
        count = -(-min(SPREAD_BYTES, model_bytes) // (product.num_weights * dtype.itemsize))
        noise = torch.Generator().manual_seed(0)
        first = torch.randn(product.outputs, product.inputs, generator=noise).to(dtype)
        stored = [first, *(first.clone() for _ in range(count - 1))]
        return cls(stored, [weight.t().contiguous() for weight in stored])

    def used(self, num_rows: int) -> Copies:
        """All for few rows, one for many."""
        return self if num_rows <= FEW_ROWS else Copies(self.stored[:1], self.transposed[:1])


def product_loops(name: str, copies: Copies, num_rows: int) -> dict[str, Callable[[], object]]:
    """Ways to multiply `num_rows` rows with each of the weights; each is tried against float64 first."""
    first = copies.stored[0]
    x = torch.randn(num_rows, first.shape[1], generator=torch.Generator().manual_seed(1)).to(first.dtype)
    out = torch.empty(num_rows, first.shape[0], dtype=first.dtype)
    columns = [weight.t() for weight in copies.stored]
    ops = select(torch.device("cpu"))

    @torch.inference_mode()
    def stored() -> None:
        for weight in columns:
            torch.mm(x, weight, out=out)

    @torch.inference_mode()
    def transposed() -> None:
        for weight in copies.transposed:
            torch.mm(x, weight, out=out)

    def ours(linear: LinearOp) -> Callable[[], object]:
        @torch.inference_mode()
        def loop() -> None:
            for weight in copies.stored:
                linear(x, weight, None, out)

        return loop

    loops: dict[str, Callable[[], object]] = {"torch": stored, "torch transposed": transposed}
    loops["kvlite"] = ours(ops.linear)
    if ops.invariant_linear is not None and num_rows <= FEW_ROWS:
        loops["kvlite, row by row"] = ours(ops.invariant_linear)
    expected = x[:1].double() @ first.double().t()
    bound = expected.abs().max() * (1e-4 if first.dtype is torch.float32 else 2e-2)
    for loop_name, loop in loops.items():
        out.fill_(math.nan)
        loop()
        if not bool(((out[:1].double() - expected).abs() <= bound).all()):
            raise BenchError(f"{loop_name}: {name} with {num_rows} rows is wrong, so its speed means nothing")
    return loops


def main(arguments: list[str]) -> int:
    """Prints every limit of one model shape; the last line is one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m bench limits", description="the best rates of this machine")
    add_model_options(parser)
    parser.add_argument("--rows", default="1,8,32,512", help="rows of a matrix product, separated by commas")
    parser.add_argument("--budget-s", type=float, default=0.1, help="seconds per loop")
    options = parser.parse_args(arguments)
    directory = model_directory(options.model)
    config, _family = load_config(directory)
    dtype = torch_dtype(options.dtype)
    rows = integers("--rows", options.rows)
    figures: dict[str, Any] = origin() | {"model": directory.name, "dtype": str(dtype).removeprefix("torch.")}
    counts = sorted({1, options.threads})
    with Bar("measuring", unit="figures") as bar:
        for index, threads in enumerate(counts):
            limits = Limits(config, dtype, threads, options.budget_s)
            figures[f"read_gbs_{threads}"] = round(limits.read_rate() / 1e9, 2)
            print(f"{threads} threads, {limits.weight_bytes / 1e6:.0f} MB: read {figures[f'read_gbs_{threads}']} GB/s")
            for at, num_rows in enumerate(rows):
                figures |= row_figures(limits, num_rows)
                bar.update(index * len(rows) + at + 1, len(counts) * len(rows))
            figures[f"loops_{threads}"] = limits.loops
    finish("limits", figures, options.save)
    return 0


def row_figures(limits: Limits, num_rows: int) -> dict[str, float]:
    """Rates of all layers at `num_rows` rows: of weights read, and of arithmetic."""
    seconds = limits.product_s(num_rows, head_rows=num_rows)
    stream = limits.weight_bytes / seconds / 1e9
    flops = sum(2 * p.num_weights * p.count for p in limits.products) * num_rows / seconds / 1e9
    print(f"  {num_rows:5} rows: {stream:7.2f} GB/s of weights, {flops:8.1f} GFLOP/s", flush=True)
    name = f"{num_rows}_{limits.threads}"
    return {f"weights_gbs_{name}": round(stream, 2), f"gemm_gflops_{name}": round(flops, 1)}
