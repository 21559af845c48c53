"""`LiveRequests`: the requests that live on this engine, by the front-end's number, each under its epoch.

Owns one reading task per request: what the engine's stream gives goes to the front-end as tokens and ends, in order.
What is said of a request while it is being started waits for it. Knows nothing of moves but their ends: `arrive`,
`leave`, `discard`. Called by worker.py and mover.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from kvlite.async_engine import AsyncEngine
from kvlite.errors import InvalidRequestError, KvliteError
from kvlite.fleet import spec
from kvlite.fleet.messages import Abort, Add, Ended, Failure, Finish, FromWorker, Refused, Scores, Tokens
from kvlite.fleet.uplink import Uplink
from kvlite.fleet.wire import OversizedError
from kvlite.output import unreadable
from kvlite.readers import RawStream
from kvlite.types import Delta, FinishReason, TokenLogprobs

log = logging.getLogger("kvlite.fleet")

Starter = Callable[[], Awaitable[RawStream]]


@dataclass(eq=False)
class Live:
    """One request here."""

    request: int
    epoch: int
    stream: RawStream
    sent: list[int]
    """Output tokens of each choice that went to the front-end, those of earlier owners included."""
    open: set[int]
    """Choices whose end was not sent."""
    progress: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever `sent` or `open` changed."""
    silent: bool = False
    """Nothing of it is said any more: it lives elsewhere."""

    @property
    def handle(self) -> int:
        """The engine's number."""
        return self.stream.handle

    async def reached(self, lengths: Sequence[int | None]) -> None:
        """Returns when so many tokens of each choice, or its end (None), went to the front-end, or it fell silent."""
        while not self.silent and any(
            index in self.open if wanted is None else self.sent[index] < wanted for index, wanted in enumerate(lengths)
        ):
            self.progress.clear()
            await self.progress.wait()


class LiveRequests:
    """`ended` hears of every request whose last choice has ended here."""

    def __init__(self, engine: AsyncEngine, uplink: Uplink) -> None:
        self.ended: Callable[[int], None] = lambda request: None
        self._engine = engine
        self._uplink = uplink
        self._live: dict[int, Live] = {}
        self._starting: dict[int, list[Callable[[Live], None]]] = {}
        """What was said of requests that are being started."""
        self._beginnings: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        uplink.on_oversized = self._oversized

    def __len__(self) -> int:
        return len(self._live) + len(self._starting)

    def get(self, request: int) -> Live | None:
        """The live request of that number."""
        return self._live.get(request)

    def add(self, message: Add) -> None:
        """Starts a request, new or replayed; says Refused when the engine does not take it."""
        try:
            request = spec.decode(self._engine.limits, message.spec)
            given = message.outputs
            outputs = None if given is None else [None if ids is None else spec.unpack_ids(ids) for ids in given]
            if outputs is not None and len(outputs) != request.params.n:
                raise InvalidRequestError("outputs", f"of {len(outputs)} choices, the request has {request.params.n}")
        except KvliteError as error:
            self._uplink.post(Refused(message.request, message.epoch, Failure.of(error)))
            return
        lengths = [0] * request.params.n if outputs is None else [None if ids is None else len(ids) for ids in outputs]
        self.begin(message.request, message.epoch, lengths, lambda: self._engine.stream_raw(request, outputs))

    def begin(self, request: int, epoch: int, lengths: Sequence[int | None], start: Starter) -> None:
        """Brings a request to life; `lengths`: its outputs so far, None for a choice that has ended."""
        older = self._live.get(request)
        if older is not None:
            self.discard(older)
        self._starting[request] = []
        self._beginnings[request] = self._spawn(self._begin(request, epoch, lengths, start))

    async def started(self, request: int) -> Live | None:
        """The live request, once it is started; None when it is not here."""
        beginning = self._beginnings.get(request)
        if beginning is not None:
            await asyncio.wait([beginning])
        return self._live.get(request)

    def abort(self, message: Abort) -> None:
        """Ends a request with reason cancelled; nothing happens when it is not here."""
        self._tell(message.request, lambda live: live.stream.abort())

    def finish(self, message: Finish) -> None:
        """Ends a choice, which keeps its first tokens; nothing happens when it lives under a newer epoch."""
        self._tell(message.request, lambda live: self._finish(live, message))

    async def leave(self, live: Live) -> None:
        """The frozen request lives elsewhere now. Raises KvliteError when the engine does not let it go."""
        self._silence(live)
        await self._engine.detach(live.handle)

    def discard(self, live: Live) -> None:
        """The request lives elsewhere, whatever this engine still does with it."""
        self._silence(live)
        live.stream.abort()

    async def idle(self) -> None:
        """Returns when every request has ended and everything of them was said."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def close(self) -> None:
        """Ends every task."""
        for task in self._tasks:
            task.cancel()

    def _silence(self, live: Live) -> None:
        live.silent = True
        live.progress.set()
        if self._live.get(live.request) is live:
            del self._live[live.request]

    def _tell(self, request: int, what: Callable[[Live], None]) -> None:
        live, waiting = self._live.get(request), self._starting.get(request)
        if waiting is not None:
            waiting.append(what)
        elif live is not None:
            what(live)

    def _finish(self, live: Live, message: Finish) -> None:
        if message.epoch >= live.epoch and message.choice < len(live.sent):
            handle, choice, kept_len = live.handle, message.choice, message.kept_len
            self._spawn(self._call_finish(handle, choice, kept_len))

    async def _call_finish(self, handle: int, choice: int, kept_len: int) -> None:
        try:
            await self._engine.call(lambda engine: engine.finish(handle, choice, kept_len))
        except InvalidRequestError as error:  # it has ended meanwhile
            log.debug("finish of %d: %s", handle, error)

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a request's task failed", exc_info=task.exception())

    async def _begin(self, request: int, epoch: int, lengths: Sequence[int | None], start: Starter) -> None:
        try:
            stream = await start()
        except KvliteError as error:
            self._uplink.post(Refused(request, epoch, Failure.of(error)))
            del self._starting[request], self._beginnings[request]
            return
        del self._beginnings[request]
        open_choices = {index for index, length in enumerate(lengths) if length is not None}
        live = Live(request, epoch, stream, [length or 0 for length in lengths], open_choices)
        self._live[request] = live
        for what in self._starting.pop(request):
            what(live)
        self._spawn(self._forward(live))

    async def _forward(self, live: Live) -> None:
        """Reads the stream to its end."""
        async for delta in live.stream:
            await self._uplink.room()
            if not live.silent:
                self._say(live, delta)

    def _say(self, live: Live, delta: Delta) -> None:
        if delta.finish_reason is FinishReason.ERROR and not self._engine.healthy:
            return  # The front-end learns it from the end of the link, and replays.
        index, asked = delta.index, bool(delta.logprobs)
        if delta.token_ids or delta.prompt_logprobs is not None:
            shown = delta.prompt_logprobs
            self._uplink.post(
                Tokens(
                    live.request,
                    live.epoch,
                    index,
                    live.sent[index],
                    list(delta.token_ids),
                    [_scores(each) for each in delta.logprobs] if asked else None,
                    None if shown is None else [None if each is None else _scores(each) for each in shown],
                )
            )
            live.sent[index] += len(delta.token_ids)
        if delta.finish_reason is not None:
            last = delta.usage is not None
            message = Ended(
                live.request, live.epoch, index, delta.finish_reason, live.sent[index], delta.error, last, delta.reuse
            )
            self._uplink.post(message)
            live.open.discard(index)
            if last:
                self._silence(live)
                self.ended(live.request)
        live.progress.set()

    def _oversized(self, message: FromWorker, error: OversizedError) -> None:
        """A message that no link takes ends its request, nothing else."""
        log.error("a message %s is too large for the link: %s", type(message).__name__, error)
        if isinstance(message, Tokens):
            self._uplink.post(Refused(message.request, message.epoch, Failure.of(error)))
            self._tell(message.request, self.discard)


def _scores(logprobs: TokenLogprobs) -> Scores:
    raw = unreadable(logprobs)
    return Scores(raw.token_id, raw.logprob, raw.rank, raw.top_ids, raw.top_logprobs)
