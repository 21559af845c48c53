"""What a reuse method is: how the rows of reused text are chosen that are computed again.

A method is a frozen value: its name and options. It says which scoring rounds the core plans (`rounds`), or gives every
position a score at once (`scores`), and makes the probe that scores a chunk of rows while it is computed. The core
chooses: the budget follows from ratio and lengths alone, the rows are those of the highest weight * value. Knows
neither requests nor blocks. Called by the runner (probes) and by whoever adds blended requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvlite.errors import InvalidRequestError
from kvlite.models import Probe
from kvlite.ops import KeyMassOp

Span = tuple[int, int]
"""(start, len) of a segment in the prompt, in tokens."""


class Scope(IntEnum):
    """Which rows a scoring round runs."""

    NEW = 0
    """Every row that is not reused; those behind the last reused row score, 64 at most."""
    ALL = 1
    """Every row behind the hit, in later rounds those kept so far and the new ones; all of them score."""


class Round(NamedTuple):
    """One scoring round as the core plans it."""

    scope: Scope
    cost: float
    """Share of a full forward pass that one of its rows costs."""
    ratio: float
    """Share of the reused rows that this round keeps; the last round's is the request's."""


@dataclass(frozen=True)
class ScoreEntry:
    """One sequence's part in a scoring round, in one plan."""

    rows: range
    """Scoring rows of the plan."""
    seq_row: int
    keys: range
    """Positions from the first to the last reused row."""
    round: int
    """Index in `rounds`; from len(rounds) on: the decode stage."""


@dataclass(frozen=True)
class Tools:
    """What a probe may use of the device."""

    key_mass: KeyMassOp
    links_of: Callable[[ScoreEntry], torch.Tensor]
    """Links of the entry's keys, [len(keys), 3] fp32 (links.py); 0 where a key is not reused text."""


class ReuseMethod(Protocol):
    """One method with its options; equal methods choose equal rows. Implementations are frozen dataclasses."""

    @property
    def name(self) -> str:
        """As in `METHODS`."""
        ...

    @property
    def decode_rows(self) -> int:
        """Reused rows that each decode step computes again, 0 = none."""
        ...

    def ratio(self, asked: float) -> float:
        """The recompute ratio for the core. Raises InvalidRequestError outside [0, 1]."""
        ...

    def rounds(self, num_layers: int, ratio: float) -> tuple[Round, ...]:
        """Scoring rounds, in order; none for a rule that needs no look at the model."""
        ...

    def scores(self, prompt_len: int, spans: Sequence[Span]) -> NDArray[np.float32] | None:
        """[prompt_len], higher is chosen first; only of methods without rounds. A function of lengths and options."""
        ...

    def probe(self, entry: ScoreEntry, tools: Tools) -> Probe:
        """What scores the entry's rows; only of methods with rounds."""
        ...


class Static:
    """The half of a method that looks at lengths alone."""

    @property
    def decode_rows(self) -> int:
        """None: nothing is scored, so nothing can be scored again."""
        return 0

    def ratio(self, asked: float) -> float:
        """As asked."""
        return checked_ratio(asked)

    def rounds(self, num_layers: int, ratio: float) -> tuple[Round, ...]:
        """None."""
        return ()

    def probe(self, entry: ScoreEntry, tools: Tools) -> Probe:
        """Never asked for: the core plans a score entry for a round only."""
        raise AssertionError("a method without rounds has no probe")


class Dynamic:
    """The half of a method that every method with rounds shares."""

    @property
    def decode_rows(self) -> int:
        """None, unless the method says otherwise."""
        return 0

    def ratio(self, asked: float) -> float:
        """As asked."""
        return checked_ratio(asked)

    def scores(self, prompt_len: int, spans: Sequence[Span]) -> NDArray[np.float32] | None:
        """None: the rounds find them."""
        return None


def checked_ratio(asked: float) -> float:
    """`asked`. Raises InvalidRequestError unless it is a number in [0, 1]."""
    is_number = isinstance(asked, int | float) and not isinstance(asked, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not is_number or math.isnan(asked) or not 0 <= asked <= 1:
        raise InvalidRequestError("reuse_options.recompute_ratio", f"{asked!r} is not a number between 0 and 1")
    return float(asked)
