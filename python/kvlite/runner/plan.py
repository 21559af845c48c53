"""Mirror of rust/kvlite-core/src/plan.rs: where each region of an int32 arena lies, and numpy views of it.

Owns the layout on the Python side and compares it with the core's at start-up; never interprets what a region says.
An arena is allocated once; a `Plan` is a set of views into it, valid until the core overwrites that arena.
Called by engine.py (arenas, events) and model_runner.py (what to compute, where to answer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

HEADER_LEN = 32


class Header(IntEnum):
    """Index of each field in the header."""

    PLAN_ID = 0
    NUM_TOKENS = 1
    NUM_SEQS = 2
    NUM_SAMPLES = 3
    NUM_BLOCK_UPDATES = 4
    NUM_PREFIX_GROUPS = 5
    NUM_PLACES = 6
    NUM_SOURCE_BLOCKS = 7
    NUM_SCORES = 8
    NUM_BLOCK_COPIES = 9
    NUM_ADMITTED = 10
    NUM_COMMITTED = 11
    NUM_FINISHED = 12
    NEXT_WAKE_MS = 13
    NUM_RUNNING = 14
    NUM_WAITING = 15


class SampleKind(IntEnum):
    """Third column of a sample row."""

    SAMPLE = 0
    PROMPT_LOGPROB = 1


class CopyDirection(IntEnum):
    """First column of a block_copy row; rows to the host come before the others, whatever their place."""

    ON_DEVICE = 0
    TO_HOST = 1
    FROM_HOST = 2


class Cause(IntEnum):
    """Why a row was given to a choice: fourth column of an admitted row."""

    NEW = 0
    RESUMED = 1
    FORKED = 2
    IMPORTED = 3


class Status(IntEnum):
    """What the runner reports of a whole plan."""

    OK = 0
    FAILED = 1


@dataclass(frozen=True)
class Layout:
    """Offset and shape of every region, in order; `size` int32 values in all."""

    offsets: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    size: int

    @classmethod
    def of(
        cls,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        max_num_waiting: int,
        max_segments: int = 64,
        host_blocks: int = 0,
    ) -> Layout:
        """The layout that plan.rs computes from the same limits."""
        t, s = max_num_batched_tokens, max_num_seqs
        nb = -(-max_model_len // block_size)
        n, u, c, f = t + s, 2 * nb + 4 * s + -(-t // block_size), 2 * s, s + max_num_waiting
        c += 2 * nb if host_blocks else 0
        p = s + max_segments
        shapes: dict[str, tuple[int, ...]] = {
            "header": (HEADER_LEN,), "token_ids": (t,), "positions": (t,), "last_key": (t,), "slot_mapping": (t,),
            "segment_slot": (t,), "query_start": (s + 1,), "context_len": (s,), "seq_row": (s,), "sample": (n, 3),
            "block_update": (u, 3), "prefix_group": (s, 3), "group_seqs": (s,), "place": (p, 6),
            "source_blocks": (2 * nb + p,), "score": (s, 7), "block_copy": (c, 3), "admitted": (s, 5),
            "committed": (2 * s, 3), "finished": (f, 3), "done_plan_id": (1,), "status": (1,), "sampled": (n,),
            "scored": (max_model_len, 2),
        }  # fmt: skip
        offsets: dict[str, int] = {}
        size = 0
        for name, shape in shapes.items():
            offsets[name] = size
            size += prod(shape)
        return cls(offsets, shapes, size)

    def check(self, core: Mapping[str, tuple[int, tuple[int, ...]]]) -> None:
        """Asserts that the core has the same regions, offsets and shapes: the two sides are built together."""
        ours = {name: (offset, self.shapes[name]) for name, offset in self.offsets.items()}
        differing = [name for name in {*ours, *core} if ours.get(name) != core.get(name)]
        assert not differing and list(ours) == list(core), f"plan.py and plan.rs disagree on {sorted(differing)}"

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every region of an arena at its full capacity."""
        return {
            name: buffer[offset : offset + prod(self.shapes[name])].view(self.shapes[name])
            for name, offset in self.offsets.items()
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """Views of what one plan holds, cut to its counts. Shapes as in `Layout.of`; all int32."""

    plan_id: int
    num_tokens: int
    num_seqs: int
    next_wake_ms: int
    num_running: int
    num_waiting: int
    token_ids: Int32
    positions: Int32
    last_key: Int32
    slot_mapping: Int32
    segment_slot: Int32
    query_start: Int32
    context_len: Int32
    seq_row: Int32
    sample: Int32
    block_update: Int32
    prefix_group: Int32
    group_seqs: Int32
    place: Int32
    source_blocks: Int32
    score: Int32
    block_copy: Int32
    admitted: Int32
    committed: Int32
    finished: Int32
    sampled: Int32
    """The runner's answer per sample row; below 0 ends that row's request with an error."""
    scored: Float32
    """The runner's answer per key of each score row, one row after the other: weight, value."""


class Arena:
    """One int32 buffer that the core fills and the runner answers in, and its copy on the device."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        on_host = device.type == "cpu"
        self._buffer = torch.zeros(layout.size, dtype=torch.int32, pin_memory=not on_host)
        self._device_buffer = self._buffer if on_host else torch.zeros_like(self._buffer, device=device)
        # What the device reads ends where the core's bookkeeping begins.
        self._device_len = layout.offsets["place"]
        self.data: Int32 = self._buffer.numpy()
        self._views: dict[str, Int32] = {name: view.numpy() for name, view in layout.views(self._buffer).items()}
        self.tensors = layout.views(self._device_buffer)
        """Regions on the device at full capacity; current after `upload`."""

    def upload(self) -> None:
        """Copies the plan to the device, in one piece; nothing to do on a CPU."""
        if self._device_buffer is not self._buffer:
            used = slice(0, self._device_len)
            self._device_buffer[used].copy_(self._buffer[used], non_blocking=True)

    def read(self) -> Plan:
        """The plan that the core wrote last."""
        header: list[int] = self._views["header"].tolist()
        views = self._views
        tokens, seqs, samples = header[Header.NUM_TOKENS], header[Header.NUM_SEQS], header[Header.NUM_SAMPLES]
        return Plan(
            plan_id=header[Header.PLAN_ID],
            num_tokens=tokens,
            num_seqs=seqs,
            next_wake_ms=header[Header.NEXT_WAKE_MS],
            num_running=header[Header.NUM_RUNNING],
            num_waiting=header[Header.NUM_WAITING],
            token_ids=views["token_ids"][:tokens],
            positions=views["positions"][:tokens],
            last_key=views["last_key"][:tokens],
            slot_mapping=views["slot_mapping"][:tokens],
            segment_slot=views["segment_slot"][:tokens],
            query_start=views["query_start"][: seqs + 1],
            context_len=views["context_len"][:seqs],
            seq_row=views["seq_row"][:seqs],
            sample=views["sample"][:samples],
            block_update=views["block_update"][: header[Header.NUM_BLOCK_UPDATES]],
            prefix_group=views["prefix_group"][: header[Header.NUM_PREFIX_GROUPS]],
            group_seqs=views["group_seqs"][:seqs],
            place=views["place"][: header[Header.NUM_PLACES]],
            source_blocks=views["source_blocks"][: header[Header.NUM_SOURCE_BLOCKS]],
            score=views["score"][: header[Header.NUM_SCORES]],
            block_copy=views["block_copy"][: header[Header.NUM_BLOCK_COPIES]],
            admitted=views["admitted"][: header[Header.NUM_ADMITTED]],
            committed=views["committed"][: header[Header.NUM_COMMITTED]],
            finished=views["finished"][: header[Header.NUM_FINISHED]],
            sampled=views["sampled"][:samples],
            scored=views["scored"].view(np.float32),
        )

    def complete(self, plan_id: int, status: Status) -> None:
        """Says that plan `plan_id` is done; its sampled ids must be in place."""
        self._views["status"][0] = status
        self._views["done_plan_id"][0] = plan_id


def as_rows(region: Int32) -> list[list[int]]:
    """The rows of a region [N, C] as plain integers."""
    return region.tolist()
