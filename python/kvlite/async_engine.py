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
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvlite.documents import PUBLIC_TENANT, DocumentInfo, DocumentState
from kvlite.engine import Engine
from kvlite.errors import CapacityError, EngineClosedError, EngineError, KvliteError
from kvlite.library import KEEP, check_made
from kvlite.output import Collector
from kvlite.prompts import ChatPrompt, Prompt
from kvlite.readers import Call, RawStream, StreamBuffer, wake
from kvlite.request import RequestLimits, ValidatedRequest
from kvlite.reuse_types import Document, Reuse
from kvlite.tokenizer import Message, Tokenizer
from kvlite.types import Delta, EngineStats, FinishReason, RequestOptions, RequestOutput, SamplingParams

HUNG_STEP_S = 300.0
"""A step that takes longer is reported as unhealthy."""
IDLE_WAIT_S = 0.05

T = TypeVar("T")


@dataclass(frozen=True)
class _Command:
    """Start a stream's request (None: end it)."""

    stream: StreamBuffer
    request: ValidatedRequest | None


class AsyncEngine:
    """Takes an Engine over, until `close`. May be made anywhere; `stream` and `generate` need a running event loop."""

    def __init__(self, engine: Engine) -> None:
        self.tokenizer: Tokenizer = engine.tokenizer
        self.limits: RequestLimits = engine.limits
        self._engine = engine
        self._changed = threading.Condition()
        self._commands: deque[_Command | Call[Engine, Any]] = deque()
        self._calls: list[Call[Engine, Any]] = []
        """Those that are not due yet; the engine thread's."""
        self._num_starting = 0
        self._streams: dict[int, StreamBuffer] = {}
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

    async def call(self, fn: Callable[[Engine], T], *, when: Callable[[Engine], bool] | None = None) -> T:
        """Runs `fn(engine)` on the engine thread, between two steps, and gives what it returns or raises.

        An idle thread wakes up for it. `when`: `fn` waits until it is true; it is asked on the engine thread before
        a plan is made and once more between the making of a plan and its computing, so an answer that a commit brings
        (a frozen request) is seen before the next plan is computed. Both must be quick: every request waits meanwhile.
        Cancelling the call takes it back if it has not run yet. Raises EngineClosedError or EngineError when the
        engine ends first. Call it from any event loop.
        """
        call = Call(fn, when)
        with self._changed:
            if self._closing:
                raise EngineClosedError() if self._broken is None else EngineError(self._broken)
            self._commands.append(call)
            self._changed.notify_all()
        return await asyncio.wrap_future(call.future)

    async def stream_raw(
        self, request: ValidatedRequest, outputs: Sequence[NDArray[np.int32] | None] | None = None
    ) -> RawStream:
        """Starts a raw request; returns once the engine has taken it, so the stream has a handle.

        `outputs`: it lived elsewhere and continues behind these ids, per choice; None for a choice that has ended. Its
        first delta has the id at position len(outputs[choice]). Raises CapacityError, InvalidRequestError,
        EngineClosedError (also while the engine drains).
        """
        assert request.raw, "a request with text is for `stream_validated`"
        self._check_accepting()
        return await self.adopt(lambda engine: engine.resume(request, outputs), request.params.n)

    async def adopt(self, start: Callable[[Engine], int], num_choices: int) -> RawStream:
        """The stream of a request that `start(engine)` brings to life on the engine thread; it returns the handle.

        `start` is `engine.migration.import_commit` for a request that moves here, `engine.resume` for a replay. The
        stream is there before the next step, so no delta is lost. Works while the engine drains: what was granted
        belongs here. Raises what `start` raises, and as `call`. Cancelling it aborts the request if it has begun.
        """
        stream = StreamBuffer(num_choices, asyncio.get_running_loop())

        def begin(engine: Engine) -> None:
            stream.handle = start(engine)
            self._streams[stream.handle] = stream

        try:
            await self.call(begin)
        except asyncio.CancelledError:
            self._command(stream, None)
            raise
        return RawStream(stream, lambda: self._command(stream, None))

    async def detach(self, handle: int) -> None:
        """The request lives elsewhere now: commits its export and ends its stream without a last delta.

        What was delivered before can still be read. Raises InvalidRequestError for a request that is not frozen, as
        `call` otherwise.
        """

        def leave(engine: Engine) -> None:
            engine.migration.export_commit(handle)
            stream = self._streams.pop(handle, None)
            if stream is not None:
                stream.detached = True
                wake([stream])
            with self._changed:
                self._changed.notify_all()

        await self.call(leave)

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
        stream = StreamBuffer(request.params.n, asyncio.get_running_loop())
        self._command(stream, request)
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
                self._command(stream, None)

    def _command(self, stream: StreamBuffer, request: ValidatedRequest | None) -> None:
        with self._changed:
            if request is not None:
                self._check_accepting()
                self._num_starting += 1
            elif self._closing:
                return
            self._commands.append(_Command(stream, request))
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
                self._carry_out()
                self._engine.run_plan()
        except Exception as error:  # whatever broke the engine, its readers must hear of it
            self._broken = f"the engine stopped: {error!r}"
        self._end()

    def _obey(self) -> bool:
        """Carries out the commands; sleeps while there is nothing to compute. False when the engine shall close."""
        with self._changed:
            while self._engine.is_idle and not self._commands and not self._closing:
                self._step_since = float("inf")
                waited = self._engine.num_unfinished or self._calls
                if self._changed.wait(IDLE_WAIT_S if waited else None) is False:
                    break
            self._step_since = time.monotonic()
        self._carry_out()
        return not self._closing

    def _carry_out(self) -> None:
        """What was asked of the engine thread, in order; then the calls that waited for a step."""
        with self._changed:
            commands = list(self._commands)
            self._commands.clear()
        late = self._calls
        self._calls = [call for call in late if not call.run(self._engine)]
        for command in commands:
            if isinstance(command, Call):
                if not command.run(self._engine):
                    self._calls.append(command)
            elif command.request is not None:
                self._start(command.stream, command.request)
            else:
                self._abort(command.stream)

    def _start(self, stream: StreamBuffer, request: ValidatedRequest) -> None:
        try:
            stream.handle = self._engine.add_validated(request)
            self._streams[stream.handle] = stream
        except KvliteError as error:
            stream.fail(error)
            wake([stream])
        with self._changed:
            self._num_starting -= 1
            self._changed.notify_all()

    def _abort(self, stream: StreamBuffer) -> None:
        if stream.handle is not None:
            self._engine.abort(stream.handle)

    def _deliver(self, deltas: Sequence[Delta]) -> None:
        """Hands deltas to their streams; one wake-up per event loop."""
        woken: dict[int, StreamBuffer] = {}
        for delta in deltas:
            stream = self._streams[delta.handle]
            stream.push(delta)
            woken[delta.handle] = stream
            if delta.usage is not None:
                del self._streams[delta.handle]
        for stream in wake(list(woken.values())):
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
        error = EngineClosedError() if self._broken is None else EngineError(self._broken)
        refused: list[StreamBuffer] = []
        for command in [*self._calls, *commands]:
            if isinstance(command, Call):
                command.fail(error)
            elif command.request is not None:
                command.stream.fail(error)
                refused.append(command.stream)
        self._calls.clear()
        wake(refused)
        with self._changed:
            self._changed.notify_all()
