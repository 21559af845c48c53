"""Why a benchmark stops, in one sentence. `python -m bench` prints a `BenchError` and ends with status 1."""

from __future__ import annotations


class BenchError(Exception):
    """The run cannot go on, or its figures would be wrong; the text says what to change."""


class MissingError(BenchError):
    """A package that some figures need is not here; the others can be had."""


class TargetError(Exception):
    """One engine cannot be measured; the others can."""
