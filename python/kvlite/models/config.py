"""`ModelConfig`: what config.json says of a model, checked field by field, and the fingerprint of the KV that it makes.

Owns the reading of Hugging Face's config.json (transformers 4 and 5 spellings); knows neither weights nor devices. A
bad or missing field is a ModelLoadError that names file, field and value; nothing is guessed. What only one family has
is read by that family's `traits`. Called by `models.registry`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from kvlite.errors import ModelLoadError
from kvlite.layers.rope import RopeConfig, RopeType

MAX_CONFIG_BYTES = 4 << 20
MAX_LAYERS = 4096
MAX_DIM = 1 << 24
MAX_CONTEXT = 1 << 22
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Fields:
    """The fields of one JSON object, read with a type, a range and an error that says where."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self._path = path
        self._values = values
        self._prefix = prefix

    def error(self, name: str, expected: str) -> ModelLoadError:
        """The error for a field whose value is not what was expected."""
        value = self._values.get(name, "missing")
        shown = "missing" if name not in self._values else repr(value)
        return ModelLoadError(f"{self._path}: {self._prefix}{name} is {shown[:80]}, expected {expected}")

    def has(self, name: str) -> bool:
        """Present and not null."""
        return self._values.get(name) is not None

    def is_null(self, name: str) -> bool:
        """Present as null."""
        return name in self._values and self._values[name] is None

    def integer(self, name: str, default: int | None = None, *, low: int = 1, high: int = MAX_DIM) -> int:
        """An integer in [low, high]; a null or missing one is the default, or an error without a default."""
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None, *, above: float = 0.0) -> float:
        """A finite number greater than `above`."""
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        expected = f"a finite number greater than {above:g}"
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
            raise self.error(name, expected)
        if not math.isfinite(value) or value <= above:
            raise self.error(name, expected)
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def choice(self, name: str, allowed: tuple[str, ...], default: str) -> str:
        """One of a few strings."""
        value = self._values.get(name)
        if value is None:
            return default
        if value not in allowed:
            raise self.error(name, f"one of {', '.join(allowed)}")
        return cast(str, value)

    def items(self, name: str) -> list[Any]:
        """A list; missing, null or anything else is an error."""
        value = self._values.get(name)
        if not isinstance(value, list):
            raise self.error(name, "a list")
        return cast("list[Any]", value)

    def nested(self, name: str) -> Fields | None:
        """The fields of an object, or None when it is missing, null or empty."""
        value = self._values.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "an object")
        return Fields(self._path, cast("dict[str, Any]", value), f"{self._prefix}{name}.")

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of exactly `count` finite numbers greater than 0."""
        values = self.items(name)
        if len(values) != count:
            raise self.error(name, f"a list of {count} numbers, not {len(values)}")
        entries = Fields(self._path, {str(i): v for i, v in enumerate(values)}, f"{self._prefix}{name}.")
        return tuple(entries.number(str(i)) for i in range(count))

    def refuse(self, name: str, reason: str) -> None:
        """An error when the field is present and means something that the engine would have to ignore."""
        if self._values.get(name):
            raise self.error(name, f"none: {reason}")


@dataclass(frozen=True)
class Traits:
    """What differs between families; everything else of the decoder is the same."""

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of q and k before RoPE."""
    windows: tuple[int, ...] = ()
    """Sliding window of each layer in keys, 0 = none; empty = none anywhere."""


@dataclass(frozen=True)
class KeyMap:
    """Names of a checkpoint's tensors; `{i}` is the layer."""

    embedding: str = "model.embed_tokens.weight"
    layer: str = "model.layers.{i}."
    input_norm: str = "input_layernorm.weight"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"
    output: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm.weight"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"


@dataclass(frozen=True)
class Family:
    """A line of models that share a config layout and a key map; one per file of `models/`."""

    architecture: str
    """As in config.json `architectures`."""
    traits: Callable[[Fields, int], Traits]
    """Reads what only this family has; the second argument is the number of layers."""
    keys: KeyMap = field(default_factory=KeyMap)
    head_dim: int | None = None
    """Used when config.json has no head_dim; None = hidden_size / num_attention_heads."""
    num_kv_heads: int | None = None
    """Used when config.json has no num_key_value_heads; None = num_attention_heads."""


@dataclass(frozen=True)
class ModelConfig:
    """One model's shape. Sizes in elements, lengths in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope: RopeConfig
    traits: Traits
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    """Of the checkpoint; the engine may compute in another."""

    def window(self, layer: int) -> int:
        """Sliding window of a layer in keys, 0 = none."""
        return self.traits.windows[layer] if self.traits.windows else 0

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values that one token occupies over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * dtype.itemsize

    def fingerprint(self, *, dtype: torch.dtype, max_model_len: int, weights_digest: str) -> str:
        """Digest of everything that changes KV: shape, RoPE, number format, weights. 64 hex digits, stable over runs.

        `max_model_len` counts only where the RoPE frequencies depend on it.
        """
        length = max_model_len if self.rope.depends_on_length else None
        described = asdict(self) | {"dtype": str(dtype), "max_model_len": length, "weights": weights_digest}
        described.pop("eos_token_ids")
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; ModelLoadError when it is missing, too large or not one."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelLoadError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelLoadError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return cast("dict[str, Any]", value)


def parse_config(path: Path, values: Mapping[str, Any], family: Family) -> ModelConfig:
    """Checks every field that changes the model's numbers. `path` is for messages only."""
    fields = Fields(path, values)
    fields.refuse("quantization_config", "quantized checkpoints are not supported")
    fields.choice("hidden_act", ("silu", "swish"), "silu")
    num_layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads", high=65536)
    if hidden_size % num_heads and not fields.has("head_dim"):
        raise fields.error("hidden_size", f"a multiple of num_attention_heads ({num_heads})")
    head_dim = fields.integer("head_dim", family.head_dim or hidden_size // num_heads, high=4096)
    num_kv_heads = fields.integer("num_key_value_heads", family.num_kv_heads or num_heads, high=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    vocab_size = fields.integer("vocab_size")
    max_positions = fields.integer("max_position_embeddings", high=MAX_CONTEXT)
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        max_position_embeddings=max_positions,
        rope=parse_rope(fields, head_dim, max_positions),
        traits=family.traits(fields, num_layers),
        eos_token_ids=_eos(fields, vocab_size),
        dtype=DTYPES[fields.choice("dtype" if fields.has("dtype") else "torch_dtype", tuple(DTYPES), "float32")],
    )


def _eos(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    """End-of-sequence ids: one, several or none, each inside the vocabulary."""
    if not fields.has("eos_token_id"):
        return ()
    try:
        ids = fields.items("eos_token_id")
    except ModelLoadError:
        return (fields.integer("eos_token_id", low=0, high=vocab_size - 1),)
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size for i in ids):
        raise fields.error("eos_token_id", f"token ids from 0 to {vocab_size - 1}")
    return tuple(dict.fromkeys(ids))


def parse_rope(fields: Fields, head_dim: int, max_positions: int) -> RopeConfig:
    """RoPE from `rope_scaling` + `rope_theta` (transformers 4) or `rope_parameters` (transformers 5)."""
    scaling = fields.nested("rope_scaling") or fields.nested("rope_parameters") or Fields(Path(), {})
    for name in ("full_attention", "sliding_attention", "mrope_section"):
        scaling.refuse(name, "one RoPE for every layer and axis is supported")
    known = tuple(RopeType)
    rope_type = RopeType(scaling.choice("rope_type" if scaling.has("rope_type") else "type", known, RopeType.DEFAULT))
    partial = (scaling if scaling.has("partial_rotary_factor") else fields).number("partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * partial)
    smallest = 4 if rope_type is RopeType.DYNAMIC else 2
    if not smallest <= rotary_dim <= head_dim or rotary_dim % 2:
        raise ModelLoadError(
            f"{fields.error('head_dim', 'an even number of rotated dimensions')}: head_dim {head_dim} with "
            f"partial_rotary_factor {partial:g} rotates {rotary_dim}, allowed are even numbers from {smallest}"
        )
    name = "original_max_position_embeddings"
    original = (fields if fields.has(name) else scaling).integer(name, max_positions, low=2, high=MAX_CONTEXT)
    neutral = RopeConfig(
        rope_type=rope_type,
        theta=(scaling if scaling.has("rope_theta") else fields).number("rope_theta", 10000.0, above=1.0),
        rotary_dim=rotary_dim,
        max_position_embeddings=max_positions,
        original_max_position_embeddings=original,
    )
    changed = _scaling_fields(rope_type, scaling, rotary_dim, max_positions / original)
    return RopeConfig(**{**neutral.__dict__, **changed})


def _scaling_fields(rope_type: RopeType, scaling: Fields, rotary_dim: int, ratio: float) -> dict[str, Any]:
    """The fields that one scaling type has beyond theta; `ratio` = trained positions / pretraining positions."""
    match rope_type:
        case RopeType.DEFAULT:
            return {}
        case RopeType.LINEAR:
            return {"factor": scaling.number("factor")}
        case RopeType.DYNAMIC:
            factor = scaling.number("factor")
            if factor < 1:
                raise scaling.error("factor", "a number from 1")
            return {"factor": factor}
        case RopeType.LLAMA3:
            low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
            if low >= high:
                raise scaling.error("high_freq_factor", f"a number greater than low_freq_factor ({low:g})")
            return {"factor": scaling.number("factor"), "low_freq_factor": low, "high_freq_factor": high}
        case RopeType.YARN | RopeType.LONGROPE:
            pass
    has_attention_factor = scaling.has("attention_factor")
    common = {
        "factor": scaling.number("factor", ratio),
        "attention_factor": scaling.number("attention_factor") if has_attention_factor else None,
    }
    if rope_type is RopeType.LONGROPE:
        pairs = rotary_dim // 2
        short, long = scaling.numbers("short_factor", pairs), scaling.numbers("long_factor", pairs)
        return common | {"short_factor": short, "long_factor": long}
    return common | {
        "beta_fast": scaling.number("beta_fast", 32.0),
        "beta_slow": scaling.number("beta_slow", 1.0),
        "mscale": scaling.number("mscale", 0.0, above=-1.0),
        "mscale_all_dim": scaling.number("mscale_all_dim", 0.0, above=-1.0),
        "truncate": scaling.boolean("truncate", True),
    }
