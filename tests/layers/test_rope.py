"""Frequencies of every scaling type against transformers' own functions, and what the tables promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvlite import ops
from kvlite.layers.rope import RopeConfig, RopeType, RotaryEmbedding, inverse_frequencies
from kvlite.models import load_config
from tests.models.make import ROPES, SHAPE

CPU = torch.device("cpu")
SCALED = [name for name in ROPES if name != "default"]


def parsed(folder: Path, fields: dict[str, Any]) -> RopeConfig:
    values = SHAPE | {"architectures": ["LlamaForCausalLM"]} | fields
    (folder / "config.json").write_text(json.dumps(values))
    return load_config(folder)[0].rope


@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("length", [16, 33, 128, 500])
@pytest.mark.parametrize("name", SCALED)
def test_frequencies_are_those_of_transformers(name: str, length: int, partial: float, tmp_path: Path) -> None:
    parameters = dict(ROPES[name])
    if name == "longrope":
        pairs = int(16 * partial) // 2
        parameters |= {key: parameters[key][:pairs] for key in ("short_factor", "long_factor")}
    fields = {"rope_parameters": parameters, "partial_rotary_factor": partial}
    ours, our_factor = inverse_frequencies(parsed(tmp_path, fields), length)
    theirs = LlamaConfig(**(SHAPE | {"rope_parameters": dict(parameters), "partial_rotary_factor": partial}))
    expected, expected_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, CPU, seq_len=length)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(expected_factor, rel=1e-12)
    assert len(ours) == int(16 * partial) // 2


def test_only_dynamic_and_longrope_depend_on_the_length(tmp_path: Path) -> None:
    for name in ROPES:
        rope = parsed(tmp_path, {"rope_parameters": ROPES[name], "max_position_embeddings": 32})
        short, long = (inverse_frequencies(rope, length)[0] for length in (20, 100))
        assert torch.equal(short, long) != rope.depends_on_length, name


def rotary(length: int, **changes: Any) -> RotaryEmbedding:
    fields: dict[str, Any] = {"rope_type": RopeType.DEFAULT, "theta": 100.0, "rotary_dim": 8}
    rope = RopeConfig(**(fields | {"max_position_embeddings": 64, "original_max_position_embeddings": 64} | changes))
    return RotaryEmbedding(rope, length, CPU, ops.select(CPU, "reference"))


def test_the_product_of_a_query_and_a_key_depends_on_their_distance_alone() -> None:
    noise = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 3, 8, generator=noise), torch.randn(1, 1, 8, generator=noise)
    layer = rotary(200)

    def product(q_at: int, k_at: int) -> torch.Tensor:
        turned_q, turned_k = q.clone(), k.clone()
        layer(turned_q, turned_q[:, :0], torch.tensor([q_at], dtype=torch.int32))
        layer(turned_k, turned_k[:, :0], torch.tensor([k_at], dtype=torch.int32))
        return (turned_q * turned_k).sum(-1)

    torch.testing.assert_close(product(9, 4), product(150, 145), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(product(9, 4), product(9, 5))


def test_dimensions_beyond_the_rotated_ones_stay_and_position_zero_turns_nothing() -> None:
    q = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    turned = q.clone()
    rotary(64)(turned, turned[:, :0], torch.tensor([0, 50], dtype=torch.int32))
    assert torch.equal(turned[..., 8:], q[..., 8:]) and torch.equal(turned[0], q[0])
    assert not torch.equal(turned[1, :, :8], q[1, :, :8])


def test_the_attention_factor_is_in_both_tables() -> None:
    yarn = {"rope_type": RopeType.YARN, "factor": 4.0, "original_max_position_embeddings": 16}
    plain, scaled = rotary(64, **yarn, attention_factor=1.0), rotary(64, **yarn, attention_factor=1.5)
    assert torch.equal(scaled.cos, plain.cos * 1.5) and torch.equal(scaled.sin, plain.sin * 1.5)
