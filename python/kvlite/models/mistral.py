"""Mistral 7B, Nemo, Small (dense, text): Llama with one sliding window for every layer in the early ones."""

from __future__ import annotations

from kvlite.models.config import MAX_CONTEXT, Family, Fields, Traits


def traits(fields: Fields, num_layers: int) -> Traits:
    """Reads sliding_window: null means none, a missing one 4096 (as in transformers)."""
    fields.refuse("layer_types", "Mistral models have one window for every layer")
    if fields.is_null("sliding_window"):
        return Traits()
    return Traits(windows=(fields.integer("sliding_window", 4096, high=MAX_CONTEXT),) * num_layers)


MISTRAL = Family(architecture="MistralForCausalLM", traits=traits, num_kv_heads=8)
