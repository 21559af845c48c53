"""`EngineStream`: the deltas of one request of an embedded engine, as an iterator that survives a move.

Owns what its reader has not taken. Knows of an engine three functions, `Home`; a move gives it another home. Made by
`Engine.stream`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvlite.request import ValidatedRequest
from kvlite.types import Delta


@dataclass(frozen=True, eq=False)
class Home:
    """One engine, as its streams see it."""

    open: Callable[[EngineStream, ValidatedRequest], int]
    """Starts the request, whose deltas go to the stream's `box`; returns the handle."""
    advance: Callable[[], None]
    """One step."""
    forget: Callable[[int], None]
    """Nobody reads that request any more."""


class EngineStream(Iterator[Delta]):
    """Each `next` steps the engine that has the request; closing or dropping the stream aborts it."""

    def __init__(self, home: Home, request: ValidatedRequest) -> None:
        self.home = home
        self.handle: int | None = None
        """The request's number on its engine; None before the first `next`. A move changes it."""
        self.box: deque[Delta] = deque()
        """Came out and was not taken yet."""
        self._request = request
        self._done = False

    def __next__(self) -> Delta:
        if self._done:
            raise StopIteration
        try:
            if self.handle is None:
                self.handle = self.home.open(self, self._request)
            while not self.box:
                self.home.advance()
        except BaseException:
            self.close()
            raise
        delta = self.box.popleft()
        if delta.usage is not None:
            self.close()
        return delta

    def close(self) -> None:
        """Ends the request if it lives. Twice is fine."""
        if not self._done:
            self._done = True
            if self.handle is not None:
                self.home.forget(self.handle)

    def __del__(self) -> None:
        self.close()
