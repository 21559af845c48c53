"""Checks of single values: a number, an integer, a flag; the error names field, value and range.

Owns the wording of range errors; knows no field. Called by every class that users fill in.
"""

from __future__ import annotations

import math
import reprlib

from kvlite.errors import InvalidRequestError

INT32_MAX = (1 << 31) - 1


def check_number(param: str, value: float | None, low: float, high: float, *, optional: bool = False) -> None:
    """Raises InvalidRequestError unless `value` is a finite number in [low, high], or None where that is allowed."""
    if value is None and optional:
        return
    is_finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if value is None or isinstance(value, bool) or not is_finite:
        raise InvalidRequestError(param, f"{reprlib.repr(value)} is not a finite number between {low:g} and {high:g}")
    if not low <= value <= high:
        raise InvalidRequestError(param, f"{reprlib.repr(value)} is out of range: must be between {low:g} and {high:g}")


def check_integer(param: str, value: int | None, low: int, high: int, *, optional: bool = False) -> None:
    """Raises InvalidRequestError unless `value` is an integer in [low, high], or None where that is allowed."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidRequestError(param, f"{reprlib.repr(value)} is not an integer between {low} and {high}")
    if not low <= value <= high:
        raise InvalidRequestError(param, f"{reprlib.repr(value)} is out of range: must be between {low} and {high}")


def check_flag(param: str, value: bool) -> None:
    """Raises InvalidRequestError unless `value` is True or False."""
    if not isinstance(value, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidRequestError(param, f"{reprlib.repr(value)} is not true or false")
