"""Reuse as users see it: what a request asks (`Reuse`), reusable text (`Document`, `Segment`), and the reports.

Owns shapes and absolute ranges. Names and options of methods are checked by request.py, which asks kvlite.reuse; this
file knows no method. Every class is frozen. Used by everyone; imports nothing of ours but checks and errors.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from kvlite.checks import INT32_MAX, check_integer, check_number
from kvlite.errors import InvalidRequestError

ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}"
TITLE_CEILING = 512
"""Characters of a title."""
OPTIONS_CEILING = 16

OptionValue = int | float | bool | str


class ReuseMode(StrEnum):
    """Which cached KV a request may take; what it computes is kept for others in any mode."""

    OFF = "off"
    PREFIX = "prefix"
    """Exact: KV of the same tokens from the first one on."""
    BLEND = "blend"
    """KV of documents computed alone, placed anywhere, repaired in part: approximate."""
    VERIFY = "verify"
    """Answers exactly and says how a blended twin would have differed."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """What a request asks. `Reuse.OFF`, `Reuse.PREFIX`, `Reuse.blend(0.15)`, `Reuse.verify(0.15)`.

    Raises InvalidRequestError for a ratio that is no number between 0 and 1.
    """

    mode: ReuseMode = ReuseMode.PREFIX
    ratio: float | None = None
    """Share of the reused rows that is recomputed, 0 to 1; None: the engine's recompute_ratio."""
    method: str | None = None
    """Which rows those are; None: the engine's reuse_method."""
    options: Mapping[str, OptionValue] = field(default_factory=dict[str, OptionValue])
    """Of the method, by name."""

    OFF: ClassVar[Reuse]
    PREFIX: ClassVar[Reuse]

    def __post_init__(self) -> None:
        if self.mode not in tuple(ReuseMode):
            modes = ", ".join(ReuseMode)
            raise InvalidRequestError("reuse", f"{reprlib.repr(self.mode)} is not allowed: must be one of {modes}")
        object.__setattr__(self, "mode", ReuseMode(self.mode))
        check_number("reuse_options.recompute_ratio", self.ratio, 0.0, 1.0, optional=True)
        if self.method is not None and not isinstance(self.method, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError("reuse_options.method", f"{reprlib.repr(self.method)} is no name of a method")
        if not isinstance(self.options, Mapping) or len(self.options) > OPTIONS_CEILING:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError("reuse_options", f"must be at most {OPTIONS_CEILING} options by name")
        object.__setattr__(self, "options", dict(self.options))

    @classmethod
    def blend(cls, ratio: float | None = None, method: str | None = None, **options: OptionValue) -> Reuse:
        """Documents are reused wherever they stand; `ratio` of their rows is recomputed, chosen by `method`."""
        return cls(ReuseMode.BLEND, ratio, method, options)

    @classmethod
    def verify(cls, ratio: float | None = None, method: str | None = None, **options: OptionValue) -> Reuse:
        """The exact answer, with a report on how `blend` with the same arguments differs. Costs both."""
        return cls(ReuseMode.VERIFY, ratio, method, options)

    @property
    def is_blended(self) -> bool:
        """Whether documents are reused at all: blend or verify."""
        return self.mode in (ReuseMode.BLEND, ReuseMode.VERIFY)


Reuse.OFF = Reuse(ReuseMode.OFF)
Reuse.PREFIX = Reuse(ReuseMode.PREFIX)


@dataclass(frozen=True, slots=True)
class Document:
    """Text that conversations refer to, or the id of one that the engine's store holds.

    Raises InvalidRequestError for an empty text, an odd id, and for neither of the two.
    """

    text: str | None = None
    """None: look `id` up in the store."""
    id: str | None = None
    """Named in reports; letters, digits, `.`, `_`, `:` and `-`."""
    title: str | None = None
    """Shown to the model by templates that have a place for it."""

    def __post_init__(self) -> None:
        if self.text is None and self.id is None:
            raise InvalidRequestError("document.text", "is missing: give a text, or the id of a stored document")
        if self.text is not None and (not isinstance(self.text, str) or not self.text):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError("document.text", "is empty: must be text of at least one character")
        check_id("document.id", self.id)
        if self.title is None:
            return
        if not isinstance(self.title, str) or len(self.title) > TITLE_CEILING:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError("document.title", f"must be text of at most {TITLE_CEILING} characters")


@dataclass(frozen=True, slots=True)
class Segment:
    """A reusable part of a prompt that is a list of parts: text, or token ids. Raises InvalidRequestError."""

    content: str | Sequence[int]
    id: str | None = None

    def __post_init__(self) -> None:
        is_list = isinstance(self.content, str) or hasattr(self.content, "__len__")
        if not is_list or len(self.content) == 0:
            raise InvalidRequestError("prompt", "a segment is empty: it needs at least one token")
        check_id("prompt", self.id)


def check_id(param: str, id: str | None) -> None:
    """Raises InvalidRequestError unless `id` is None or a short word that can stand in a URL."""
    if id is not None and (not isinstance(id, str) or not re.fullmatch(ID_PATTERN, id)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidRequestError(
            param, f"id {reprlib.repr(id)} is not allowed: must be 1 to 64 letters, digits, '.', '_', ':' or '-'"
        )


@dataclass(frozen=True, slots=True)
class SegmentSpan:
    """Where a segment lies in a prompt: `length` ids from `start` on."""

    start: int
    length: int
    id: str
    """The caller's, or its number in the prompt."""

    def __post_init__(self) -> None:
        check_integer("prompt", self.start, 0, INT32_MAX)
        check_integer("prompt", self.length, 1, INT32_MAX)


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as ids, with its segments: ascending spans that do not overlap. The same ids under every reuse mode."""

    ids: Sequence[int]
    spans: tuple[SegmentSpan, ...] = ()
    warnings: tuple[str, ...] = ()
    """What the caller should know of how it was made."""
    text: str | None = None
    """The prompt as text, when it came as one."""


class SegmentHit(StrEnum):
    """Where a segment's KV came from."""

    PREFIX = "prefix"
    """Exact KV of the prompt's own prefix."""
    DEVICE = "device"
    """The store of segments."""
    MADE = "made"
    """Computed alone for this request, and stored."""
    COMPUTED = "computed"
    """Nowhere: computed as any other text."""
    RECIPE = "recipe"
    """Blended before by a request with the same beginning."""


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """One segment of a request."""

    id: str
    tokens: int
    hit: SegmentHit


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """How the blended twin differs from the exact answer that was given."""

    kl: float
    """KL(exact || blended) of the first token's distribution, in nats; 0 is no difference."""
    top1_equal: bool
    """Whether both find the same first token most likely."""
    max_logit_difference: float
    """Largest absolute difference of the first token's logits."""
    equal_tokens: int
    """Leading output tokens that agree (of choice 0)."""
    exact_tokens: int
    blended_tokens: int
    blended_token_ids: tuple[int, ...]
    """The twin's answer."""
    blended_text: str

    @property
    def first_difference(self) -> int | None:
        """Index of the first output token that differs; None when the answers are the same."""
        same = self.equal_tokens == self.exact_tokens == self.blended_tokens
        return None if same else self.equal_tokens


@dataclass(frozen=True, slots=True)
class ReuseReport:
    """What a request took from the cache. The four counts add up to the prompt's tokens."""

    mode: ReuseMode
    """As asked; `fallback` says when the engine did otherwise."""
    exact: bool
    """Whether every token was computed from exact KV."""
    prefix_tokens: int
    """Exact KV of the same beginning."""
    blended_tokens: int
    """Reused from segments as they were computed alone."""
    recomputed_tokens: int
    """Reused from segments, then recomputed in full context."""
    computed_tokens: int
    """Computed anew: text that is no cached segment."""
    segments: tuple[SegmentReport, ...] = ()
    method: str | None = None
    """Of blend and verify, with the ratio that was used."""
    ratio: float | None = None
    verify: VerifyReport | None = None
    """In verify mode; the counts are those of the blended twin then."""
    fallback: str | None = None
    """Why the engine did otherwise than asked."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed anew."""
        return self.prefix_tokens + self.blended_tokens


@dataclass(frozen=True, slots=True)
class PrecomputeReport:
    """One document after `precompute`."""

    id: str | None
    tokens: int
    """Of its segment: the template's wrapper and the text."""
    hit: bool
    """Whether its KV was there already."""
