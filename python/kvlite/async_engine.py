"""`AsyncEngine`: one Engine on a thread of its own, streams for any number of asyncio tasks.

Owns the engine thread, the command queue into it and one bounded buffer per stream out of it. A reader that leaves, in
any phase, aborts its request; a slow one gets fewer, larger deltas. Nothing else may touch the Engine meanwhile.
Called by the server and by users with an event loop.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from kvlite.documents import PUBLIC_TENANT, DocumentInfo, DocumentState
from kvlite.engine import ChatPrompt, Engine, Prompt
from kvlite.errors import CapacityError, EngineClosedError, EngineError, KvliteError
from kvlite.library import KEEP, check_made
from kvlite.output import Collector
from kvlite.request import RequestLimits, ValidatedRequest
from kvlite.reuse_types import Document, Reuse
from kvlite.tokenizer import Message, Tokenizer
from kvlite.types import Delta, EngineStats, FinishReason, RequestOptions, RequestOutput, SamplingParams

BUFFERED_DELTAS = 32
"""Deltas that a choice keeps apart for its reader; then they become one."""
HUNG_STEP_S = 300.0
"""A step that takes longer is reported as unhealthy."""
IDLE_WAIT_S = 0.05


class _Stream:
    """What one reader has not taken yet. Filled by the engine thread, emptied by the reader's loop."""

    def __init__(self, request: ValidatedRequest, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self.loop = loop
        self.handle: int | None = None
        self.ready = asyncio.Event()
        self._lock = threading.Lock()
        self._deltas: list[list[Delta]] = [[] for _ in range(request.params.n)]
        self._error: KvliteError | None = None

    def push(self, delta: Delta) -> None:
        with self._lock:
            waiting = self._deltas[delta.index]
            waiting.append(delta)
            if len(waiting) > BUFFERED_DELTAS:
                self._deltas[delta.index] = [_merge(waiting)]

    def fail(self, error: KvliteError) -> None:
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


@dataclass(frozen=True)
class _Command:
    """Start a stream's request, or end it."""

    stream: _Stream
    start: bool


class AsyncEngine:
    """Takes an Engine over, until `close`. May be made anywhere; `stream` and `generate` need a running event loop."""

    def __init__(self, engine: Engine) -> None:
        self.tokenizer: Tokenizer = engine.tokenizer
        self.limits: RequestLimits = engine.limits
        self._engine = engine
        self._changed = threading.Condition()
        self._commands: deque[_Command] = deque()
        self._num_starting = 0
        self._streams: dict[int, _Stream] = {}
        self._draining = False
        self._closing = False
        self._broken: str | None = None
        self._step_since = time.monotonic()
        self._thread = threading.Thread(target=self._serve, name="kvlite-engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the engine thread runs, is not broken, and no step hangs."""
        return self._thread.is_alive() and self._broken is None and time.monotonic() - self._step_since < HUNG_STEP_S

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining or self._closing

    def stats(self) -> EngineStats:
        """Counters and gauges of now."""
        self._engine.library.expire()
        return self._engine.stats()

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        reuse: Reuse | None = None,
    ) -> AsyncGenerator[Delta]:
        """Deltas as they come; the last one has `usage`. Checked now, started by the first `anext`.

        Closing the iterator or cancelling its task aborts the request. Raises InvalidRequestError, CapacityError or
        EngineClosedError now; the latter two may also come from the first `anext`, EngineError from any.
        """
        return self.stream_validated(self._engine.validate(prompt, params, options, reuse=reuse))

    def stream_validated(self, request: ValidatedRequest) -> AsyncGenerator[Delta]:
        """`stream` for a request that has passed `validate`."""
        self._check_accepting()
        return self._stream(request)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        reuse: Reuse | None = None,
    ) -> RequestOutput:
        """One whole request; cancelling the call aborts it."""
        request = self._engine.validate(prompt, params, options, reuse=reuse)
        collector = Collector(request)
        async for delta in self._stream(request):
            collector.push(delta)
        return collector.output()

    def prepare_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        documents: Sequence[Document | str] = (),
        reuse: Reuse | None = None,
        **variables: Any,
    ) -> ChatPrompt:
        """As Engine's; for any thread but that of an event loop, because it tokenises."""
        return self._engine.prepare_chat(messages, params, options, documents=documents, reuse=reuse, **variables)

    async def create_document(
        self,
        document: Document,
        *,
        tenant: int = 0,
        public: bool = False,
        pinned: bool = False,
        ttl_s: float | None = None,
    ) -> DocumentInfo:
        """Computes a document's KV and keeps the document by its id; returns when it is ready.

        One of the same id is replaced. Cancelling the call ends it. Raises InvalidRequestError (document.text,
        document.id, ttl_s), CapacityError when store or pool have no room.
        """
        self._check_accepting()
        owner = PUBLIC_TENANT if public else tenant
        library = self._engine.library
        library.expire()
        stored, order = await asyncio.to_thread(library.prepare, document, tenant=owner, pinned=pinned, ttl_s=ttl_s)
        await self._make(order)
        return library.put(stored)

    def get_document(self, tenant: int, id: str) -> DocumentInfo | None:
        """The tenant's own document of that id, else the public one."""
        return self._engine.library.get(tenant, id)

    def list_documents(self, tenant: int) -> list[DocumentInfo]:
        """The tenant's own and the public ones, oldest first."""
        return self._engine.library.list(tenant)

    async def update_document(
        self, tenant: int, id: str, *, public: bool = False, pinned: bool | None = None, ttl_s: float | None = KEEP
    ) -> DocumentInfo | None:
        """Pins, unpins, sets or clears the time to live; None when there is no such document.

        One that is pinned while its KV is not there is computed first. Raises InvalidRequestError or CapacityError.
        """
        library = self._engine.library
        changed = library.change(PUBLIC_TENANT if public else tenant, id, pinned, ttl_s)
        if changed is None:
            return None
        if pinned and library.state(changed.tenant, changed.token_ids) is DocumentState.EVICTED:
            await self._make(library.order(changed))
        return library.info(changed)

    async def delete_document(self, tenant: int, id: str, *, public: bool = False) -> bool:
        """Forgets a document and its KV; requests that use it go on. False when there is no such document."""
        return self._engine.library.delete(PUBLIC_TENANT if public else tenant, id)

    async def _make(self, order: ValidatedRequest) -> None:
        async for delta in self._stream(order):
            if delta.finish_reason is FinishReason.CANCELLED and self.draining:
                raise EngineClosedError
            check_made(delta)

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests, lets the running ones finish; False when some still run after `timeout_s`."""
        self._draining = True
        return await asyncio.to_thread(self._wait_until_idle, timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends every request with reason cancelled and stops the thread. Twice is fine; waits for the step at hand."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    async def _stream(self, request: ValidatedRequest) -> AsyncGenerator[Delta]:
        stream = _Stream(request, asyncio.get_running_loop())
        self._command(stream, start=True)
        done = False
        try:
            while not done:
                await stream.ready.wait()
                for delta in stream.take():
                    done = delta.usage is not None
                    yield delta
        except KvliteError:
            done = True
            raise
        finally:
            if not done:
                self._command(stream, start=False)

    def _command(self, stream: _Stream, start: bool) -> None:
        with self._changed:
            if start:
                self._check_accepting()
                self._num_starting += 1
            elif self._closing:
                return
            self._commands.append(_Command(stream, start))
            self._changed.notify_all()

    def _check_accepting(self) -> None:
        if self._broken is not None:
            raise EngineError(self._broken)
        if self.draining:
            raise EngineClosedError
        limit = self._engine.config.max_num_waiting
        if self._num_starting + self._engine.num_waiting >= limit:
            raise CapacityError(f"{limit} requests are waiting, which is max_num_waiting: retry later")

    def _wait_until_idle(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._num_starting and not self._streams, timeout_s)

    def _serve(self) -> None:
        try:
            while self._obey():
                self._deliver(self._engine.make_plan())
                self._engine.run_plan()
        except Exception as error:  # whatever broke the engine, its readers must hear of it
            self._broken = f"the engine stopped: {error!r}"
        self._end()

    def _obey(self) -> bool:
        """Carries out the commands; sleeps while there is nothing to compute. False when the engine shall close."""
        with self._changed:
            while self._engine.is_idle and not self._commands and not self._closing:
                self._step_since = float("inf")
                if self._changed.wait(IDLE_WAIT_S if self._engine.num_unfinished else None) is False:
                    break
            self._step_since = time.monotonic()
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            self._start(command.stream) if command.start else self._abort(command.stream)
        return not self._closing

    def _start(self, stream: _Stream) -> None:
        try:
            stream.handle = self._engine.add_validated(stream.request)
            self._streams[stream.handle] = stream
        except KvliteError as error:
            stream.fail(error)
            _wake([stream])
        with self._changed:
            self._num_starting -= 1
            self._changed.notify_all()

    def _abort(self, stream: _Stream) -> None:
        if stream.handle is not None:
            self._engine.abort(stream.handle)

    def _deliver(self, deltas: Sequence[Delta]) -> None:
        """Hands deltas to their streams; one wake-up per event loop."""
        woken: dict[int, _Stream] = {}
        for delta in deltas:
            stream = self._streams[delta.handle]
            stream.push(delta)
            woken[delta.handle] = stream
            if delta.usage is not None:
                del self._streams[delta.handle]
        for stream in _wake(list(woken.values())):
            self._abort(stream)
        if woken and not self._streams:
            with self._changed:
                self._changed.notify_all()

    def _end(self) -> None:
        """Ends every stream: cancelled when the engine was closed, error when it broke."""
        with self._changed:
            self._closing = True
            commands = list(self._commands)
            self._commands.clear()
            self._num_starting = 0
        reason = FinishReason.CANCELLED if self._broken is None else FinishReason.ERROR
        self._deliver(self._engine.close(reason, self._broken))
        refused = [command.stream for command in commands if command.start]
        for stream in refused:
            stream.fail(EngineClosedError() if self._broken is None else EngineError(self._broken))
        _wake(refused)
        with self._changed:
            self._changed.notify_all()


def _wake(streams: list[_Stream]) -> list[_Stream]:
    """Tells the readers that something is there; returns those whose event loop is gone."""
    gone: list[_Stream] = []
    for loop in {stream.loop for stream in streams}:
        mine = [stream for stream in streams if stream.loop is loop]
        try:
            loop.call_soon_threadsafe(_set_ready, mine)
        except RuntimeError:  # the loop is closed
            gone += mine
    return gone


def _set_ready(streams: list[_Stream]) -> None:
    for stream in streams:
        stream.ready.set()


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
