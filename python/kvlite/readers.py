"""Between the engine thread and its readers: `StreamBuffer`, `RawStream`, and `Call` for everything else.

Owns what one reader has not taken yet, bounded by merging deltas of a choice, and the way answers get from the engine
thread to an event loop. Knows no engine. Called by async_engine.py.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from kvlite.errors import KvliteError
from kvlite.types import Delta

BUFFERED_DELTAS = 32
"""Deltas that a choice keeps apart for its reader; then they become one."""

E = TypeVar("E")
T = TypeVar("T")


class StreamBuffer:
    """What one reader has not taken yet. Filled by the engine thread, emptied by the reader's loop."""

    def __init__(self, num_choices: int, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.handle: int | None = None
        self.ready = asyncio.Event()
        self.detached = False
        """Set by the engine thread when the request went elsewhere: nothing more is pushed."""
        self._lock = threading.Lock()
        self._deltas: list[list[Delta]] = [[] for _ in range(num_choices)]
        self._error: KvliteError | None = None

    def push(self, delta: Delta) -> None:
        """The engine thread's; `wake` comes next."""
        with self._lock:
            waiting = self._deltas[delta.index]
            waiting.append(delta)
            if len(waiting) > BUFFERED_DELTAS:
                self._deltas[delta.index] = [_merge(waiting)]

    def fail(self, error: KvliteError) -> None:
        """What the reader gets once everything before is taken."""
        with self._lock:
            self._error = error

    def take(self) -> list[Delta]:
        """Everything so far, the request's last delta last. Raises what `fail` was given once that is empty."""
        with self._lock:
            self.ready.clear()
            taken = [delta for waiting in self._deltas for delta in waiting]
            for waiting in self._deltas:
                waiting.clear()
            if not taken and self._error is not None:
                raise self._error
            return sorted(taken, key=lambda delta: delta.usage is not None)


class RawStream:
    """Deltas of one raw request (ids and log-probabilities; `text` is empty) for the one task that reads them.

    Ends after the delta that has `usage`, or without one once the request was detached.
    """

    def __init__(self, buffer: StreamBuffer, abort: Callable[[], None]) -> None:
        assert buffer.handle is not None, "a raw stream is made once its request has a handle"
        self.handle: int = buffer.handle
        """The engine's number of the request, for `Engine.migration`, `Engine.finish` and `AsyncEngine.detach`."""
        self._buffer = buffer
        self._abort = abort
        self._taken: deque[Delta] = deque()
        self._done = False

    def __aiter__(self) -> RawStream:
        return self

    async def __anext__(self) -> Delta:
        while not self._taken:
            if self._done:
                raise StopAsyncIteration
            await self._buffer.ready.wait()
            detached = self._buffer.detached
            self._taken.extend(self._buffer.take())
            self._done = detached or (bool(self._taken) and self._taken[-1].usage is not None)
        return self._taken.popleft()

    def abort(self) -> None:
        """Ends the request with reason cancelled at the next step; nothing happens when it has ended or left."""
        self._abort()


class Call(Generic[E, T]):
    """A function for the engine thread, and where its answer goes."""

    def __init__(self, fn: Callable[[E], T], when: Callable[[E], bool] | None) -> None:
        self.future: Future[T] = Future()
        self._fn = fn
        self._when = when

    def run(self, engine: E) -> bool:
        """Runs it if it is due; False when it must be asked again after the next step."""
        try:
            if self._when is not None and not self.future.cancelled() and not self._when(engine):
                return False
        except Exception as error:  # whoever called must hear of it, not the engine
            self.fail(error)
            return True
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self._fn(engine))
            except Exception as error:  # as above
                self.future.set_exception(error)
        return True

    def fail(self, error: Exception) -> None:
        """Ends a call that has not run."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


def wake(buffers: list[StreamBuffer]) -> list[StreamBuffer]:
    """Tells the readers that something is there; returns those whose event loop is gone."""
    gone: list[StreamBuffer] = []
    for loop in {buffer.loop for buffer in buffers}:
        mine = [buffer for buffer in buffers if buffer.loop is loop]
        try:
            loop.call_soon_threadsafe(_set_ready, mine)
        except RuntimeError:  # the loop is closed
            gone += mine
    return gone


def _set_ready(buffers: list[StreamBuffer]) -> None:
    for buffer in buffers:
        buffer.ready.set()


def _merge(deltas: list[Delta]) -> Delta:
    """Consecutive deltas of one choice as one."""
    first, last = deltas[0], deltas[-1]
    return Delta(
        handle=last.handle,
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(id for delta in deltas for id in delta.token_ids),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        error=last.error,
        usage=last.usage,
        prompt_logprobs=first.prompt_logprobs,
        reuse=last.reuse,
    )
