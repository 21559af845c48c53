"""config.json: what is read, what is refused and in which words, and what the fingerprint depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlite.errors import ModelLoadError
from kvlite.layers.rope import RopeType
from kvlite.models import ModelConfig, load_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "eos_token_id": [128001, 128008, 128009],
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
QWEN2: dict[str, Any] = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"], "rope_scaling": None, "use_sliding_window": True, "sliding_window": 100,
    "max_window_layers": 30, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "rope_scaling": None, "hidden_size": 2560}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "rope_scaling": None, "sliding_window": 4096}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}


def read(folder: Path, values: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    return load_config(folder)[0]


def test_a_llama_31_config_is_read_field_by_field(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.num_layers) == (32, 8, 128, 32)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.dtype == torch.bfloat16
    assert (config.rope.rope_type, config.rope.theta, config.rope.factor) == (RopeType.LLAMA3, 500000.0, 8.0)
    assert config.rope.original_max_position_embeddings == 8192
    assert config.kv_bytes_per_token(torch.bfloat16) == 32 * 2 * 8 * 128 * 2
    assert not config.tie_word_embeddings and config.window(0) == 0


def test_families_differ_where_they_should(tmp_path: Path) -> None:
    qwen2, qwen3, mistral = (read(tmp_path, values) for values in (QWEN2, QWEN3, MISTRAL))
    assert [qwen2.window(i) for i in (0, 29, 30, 31)] == [0, 0, 100, 100]
    assert qwen2.traits.qkv_bias and not qwen2.traits.output_bias and qwen2.tie_word_embeddings
    assert qwen3.traits.qk_norm and not qwen3.traits.qkv_bias and (qwen3.head_dim, qwen3.window(31)) == (128, 0)
    assert {mistral.window(i) for i in range(32)} == {4096}
    assert read(tmp_path, MISTRAL | {"sliding_window": None}).window(0) == 0


def test_layer_types_decide_the_windows_when_given(tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention"] * 16
    config = read(tmp_path, QWEN2 | {"layer_types": types})
    assert [config.window(i) for i in range(4)] == [100, 0, 100, 0]


def test_missing_optional_fields_get_the_documented_defaults(tmp_path: Path) -> None:
    absent = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling", "eos_token_id", "torch_dtype")
    config = read(tmp_path, LLAMA | dict.fromkeys(absent, ...))
    assert (config.num_kv_heads, config.rms_norm_eps, config.rope.theta) == (32, 1e-6, 10000.0)
    assert (config.eos_token_ids, config.dtype, config.rope.rope_type) == ((), torch.float32, RopeType.DEFAULT)


def test_partial_rotary_factor_and_the_context_of_the_pretraining_are_read_where_they_stand(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA | {"rope_scaling": None, "partial_rotary_factor": 0.5})
    assert config.rope.rotary_dim == 64
    config = read(tmp_path, LLAMA | {"rope_scaling": LONGROPE, "original_max_position_embeddings": 4096})
    assert (config.rope.original_max_position_embeddings, config.rope.factor) == (4096, 32.0)


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                   "vocab_size", "max_position_embeddings"])  # fmt: skip
def test_a_missing_required_field_is_named(field: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"config.json: {field} is missing, expected an integer"):
        read(tmp_path, LLAMA | {field: ...})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0, expected an integer from 1"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', expected an integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 1 << 40}, "hidden_size is 1099511627776"),
        ({"hidden_size": 4095}, "hidden_size is 4095, expected a multiple of num_attention_heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5, expected a divisor"),
        ({"num_key_value_heads": 64}, "num_key_value_heads is 64"),
        ({"head_dim": 127}, "head_dim is 127, expected an even number"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected one of silu"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"eos_token_id": 128256}, "eos_token_id is 128256"),
        ({"eos_token_id": [1, -2]}, r"eos_token_id is \[1, -2\]"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8', expected one of bfloat16"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*quantized"),
        ({"sliding_window": 100}, "sliding_window is 100"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        ({"rope_scaling": {"type": "magic"}}, r"rope_scaling\.type is 'magic', expected one of default"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, r"rope_scaling\.factor is -2"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, r"rope_scaling\.factor is 0.5"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0]}}, r"long_factor is .*64 numbers, not 1"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0] * 63 + [None]}}, r"long_factor\.63 is None"),
        ({"rope_scaling": {**LLAMA["rope_scaling"], "high_freq_factor": 1.0}}, "high_freq_factor is 1.0"),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}, "rope_scaling": None}, "one RoPE"),
        ({"partial_rotary_factor": 1.5}, "rotates 192"),
        ({"architectures": None}, "architectures is None"),
        ({"architectures": ["Llama4ForCausalLM"]}, "'Llama4ForCausalLM' is not supported; known are LlamaForCausalLM"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named_with_its_value(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=message) as caught:
        read(tmp_path, LLAMA | changes)
    assert "config.json" in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (QWEN2, {"layer_types": ["full_attention"]}, "layer_types is .*32 entries"),
        (QWEN2, {"layer_types": ["linear_attention"] * 32}, "layer_types is"),
        (
            QWEN2,
            {"layer_types": ["sliding_attention"] * 32, "use_sliding_window": False},
            "use_sliding_window is False",
        ),
        (MISTRAL, {"layer_types": ["full_attention"] * 32}, "layer_types is"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_a_window_that_cannot_be_honoured_is_refused(
    base: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        read(tmp_path, base | changes)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00\xff", "[" * 100_000, '{"architectures": NaN}'])
def test_a_file_that_is_no_config_is_one_clear_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load_config(tmp_path)


def test_a_missing_and_an_oversized_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no such file"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(" " * (5 << 20))
    with pytest.raises(ModelLoadError, match="larger than"):
        load_config(tmp_path)


def test_the_fingerprint_changes_with_everything_that_changes_kv_and_with_nothing_else(tmp_path: Path) -> None:
    def fingerprint(values: dict[str, Any], length: int = 1000, dtype: torch.dtype = torch.bfloat16) -> str:
        return read(tmp_path, values).fingerprint(dtype=dtype, max_model_len=length, weights_digest="w")

    base = fingerprint(LLAMA)
    assert base == fingerprint(LLAMA) == fingerprint(LLAMA, length=2000) == fingerprint(LLAMA | {"eos_token_id": 1})
    changed = [
        fingerprint(LLAMA | {"rope_theta": 500001.0}),
        fingerprint(LLAMA | {"rms_norm_eps": 1e-6}),
        fingerprint(LLAMA, dtype=torch.float16),
        fingerprint(LLAMA | {"rope_scaling": LLAMA["rope_scaling"] | {"factor": 4.0}}),
        fingerprint(QWEN2),
        fingerprint(MISTRAL),
        read(tmp_path, LLAMA).fingerprint(dtype=torch.bfloat16, max_model_len=1000, weights_digest="v"),
    ]
    assert len({base, *changed}) == len(changed) + 1
    scaled = LLAMA | {"rope_scaling": LONGROPE}
    assert fingerprint(scaled) != fingerprint(scaled, length=2000)
