"""`python -m bench core`: what a step of the Rust core costs, as Python pays it, and what its cache operations cost.

Physics. A decode step touches a few cache lines of state per sequence and writes about 15 int32 values per sequence
into the arena: 256 sequences are some 16 KB, which a core streams in under a microsecond; the rest is branches and
cache misses. So a step should cost single microseconds at 32 sequences and stay under 0.1 us per sequence. A hit reads
8 bytes per token, asked and stored, and follows one link per block: some 0.4 ns per token from the level-2 cache.

How each figure is measured:
- step_us_R: `Core.step` called from Python (PyO3, attach and detach included) with R sequences in decode, all different
  prompts, block boundaries spread evenly over the steps; median over all steps. The sampled ids are written into the
  arena outside of the measured time. Caches are warm: behind a real forward pass, which sweeps them, it misses more.
- admit_ns_per_token_P: from Python; the step that admits a request whose P tokens are all in the cache, divided by P:
  match, pin, and the block table's updates together.
- match_*, insert_*, evict_*: by `cargo bench --bench radix` (criterion's median of the bare operation), because none of
  them can be seen alone through PyO3. allocs_per_step and core_step_us_R: by `cargo bench --bench schedule`, whose
  allocator counts, and whose step includes writing the answers. Without cargo (an installed wheel) these are left out.

Correctness comes first: a small run, whose every token is known beforehand, must come out exactly.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvlite import _core
from kvlite.runner.plan import Arena, Layout, Plan, Status

from .report import finish, origin

BLOCK_SIZE = 16
VOCAB_SIZE = 151_936
NUM_RUNNING = (1, 32, 256, 1024)
PROMPT_LEN = 64
SHARED_LEN = 512
RUST_BENCHES = ("radix", "schedule")
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Shape:
    """Limits of one measurement."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_blocks: int


class Loop:
    """A core with a fake model behind it: the token at a position is a function of that position."""

    def __init__(self, shape: Shape) -> None:
        limits = {
            "max_num_batched_tokens": shape.max_num_batched_tokens,
            "max_num_seqs": shape.max_num_seqs,
            "max_model_len": shape.max_model_len,
            "block_size": BLOCK_SIZE,
            "max_num_waiting": max(shape.max_num_seqs, 16),
            "max_segments": 1,
        }
        config = limits | {
            "num_blocks": shape.num_blocks,
            "vocab_size": VOCAB_SIZE,
            "enable_prefix_caching": True,
            "policy": "fcfs",
            "max_passes": 64,
            "eviction": "reuse-weighted",
            "attention_cost_tokens": 4096,
            "attention_split_tokens": 256,
            "group_cost_tokens": 0,
            "host_blocks": 0,
            "swap_cost_tokens": 0,
            "reserve_tokens": 0,
            "watermark_ratio": 1.0,
            "segment_cache_ratio": 0.0,
            "model_digest": 0,
            "canonical_prefix": [],
            "hash_seed": 1,
        }
        layout = Layout.of(**limits)
        layout.check(_core.Core.layout(**config))
        self._arenas = (Arena(layout, torch.device("cpu")), Arena(layout, torch.device("cpu")))
        self._idx = 0
        self.core = _core.Core(arenas=(self._arenas[0].data, self._arenas[1].data), **config)

    def add(self, prompt: Sequence[int], max_tokens: int) -> int:
        """Queues a prompt; returns its handle."""
        return self.core.add(
            np.asarray(prompt, dtype=np.int32), n=1, max_tokens=max_tokens, min_tokens=0, stop_token_ids=[], priority=0,
            deadline_ms=None, tenant=0, use_cache=True, prompt_logprobs=False, now_ms=0,
        )  # fmt: skip

    def step(self) -> tuple[int, Plan]:
        """One step of the core: its nanoseconds and its plan, which the fake model completes at once."""
        self._idx = 1 - self._idx
        start = time.perf_counter_ns()
        self.core.step(self._idx, 0)
        elapsed = time.perf_counter_ns() - start
        plan = self._arenas[self._idx].read()
        if plan.num_tokens:
            plan.sampled[:] = next_token(plan.last_key[plan.sample[:, 0]])
            self._arenas[self._idx].complete(plan.plan_id, Status.OK)
        return elapsed, plan

    def drain(self) -> None:
        """Steps until nothing runs or waits."""
        while self.step()[1].num_tokens:
            pass


def next_token(position: Any) -> Any:
    """The fake model: what follows the token at `position`."""
    return (position * 31 + 7) % VOCAB_SIZE


def prompt_of(idx: int, length: int) -> list[int]:
    """A prompt that shares no first block with another one."""
    return [(idx * 7919 + at * 13 + 1) % VOCAB_SIZE for at in range(length)]


def check() -> None:
    """Small requests, cold and cached: every input and every output must be the one that is known beforehand."""
    loop = Loop(Shape(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=128, num_blocks=64))
    prompts = [prompt_of(idx, 20 + 13 * idx) for idx in range(3)]
    for is_cached in (False, True):
        handles = {loop.add(prompt, max_tokens=20): prompt for prompt in prompts}
        outputs: dict[int, list[int]] = {handle: [] for handle in handles}
        rows: dict[int, int] = {}
        for _ in range(200):
            plan = loop.step()[1]
            for seq_row, position, token in plan.committed.tolist():
                assert position == len(outputs[rows[seq_row]]), "outputs are committed in order"
                outputs[rows[seq_row]].append(token)
            for handle, _, seq_row, _, cached_len in plan.admitted.tolist():
                rows[seq_row] = handle
                assert (cached_len > 0) == is_cached, "a prompt is served from the cache the second time, not the first"
            check_inputs(plan, {row: handles[handle] + outputs[handle] for row, handle in rows.items()})
            if not plan.num_tokens:
                break
        for handle, prompt in handles.items():
            expected = [next_token(len(prompt) - 1 + at) for at in range(20)]
            assert outputs[handle] == expected, f"request {handle}: {outputs[handle]} instead of {expected}"


def check_inputs(plan: Plan, texts: dict[int, list[int]]) -> None:
    """The rows of a plan hold the tokens of their sequences, each at its own position."""
    starts = plan.query_start.tolist()
    for idx, seq_row in enumerate(plan.seq_row.tolist()):
        for row in range(starts[idx], starts[idx + 1]):
            expected = texts[seq_row][plan.positions[row]]
            assert plan.token_ids[row] == expected, f"row {row} of plan {plan.plan_id} holds a wrong token"


def step_us(num_running: int, num_steps: int, num_groups: int = 0) -> dict[str, float]:
    """Median and 99th percentile of a decode step with `num_running` sequences, microseconds.

    With `num_groups` they begin in so many ways, with SHARED_LEN tokens that are cached before.
    """
    warm_up = 2 * BLOCK_SIZE
    # The first to start decode while the last still prefill: room for those steps too.
    shared_len = SHARED_LEN if num_groups else 0
    longest = shared_len + PROMPT_LEN + BLOCK_SIZE + warm_up + num_steps + num_running // 8
    per_sequence = -(-longest // BLOCK_SIZE) + 1
    loop = Loop(Shape(num_running, max(4096, 4 * num_running), longest + 8, num_running * per_sequence))
    for idx in range(num_groups):
        loop.add(prompt_of(num_running + idx, shared_len), max_tokens=1)
        loop.drain()
    for idx in range(num_running):
        shared = prompt_of(num_running + idx % num_groups, shared_len) if num_groups else []
        prompt = [*shared, *prompt_of(idx, PROMPT_LEN + idx % BLOCK_SIZE)]
        loop.add(prompt, max_tokens=longest - len(prompt))
    while True:
        plan = loop.step()[1]
        if plan.num_seqs == num_running == plan.num_tokens:
            break
    for _ in range(warm_up):
        loop.step()
    times: list[int] = []
    for _ in range(num_steps):
        elapsed, plan = loop.step()
        assert plan.num_tokens == num_running, "every sequence decodes in every step"
        assert len(plan.prefix_group) == num_groups, "who shares a prefix reads it together"
        times.append(elapsed)
    times.sort()
    return {"p50": times[len(times) // 2] / 1e3, "p99": times[len(times) * 99 // 100] / 1e3}


def admit_ns_per_token(length: int) -> float:
    """Cost of admitting a request that is all in the cache but its last block, per token of its prompt."""
    loop = Loop(Shape(4, 4096, length + 64, 2 * length // BLOCK_SIZE + 64))
    medians: list[float] = []
    for idx, num_tokens in enumerate((BLOCK_SIZE + 1, length + 1)):
        prompt = prompt_of(idx, num_tokens)
        loop.add(prompt, max_tokens=1)
        loop.drain()
        times: list[int] = []
        for _ in range(41):
            loop.add(prompt, max_tokens=1)
            elapsed, plan = loop.step()
            assert plan.admitted[0, 4] == num_tokens - 1, "all but the last token is a hit"
            times.append(elapsed)
            loop.drain()
        medians.append(statistics.median(times))
    return (medians[1] - medians[0]) / (length - BLOCK_SIZE)


def rust_figures() -> dict[str, float]:
    """The last line of each of the core's own benches, which is one JSON object; empty without cargo or sources."""
    if shutil.which("cargo") is None or not (ROOT / "rust/kvlite-core/benches").is_dir():
        print("no cargo or no sources here: figures of cargo bench are left out")
        return {}
    figures: dict[str, float] = {}
    for name in RUST_BENCHES:
        print(f"cargo bench --bench {name} (compiles the first time) ...", flush=True)
        command = ["cargo", "bench", "--quiet", "-p", "kvlite-core", "--bench", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        figures |= json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def main(arguments: list[str]) -> int:
    """Runs every measurement; the last line is one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m bench core", description="one step of the Rust core")
    parser.add_argument("--save", action="store_true", help="also write bench/results/core.json")
    parser.add_argument("--no-rust", action="store_true", help="leave out what cargo bench measures")
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = origin()
    check()
    print("check: every token as expected")
    for num_running in NUM_RUNNING:
        times = step_us(num_running, num_steps=2000 if num_running <= 256 else 500)
        figures[f"step_us_{num_running}"] = round(times["p50"], 2)
        figures[f"step_us_{num_running}_p99"] = round(times["p99"], 2)
        print(f"step, {num_running:5} running: p50 {times['p50']:8.2f} us, p99 {times['p99']:8.2f} us", flush=True)
    times = step_us(256, num_steps=2000, num_groups=16)
    figures |= {"step_us_256_grouped": round(times["p50"], 2), "step_us_256_grouped_p99": round(times["p99"], 2)}
    print(f"step,   256 in 16 groups: p50 {times['p50']:8.2f} us, p99 {times['p99']:8.2f} us", flush=True)
    for name, length in (("2k", 2048), ("32k", 32_768)):
        figures[f"admit_ns_per_token_{name}"] = round(admit_ns_per_token(length), 3)
        print(f"admission, {name} tokens cached: {figures[f'admit_ns_per_token_{name}']} ns per token", flush=True)
    if not options.no_rust:
        figures |= rust_figures()
    finish("core", figures, options.save)
    return 0
