"""`Requests`: every request under way in a fleet, which engine has it, and where it goes when that one dies.

Owns the streams and the word on who owns each request (`_core.Owner`): tokens of anybody else are dropped, and whoever
speaks out of turn is told so. A replay begins behind what the client has; one that finds no engine waits for one. Knows
members and messages, neither links nor HTTP. One event loop. Called by frontend.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvlite import _core
from kvlite.config import EngineConfig
from kvlite.errors import CapacityError, InvalidRequestError
from kvlite.fleet.members import Member
from kvlite.fleet.messages import Abort, Add, Ended, Finish, MessageError, Refused, Scores, Tokens
from kvlite.fleet.moves import MoveReport, Moves
from kvlite.fleet.spec import encode
from kvlite.fleet.streams import Stream
from kvlite.fleet.wire import OversizedError
from kvlite.request import ValidatedRequest
from kvlite.runner.sampler import choice_seed
from kvlite.tokenizer import Tokenizer
from kvlite.types import FinishReason

REPLAYS_MAX = 8
"""Of one request: it may be what its engines die of."""
LAST_WORD_S = 5.0
"""How long a request that a stop string ended waits for its engine's report of what it reused."""

log = logging.getLogger("kvlite.fleet")


class Requests:
    """`members` is the living engines by number, and changes. `tell` hears of every move's end."""

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer,
        members: Mapping[int, Member],
        changed: asyncio.Event,
        tell: Callable[[MoveReport], None],
    ) -> None:
        self.owner = _core.Owner()
        self.streams: dict[int, Stream] = {}
        self.moves = Moves(tell)
        self._config = config
        self._tokenizer = tokenizer
        self._members = members
        self._changed = changed
        """Set whenever a request ends."""
        self._orphans: set[int] = set()
        """Requests that wait for an engine to be replayed on."""
        self._refused: set[int] = set()
        """Replays that their new engine had no room for yet: it is asked again."""
        self._num_added = 0

    def start(self, request: ValidatedRequest, name: str) -> Stream:
        """Sends a new request to the engine with the fewest; there must be room. Raises InvalidRequestError."""
        self._num_added += 1
        given = request.params.seed
        seed = given if given is not None else choice_seed(self._config.seed, self._num_added)
        stream = Stream(self._num_added, name or str(self._num_added), request, seed, self._tokenizer)
        member = self._choose()
        assert member is not None, "there is room, or nothing is accepted"
        # A claim must not overtake scores that only the old engine has, the prompt's neither.
        wants_scores = request.params.logprobs is not None or request.params.prompt_logprobs is not None
        epoch = self.owner.add(stream.id, member.id, request.params.n, wants_scores)
        self.streams[stream.id] = stream
        try:
            self._add(stream, member, epoch, None)
        except InvalidRequestError:
            self.conclude(stream)
            raise
        return stream

    def _choose(self, preferred: int = -1) -> Member | None:
        """Where the next request goes: `preferred` if it can, else to the engine with the fewest unfinished ones."""
        able = [member for member in self._members.values() if member.has_room]
        wanted = [member for member in able if member.id == preferred]
        return min(wanted or able, key=lambda member: (len(member.requests), member.id), default=None)

    def _add(self, stream: Stream, member: Member, epoch: int, outputs: list[bytes | None] | None) -> None:
        """Sends a request to its engine. Raises InvalidRequestError for one that no link takes."""
        spec = encode(stream.request, stream.seed, timeout_s=stream.time_left_s)
        try:
            member.post(Add(stream.id, epoch, spec, outputs))
        except OversizedError as error:
            raise InvalidRequestError("prompt", f"is too large for a link between processes: {error}") from None
        member.requests.add(stream.id)

    def drop(self, stream: Stream) -> None:
        """The reader has what it wants: a request that still runs is aborted, wherever it is or goes."""
        if stream.id not in self.streams:
            return
        owner, to = self.owner.owner(stream.id), self.owner.moving(stream.id)
        for engine in {None if owner is None else owner[0], to}:
            if engine is not None and engine in self._members:
                self._members[engine].post(Abort(stream.id))
        self.conclude(stream)

    def conclude(self, stream: Stream) -> None:
        """Forgets a request; what anybody says of it later is dropped or denied."""
        del self.streams[stream.id]
        self._orphans.discard(stream.id)
        self._refused.discard(stream.id)
        self.owner.remove(stream.id)
        for member in self._members.values():
            member.requests.discard(stream.id)
        self.moves.stream_over(stream.id)
        self.carry(self.owner.due())
        self._changed.set()

    def replay(self, request: int, preferred: int = -1) -> None:
        """Starts a request again, behind what its client has. Without an engine that can take it, it waits for one."""
        stream = self.streams.get(request)
        self._refused.discard(request)
        if stream is None:
            return
        stream.settle()
        if stream.num_replays >= REPLAYS_MAX and not stream.ended:
            stream.end_all(FinishReason.ERROR, f"its engine died {stream.num_replays + 1} times")
        if stream.ended:
            stream.close(None)
            self.conclude(stream)
            return
        member = self._choose(preferred)
        if member is None:
            self._orphans.add(request)
            return
        self._orphans.discard(request)
        stream.num_replays += 1
        epoch = self.owner.replay(request, member.id)
        log.info("request %s goes on at engine %d behind %d tokens", stream.name, member.id, stream.num_tokens)
        try:
            self._add(stream, member, epoch, stream.outputs())
        except InvalidRequestError as error:
            stream.end_all(FinishReason.ERROR, str(error))
            self.conclude(stream)
        self.carry(self.owner.due())

    def tokens(self, member: Member, message: Tokens) -> None:
        """What an engine has sampled. Raises MessageError or FrameError for what no engine may say."""
        request, index = message.request, message.choice
        stream = self.streams.get(request)
        if not self._speaks_for(member, request, message.epoch) or stream is None:
            return
        scores, wanted = message.logprobs, stream.request.params.logprobs is not None
        if any(id >= member.hello.vocab_size for id in message.ids) or index >= stream.request.params.n:
            raise MessageError(f"engine {member.id} gave a token or a choice that there is not")
        if (message.ids and wanted != (scores is not None)) or (scores is not None and len(scores) != len(message.ids)):
            raise MessageError(f"engine {member.id} gave {len(scores or ())} log-probabilities of {len(message.ids)}")
        if message.prompt_logprobs is not None:
            stream.show_prompt(message.prompt_logprobs)
        at, count = self.owner.tokens(request, member.id, message.epoch, index, message.position, len(message.ids))
        if count:
            self._push(stream, index, message.ids[at : at + count], None if scores is None else scores[at : at + count])
            assert stream.token_at is not None, "it has just got some"
            self.moves.token(request, stream.token_at)
        self.carry(self.owner.due())

    def _push(self, stream: Stream, index: int, ids: list[int], scores: list[Scores] | None) -> None:
        """Tokens of the owner, in order; a stop string in them ends the choice here, and its engine is told."""
        if not stream.is_open(index):
            return
        kept_len = stream.push(index, ids, scores)
        owner = self.owner.owner(stream.id)
        if kept_len is None or owner is None:
            return
        self.owner.finish(stream.id, owner[0], owner[1], index)
        if owner[0] in self._members:
            self._members[owner[0]].post(Finish(stream.id, owner[1], index, kept_len))

    def ended(self, member: Member, message: Ended) -> None:
        """A choice has ended at its engine. Raises MessageError."""
        stream = self.streams.get(message.request)
        if not self._speaks_for(member, message.request, message.epoch) or stream is None:
            return
        index = message.choice
        if index >= stream.request.params.n or (stream.is_open(index) and message.num_tokens > stream.length(index)):
            raise MessageError(f"engine {member.id} ended a choice that there is not, or before its last tokens")
        if self.owner.finish(message.request, member.id, message.epoch, index) and stream.is_open(index):
            stream.end(index, message.reason, message.error)
        if message.last and stream.ended:
            stream.close(message.reuse)
            self.conclude(stream)
        else:
            self.carry(self.owner.due())

    def refused(self, member: Member, message: Refused) -> None:
        """An engine did not take a request, or gave it up: a replay without room is tried again, others fail."""
        stream = self.streams.get(message.request)
        if not self._speaks_for(member, message.request, message.epoch) or stream is None:
            return
        error = message.failure.error()
        if message.epoch and isinstance(error, CapacityError):
            self._refused.add(message.request)
            return
        stream.fail(error)
        self.conclude(stream)

    def _speaks_for(self, member: Member, request: int, epoch: int) -> bool:
        """Whether an engine owns a request under that epoch; one that does not is told so."""
        effects = self.owner.fence(request, member.id, epoch)
        self.carry(effects)
        return not effects

    def carry(self, effects: Sequence[tuple[Any, ...]]) -> None:
        """Carries out what `_core.Owner` decided, in order."""
        for effect in effects:
            match effect[0]:
                case _core.Owner.SEND:
                    if effect[1] in self._members:
                        self._members[effect[1]].post_frame(effect[2])
                case _core.Owner.SWITCH:
                    self._switch(*effect[1:])
                case _core.Owner.DELIVER:
                    _, request, index, _position, ids = effect
                    if request in self.streams:
                        self._push(self.streams[request], index, list(ids), None)
                case _core.Owner.REPLAY:
                    self.replay(*effect[1:])
                case _core.Owner.MOVED:
                    _, request, result, _to, stages, blocks, reason = effect
                    self.moves.ended(request, result, stages, blocks, reason)
                case _:
                    raise AssertionError(f"the owner has no effect {effect[0]}")

    def _switch(self, request: int, engine: int, epoch: int) -> None:
        """A request has changed hands, or its epoch: the new owner hears which choices have been cut meanwhile."""
        self.moves.switched(request, engine)
        self._orphans.discard(request)
        for member in self._members.values():
            member.requests.discard(request)
        stream, member = self.streams.get(request), self._members.get(engine)
        if member is None:
            return
        if stream is None:
            member.post(Abort(request))
            return
        member.requests.add(request)
        for index, kept_len in stream.stopped.items():
            member.post(Finish(request, epoch, index, kept_len))

    def place_orphans(self) -> None:
        """Replays those that waited for an engine, oldest first."""
        for request in sorted(self._orphans):
            self.replay(request)
        for request in sorted(self._refused):
            engine, epoch = self.owner.owner(request) or (-1, 0)
            if engine in self._members:
                self._refused.discard(request)
                self._add(self.streams[request], self._members[engine], epoch, self.streams[request].outputs())

    def expire(self) -> None:
        """What waits for time alone: those without an engine past their deadline, ends whose report is owed."""
        now = time.monotonic()
        self.place_orphans()
        for stream in list(self.streams.values()):
            if stream.id in self._orphans | self._refused and now >= stream.deadline:
                stream.end_all(FinishReason.TIMEOUT)
                self.conclude(stream)
            elif stream.ended_at is not None and now - stream.ended_at > LAST_WORD_S:
                stream.close(None)
                self.drop(stream)

    def end_orphans(self, error: str) -> None:
        """Nobody will replay them."""
        for request in list(self._orphans):
            stream = self.streams[request]
            stream.end_all(FinishReason.ERROR, error)
            self.conclude(stream)

    def end_all(self, reason: FinishReason) -> None:
        """Ends every request."""
        for stream in list(self.streams.values()):
            stream.end_all(reason)
            self.conclude(stream)


def now_ms() -> int:
    """The clock of the movers."""
    return time.monotonic_ns() // 1_000_000
