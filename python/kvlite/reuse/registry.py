"""Names and options of every reuse method, and the numbers that the core knows methods by.

The one place where a method is looked up; a new method is its file and a line here. Errors name option, value and
range. Called by whoever checks requests, and by the runner.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from kvlite.checks import check_integer
from kvlite.errors import CapacityError, InvalidRequestError
from kvlite.reuse.attention_deviation import AttentionDeviation
from kvlite.reuse.base import ReuseMethod
from kvlite.reuse.boundary import Boundary
from kvlite.reuse.deviation import Deviation
from kvlite.reuse.hybrid import Hybrid
from kvlite.reuse.none import NoRows
from kvlite.reuse.query import Query
from kvlite.reuse.random_rows import MAX_SEED, RandomRows

MAX_METHODS = 4096
"""Methods with different options that one engine remembers."""
MAX_DECODE_ROWS = 16
MAX_GRADUAL = 8
MAX_WINDOW = 63

Check = Callable[[str, object, int], None]
"""(field, value, number of layers): raises InvalidRequestError."""


def _integer(low: int, high: int) -> Check:
    return lambda field, value, num_layers: check_integer(field, cast("int", value), low, high)


def _layer(field: str, value: object, num_layers: int) -> None:
    if num_layers < 2:
        raise InvalidRequestError(field, f"{value!r}: the model has {num_layers} layer, 2 are needed")
    check_integer(field, cast("int", value), 1, num_layers - 1)


def _flag(field: str, value: object, num_layers: int) -> None:
    if not isinstance(value, bool):
        raise InvalidRequestError(field, f"{value!r} is not true or false")


def _odd(field: str, value: object, num_layers: int) -> None:
    check_integer(field, cast("int", value), 1, MAX_WINDOW)
    if cast("int", value) % 2 == 0:
        raise InvalidRequestError(field, f"{value} is even: must be an odd number between 1 and {MAX_WINDOW}")


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    make: Callable[..., ReuseMethod]
    options: Mapping[str, Check]


METHODS: Mapping[str, Entry] = {
    "none": Entry(NoRows, {}),
    "boundary": Entry(Boundary, {}),
    "random": Entry(RandomRows, {"seed": _integer(0, MAX_SEED)}),
    "deviation": Entry(
        Deviation, {"check_layer": _layer, "max_over_layers": _flag, "gradual": _integer(1, MAX_GRADUAL)}
    ),
    "attention-deviation": Entry(
        AttentionDeviation, {"check_layer": _layer, "decode_rows": _integer(0, MAX_DECODE_ROWS)}
    ),
    "query": Entry(Query, {"hop": _flag, "window": _odd}),
    "hybrid": Entry(Hybrid, {}),
}


def resolve(name: str, options: Mapping[str, object], num_layers: int) -> ReuseMethod:
    """The method for a model of `num_layers`. Raises InvalidRequestError for an unknown name, option or value."""
    entry = METHODS.get(name) if isinstance(name, str) else None  # pyright: ignore[reportUnnecessaryIsInstance]
    if entry is None:
        raise InvalidRequestError("reuse_options.method", f"{name!r} is not one of {', '.join(METHODS)}")
    for option, value in options.items():
        field = f"reuse_options.{option}"
        check = entry.options.get(option)
        if check is None:
            known = ", ".join(entry.options) or "none"
            raise InvalidRequestError(field, f"no option of method {name}, whose options are: {known}")
        check(field, value, num_layers)
    method = entry.make(**cast("dict[str, Any]", options))
    if isinstance(method, Deviation | AttentionDeviation):
        _layer("reuse_options.check_layer", method.check_layer, num_layers)
    if isinstance(method, Deviation) and method.check_layer + method.gradual > num_layers:
        most = num_layers - method.check_layer
        raise InvalidRequestError(
            "reuse_options.gradual",
            f"{method.gradual} is out of range: from check_layer {method.check_layer} on there are {most} layers",
        )
    return method


class MethodTable:
    """Every method that an engine has been asked for, by the number that plans name it with. Safe in any thread."""

    def __init__(self) -> None:
        self._ids: dict[ReuseMethod, int] = {}
        self._methods: list[ReuseMethod] = []
        self._lock = threading.Lock()

    def intern(self, method: ReuseMethod) -> int:
        """The method's number: equal methods have one, for the life of the engine. CapacityError when full."""
        with self._lock:
            known = self._ids.get(method)
            if known is not None:
                return known
            if len(self._methods) >= MAX_METHODS:
                raise CapacityError(f"all {MAX_METHODS} reuse methods with different options are taken")
            self._methods.append(method)
            self._ids[method] = len(self._methods) - 1
            return len(self._methods) - 1

    def __getitem__(self, method_id: int) -> ReuseMethod:
        return self._methods[method_id]
