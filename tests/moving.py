"""Two embedded engines, and a request that moves between them at chosen steps; what comes out, what is left behind."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from kvlite import Delta, Engine, InvalidRequestError, RequestOutput
from kvlite.migration import How, MigrationReport
from kvlite.output import Collector
from kvlite.request import ValidatedRequest

STEPS_MAX = 1000


class Journey:
    """One request, added to the first engine; `step` steps the engine that has it."""

    def __init__(self, engines: Sequence[Engine], request: ValidatedRequest) -> None:
        self.engines = engines
        self.at = 0
        self.reports: list[MigrationReport] = []
        self.deltas: list[Delta] = []
        self.ended = False
        self.handle = engines[0].add_validated(request)
        self._collector = Collector(request)

    @property
    def here(self) -> Engine:
        return self.engines[self.at]

    def step(self) -> None:
        """One step of the engine that has the request; deltas of other requests are dropped."""
        self._take(self.here.step())

    def move(self, how: How = "auto") -> bool:
        """To the next engine; False when the request ended in the step that the move waited for."""
        source, target = self.here, self.engines[1 - self.at]
        try:
            report = source.migrate(self.handle, target, how=how)
        except InvalidRequestError as error:
            assert "has ended" in str(error)
            self._take(source._unread)
            source._unread.clear()
            assert self.ended
            return False
        self._take(source._unread)
        source._unread.clear()
        self.reports.append(report)
        self.at, self.handle = 1 - self.at, report.handle
        return True

    def finish(self) -> RequestOutput:
        for _ in range(STEPS_MAX):
            if self.ended:
                return self._collector.output()
            self.step()
        raise AssertionError("the request never ends")

    def _take(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if delta.handle == self.handle:
                assert not self.ended, "nothing follows the end"
                self.deltas.append(delta)
                self.ended = self._collector.push(delta)


def travel(
    engines: Sequence[Engine], request: ValidatedRequest, moves: Collection[int], how: How = "auto"
) -> tuple[RequestOutput, Journey]:
    """Runs a request to its end, moving it before the steps in `moves` (0: at once, when it is only queued)."""
    journey = Journey(engines, request)
    for step in range(STEPS_MAX):
        if journey.ended or (step in moves and not journey.move(how)):
            break
        journey.step()
    return journey.finish(), journey


def clear(engines: Sequence[Engine]) -> None:
    for engine in engines:
        engine.clear_cache()


def assert_clean(engines: Sequence[Engine]) -> None:
    """Nothing is left of any request: every block is free, cached or pinned, every invariant holds."""
    for engine in engines:
        # An end that the engine gave (a stop string) reaches the core with the next plan, its blocks with one more.
        for _ in range(3):
            engine.step()
        assert engine.num_unfinished == 0 and engine.is_idle
        engine._core.audit()
        stats: Any = engine._core.stats()
        assert stats["in_transfer_blocks"] == 0 and stats["num_requests"] == 0
        assert stats["owned_blocks"] == stats["pinned_blocks"]
        assert stats["free_blocks"] + stats["cached_blocks"] + stats["owned_blocks"] == engine.startup.num_blocks
        assert not engine._inflight._requests and not engine._runner.captured and not engine._twins._sampled
