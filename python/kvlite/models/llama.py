"""Llama 2, 3, 3.1, 3.2, 3.3 (dense, text): optional biases, no window."""

from __future__ import annotations

from kvlite.models.config import Family, Fields, Traits


def traits(fields: Fields, num_layers: int) -> Traits:
    """Reads attention_bias (all four projections) and mlp_bias."""
    fields.refuse("sliding_window", "Llama models attend to everything before them")
    attention_bias = fields.boolean("attention_bias", False)
    return Traits(qkv_bias=attention_bias, output_bias=attention_bias, mlp_bias=fields.boolean("mlp_bias", False))


LLAMA = Family(architecture="LlamaForCausalLM", traits=traits)
