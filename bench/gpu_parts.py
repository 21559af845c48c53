"""The parts of `bench gpu`: what is checked and what is timed. Each runs in a process of its own (gpu.py).

`checks`, `gate`: kernels against the torch references, greedy tokens of a small model against the references in fp32.
`kernels`, `decode`, `prefill`: times against floors. `transformers`: the same weights there. `profile`: where a step's
device time goes. Every function gets a `Part` and writes as it goes; what it cannot do it says there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from kvlite.config import EngineConfig
from kvlite.ops import select

from . import peer
from .errors import BenchError, MissingError
from .gpu_report import Part
from .gpu_stage import BLOCK_SIZE, RandomModel, Room, Stage
from .kernel_cases import Case, odd
from .kernels import check, line, timed
from .limits import kv_bytes_per_token, products, prompt_flops

PAPER_BYTES_PER_S = 4.3e12
PAPER_FLOPS = 790e12
"""An H200's copy and bf16 products, as measured on one; the floors of plans and of other machines' results."""
GATE_TOKENS = 12
WARM_STEPS = 3
ROUNDS = 3
PEER_STEPS = 16
PROFILED_RUNS = 3
TOP_KERNELS = 16


def ids_of(part: Part, count: int, seed: int, vocab_size: int | None = None) -> list[int]:
    """Random token ids."""
    draw = np.random.default_rng(seed)
    return draw.integers(16, vocab_size or part.scale.shape.vocab_size, count).tolist()


@torch.inference_mode()
def checks(part: Part) -> None:
    """Every op at odd sizes in every element type, outputs poisoned before, against the reference."""
    count = 0
    dtypes = (part.dtype,) if part.device.type == "cpu" else (torch.bfloat16, torch.float16, torch.float32)
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        for want, have in zip(odd(part.device, dtype), odd(part.device, dtype), strict=True):
            if not part.has_time(f"{name} from {have.name} on", 3):
                break
            count += is_right(part, want, have, dtype)
        part.add(right=count)
        part.say(f"{count} cases are right after {name}")


def is_right(part: Part, want: Case, have: Case, dtype: torch.dtype) -> bool:
    """Whether the op gives what the reference gives; a failure is noted, and the next case is still worth its try."""
    try:
        want.run(select(part.device, "reference"))
        have.run(part.ops)
        check(want, have, part.ops.backend, dtype)
    except Exception as error:  # whatever it is, it is that kernel's
        part.fail(f"{have.name} in {str(dtype).removeprefix('torch.')}: {error!r}")
        if part.device.type == "cuda":
            torch.cuda.synchronize()  # raises when the device is lost to this process
        return False
    return True


def gate_model(part: Part) -> tuple[RandomModel, list[list[int]], Room]:
    """A small model, prompts for it, and room for them with their tokens."""
    shape, lengths = part.scale.gate_shape, part.scale.gate_lengths
    prompts = [ids_of(part, length, seed, shape.vocab_size) for seed, length in enumerate(lengths)]
    longest = max(lengths) + GATE_TOKENS
    room = Room(len(lengths), longest, longest, longest * len(lengths))
    return RandomModel.of(shape, part.device, part.dtype), prompts, room


def gate(part: Part) -> None:
    """Greedy tokens of a small model, prompts beside decodes, graphs replayed: those of the references in fp32."""
    small, prompts, room = gate_model(part)
    stage = Stage(small, part.ops, room)
    eager, _ = stage.follow(prompts, GATE_TOKENS)
    stage.record()
    tokens, _ = stage.follow(prompts, GATE_TOKENS)
    oracle = Stage(small.widened(), select(part.device, "reference"), room)
    _, logits = oracle.follow(prompts, GATE_TOKENS, tokens)
    for mine, theirs in zip(tokens, logits, strict=True):
        peer.check_tokens(mine, theirs, part.dtype, "the reference")
    # As an engine that plans a step ahead: ids that are still on the device.
    ahead, _ = stage.follow(prompts, GATE_TOKENS, [[-1] * GATE_TOKENS] * len(prompts))
    if ahead != tokens:
        raise BenchError("tokens differ when a plan reads them where the last one left them, on the device")
    part.add(tokens=sum(map(len, tokens)), tokens_as_eager=eager == tokens)
    part.say(f"{sum(map(len, tokens))} greedy tokens are the reference's")


@torch.inference_mode()
def kernels(part: Part) -> None:
    """Every op at the scale's sizes: right first, then its time with a cold cache, as a share of its bound."""
    clock, make = part.clock(), part.maker()
    part.add(read_gbs=round(clock.read_rate(part.scale.copied_bytes) / 1e9, 1))
    for case, want in zip(part.scale.cases(make), part.scale.cases(make), strict=True):
        if not part.has_time(f"{case.name} and what follows", 5):
            break
        if not is_right(part, want, case, make.dtype):
            continue
        try:
            elapsed, found = timed(clock, case, part.ops)
        except BenchError as error:
            part.fail(str(error))
            continue
        figures = {"us": elapsed * 1e6, "gbs": case.num_bytes / elapsed / 1e9, "tflops": case.flops / elapsed / 1e12}
        part.add(**{case.name: {name: round(value, 3) for name, value in (figures | {"share": found}).items()}})
        part.say(line(case, part.ops.backend, elapsed, found))


@dataclass(frozen=True)
class Point:
    """A decode batch: so many sequences with so many tokens each before the first step."""

    batch: int
    context: int
    num_steps: int

    @property
    def name(self) -> str:
        """Suffix of its keys."""
        return f"b{self.batch}_c{self.context}"

    @property
    def end(self) -> int:
        """Tokens of a sequence after the last step."""
        return self.context + WARM_STEPS + self.num_steps

    def floor_s(self, part: Part, config: Any, bytes_per_s: float) -> float:
        """Weights of all linear layers and the head once, and every key and value, at that rate."""
        weights = sum(p.num_weights * p.count for p in products(config)) * part.dtype.itemsize
        keys = self.batch * (self.context + WARM_STEPS + self.num_steps // 2)
        return (weights + keys * kv_bytes_per_token(config, part.dtype)) / bytes_per_s


def decode_stage(part: Part, model: RandomModel, points: list[Point]) -> Stage:
    """Room for every one of the points, one at a time."""
    batch = max(point.batch for point in points)
    kv_tokens = max(point.batch * (point.end + BLOCK_SIZE) for point in points)
    return Stage(model, part.ops, Room(batch, max(point.end for point in points), batch, kv_tokens))


def replay_agrees(part: Part, stage: Stage, point: Point) -> bool:
    """Whether one step over the pool's random keys has the logits of the eager way (see `agree`)."""
    stage.lay_out(point.batch, point.end)
    ids = ids_of(part, point.batch, seed=point.batch)
    plan = stage.plan([(row, point.context, [token]) for row, token in enumerate(ids)])
    return agree(part, f"graph_{point.name}", stage.logits(plan), stage.logits(plan, eager=True))


def step_s(part: Part, stage: Stage, point: Point) -> float:
    """Seconds of a step: from a plan in the arena to its tokens on the host, median."""
    stage.lay_out(point.batch, point.end)
    tokens, times = ids_of(part, point.batch, seed=1), []
    for position in range(point.context, point.end):
        plan = stage.plan([(row, position, [token]) for row, token in enumerate(tokens)])
        start = time.perf_counter()
        tokens = stage.run(plan)
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_STEPS:])


def agree(part: Part, name: str, have: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether logits differ by no more than rounding explains; how far, in standard deviations, is a figure."""
    far = float((have - want).abs().max() / want.std())
    part.add(**{f"apart_{name}": round(far, 4)})
    if not far <= peer.TIE[part.dtype]:
        part.fail(f"{name}: logits are {far:.3f} of their standard deviation apart, so no speed for it")
        return False
    return True


def decode(part: Part) -> None:
    """Steps of every batch without and with graphs; a replay must give the logits of the eager way first."""
    copy_rate = part.copy_rate(part.clock())
    model = RandomModel.of(part.scale.shape, part.device, part.dtype)
    points = [Point(batch, context, part.scale.num_steps) for batch, context in part.scale.points]
    stage = decode_stage(part, model, points)
    part.add(weights_gb=round(sum(tensor.nbytes for tensor in model.params.values()) / 1e9, 2))
    for point in points:
        if part.has_time(f"eager {point.name}", 5):
            step_figures(part, f"eager_{point.name}", point, model, step_s(part, stage, point), copy_rate)
    start = time.perf_counter()
    stage.record()
    part.add(record_s=round(time.perf_counter() - start, 2))
    for point in points:
        if part.has_time(f"graph {point.name}", 5) and replay_agrees(part, stage, point):
            step_figures(part, f"graph_{point.name}", point, model, step_s(part, stage, point), copy_rate)


def step_figures(part: Part, name: str, point: Point, model: RandomModel, step: float, copy_rate: float) -> None:
    """One step's time against its floor at the rate of this device's copy and at the paper's."""
    floors = {kind: point.floor_s(part, model.config, rate) for kind, rate in
              (("copy", copy_rate), ("paper", PAPER_BYTES_PER_S))}  # fmt: skip
    figures = {"step_ms": step * 1e3, "tokens_per_s": point.batch / step}
    figures |= {f"floor_ms_{kind}": floor * 1e3 for kind, floor in floors.items()}
    figures |= {f"share_{kind}": floor / step for kind, floor in floors.items()}
    against_floor(part, name, figures, "copy", f"{step * 1e3:8.3f} ms")


def against_floor(part: Part, name: str, figures: dict[str, float], kind: str, time_ms: str) -> None:
    """Keeps and says a time with its shares of the floors at the `kind` rate and at the paper's; above 1 is a fault."""
    found, rate = figures[f"share_{kind}"], {"gemm": "GEMM"}.get(kind, kind)
    part.add(**{name: {key: round(value, 4) for key, value in figures.items()}})
    part.say(
        f"{name:16} {time_ms}, {found:.3f} of the {rate} rate's floor, {figures['share_paper']:.3f} of the paper's"
    )
    if found > 1:
        part.fail(f"{name}: faster than its floor, so the {rate} rate was measured too low")


def prefill(part: Part) -> None:
    """Prompts of every length; computed in other chunks they must give the same logits first."""
    clock = part.clock()
    model = RandomModel.of(part.scale.shape, part.device, part.dtype)
    body = sum(p.num_weights * p.count for p in products(model.config) if p.name != "head")
    longest = part.scale.lengths[-1]
    shipped = min(EngineConfig().max_num_batched_tokens, part.scale.chunk // 2)
    stage = Stage(model, part.ops, Room(1, longest + 1, part.scale.chunk, longest))
    stage.lay_out(1, longest)
    ways = [(part.scale.lengths[-2], shipped), *((length, part.scale.chunk) for length in part.scale.lengths)]
    expected: dict[int, torch.Tensor] = {}
    for length, chunk in ways:
        name = f"n{length}" + (f"_chunk{chunk}" if chunk != part.scale.chunk else "")
        floor = prompt_flops(model.config, body, length)
        if not part.has_time(name, 3 + (ROUNDS + 1) * 4 * floor / clock.flop_rate):
            continue
        prompt = ids_of(part, length, seed=length)
        found = stage.prompt_logits(prompt, chunk)
        if not agree(part, name, found, expected.setdefault(length, found)):
            continue
        times: list[float] = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            stage.prompt(prompt, chunk)
            times.append(time.perf_counter() - start)
        elapsed = statistics.median(times)
        figures = {"ms": elapsed * 1e3, "spread_ms": (max(times) - min(times)) * 1e3}
        for kind, rate in (("gemm", clock.flop_rate), ("paper", PAPER_FLOPS)):
            figures |= {f"floor_ms_{kind}": floor / rate * 1e3, f"share_{kind}": floor / rate / elapsed}
        against_floor(part, name, figures, "gemm", f"{elapsed * 1e3:9.2f} ms")


def transformers(part: Part) -> None:
    """The same weights in transformers: greedy tokens agree on a small shape, then both are timed in turns."""
    small, prompts, room = gate_model(part)
    try:
        there = peer.of_weights(small.values, small.weights())
    except MissingError as error:
        part.skip(str(error))
        return
    stage = Stage(small, part.ops, room)
    stage.record()
    tokens, _ = stage.follow(prompts, GATE_TOKENS)
    for prompt, mine in zip(prompts, tokens, strict=True):
        peer.check_tokens(mine, peer.logits_after(there, prompt, mine), part.dtype)
    part.add(gate_tokens=sum(map(len, tokens)))
    part.say(f"{sum(map(len, tokens))} greedy tokens are transformers'")
    model = RandomModel.of(part.scale.shape, part.device, part.dtype)
    there = peer.of_weights(model.values, model.weights())
    points = [Point(batch, context, PEER_STEPS) for batch, context in part.scale.peer_points]
    stage = decode_stage(part, model, points)
    stage.record()
    for point in points:
        batch = [ids_of(part, point.context, seed) for seed in range(point.batch)]
        in_turns(
            part, f"decode_{point.name}", 25,
            lambda point=point: step_s(part, stage, point),
            lambda batch=batch: peer.step_s(there, batch, PEER_STEPS),
        )  # fmt: skip
    length = part.scale.peer_length
    stage = Stage(model, part.ops, Room(1, length + 1, length, length))
    stage.lay_out(1, length)
    prompt = ids_of(part, length, seed=0)

    def ours() -> float:
        start = time.perf_counter()
        stage.prompt(prompt, length)
        return time.perf_counter() - start

    in_turns(part, f"prefill_n{length}", 5, ours, lambda: peer.prompt_s(there, prompt))


def in_turns(part: Part, name: str, seconds: float, ours: Callable[[], float], theirs: Callable[[], float]) -> None:
    """Medians of ROUNDS turns after one to warm up, and their ratio."""
    if not part.has_time(name, seconds):
        return
    ours(), theirs()
    times = [(ours(), theirs()) for _ in range(ROUNDS)]
    mine, other = (statistics.median(column) for column in zip(*times, strict=True))
    figures = {"ms": mine * 1e3, "transformers_ms": other * 1e3, "x_transformers": other / mine}
    part.add(**{name: {key: round(value, 3) for key, value in figures.items()}})
    part.say(f"{name}: {mine * 1e3:.2f} ms, transformers {other * 1e3:.2f} ms: {other / mine:.2f} x")


def profile(part: Part) -> None:
    """Device time by kernel of decode steps by graph and of a prompt, beside what they take: the rest is launching."""
    model = RandomModel.of(part.scale.shape, part.device, part.dtype)
    for batch, context in part.scale.peer_points:
        point = Point(batch, context, PROFILED_RUNS)
        stage = decode_stage(part, model, [point])
        stage.record()
        step_s(part, stage, point)
        profiled(part, f"decode_{point.name}", point.end - point.context, partial(step_s, part, stage, point))
    length = part.scale.lengths[-2]
    stage = Stage(model, part.ops, Room(1, length + 1, part.scale.chunk, length))
    stage.lay_out(1, length)
    prompt = ids_of(part, length, seed=0)
    stage.prompt(prompt, part.scale.chunk)
    profiled(part, f"prefill_n{length}", 1, partial(stage.prompt, prompt, part.scale.chunk))


def profiled(part: Part, name: str, count: int, run: Callable[[], object]) -> None:
    """The kernels that take most of `run`, microseconds per each of its `count` runs."""
    if not part.has_time(name, 10):
        return
    is_cuda = part.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if is_cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as recorded:
        start = time.perf_counter()
        run()
        elapsed = time.perf_counter() - start
    spent: dict[str, float] = {}
    for event in recorded.key_averages():
        own = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        spent[event.key[:70]] = spent.get(event.key[:70], 0.0) + own / count
    top = sorted(spent, key=lambda key: -spent[key])[:TOP_KERNELS]
    busy = sum(spent.values())
    part.add(**{name: {"wall_us": round(elapsed * 1e6 / count, 1), "busy_us": round(busy, 1),
                       "us": {key: round(spent[key], 1) for key in top}}})  # fmt: skip
    part.say(f"{name}: device busy {busy:.0f} us of {elapsed * 1e6 / count:.0f} us; most in {top[0] if top else '-'}")
