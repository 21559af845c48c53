"""What may stand where a prompt is asked for: text, ids, parts with segments; and one prompt told from a list of them.

Owns the two types and that decision alone. Called by engine.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from kvlite.reuse_types import EncodedPrompt, Segment

Part = str | Sequence[int] | Segment
Prompt = str | Sequence[int] | Sequence[Part] | EncodedPrompt
"""Text, ids, or parts of which at least one is a Segment."""


def is_parts(prompt: object) -> bool:
    """Whether a list is one prompt of parts: one of them is a Segment."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence) or not prompt:
        return False
    parts = cast("Sequence[object]", prompt)
    return not isinstance(parts[0], int) and any(isinstance(part, Segment) for part in parts)


def is_single(prompts: Prompt | Sequence[str] | Sequence[Sequence[int]] | Sequence[Prompt]) -> bool:
    """Whether this is one prompt, not a list of them."""
    if isinstance(prompts, EncodedPrompt) or is_parts(prompts):
        return True
    is_list = not isinstance(prompts, str) and isinstance(prompts, Sequence)  # pyright: ignore[reportUnnecessaryIsInstance]
    return not is_list or (len(prompts) > 0 and not isinstance(prompts[0], str | Sequence | EncodedPrompt))
