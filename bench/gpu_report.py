"""Where the parts of `bench gpu` leave what they find: one JSON file, whole after every line that is added to it.

Each part is a process of its own and the only writer while it runs; what is cut short keeps what it had. Knows no
figure. `Part` is what a part is given: device, sizes, its time, and its place in the file.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvlite.ops import Ops, select

from .kernel_cases import Case, Maker
from .kernels import LARGE_READ, Clock
from .make_model import Shape


@dataclass(frozen=True)
class Scale:
    """What is measured, in sizes."""

    shape: Shape
    points: tuple[tuple[int, int], ...]
    """Decode: (batch, context)."""
    lengths: tuple[int, ...]
    """Prompts, ascending."""
    chunk: int
    """Rows of a prompt that are computed at once."""
    num_steps: int
    gate_shape: Shape
    """Small: greedy tokens are compared on it, with the references in fp32 too."""
    gate_lengths: tuple[int, ...]
    shared: tuple[tuple[int, int], ...]
    """Attention of sequences that share a prefix: (batch, keys of the prefix)."""
    peer_points: tuple[tuple[int, int], ...]
    peer_length: int
    cases: Callable[[Maker], Iterator[Case]]
    copied_bytes: int = LARGE_READ


class ResultFile:
    """`{..., "parts": {name: {"status": ..., "failures": [...], figures}}}` on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """Everything so far."""
        return json.loads(self.path.read_text(encoding="utf-8"))

    def write(self, whole: dict[str, Any]) -> None:
        """Replaces the file in one move: a reader, or a process that is killed, never sees half of it."""
        draft = self.path.with_name(self.path.name + ".new")
        draft.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.path)

    def add(self, part: str, figures: dict[str, Any]) -> None:
        """Adds figures of a part; a list goes behind the one that is there."""
        whole = self.read()
        known = whole["parts"].setdefault(part, {})
        for name, value in figures.items():
            known[name] = [*known.get(name, []), *value] if isinstance(value, list) else value
        self.write(whole)


@dataclass(frozen=True)
class Part:
    """One part while it runs."""

    name: str
    device: torch.device
    scale: Scale
    file: ResultFile
    until: float
    """When its process will be ended, by time.time()."""

    @property
    def ops(self) -> Ops:
        """Triton on a GPU and under its interpreter, else the references."""
        triton = self.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
        return select(self.device, "triton" if triton else "reference")

    @property
    def dtype(self) -> torch.dtype:
        """What is served on a GPU; Triton's interpreter has no bf16."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def maker(self) -> Maker:
        """Inputs of kernels at the scale's shape."""
        return Maker(self.device, self.dtype, self.scale.shape)

    def clock(self) -> Clock:
        """With the rates of this device; they are added to the figures."""
        clock = Clock(self.maker(), torch.get_num_threads(), 0.05)
        self.add(gemm_tflops=round(clock.flop_rate / 1e12, 3))
        return clock

    def copy_rate(self, clock: Clock) -> float:
        """Bytes per second, read and written."""
        rate = clock.copy_rate(self.scale.copied_bytes)
        self.add(copy_gbs=round(rate / 1e9, 1))
        return rate

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether `seconds` more fit; if not, `what` is listed as left out."""
        fits = time.time() + seconds < self.until
        if not fits:
            self.say(f"{what} is left out: no time is left")
            self.add(left_out=[what])
        return fits

    def add(self, **figures: Any) -> None:
        """Writes figures."""
        self.file.add(self.name, figures)

    def fail(self, text: str) -> None:
        """Something is wrong; the part goes on, the command ends with status 1."""
        self.say(f"FAILED: {text}")
        self.add(failures=[text])

    def skip(self, reason: str) -> None:
        """The part cannot be done here, which is no failure."""
        self.say(f"skipped: {reason}")
        self.add(skipped=reason)

    def say(self, text: str) -> None:
        """One line for people."""
        print(f"  {text}", flush=True)
