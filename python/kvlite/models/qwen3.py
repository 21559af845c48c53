"""Qwen3 (dense): RMSNorm on each head of q and k, a head_dim of its own, windows as in Qwen2."""

from __future__ import annotations

from kvlite.models.config import Family, Fields, Traits
from kvlite.models.qwen2 import windows


def traits(fields: Fields, num_layers: int) -> Traits:
    """Reads attention_bias (all four projections) and the window."""
    attention_bias = fields.boolean("attention_bias", False)
    return Traits(
        qkv_bias=attention_bias, output_bias=attention_bias, qk_norm=True, windows=windows(fields, num_layers)
    )


QWEN3 = Family(architecture="Qwen3ForCausalLM", traits=traits, head_dim=128)
