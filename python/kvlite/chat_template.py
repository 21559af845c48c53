"""`ChatTemplate`: renders a conversation in jinja2's sandbox and remembers which text came from users.

Owns the environment (the one that Hugging Face templates expect) and the protection of user text: a piece of it that
could be, or complete, a special token is rendered as a placeholder and put back afterwards as a protected span.
jinja2 is imported at the first use. Called by tokenizer.py; knows no ids.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from kvlite.errors import InvalidRequestError, KvliteError, ModelLoadError

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


class ChatTemplate:
    """One template of a model directory."""

    def __init__(self, source: str) -> None:
        self._source = source

    @cached_property
    def compiled(self) -> jinja2.Template:
        """Made at the first use. Raises ModelLoadError."""
        import jinja2

        try:
            return _environment().from_string(self._source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            raise ModelLoadError(f"the chat template cannot be compiled: {error}") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, specials: Sequence[str], variables: Mapping[str, Any]
    ) -> Rendered:
        """The conversation as text. Raises InvalidRequestError when the template refuses or exceeds its limit."""
        is_list = isinstance(messages, Sequence) and not isinstance(messages, str)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not is_list or not all(isinstance(message, Mapping) for message in messages):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError("messages", "must be a list of objects with role and content")
        shield = _Shield(specials)
        shield.learn([_flatten(message) for message in messages], 0)
        for name in ("tools", "documents"):
            shield.learn(variables.get(name), 0)
        shielded = [shield.hide_message(_flatten(message)) for message in messages]
        extra = {name: shield.hide(variables[name]) for name in ("tools", "documents") if variables.get(name)}
        return shield.reveal(self._run({"messages": shielded, **variables, **extra}))

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
        start = 0
        for n, part in enumerate(parts):
            if n % 2:
                parts[n] = self._hidden[int(part)]
                spans.append((start, start + len(parts[n])))
            start += len(parts[n])
        return Rendered("".join(parts), tuple(spans))


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


def _timed(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _check_time()
        yield item


def _environment() -> jinja2.Environment:
    """Jinja as Hugging Face templates expect it: sandbox, loop controls, tojson, generation blocks.

    Whatever can repeat, loops and calls, looks at the clock.
    """
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes
    from jinja2.parser import Parser

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        def call(self, /, *args: Any, **kwargs: Any) -> Any:
            _check_time()
            return super().call(*args, **kwargs)

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            template = super()._parse(source, name, filename)
            for loop in template.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, "_timed", [], [], None, None, lineno=loop.lineno)
            template.set_environment(self)
            return template

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks assistant text for training; here it is transparent."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    filters = cast("dict[str, Any]", environment.filters)
    filters.update(tojson=tojson, _timed=_timed)
    variables = cast("dict[str, Any]", environment.globals)
    variables.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment
