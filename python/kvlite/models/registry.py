"""The families that the engine can run: one line each. An architecture that is not here is refused.

Owns the list and the step from a model folder to its family and config. Called by `models.decoder` and by the engine.
"""

from __future__ import annotations

from pathlib import Path

from kvlite.errors import ModelLoadError
from kvlite.models.config import Family, ModelConfig, parse_config, read_json
from kvlite.models.llama import LLAMA
from kvlite.models.mistral import MISTRAL
from kvlite.models.qwen2 import QWEN2
from kvlite.models.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def load_config(path: Path | str) -> tuple[ModelConfig, Family]:
    """Reads `config.json` of a model folder. ModelLoadError names the file, the field and its value."""
    file = Path(path) / "config.json"
    values = read_json(file)
    named = values.get("architectures")
    known = ", ".join(FAMILIES)
    if not isinstance(named, list) or len(named) != 1:  # pyright: ignore[reportUnknownArgumentType]
        raise ModelLoadError(f"{file}: architectures is {named!r}, expected a list with one of {known}")
    family = FAMILIES.get(str(named[0]))  # pyright: ignore[reportUnknownArgumentType]
    if family is None:
        raise ModelLoadError(f"{file}: architecture {named[0]!r} is not supported; known are {known}")
    return parse_config(file, values, family), family
