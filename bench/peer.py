"""transformers as a peer in this process: loaded, held against greedy tokens, its decode steps and prompts timed.

Owns no figure. Greedy tokens agree when they are equal, or part at a place where the peer itself has both tokens within
rounding of each other. Without the package nothing of it can be had: `load` and `of_weights` raise MissingError.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import BenchError, MissingError

PEER_STEPS = 4
TIE = {torch.float32: 1e-3, torch.bfloat16: 2.5e-1, torch.float16: 5e-2}
"""Share of the logits' standard deviation below which two logits count as one: rounding through a whole stack."""


def load(directory: Path, dtype: torch.dtype) -> Any:
    """The model of a directory. Raises MissingError when the package is not here."""
    peers = _package()
    return peers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()


def of_weights(values: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Any:
    """The model that config.json's `values` describe over weights that lie in memory already, without a copy of them.

    Raises MissingError when the package is not here, BenchError when it knows other names or shapes of weights.
    """
    peers = _package()
    some = next(iter(weights.values()))
    config = peers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        peer = peers.AutoModelForCausalLM.from_config(config, dtype=some.dtype, attn_implementation="sdpa")
    try:
        peer.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise BenchError(f"transformers cannot take these weights: {error}") from None
    # Its frequencies are no weights, and were made where there is no memory.
    with some.device:
        peer.model.rotary_emb = type(peer.model.rotary_emb)(config=peer.config)
    return peer.eval()


def _package() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingError("no figure without a correctness gate, which needs: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def check_tokens(tokens: Sequence[int], logits: torch.Tensor, dtype: torch.dtype, who: str = "transformers") -> None:
    """Each of `tokens` is the best one of its row of `logits` [N, V], which are `who`'s, or ties with it.

    Raises BenchError at the first that is not. `dtype` is that of the coarser of both stacks.
    """
    for at, (token, row) in enumerate(zip(tokens, logits.float(), strict=True)):
        gap = float(row.max() - row[token])
        if not gap <= TIE[dtype] * float(row.std()):
            raise BenchError(
                f"wrong before fast: token {at} is {token}, {who} says {int(row.argmax())} "
                f"(logits {float(row[token]):.4f} and {float(row.max()):.4f})"
            )


@torch.inference_mode()
def logits_after(peer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """The peer's logits [N, V] for each of `tokens`, given what comes before it."""
    ids = torch.tensor([[*prompt, *tokens]], device=peer.device)
    return peer(ids).logits[0, len(prompt) - 1 : -1]


def step_s(peer: Any, batch: list[list[int]], num_steps: int = PEER_STEPS) -> float:
    """Seconds of one decode step of `generate` with a static cache, not compiled: longer run minus shorter run."""

    def run(num_tokens: int) -> float:
        ids = torch.tensor(batch, device=peer.device)
        start = time.perf_counter()
        out = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, min_new_tokens=num_tokens,
            do_sample=False, cache_implementation="static", disable_compile=True, pad_token_id=0,
        ).cpu()  # fmt: skip
        elapsed = time.perf_counter() - start
        if out.shape[1] != len(batch[0]) + num_tokens:
            raise BenchError(f"transformers gave {out.shape[1] - len(batch[0])} of {num_tokens} tokens")
        return elapsed

    return max(run(2 + num_steps) - run(2), 1e-9) / num_steps


@torch.inference_mode()
def prompt_s(peer: Any, prompt: Sequence[int]) -> float:
    """Seconds of a forward pass over the prompt, logits of the last row alone."""
    ids = torch.tensor([list(prompt)], device=peer.device)
    start = time.perf_counter()
    peer(ids, logits_to_keep=1).logits.cpu()
    return time.perf_counter() - start
