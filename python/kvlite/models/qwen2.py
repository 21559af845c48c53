"""Qwen2 and Qwen2.5 (dense, text): biases on q, k and v only; a sliding window in the upper layers, when it is on."""

from __future__ import annotations

from kvlite.models.config import MAX_CONTEXT, MAX_LAYERS, Family, Fields, Traits

FULL, SLIDING = "full_attention", "sliding_attention"


def windows(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Window of each layer: `layer_types` where it is given, else every layer from `max_window_layers` on."""
    window = 0
    if fields.boolean("use_sliding_window", False):
        window = fields.integer("sliding_window", 4096, high=MAX_CONTEXT)
    if not fields.has("layer_types"):
        first = fields.integer("max_window_layers", 28, low=0, high=MAX_LAYERS)
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    types = fields.items("layer_types")
    if len(types) != num_layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise fields.error("layer_types", f"{num_layers} entries, each {FULL} or {SLIDING}")
    if SLIDING in types and not window:
        raise fields.error("use_sliding_window", f"true, because layer_types has {SLIDING}")
    return tuple(window if kind == SLIDING else 0 for kind in types)


def traits(fields: Fields, num_layers: int) -> Traits:
    """Reads the window; the biases are part of the family."""
    return Traits(qkv_bias=True, windows=windows(fields, num_layers))


QWEN2 = Family(architecture="Qwen2ForCausalLM", traits=traits)
