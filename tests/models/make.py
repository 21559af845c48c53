"""Tiny random checkpoints in Hugging Face layout, made by transformers on the fly; tests load these, not downloads.

`make(name, folder)` writes one and returns the transformers model (fp32, eval). Importable by any test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    logging,
)
from transformers.models.auto import modeling_auto

logging.set_verbosity_error()
logging.disable_progress_bar()

SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MHA = {"num_key_value_heads": 4}
WINDOWED = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama2": (LlamaConfig, MHA | {"rms_norm_eps": 1e-5}),
    "llama3": (LlamaConfig, {"eos_token_id": [2, 5], "head_dim": 24}),
    "llama-biased": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-window": (Qwen2Config, WINDOWED),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "qwen3-window": (Qwen3Config, WINDOWED | {"head_dim": 32}),
    "mistral": (MistralConfig, {"sliding_window": 20, "head_dim": 16}),
    "mistral-full": (MistralConfig, {"sliding_window": None}),
}

PAIRS = 8
"""Rotated pairs of a head where a family has no head_dim of its own."""

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-mscale": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16,
        "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False,
    },
    "yarn-attention": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.3,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 5000.0,
    },
    "longrope": {
        "rope_type": "longrope", "original_max_position_embeddings": 32,
        "short_factor": [1.0 + 0.05 * i for i in range(PAIRS)],
        "long_factor": [1.0 + 0.7 * i for i in range(PAIRS)],
    },
}  # fmt: skip


def make(
    name: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: str | None = None,
    **changes: Any,
) -> PreTrainedModel:
    """Writes family `name` (a key of FAMILIES) with random weights; `changes` override config fields.

    Weights are large enough for attention to matter and norms differ from 1, so that a wrong wire shows in the logits.
    """
    kind, fields = FAMILIES[name]
    config = kind(**(SHAPE | fields | changes))
    torch.manual_seed(seed)
    cls = modeling_auto.AutoModelForCausalLM._model_mapping[kind]
    model = cls._from_config(config, dtype=torch.float32).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            scale = 0.5 if key.endswith("norm.weight") else 0.3 if key.endswith("bias") else value.shape[-1] ** -0.5
            offset = 1.0 if key.endswith("norm.weight") else 0.0
            value.copy_(torch.randn(value.shape, generator=noise) * scale + offset)
    model.tie_weights()
    model = model.to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": shard_size} if shard_size else {}))
    model.config.architectures = [cls.__name__]
    return model.float()


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes fields of a written config.json; a value of `...` removes the field."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def prompt(num_tokens: int, seed: int = 0, vocab_size: int = SHAPE["vocab_size"]) -> list[int]:
    """Random token ids."""
    return torch.randint(3, vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
