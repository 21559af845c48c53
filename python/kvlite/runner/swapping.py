"""What copying a block to the host tier and back costs in tokens of prefill, measured with the model at hand.

A block whose tokens are computed again in less time is not worth the copies; the core is told the price and decides.
Runs the decoder over blocks that nobody uses yet. Called by startup, before the first plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from kvlite.models import Decoder, ForwardBatch
from kvlite.runner.kv_pool import KVPool

PREFILL_TOKENS = 128
"""Rows of the trial: as many as keep a processor busy."""
REPEATS = 3
COST_MAX = (1 << 31) - 1


@torch.inference_mode()
def measure_swap_cost(decoder: Decoder, pool: KVPool, max_model_len: int) -> int:
    """Tokens that a prefill computes in the time that one block needs to the host and back, rounded up."""
    num_tokens = min(PREFILL_TOKENS, pool.num_blocks * pool.shape.block_size, decoder.reserved_tokens, max_model_len)
    batch = _prompt(pool, num_tokens)
    prefill_s = _best(lambda: decoder.forward(batch, pool.data), pool.data.device)
    pool.block_table[-1] = 0

    def swap() -> None:
        pool.host[:1].copy_(pool.data[:1], non_blocking=True)
        pool.data[:1].copy_(pool.host[:1], non_blocking=True)

    swap_s = _best(swap, pool.data.device)
    return min(math.ceil(swap_s * num_tokens / prefill_s), COST_MAX)


def _prompt(pool: KVPool, num_tokens: int) -> ForwardBatch:
    """A prompt of zeros in the first blocks, read by the table's row for padding."""
    device, padding = pool.data.device, pool.block_table.shape[0] - 1
    num_blocks = -(-num_tokens // pool.shape.block_size)
    pool.block_table[padding, :num_blocks] = torch.arange(num_blocks, dtype=torch.int32, device=device)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    at = torch.arange(num_tokens, dtype=torch.int32, device=device)
    return ForwardBatch(
        token_ids=torch.zeros_like(at), positions=at, last_key=at, slot_mapping=at, query_start=ints(0, num_tokens),
        context_len=ints(num_tokens), seq_row=ints(padding), block_table=pool.block_table,
    )  # fmt: skip


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs, after one that pays for what is made once."""
    best = math.inf
    for attempt in range(REPEATS + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt:
            best = min(best, time.perf_counter() - start)
    return best
