"""transformers as the oracle: logits of whole texts, greedy continuation without a cache, and the distance to ours."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """[n, V] fp32."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def greedy(model: PreTrainedModel, tokens: list[int], num_tokens: int) -> list[int]:
    """Every step computes the whole text again, so no cache of theirs can be wrong."""
    text = list(tokens)
    for _ in range(num_tokens):
        text.append(int(logits(model, text)[-1].argmax()))
    return text[len(tokens) :]


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference relative to the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
