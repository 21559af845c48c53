"""Rotary position embedding: the frequencies of every scaling type of the field, and the cos and sin tables.

Numbers follow transformers' `modeling_rope_utils` (5.x). Two types depend on the length of the text there (dynamic NTK,
longrope); here a cached key must never change, so their frequencies are fixed once from `max_model_len`, as if every
text had that length, and `max_model_len` is then part of the model's fingerprint. The scaling's attention factor
(mscale) is folded into cos and sin. Knows neither files nor batches. Called by `models`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch

from kvlite.ops import Ops


class RopeType(StrEnum):
    """Names as they stand in config.json."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"
    LLAMA3 = "llama3"
    LONGROPE = "longrope"


@dataclass(frozen=True)
class RopeConfig:
    """Parameters of one model's RoPE; fields that its type does not use keep their neutral value."""

    rope_type: RopeType
    theta: float
    rotary_dim: int
    """Dimensions of a head that are rotated, the first ones; even."""
    max_position_embeddings: int
    original_max_position_embeddings: int
    """Context of the pretraining, before the scaling (yarn, llama3, longrope)."""
    factor: float = 1.0
    attention_factor: float | None = None
    """Multiplies cos and sin; None = what the type's paper suggests."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether keys differ between engines with different `max_model_len`."""
        return self.rope_type in (RopeType.DYNAMIC, RopeType.LONGROPE)


def inverse_frequencies(rope: RopeConfig, max_model_len: int) -> tuple[torch.Tensor, float]:
    """Returns (inverse frequencies [rotary_dim / 2] fp32, factor on cos and sin). Sources beside each type."""
    dim = rope.rotary_dim
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    match rope.rope_type:
        case RopeType.DEFAULT:
            return 1.0 / rope.theta**exponent, 1.0
        case RopeType.LINEAR:  # Position Interpolation, arXiv 2306.15595
            return 1.0 / rope.theta**exponent / rope.factor, 1.0
        case RopeType.DYNAMIC:  # NTK-aware, the base grows with the length beyond the pretraining's
            trained = rope.max_position_embeddings
            stretch = rope.factor * max(max_model_len, trained) / trained - (rope.factor - 1)
            base = rope.theta * stretch ** (dim / (dim - 2))
            return 1.0 / base**exponent, 1.0
        case RopeType.YARN:
            return _yarn(rope, exponent)
        case RopeType.LLAMA3:
            return _llama3(rope, 1.0 / rope.theta**exponent), 1.0
        case RopeType.LONGROPE:
            return _longrope(rope, exponent, max_model_len)


def _yarn(rope: RopeConfig, exponent: torch.Tensor) -> tuple[torch.Tensor, float]:
    """YaRN, arXiv 2309.00071 section 3.2: slow pairs are interpolated, fast ones kept, a ramp between."""
    dim = rope.rotary_dim

    def pair_of(num_rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    interpolated = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - interpolated
    period = rope.theta**exponent
    inverse = 1.0 / (rope.factor * period) * (1 - kept) + 1.0 / period * kept
    if rope.attention_factor is not None:
        return inverse, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return inverse, mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return inverse, mscale(1.0)


def _llama3(rope: RopeConfig, inverse: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long waves divided by the factor, short ones kept, a smooth step between."""
    context = rope.original_max_position_embeddings
    wave_len = 2 * math.pi / inverse
    longest_kept, shortest_scaled = context / rope.high_freq_factor, context / rope.low_freq_factor
    scaled = torch.where(wave_len > shortest_scaled, inverse / rope.factor, inverse)
    smooth = (context / wave_len - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = (wave_len >= longest_kept) & (wave_len <= shortest_scaled)
    return torch.where(between, blended, scaled)


def _longrope(rope: RopeConfig, exponent: torch.Tensor, max_model_len: int) -> tuple[torch.Tensor, float]:
    """LongRoPE, arXiv 2402.13753: one searched factor per pair, another set beyond the pretraining's context."""
    original = rope.original_max_position_embeddings
    factors = torch.tensor(rope.long_factor if max_model_len > original else rope.short_factor, dtype=torch.float32)
    inverse = 1.0 / (factors * rope.theta**exponent)
    if rope.attention_factor is not None:
        return inverse, rope.attention_factor
    return inverse, math.sqrt(1 + math.log(rope.factor) / math.log(original)) if rope.factor > 1 else 1.0


class RotaryEmbedding:
    """Rotates queries and keys in place; owns cos and sin, [max_model_len, rotary_dim / 2] fp32 each."""

    def __init__(self, rope: RopeConfig, max_model_len: int, device: torch.device, ops: Ops) -> None:
        inverse, attention_factor = inverse_frequencies(rope, max_model_len)
        angle = torch.outer(torch.arange(max_model_len, dtype=torch.float32), inverse)
        self.cos = (angle.cos() * attention_factor).to(device)
        self.sin = (angle.sin() * attention_factor).to(device)
        self._rope = ops.rope

    def __call__(self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> None:
        """q [T, H, D], k [T, KH, D], positions [T] int32, each in [0, max_model_len)."""
        self._rope(q, k, positions, self.cos, self.sin)
