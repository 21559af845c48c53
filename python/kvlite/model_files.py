"""The small files of a model directory: text and JSON of bounded size, and the defaults for sampling.

Owns how they are read and what is refused; knows neither tokenizer nor weights. Raises ModelLoadError naming the file.
Called by tokenizer.py and startup.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from kvlite.errors import InvalidRequestError, ModelLoadError
from kvlite.types import GenerationDefaults

JSON_BYTES_LIMIT = 1 << 20
"""Size of a small JSON file of a model directory; more is refused before it is read."""


def load_generation_defaults(directory: str | Path, eos_token_id: int | None = None) -> GenerationDefaults:
    """What generation_config.json (then config.json, then the tokenizer, for EOS) asks for."""
    config = read_json(Path(directory) / "generation_config.json")
    eos: Any = config.get("eos_token_id")
    if eos is None:
        eos = read_json(Path(directory) / "config.json").get("eos_token_id", eos_token_id)
    ids = cast("list[Any]", eos if isinstance(eos, list) else [] if eos is None else [eos])
    greedy = config.get("do_sample") is False
    try:
        return GenerationDefaults(
            temperature=0.0 if greedy else config.get("temperature") or 1.0,
            top_p=config.get("top_p") or 1.0,
            top_k=config.get("top_k") or 0,
            min_p=config.get("min_p") or 0.0,
            repetition_penalty=config.get("repetition_penalty") or 1.0,
            max_tokens=config.get("max_new_tokens"),
            eos_token_ids=tuple(ids),
        )
    except InvalidRequestError as error:
        raise ModelLoadError(f"{directory}/generation_config.json: {error}") from None


def read_text(path: Path, limit: int) -> str | None:
    """The file's text, None when there is none; ModelLoadError above `limit` bytes or outside UTF-8."""
    try:
        if path.stat().st_size > limit:
            raise ModelLoadError(f"{path} has {path.stat().st_size} bytes, at most {limit} are read")
        return path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file, {} when there is no file. Raises ModelLoadError."""
    text = read_text(path, JSON_BYTES_LIMIT)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds no JSON object")
    return cast("dict[str, Any]", value)
