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
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from kvlite.ops import Backend, Ops, select

from .errors import BenchError
from .kernel_cases import Case, Maker, timed_small
from .limits import best_s, read_loops, share, use_threads
from .options import DTYPES, torch_dtype
from .report import finish, origin

SMALLEST_READ = 1 << 20
"""Below, a timed read shows the cost of its call."""
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
MORE_TURNS = 3
CUDA_CALLS = 20
EVICTING_BYTES = 1 << 30
"""Read between two calls: twenty times the cache of an H200, and longer than the host takes for its launches."""
LARGE_READ = 2 << 30


def backends(device: torch.device) -> dict[Backend, Ops]:
    """What can run here, the reference first."""
    names: tuple[Backend, ...] = ("reference", "triton") if device.type == "cuda" else ("reference", "cpu")
    return {name: select(device, name) for name in names}


def check(expected: Case, found: Case, backend: str, dtype: torch.dtype) -> None:
    """Outputs of one run each agree within rounding, ids exactly. Raises BenchError."""
    for index, (want, have) in enumerate(zip(expected.outputs, found.outputs, strict=True)):
        if want.is_floating_point():
            largest = float(want.float().abs().nan_to_num(posinf=0.0).max())
            bound = TOLERANCE[dtype] * max(largest, 1.0)
            agree = torch.allclose(have.float(), want.float(), rtol=0, atol=bound, equal_nan=False)
        else:
            agree = torch.equal(have, want)
        if not agree:
            raise BenchError(f"{found.name} on {backend}: output {index} is not the reference's; no speed for it")


class Clock:
    """Times calls on one device, and knows the two rates that bound them."""

    def __init__(self, make: Maker, threads: int, budget_s: float) -> None:
        self.device = make.device
        self._threads = threads
        self._budget_s = budget_s
        is_cuda = make.device.type == "cuda"
        side, num_rows = (8192, 8192) if is_cuda else (1024, 512)
        width, outputs = make.shape.hidden_size, 2 * make.shape.intermediate_size
        square, rows, weight = make.normal(side, side), make.normal(num_rows, width), make.normal(width, outputs)
        stored = weight.t().contiguous()
        self._products: list[tuple[float, Callable[[], object]]] = [
            (2.0 * side**3, lambda: torch.mm(square, square)),
            (2.0 * num_rows * width * outputs, lambda: torch.mm(rows, weight)),
            (2.0 * num_rows * width * outputs, lambda: torch.mm(rows, stored.t())),
        ]
        self._evicting = torch.zeros(EVICTING_BYTES // 4 if is_cuda else 0, device=make.device)
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
        """The best call on a CPU; on a GPU the median by the device's own clock, with nothing in its cache.

        Something else is read into the cache (written, it would still have to leave it during the call). That takes the
        device longer than the host needs for a launch: so the time is that of the kernels, not of the host.
        """
        if self.device.type != "cuda":
            return best_s(run, self._budget_s)
        run()
        pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        for _ in range(CUDA_CALLS):
            pairs.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._evicting.sum()
            pairs[-1][0].record()
            run()
            pairs[-1][1].record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3

    def read_rate(self, size: int) -> float:
        """Bytes per second over as many bytes, rounded down to a power of two: a smaller buffer is read no slower.

        On a GPU nothing is read from the cache, so that the rate is that of its memory whatever the size.
        """
        size = LARGE_READ if self.device.type == "cuda" else 1 << max(size, SMALLEST_READ).bit_length() - 1
        if size not in self._fresh:
            self._fresh.add(size)
            self._read_rates[size] = max(self._read_rates.get(size, 0.0), self._measured_read_rate(size))
        return self._read_rates[size]

    def _measured_read_rate(self, size: int) -> float:
        if self.device.type == "cuda":
            rows = torch.ones(size // 8192, 4096, dtype=torch.bfloat16, device=self.device)
            loops = (rows.sum, lambda: torch.mv(rows, rows[0]))
            return max(self.copy_rate(size), *(size / self.seconds(loop) for loop in loops))
        loops = read_loops(size, self._threads).values()
        return size / min(best_s(loop, self._budget_s) for loop in loops)

    def copy_rate(self, size: int) -> float:
        """Bytes read and written per second by a copy of `size` bytes."""
        source = torch.ones(size // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.seconds(lambda: target.copy_(source))

    def bound_s(self, case: Case) -> float:
        """The least time of a case."""
        return max(case.num_bytes / self.read_rate(max(case.num_bytes, case.spread_bytes)), case.flops / self.flop_rate)


def timed(clock: Clock, case: Case, ops: Ops) -> tuple[float, float]:
    """(seconds of a call, share of its bound). Raises BenchError for a share above 1."""
    elapsed = clock.seconds(lambda: case.run(ops))
    bound = clock.bound_s(case)
    for _ in range(MORE_TURNS):
        if bound <= elapsed:
            break
        # Neighbours may have slowed the limit down: it gets more turns before the run fails.
        clock.measure_again()
        bound = clock.bound_s(case)
    return elapsed, share(f"{case.name} on {ops.backend}", bound, elapsed)


def line(case: Case, backend: str, elapsed: float, found: float) -> str:
    """One row for people."""
    return f"{case.name:26} {backend:10} {elapsed * 1e6:10.1f} us  {found:6.3f} of its bound"


@torch.inference_mode()
def measure(make: Maker, clock: Clock, op: str = "") -> dict[str, Any]:
    """Check and time of every case whose name begins with `op`, on every backend."""
    figures: dict[str, Any] = {}
    every = backends(make.device)
    if not any(case.name.startswith(op) for case in timed_small(make)):
        raise BenchError(
            f"--op {op}: no case begins so; cases are {', '.join(case.name for case in timed_small(make))}"
        )
    for name, ops in every.items():
        for case, reference in zip(timed_small(make), timed_small(make), strict=True):
            if not case.name.startswith(op):
                continue
            case.run(ops)
            reference.run(every["reference"])
            check(reference, case, name, make.dtype)
            elapsed, found = timed(clock, case, ops)
            figures[f"us_{case.name}_{name}"] = round(elapsed * 1e6, 2)
            figures[f"share_{case.name}_{name}"] = round(found, 4)
            print(line(case, name, elapsed, found), flush=True)
    return figures


def main(arguments: list[str]) -> int:
    """Every case; the last line is one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m bench kernels", description="each op on each backend")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--budget-s", type=float, default=0.1, help="seconds per figure")
    parser.add_argument("--op", default="", help="only cases whose names begin so")
    parser.add_argument("--grouped", action="store_true", help="attention of a shared prefix, together against apart")
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
    if options.grouped and options.op not in ("", "attention"):
        raise BenchError(f"--op {options.op} --grouped: only attention has a grouped form")
    figures: dict[str, Any] = origin() | {"device": torch.cuda.get_device_name() if is_cuda else "cpu"}
    figures |= {"threads": options.threads, "dtype": str(dtype).removeprefix("torch.")}
    if options.grouped:
        from .grouped import measure as measure_groups

        finish("kernels-grouped", figures | measure_groups(make, options.threads, options.budget_s), options.save)
        return 0
    clock = Clock(make, options.threads, options.budget_s)
    figures["gemm_gflops"] = round(clock.flop_rate / 1e9, 1)
    figures |= measure(make, clock, options.op)
    finish("kernels", figures | {"wall_s": round(time.perf_counter() - start, 1)}, options.save)
    return 0
