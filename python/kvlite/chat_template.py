"""`ChatTemplate`: renders a conversation in jinja2's sandbox and remembers which text came from users.

Owns the protection of user text: a piece of it that could be, or complete, a special token is rendered as a placeholder
and put back afterwards as a protected span. A whole document is one placeholder, so it is known where it lies. Owns
where a template takes documents, too. Called by tokenizer.py.
"""

from __future__ import annotations

import math
import re
import time
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from kvlite.chat_environment import environment
from kvlite.errors import InvalidRequestError, KvliteError, ModelLoadError
from kvlite.reuse_types import Document

if TYPE_CHECKING:
    import jinja2

OUTPUT_LIMIT = 1 << 24
"""Characters that a template may write: far above any context, far below the machine's memory."""
TIME_LIMIT_S = 5.0
"""Time that one rendering may take; the longest that fits a request body takes milliseconds."""
DEPTH_LIMIT = 32
"""Nesting of messages, tools and documents."""

_deadline: ContextVar[float] = ContextVar("_deadline", default=math.inf)
"""Of the rendering under way, by time.monotonic()."""


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation; `protected` are (start, end) spans, ascending, that never turn into special tokens."""

    text: str
    protected: tuple[tuple[int, int], ...] = ()
    documents: tuple[tuple[int, int, int], ...] = ()
    """(start, end, number) of every document's text, ascending by start."""

    def part(self, start: int, end: int) -> Rendered:
        """The text from `start` to `end` with its protected spans, without documents."""
        first = bisect_right(self.protected, start, key=lambda span: span[1])
        last = bisect_left(self.protected, end, key=lambda span: span[0])
        spans = self.protected[first:last]
        return Rendered(self.text[start:end], tuple((max(a, start) - start, min(b, end) - start) for a, b in spans))


class Place(Enum):
    """Where a template takes documents."""

    VARIABLE = auto()
    """Its own variable `documents`."""
    ROLE = auto()
    """Messages of the role `document`."""
    MESSAGE = auto()
    """Nowhere: they become part of the first user message."""


@dataclass(frozen=True)
class Placement:
    """What a template does with documents."""

    place: Place
    wrapper: str
    """Text that stands before every document, the first one included; "" when that differs."""


@dataclass(frozen=True)
class Placed:
    """Documents and the place where a template takes them. All of them have texts."""

    documents: Sequence[Document]
    place: Place
    role: str = "document"

    def put_in(self, messages: list[dict[str, Any]], shield: _Shield) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The messages with the documents among them, and further variables; everything is shielded."""
        texts = [shield.hide_document(document.text or "") for document in self.documents]
        titles = [shield.hide(document.title) for document in self.documents]
        if self.place is Place.MESSAGE:
            return _in_first_user_message(messages, texts, titles), {}
        entries: list[dict[str, Any]] = []
        key = "text" if self.place is Place.VARIABLE else "content"
        for text, title in zip(texts, titles, strict=True):
            entries.append({key: text} if title is None else {"title": title, key: text})
        if self.place is Place.VARIABLE:
            return messages, {"documents": entries}
        start = next((n for n, message in enumerate(messages) if message["role"] != "system"), len(messages))
        told = [{"role": self.role, **entry} for entry in entries]
        return [*messages[:start], *told, *messages[start:]], {}


_PROBES = (Document("a"), Document("b"), Document("c"))
_PROBE_MESSAGES = ({"role": "user", "content": "a"},)


class ChatTemplate:
    """One template of a model directory."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._placement: Placement | None = None

    @cached_property
    def compiled(self) -> jinja2.Template:
        """Made at the first use. Raises ModelLoadError."""
        import jinja2

        try:
            return environment(_check_time).from_string(self.source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            raise ModelLoadError(f"the chat template cannot be compiled: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        specials: Sequence[str],
        variables: Mapping[str, Any],
        placed: Placed | None = None,
    ) -> Rendered:
        """The conversation as text. Raises InvalidRequestError when the template refuses or exceeds its limit."""
        is_list = isinstance(messages, Sequence) and not isinstance(messages, str)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not is_list or not all(isinstance(message, Mapping) for message in messages):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError("messages", "must be a list of objects with role and content")
        return self._render(messages, specials, variables, placed)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        specials: Sequence[str],
        variables: Mapping[str, Any],
        placed: Placed | None,
    ) -> Rendered:
        shield = _Shield(specials)
        shield.learn([_flatten(message) for message in messages], 0)
        for name in ("tools", "documents"):
            shield.learn(variables.get(name), 0)
        if placed is not None:
            shield.learn([[document.text, document.title] for document in placed.documents], 0)
        shielded = [shield.hide_message(_flatten(message)) for message in messages]
        extra = {name: shield.hide(variables[name]) for name in ("tools", "documents") if variables.get(name)}
        if placed is not None:
            shielded, more = placed.put_in(shielded, shield)
            extra |= more
        return shield.reveal(self._run({"messages": shielded, **variables, **extra}))

    def placement(self, specials: Sequence[str], variables: Mapping[str, Any]) -> Placement:
        """Found once, by rendering three documents; `variables` are the model's own tokens."""
        if self._placement is None:
            self._placement = self._find_placement(specials, variables)
        return self._placement

    def _find_placement(self, specials: Sequence[str], variables: Mapping[str, Any]) -> Placement:
        def probe(place: Place, role: str = "document") -> Rendered | None:
            try:
                found = self._render(_PROBE_MESSAGES, specials, variables, Placed(_PROBES, place, role))
            except InvalidRequestError:
                return None
            return found if [number for *_, number in found.documents] == [0, 1, 2] else None

        if (found := probe(Place.VARIABLE)) is not None:
            return Placement(Place.VARIABLE, _wrapper(found, specials))
        # A template that writes any role as it comes was not trained on documents.
        if (found := probe(Place.ROLE)) is not None and probe(Place.ROLE, "anything") is None:
            return Placement(Place.ROLE, _wrapper(found, specials))
        found = probe(Place.MESSAGE)
        return Placement(Place.MESSAGE, "" if found is None else _wrapper(found, specials))

    def _run(self, variables: Mapping[str, Any]) -> str:
        parts: list[str] = []
        size = 0
        _deadline.set(time.monotonic() + TIME_LIMIT_S)
        try:
            for part in self.compiled.generate(**variables):
                parts.append(part)
                size += len(part)
                if size > OUTPUT_LIMIT:
                    raise InvalidRequestError(
                        "messages", f"the chat template wrote more than {OUTPUT_LIMIT} characters"
                    )
        except KvliteError:
            raise
        except Exception as error:  # foreign code: whatever it raises, these messages have no rendering
            reason = str(error) or type(error).__name__
            raise InvalidRequestError("messages", f"the chat template refuses them: {reason}") from None
        return "".join(parts)


def _in_first_user_message(
    messages: list[dict[str, Any]], texts: list[str], titles: list[str | None]
) -> list[dict[str, Any]]:
    at = next((n for n, message in enumerate(messages) if message["role"] == "user"), None)
    if at is None or not isinstance(messages[at].get("content"), str):
        raise InvalidRequestError("documents", "need a user message with text: the chat template has no other place")
    names = ["Document" if title is None else f'Document "{title}"' for title in titles]
    told = "".join(f"\n\n{name}: {text}" for name, text in zip(names, texts, strict=True))
    return [*messages[:at], {**messages[at], "content": f"{told}\n\n{messages[at]['content']}"}, *messages[at + 1 :]]


def _wrapper(rendered: Rendered, specials: Sequence[str]) -> str:
    """The text between two documents, when it is the same in every gap and stands before the first one as well."""
    text, spans = rendered.text, rendered.documents
    gaps = {text[left[1] : right[0]] for left, right in pairwise(spans)}
    before, gap = text[: spans[0][0]], next(iter(gaps))
    if len(gaps) > 1 or not gap or not before.endswith(gap):
        return ""
    cut = len(before) - len(gap)
    cuts_special = any(
        before.startswith(special, at)
        for special in specials
        for at in range(max(cut - len(special) + 1, 0), cut)
        if at + len(special) > cut
    )
    return "" if cuts_special else gap


class _Shield:
    """Hides the dangerous pieces of user strings behind placeholders `<mark>number<mark>`, and puts them back.

    Dangerous are whole special tokens, and at the borders of a string anything that a neighbour could complete to one.
    Roles are left alone: templates write special tokens around them, so their alphabet is checked instead.
    """

    def __init__(self, specials: Sequence[str]) -> None:
        self._specials = [special for special in specials if special]
        longest_first = sorted(map(re.escape, self._specials), key=len, reverse=True)
        self._pattern = re.compile("|".join(longest_first)) if longest_first else None
        self._seen: set[str] = set()
        self._hidden: list[str] = []
        self._documents: dict[int, int] = {}
        """Number of the document by the number of its placeholder."""
        self._mark = ""

    def learn(self, value: Any, depth: int) -> None:
        """Takes note of every character in `value`, so that the mark can be one that does not occur."""
        if depth > DEPTH_LIMIT:
            raise InvalidRequestError("messages", f"nested deeper than {DEPTH_LIMIT}")
        if isinstance(value, str):
            self._seen.update(value)
        elif isinstance(value, Mapping):
            for key, item in cast("Mapping[Any, Any]", value).items():
                self.learn(key, depth + 1)
                self.learn(item, depth + 1)
        elif isinstance(value, list | tuple):
            for item in cast("Sequence[Any]", value):
                self.learn(item, depth + 1)
        if depth == 0:
            private = (chr(point) for point in range(0xE000, 0xF900))
            self._mark = next((mark for mark in private if mark not in self._seen), "")
            if not self._mark:
                raise InvalidRequestError("messages", "text uses every private character of Unicode")

    def hide_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of the message in which everything but the role is hidden."""
        role = message.get("role")
        if not isinstance(role, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,31}", role):
            raise InvalidRequestError("messages", f"role {str(role)[:40]!r} is not a word of letters, digits, _ and -")
        return {key: item if key == "role" else self.hide(item) for key, item in message.items()}

    def hide(self, value: Any) -> Any:
        """A copy of `value` with the dangerous pieces of its strings replaced."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, Mapping):
            items = cast("Mapping[Any, Any]", value).items()
            return {self._hide_text(key) if isinstance(key, str) else key: self.hide(item) for key, item in items}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in cast("Sequence[Any]", value)]
        return value

    def _hide_text(self, text: str) -> str:
        if self._pattern is None or not text:
            return text
        head = max((n for special in self._specials for n in _overlaps(special, text)), default=0)
        tail = max((n for special in self._specials for n in _overlaps(text, special)), default=0)
        end = max(len(text) - tail, head)
        middle = self._pattern.sub(lambda match: self._placeholder(match[0]), text[head:end])
        return self._placeholder(text[:head]) + middle + self._placeholder(text[end:])

    def hide_document(self, text: str) -> str:
        """The next document's text as one placeholder, whatever is in it."""
        self._documents[len(self._hidden)] = len(self._documents)
        return self._placeholder(text)

    def _placeholder(self, piece: str) -> str:
        if not piece:
            return ""
        self._hidden.append(piece)
        return f"{self._mark}{len(self._hidden) - 1}{self._mark}"

    def reveal(self, text: str) -> Rendered:
        """`text` with every placeholder replaced by its piece, and where those pieces lie."""
        if not self._hidden:
            return Rendered(text)
        parts = text.split(self._mark)
        if len(parts) % 2 == 0 or not all(part.isdecimal() and int(part) < len(self._hidden) for part in parts[1::2]):
            raise InvalidRequestError("messages", "the chat template cuts text that holds special tokens")
        spans: list[tuple[int, int]] = []
        documents: list[tuple[int, int, int]] = []
        start = 0
        for n, part in enumerate(parts):
            if n % 2:
                parts[n] = self._hidden[int(part)]
                spans.append((start, start + len(parts[n])))
                if int(part) in self._documents:
                    documents.append((*spans[-1], self._documents[int(part)]))
            start += len(parts[n])
        return Rendered("".join(parts), tuple(spans), tuple(documents))


def _overlaps(left: str, right: str) -> list[int]:
    """Lengths n > 0 for which the last n characters of `left` begin `right`."""
    return [n for n in range(1, min(len(left), len(right)) + 1) if left.endswith(right[:n])]


def _flatten(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose content is a list of text parts becomes one with plain text, as most templates expect."""
    content: Any = message.get("content")
    if not isinstance(content, list) or not content:
        return message
    parts = cast("list[Any]", content)
    if not all(isinstance(part, Mapping) and isinstance(cast("Any", part).get("text"), str) for part in parts):
        return message
    return {**message, "content": "\n".join(part["text"] for part in parts)}


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise InvalidRequestError("messages", f"the chat template takes longer than {TIME_LIMIT_S:g} s")
