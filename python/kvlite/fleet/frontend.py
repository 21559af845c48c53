"""`FleetEngine`: several engines as one, for the server: it owns every stream, and no engine does.

Owns text, stop strings, dispatch and the word on who has a request (`_core.Owner`): tokens of anybody else are dropped.
A request whose engine dies is replayed on another one from what its client has already; positions have no gap and no
repeat. Knows links and messages, not how processes are started (launcher.py). One event loop; `prepare_chat`, `close`
and `stats` in any thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from kvlite import _core
from kvlite.config import EngineConfig
from kvlite.errors import CapacityError, ConfigError, EngineClosedError, EngineError, InvalidRequestError
from kvlite.fleet.links import Link
from kvlite.fleet.members import EngineState, Member
from kvlite.fleet.messages import (
    PROTOCOL,
    Ended,
    FromWorker,
    Hello,
    MessageError,
    Moved,
    Peers,
    Refused,
    Reply,
    Shutdown,
    Stats,
    Tokens,
    decode_from_worker,
)
from kvlite.fleet.moves import MoveConflictError, MoveHow, MoveReport, UnknownRequestError, decide
from kvlite.fleet.requests import Requests, now_ms
from kvlite.fleet.shelf import FleetDocuments
from kvlite.fleet.status import FleetStatus, add_stats, status_of
from kvlite.fleet.streams import Stream
from kvlite.fleet.wire import Channel, LinkError
from kvlite.prompts import ChatPrompt, ChatPrompts
from kvlite.request import RequestLimits, ValidatedRequest
from kvlite.reuse_types import Document
from kvlite.tokenizer import Message, Tokenizer
from kvlite.types import Delta, EngineStats, FinishReason, GenerationDefaults, RequestOptions, SamplingParams

TICK_S = 0.25

log = logging.getLogger("kvlite.fleet")


class FleetEngine(FleetDocuments):
    """What server/app.py needs of an engine, over workers that come and go. Made and used on one event loop."""

    def __init__(
        self, config: EngineConfig, tokenizer: Tokenizer, defaults: GenerationDefaults, num_engines: int
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.states = dict.fromkeys(range(num_engines), EngineState.STARTING)
        """Of every engine; kept by the launcher, except for UP."""
        self.on_move: Callable[[MoveReport], None] = lambda report: None
        """Hears of every move's end."""
        self.members: dict[int, Member] = {}
        """Those that are up."""
        self._pool_bytes: dict[int, int] = {}
        super().__init__(self.members, tokenizer, config.max_stored_documents)
        self._loop = asyncio.get_running_loop()
        self._defaults = defaults
        self._limits: RequestLimits | None = None
        self._model: Hello | None = None
        """What the first engine said; the others must have the same model."""
        self._draining = self._closed = False
        self._changed = asyncio.Event()
        """Set whenever a member comes or goes, or a request ends."""
        self._requests = Requests(config, tokenizer, self.members, self._changed, lambda report: self.on_move(report))
        self._ticking = self._loop.create_task(self._tick())

    # What the server reads

    @property
    def limits(self) -> RequestLimits:
        """Known once the first engine is up."""
        assert self._limits is not None, "an engine is up before anybody asks"
        return self._limits

    @property
    def healthy(self) -> bool:
        """Whether an engine is up or may come up again."""
        return not self._closed and any(state is not EngineState.GIVEN_UP for state in self.states.values())

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining or self._closed

    def stats(self) -> EngineStats:
        """Sum over the engines that are up, as each last reported; within STATS_S of now."""
        self._store.expire()
        return add_stats([member.stats for member in list(self.members.values())], len(self._store))

    def status(self) -> FleetStatus:
        """Every engine and every request under way."""
        return status_of(
            self.states, self.members, self._requests.streams, self._requests.owner, draining=self.draining
        )

    def pool_bytes(self, engine: int) -> int | None:
        """KV memory that an engine had when it was last up: what it shall have again. None: it never was."""
        return self._pool_bytes.get(engine)

    def prepare_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        documents: Sequence[Document | str] = (),
        reuse: None = None,
        **variables: Any,
    ) -> ChatPrompt:
        """As Engine's; for any thread but that of the event loop, because it tokenises."""
        prompts = ChatPrompts(self.limits, self.tokenizer, self._store)
        return prompts.prepare(messages, documents, params, options, variables)

    def stream_validated(self, request: ValidatedRequest, name: str = "") -> AsyncGenerator[Delta]:
        """Deltas as they come, wherever they are computed. `name`: what its answer is called in the API.

        Closing the iterator or cancelling its task aborts the request. Raises CapacityError or EngineClosedError now or
        from the first `anext`, EngineError from any.
        """
        self._check_accepting()
        return self._read(request, name)

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests, lets the running ones finish; False when some still run after `timeout_s`."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                while self._requests.streams or any(member.num_orders for member in self.members.values()):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def close(self, timeout_s: float = 10.0) -> None:
        """`shut`, for any thread but that of the event loop, which must be running."""
        asyncio.run_coroutine_threadsafe(self.shut(), self._loop).result(timeout_s)

    async def shut(self) -> None:
        """Ends every request with reason cancelled and tells the workers to exit. Twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._requests.end_all(FinishReason.CANCELLED)
        members = list(self.members.values())
        for member in members:
            member.post(Shutdown())
        await asyncio.gather(*(member.farewell() for member in members))
        self._ticking.cancel()
        await asyncio.gather(self._ticking, return_exceptions=True)

    # Moves

    async def move(self, name: str, to: int, how: MoveHow = MoveHow.AUTO) -> MoveReport:
        """Moves a request to another engine while its client reads on. `name`: of its answer in the API, or its number.

        Returns when the client has the first token from there, or when the move has failed: then the request goes on
        where it is. Raises UnknownRequestError, InvalidRequestError (engine), MoveConflictError (no such engine is up,
        it is being moved already).
        """
        stream = self._find(name)
        if to not in self.states:
            raise InvalidRequestError("engine", f"{to} is out of range: must be 0 to {len(self.states) - 1}")
        owner = self._requests.owner.owner(stream.id)
        if owner is not None and owner[0] == to:
            raise InvalidRequestError("engine", f"{to} has request {stream.name} already: name another engine")
        source = None if owner is None else self.members.get(owner[0])
        if to not in self.members:
            raise MoveConflictError(f"engine {to} is {self.states[to]}: no request can move there")
        if source is None or stream.ended:
            raise MoveConflictError(f"request {stream.name} is on no engine now: it is ending or waits for a replay")
        if how is MoveHow.AUTO:
            how = decide(stream, source, self.members[to])
        report = self._requests.moves.begin(stream, source, to, how)
        try:
            effects = self._requests.owner.order(stream.id, to, how is MoveHow.REPLAY, now_ms())
        except _core.InvalidArgument as error:
            self._requests.moves.forget(stream.id)
            raise MoveConflictError(f"request {stream.name} cannot be moved now: {error}") from None
        self._requests.carry(effects)
        return await asyncio.shield(report)

    def _find(self, name: str) -> Stream:
        """The request under way of that name, or of that number."""
        if name.isascii() and name.isdigit() and len(name) < 20 and int(name) in self._requests.streams:
            return self._requests.streams[int(name)]
        found = [stream for stream in self._requests.streams.values() if stream.name == name]
        if len(found) > 1:
            numbers = ", ".join(str(stream.id) for stream in found[:8])
            raise InvalidRequestError("request", f"{name[:80]!r} names {len(found)} requests: use a number, {numbers}")
        if not found:
            raise UnknownRequestError(name)
        return found[0]

    # Requests

    def _check_accepting(self) -> None:
        if self.draining:
            raise EngineClosedError
        if not self.members:
            if not self.healthy:
                raise EngineError("every engine died too often and was given up")
            raise EngineClosedError("no engine is up: one is being started")
        if not any(member.has_room for member in self.members.values()):
            limit = self.config.max_num_waiting
            raise CapacityError(f"{limit} requests are waiting at every engine, which is max_num_waiting: retry later")

    async def _read(self, request: ValidatedRequest, name: str) -> AsyncGenerator[Delta]:
        self._check_accepting()
        stream = self._requests.start(request, name)
        done = False
        try:
            while not done:
                await stream.ready.wait()
                for delta in stream.take():
                    done = delta.usage is not None
                    yield delta
        finally:
            self._requests.drop(stream)

    # Workers

    async def serve(self, link: Link) -> None:
        """Talks to one worker, from its Hello until its link ends; then its requests go on elsewhere."""
        member: Member | None = None
        why = "it said goodbye"
        try:
            async for channel, frame, _payload in link:
                if channel is Channel.MIGRATION:
                    if member is None:
                        raise MessageError("a worker spoke before its hello")
                    self._requests.carry(self._requests.owner.frame(member.id, frame, now_ms()))
                    continue
                for message in decode_from_worker(frame):
                    if member is None:
                        member = self._welcome(message, link)
                    else:
                        self._hear(member, message)
        except (LinkError, MessageError, ConfigError, _core.FrameError) as error:
            why = str(error)
        finally:
            link.close()
            if member is not None:
                self._let_go(member, why)
            elif not self._closed:
                log.warning("engine %d was not let in: %s", link.peer, why)

    def _welcome(self, hello: FromWorker, link: Link) -> Member:
        """The first message of a worker. Raises MessageError or ConfigError: it cannot belong to this fleet."""
        if not isinstance(hello, Hello):
            raise MessageError(f"a worker began with {type(hello).__name__}, must be Hello")
        if hello.protocol != PROTOCOL:
            raise MessageError(f"engine {hello.engine} speaks protocol {hello.protocol}, this front-end {PROTOCOL}")
        if hello.engine != link.peer or hello.engine not in self.states:
            raise MessageError(f"engine {hello.engine} on the link of {link.peer}: must be 0 to {len(self.states) - 1}")
        if hello.engine in self.members or self._closed:
            raise MessageError(f"engine {hello.engine} is there already, or nobody is wanted any more")
        first = self._model or hello
        for field in ("model_digest", "dtype", "vocab_size", "max_model_len", "block_size", "block_bytes"):
            mine, theirs = getattr(first, field), getattr(hello, field)
            if mine != theirs:
                raise ConfigError(field, f"engine {hello.engine} has {theirs}, engine {first.engine} {mine}")
        self._model = first
        pool = hello.pool_tokens if self._limits is None else min(self._limits.pool_tokens, hello.pool_tokens)
        self._limits = RequestLimits(
            self.config, hello.vocab_size, hello.max_model_len, pool, self._defaults, hello.num_layers
        )
        member = self.members[hello.engine] = Member(hello, link)
        self._pool_bytes[hello.engine] = hello.num_blocks * hello.block_bytes
        self.states[hello.engine] = EngineState.UP
        log.info("engine %d is up, process %d", hello.engine, hello.pid)
        self._introduce()
        self._restore(member)
        self._requests.place_orphans()
        self._changed.set()
        return member

    def _introduce(self) -> None:
        """Tells every engine where the others are."""
        addresses = {member.id: member.hello.address for member in self.members.values()}
        for member in self.members.values():
            member.post(Peers(addresses))

    def _let_go(self, member: Member, why: str) -> None:
        """A link has ended: what its engine had is replayed elsewhere."""
        del self.members[member.id]
        self.states[member.id] = EngineState.DOWN
        member.gone()
        if not self._closed:
            log.warning("engine %d is gone with %d requests: %s", member.id, len(member.requests), why)
        self._introduce()
        self._requests.carry(self._requests.owner.engine_down(member.id, now_ms()))
        self._requests.moves.engine_gone(member.id)
        self._changed.set()

    def give_up(self, engine: int) -> None:
        """The launcher will not start it again. Without any other, requests that wait for an engine end with error."""
        self.states[engine] = EngineState.GIVEN_UP
        if not self.healthy:
            self._requests.end_orphans("its engine died, and no other one is left")
        self._changed.set()

    async def until_up(self, engine: int) -> None:
        """Returns when that engine has said hello."""
        while engine not in self.members:
            self._changed.clear()
            await self._changed.wait()

    async def until_down(self, engine: int) -> None:
        """Returns when that engine's link has ended."""
        while engine in self.members:
            self._changed.clear()
            await self._changed.wait()

    def _hear(self, member: Member, message: FromWorker) -> None:
        """Any message but the first. Raises MessageError, FrameError: the engine is not to be believed any more."""
        match message:
            case Tokens():
                self._requests.tokens(member, message)
            case Ended():
                self._requests.ended(member, message)
            case Refused():
                self._requests.refused(member, message)
            case Reply():
                member.answer(message)
                self._changed.set()
            case Moved():
                self._requests.moves.sent(message)
            case Stats():
                member.stats = message
                if not message.healthy:
                    raise MessageError(f"engine {member.id} says that it is broken")
                self._requests.place_orphans()
            case Hello():
                raise MessageError(f"engine {member.id} said hello twice")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._requests.expire()
