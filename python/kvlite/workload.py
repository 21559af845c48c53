"""`Workloads`: many requests run to their ends; and the boxes in which their deltas wait for whoever reads them.

Owns who reads what comes out of a step, how much of a workload the core sees at once, and in which order it is fed; in
which order it is computed is the core's affair. Knows requests that have passed `validate`, no text. Engine is built on
it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence

from kvlite.config import EngineConfig
from kvlite.errors import CapacityError, InvalidRequestError
from kvlite.interrupts import uninterrupted
from kvlite.loop import Loop
from kvlite.request import ValidatedRequest
from kvlite.startup import Parts
from kvlite.types import Delta

VIEW_TOKENS = 1 << 25
"""Of a workload, prompt and output tokens of requests that live: 128 MiB of ids in the core, and prompts here again."""


class Workloads(Loop):
    """A loop whose deltas have readers."""

    def __init__(self, config: EngineConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self._boxes: dict[int, deque[Delta]] = {}
        """Where deltas of requests go that `stream` or `generate` reads; the others come out of `step`."""
        self._unread: list[Delta] = []
        """Came out for nobody in particular; the next `step` returns them."""
        self._unwanted: set[int] = set()
        """Aborted because their reader left."""
        self._num_workloads = 0
        """Runs of whole workloads that have not ended."""

    def step(self) -> list[Delta]:
        """One step: computes the plan at hand, commits it, makes the next; returns what came out.

        Requests added while a plan is at hand join the next one. Raises EngineError when the core is broken.
        """
        self._advance()
        deltas, self._unread = self._unread, []
        return deltas

    def _advance(self) -> None:
        """One step; deltas go where their readers look."""
        if self._plan is None:
            self._collect()
        if self._plan is not None:
            self.run_plan()
            self._collect()
        self._watch_for_stall()

    def _collect(self) -> None:
        with uninterrupted():
            for delta in self.make_plan():
                self._sort(delta)

    def _sort(self, delta: Delta) -> None:
        if delta.handle in self._boxes:
            self._boxes[delta.handle].append(delta)
        elif delta.handle not in self._unwanted:
            self._unread.append(delta)
        elif delta.usage is not None:
            self._unwanted.discard(delta.handle)

    def run(
        self, requests: Iterable[ValidatedRequest], *, is_workload: bool = False
    ) -> Generator[tuple[int, Delta | InvalidRequestError]]:
        """(number of the request, delta) as they come, or (number, why) for one that the core refuses.

        Requests are taken while the queue has room, and VIEW_TOKENS: the core sees so many at once, and any number of
        them runs in bounded memory. `is_workload`: nobody waits for a single one, so the core admits them in the order
        that shares most. Leaving early aborts the rest. Raises what `add_validated` raises when no end would make room.
        """
        self._enter_workload(is_workload)
        try:
            yield from self._run(requests)
        finally:
            self._leave_workload(is_workload)

    def _enter_workload(self, is_workload: bool) -> None:
        self._num_workloads += is_workload
        if is_workload and self._num_workloads == 1:
            self._core.set_workload(True)

    def _leave_workload(self, is_workload: bool) -> None:
        self._num_workloads -= is_workload
        if is_workload and not self._num_workloads:
            self._core.set_workload(False)

    def _run(self, requests: Iterable[ValidatedRequest]) -> Generator[tuple[int, Delta | InvalidRequestError]]:
        box: deque[Delta] = deque()
        numbers: dict[int, int] = {}
        """By handle, of those that live."""
        lengths: dict[int, int] = {}
        """Tokens of the same, by number."""
        num_tokens = 0
        coming = enumerate(requests)
        at_hand = next(coming, None)
        try:
            while numbers or at_hand is not None:
                while at_hand is not None:
                    number, request = at_hand
                    length = num_tokens_of(request)
                    if numbers and num_tokens + length > VIEW_TOKENS:
                        break
                    try:
                        if not self._try_add(request, number, numbers, box):
                            break
                        lengths[number] = length
                        num_tokens += length
                    except InvalidRequestError as error:
                        yield number, error
                    at_hand = next(coming, None)
                self._advance()
                while box:
                    delta = box.popleft()
                    number = numbers[delta.handle]
                    if delta.usage is not None:
                        del numbers[delta.handle], self._boxes[delta.handle]
                        num_tokens -= lengths.pop(number)
                    yield number, delta
        finally:
            for handle in numbers:
                self._forget(handle)

    def _try_add(self, request: ValidatedRequest, number: int, numbers: dict[int, int], box: deque[Delta]) -> bool:
        """Starts one request of a run; False when it has to wait for the end of another."""
        is_alone = not self.num_unfinished
        try:
            with uninterrupted():
                handle = self.add_validated(request)
                numbers[handle], self._boxes[handle] = number, box
        except CapacityError:
            if is_alone:
                raise
            return False
        return True

    def _forget(self, handle: int) -> None:
        """Nobody reads this request any more: it is aborted if it lives."""
        self._boxes.pop(handle, None)
        if self.abort(handle):
            self._unwanted.add(handle)


def num_tokens_of(request: ValidatedRequest) -> int:
    """Prompt and all that may be drawn."""
    return len(request.prompt_ids) + request.params.n * request.max_tokens


def feeding_order(requests: Sequence[ValidatedRequest], max_num_waiting: int) -> Sequence[int]:
    """Numbers of the requests as they are best fed to a core that sees `max_num_waiting` of them at once.

    When all fit, the order is the core's business. Otherwise prompts that begin alike come one after the other.
    """
    fits = len(requests) <= max_num_waiting and sum(map(num_tokens_of, requests)) <= VIEW_TOKENS
    numbers = range(len(requests))
    return numbers if fits else sorted(numbers, key=lambda number: requests[number].prompt_ids.tobytes())
