"""`DecodeGraphs`: forward passes of decode batches, recorded once per size and replayed by one launch or one call.

A decode step of an 8B model is some 300 launches, each shorter than the host takes to make the next; a replay is one:
of a CUDA graph, or of a tape of CPU ops. Holds graphs for some batch sizes and the buffers that they read; takes plans
in which every sequence has one row and nothing watches it, refuses all others. A padding row has the reserved row of
the block table, sees no key and stores none; tables of prefix groups have room for as many as a batch may have, so one
graph serves batches with and without. Embeddings come before a replay, logits and samples behind it. Called by
model_runner.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvlite.models import Decoder, ForwardBatch
from kvlite.ops import Record
from kvlite.progress import Bar
from kvlite.runner.kv_pool import KVPool
from kvlite.runner.plan import Plan

MAX_GRAPH_ROWS = 512
"""Above, launches are short beside the step, and the host is ahead of the device without graphs."""
_ROW_ALIGN = 4
"""Input rows start at multiples of 16 bytes: Triton compiles another kernel for each alignment that it meets."""
_INPUTS = ("token_ids", "positions", "last_key", "slot_mapping", "context_len", "seq_row", "group_seqs")
_GROUP_WIDTH = 3
"""Numbers of a prefix group."""


class CudaRecorder:
    """CUDA graphs; all of one recorder share a memory pool, so that together they need what the largest needs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], object]) -> Callable[[], None]:
        """As `ops.Record`. `run` must neither wait for the device nor branch on what lies there."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            # Triton compiles and cuBLAS takes its workspace now: neither may happen while a graph is recorded.
            for _ in range(2):
                run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph.replay


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Sizes of CUDA graphs, ascending: 1, 2, 4, multiples of 8, and the largest batch up to MAX_GRAPH_ROWS."""
    largest = min(max_num_seqs, MAX_GRAPH_ROWS)
    return sorted({size for size in (1, 2, 4, *range(8, largest, 8), largest) if size <= largest})


class _Graph:
    """One batch size: its inputs on the host and the device, its replay and where its output lies."""

    def __init__(
        self, size: int, decoder: Decoder, pool: KVPool, last_token: torch.Tensor, record: Record, *, grouped: bool
    ) -> None:
        """Records with padding rows alone: nothing of the pool changes. Not `grouped`: no plan has prefix groups."""
        width = -(-size // _ROW_ALIGN) * _ROW_ALIGN
        is_cuda = decoder.device.type == "cuda"
        with torch.inference_mode(mode=False):
            self._host = torch.zeros((len(_INPUTS) + _GROUP_WIDTH, width), dtype=torch.int32, pin_memory=is_cuda)
            self._device = torch.zeros_like(self._host, device=decoder.device, pin_memory=False)
        self._values = dict(zip(_INPUTS, self._host.numpy(), strict=False))
        self._groups = self._host[len(_INPUTS) :].numpy().reshape(width, _GROUP_WIDTH)
        self._padding_row = pool.block_table.shape[0] - 1
        self._decoder, self._last_token = decoder, last_token
        inputs = {name: row[:size] for name, row in zip(_INPUTS, self._device, strict=False)}
        if grouped:
            inputs["prefix_group"] = self._device[len(_INPUTS) :].view(width, _GROUP_WIDTH)[:size]
        else:
            del inputs["group_seqs"]
        starts = torch.arange(size + 1, dtype=torch.int32, device=decoder.device)
        self._batch = ForwardBatch(**inputs, query_start=starts, block_table=pool.block_table)
        self._output = torch.empty(0)

        def run() -> None:
            self._output = decoder.forward_embedded(self._batch, pool.data)

        self._fill(None)
        self._replay = record(run)

    def forward(self, plan: Plan) -> torch.Tensor:
        """Hidden states of the plan's rows, [S, W]; the next call of any graph or of the decoder overwrites them."""
        self._fill(plan)
        ids = self._batch.token_ids
        if (plan.token_ids < 0).any():
            ids = torch.where(ids < 0, self._last_token[self._batch.seq_row], ids)
        self._decoder.embed(ids)
        self._replay()
        return self._output[: plan.num_seqs]

    def _fill(self, plan: Plan | None) -> None:
        """The rows of `plan`, then padding. The host's buffer is free: a plan ends before the next begins."""
        used = 0 if plan is None else plan.num_seqs
        for name, values in self._values.items():
            if plan is not None:
                values[:used] = getattr(plan, name)
            values[used:] = {"last_key": -1, "slot_mapping": -1, "seq_row": self._padding_row}.get(name, 0)
        num_groups = 0 if plan is None else len(plan.prefix_group)
        if plan is not None:
            self._groups[:num_groups] = plan.prefix_group
        self._groups[num_groups:] = 0
        self._device.copy_(self._host, non_blocking=True)


class DecodeGraphs:
    """Graphs of one decoder over one pool. Made after `Decoder.reserve`: a graph holds the addresses of its buffers."""

    def __init__(
        self,
        decoder: Decoder,
        pool: KVPool,
        last_token: torch.Tensor,
        record: Record,
        sizes: Sequence[int],
        *,
        lazily: bool = False,
        grouped: bool = True,
    ) -> None:
        """`last_token` [rows of the block table] int32: ids that stand where a plan says -1. `sizes` ascending;
        `lazily`: a graph is recorded by the first plan that it serves; `grouped`: plans may have prefix groups.
        """
        self._decoder = decoder
        self._reserved = decoder.reserved_tokens
        self.sizes = [n for n in sizes if n <= self._reserved]
        self._graphs: dict[int, _Graph] = {}

        def make(size: int) -> _Graph:
            return _Graph(size, decoder, pool, last_token, record, grouped=grouped)

        self._make = make
        if lazily:
            return
        # The largest first: the smaller ones then fit into the memory that it took.
        with Bar("recording", unit="graphs") as bar, torch.inference_mode():
            for n, size in enumerate(reversed(self.sizes), 1):
                self._graphs[size] = self._make(size)
                bar.update(n, len(self.sizes))

    def size_for(self, plan: Plan) -> int | None:
        """Rows of the graph that serves `plan`, the fewest that hold it; None: it needs the eager way."""
        n = plan.num_seqs
        if plan.num_tokens != n or n > self.sizes[-1] or len(plan.score):
            return None
        if (plan.segment_slot >= 0).any() or not np.array_equal(plan.query_start, np.arange(n + 1)):
            return None
        return next(size for size in self.sizes if size >= n)

    def forward(self, plan: Plan) -> torch.Tensor | None:
        """As `Decoder.forward` over the rows of `plan`, or None when `size_for` is None."""
        size = self.size_for(plan)
        if size is None:
            return None
        assert self._decoder.reserved_tokens == self._reserved, "the decoder's buffers stay where they were recorded"
        if size not in self._graphs:
            self._graphs[size] = self._make(size)
        return self._graphs[size].forward(plan)
