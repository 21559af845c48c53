"""Strict JSON, and a reader that takes a JSON object apart field by field.

Owns the shape checks of a request body: type, range, and the list of what nobody read. Knows no endpoint and no engine.
Every refusal is an InvalidRequestError that names field, value and allowed range. Called by protocol.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn, TypeVar, cast

from kvlite.errors import InvalidRequestError

MAX_DEPTH = 32
"""Nesting of objects and lists in a body; a chat message needs four."""
SHOWN_CHARS = 80
"""How much of an offending value an error repeats."""

Json = Mapping[str, object]
T = TypeVar("T")


def shown(value: object) -> str:
    """`value` as JSON, cut to SHOWN_CHARS."""
    if isinstance(value, str | list | tuple | dict) and len(cast("Sequence[object]", value)) > 4 * SHOWN_CHARS:
        size = len(cast("Sequence[object]", value))
        kind = "text of" if isinstance(value, str) else "list of" if isinstance(value, list | tuple) else "object of"
        return f"{kind} {size} {'characters' if isinstance(value, str) else 'entries'}"
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "..."


def as_list(value: object) -> list[object] | None:
    """`value` when it is a list."""
    return cast("list[object]", value) if isinstance(value, list) else None


def parse_object(body: bytes) -> Json:
    """The JSON object in `body`. Refuses NaN, Infinity, duplicate keys, lone surrogates and nesting past MAX_DEPTH."""
    try:
        text = body.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise InvalidRequestError("body", f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise InvalidRequestError("body", f"nested deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        where = f"{'' if error.lineno == 1 else f'line {error.lineno} '}column {error.colno}"
        raise InvalidRequestError("body", f"not JSON at {where}: {error.msg}") from None
    except InvalidRequestError:
        raise
    except ValueError as error:
        raise InvalidRequestError("body", f"not JSON: {str(error)[:SHOWN_CHARS]}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError("body", f"must be a JSON object, not {shown(value)}")
    _check_depth_and_text(cast("object", value))
    return cast("Json", value)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise InvalidRequestError("body", f"key {shown(twice)} appears twice in one object")
    return result


def _no_constant(name: str) -> NoReturn:
    raise InvalidRequestError("body", f"{name} is not JSON: numbers must be finite")


def _check_depth_and_text(value: object) -> None:
    """Iterative, so that depth cannot exhaust the stack; linear in the number of values."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise InvalidRequestError("body", f"nested deeper than {MAX_DEPTH} levels")
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                for key, inner in cast("dict[str, object]", item).items():
                    _check_text(key)
                    below.append(inner)
            elif isinstance(item, list):
                below.extend(cast("list[object]", item))
            elif isinstance(item, str):
                _check_text(item)
        level = below


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            "body", f"lone surrogate U+{ord(text[error.start]):04X}: text must be valid Unicode"
        ) from None


class Fields:
    """One JSON object, read field by field; null counts as absent. `unread` is what nobody asked for."""

    def __init__(self, values: Json, prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix
        self._read: set[str] = set()

    def path(self, name: str) -> str:
        """Name of a field as errors spell it, such as messages[2].role."""
        return f"{self._prefix}{name}"

    def raw(self, name: str) -> object:
        """The value as it came, or None."""
        self._read.add(name)
        return self._values.get(name)

    def unread(self) -> list[str]:
        """Fields that no reader took, in the order of the body."""
        return [self.path(name) for name in self._values if name not in self._read]

    def refuse(self, name: str, value: object, allowed: str) -> NoReturn:
        """Raise for a bad value, naming what would be right."""
        raise InvalidRequestError(self.path(name), f"{shown(value)} is not allowed: must be {allowed}")

    def text(self, name: str, max_chars: int | None = None) -> str | None:
        """A string, or None when absent."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, str):
            self.refuse(name, value, "text")
        if max_chars is not None and len(value) > max_chars:
            self.refuse(name, value, f"at most {max_chars} characters")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """An integer in [low, high] (1.0 counts, as in JSON), or None when absent."""
        value = self.raw(name)
        if value is None:
            return None
        return self._checked_integer(name, value, low, high)

    def number(self, name: str, low: float, high: float) -> float | None:
        """A finite number in [low, high], or None when absent."""
        value = self.raw(name)
        if value is None:
            return None
        return self._checked_number(name, value, low, high)

    def integers(self, name: str, low: int, high: int, max_len: int) -> tuple[int, ...]:
        """A list of integers, () when absent."""
        value = self.raw(name)
        if value is None:
            return ()
        items = as_list(value)
        if items is None or len(items) > max_len:
            self.refuse(name, value, f"a list of at most {max_len} integers between {low} and {high}")
        return tuple(self._checked_integer(f"{name}[{i}]", item, low, high) for i, item in enumerate(items))

    def texts(self, name: str, max_len: int, max_bytes: int) -> tuple[str, ...]:
        """A string or a list of strings, each of 1 to max_bytes bytes of UTF-8; () when absent."""
        value = self.raw(name)
        if value is None:
            return ()
        listed = as_list(value)
        items = [value] if listed is None else listed
        allowed = f"text or a list of at most {max_len} texts of 1 to {max_bytes} bytes each"
        if len(items) > max_len:
            self.refuse(name, items, allowed)
        result: list[str] = []
        for item in items:
            if not isinstance(item, str) or not item or len(item.encode()) > max_bytes:
                self.refuse(name, item, allowed)
            result.append(item)
        return tuple(result)

    def object(self, name: str) -> Json | None:
        """A JSON object, or None when absent."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(name, value, "an object")
        return cast("Json", value)

    def choice(self, name: str, allowed: Sequence[str]) -> str | None:
        """One of the given words, or None when absent."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, str) or value not in allowed:
            self.refuse(name, value, "one of " + ", ".join(allowed))
        return value

    def bias(self, name: str, vocab_size: int, max_len: int) -> dict[int, float]:
        """{token id: number in [-100, 100]}; JSON spells the ids as text."""
        value = self.object(name)
        if value is None:
            return {}
        if len(value) > max_len:
            self.refuse(name, value, f"an object of at most {max_len} entries")
        result: dict[int, float] = {}
        for key, bias in value.items():
            if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
                self.refuse(name, key, f"keyed by token ids between 0 and {vocab_size - 1}")
            result[int(key)] = self._checked_number(f"{name}[{key}]", bias, -100.0, 100.0)
        return result

    def items(self, name: str, max_len: int) -> Iterator[tuple[Fields, object]]:
        """Entries of a required, non-empty list of objects, each as Fields."""
        value = self.raw(name)
        entries = as_list(value)
        if not entries or len(entries) > max_len:
            self.refuse(name, value, f"a list of 1 to {max_len} objects")
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict):
                self.refuse(f"{name}[{i}]", entry, "an object")
            yield Fields(cast("Json", entry), f"{self.path(name)}[{i}]."), cast("object", entry)

    def _checked_integer(self, name: str, value: object, low: int, high: int) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(name, value, f"an integer between {low} and {high}")
        return value

    def _checked_number(self, name: str, value: object, low: float, high: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.refuse(name, value, f"a number between {low:g} and {high:g}")
        if not math.isfinite(value):
            self.refuse(name, value, "a finite number")
        return float(value)
