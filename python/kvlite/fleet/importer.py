"""`Importer`: what the destination of a move does: reserve, store blocks that arrive and verify, commit or cancel.

Owns the arrivals by request, from RESERVE to COMMIT or CANCEL. Blocks are verified against their digests before a byte
of them is stored; a reservation is not given back while its blocks are being written. Decides nothing: every
method carries out one effect of the machine and returns the answer for it. Called by mover.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvlite import _core
from kvlite.async_engine import AsyncEngine
from kvlite.errors import CapacityError, EngineClosedError, InvalidRequestError, KvliteError
from kvlite.fleet import parcel
from kvlite.fleet.copier import KVCopier
from kvlite.fleet.exporter import SMALL_BYTES, Answer
from kvlite.fleet.live import LiveRequests
from kvlite.migration import Migration, Moving
from kvlite.readers import RawStream
from kvlite.runner.plan import Int32

BACKSTOP_MS = 24 * 3600 * 1000
"""The core's own limit of a reservation. The machine ends one long before, and waits for blocks being written."""

log = logging.getLogger("kvlite.fleet")


@dataclass(eq=False)
class _Arriving:
    """One move at its destination."""

    request: int
    attempt: int
    source: int
    replay: bool
    begun: Moving | None = None
    """Set once there is room."""
    ticket: int | None = None
    """None: nothing is reserved, its tokens alone arrive."""
    dropped: bool = False
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Importer:
    """The moves that arrive at one engine, by request."""

    def __init__(self, engine: AsyncEngine, migration: Migration, copier: KVCopier, live: LiveRequests) -> None:
        """`migration`: as Exporter's."""
        self._engine = engine
        self._migration = migration
        self._copier = copier
        self._live = live
        self._arriving: dict[int, _Arriving] = {}

    def __len__(self) -> int:
        return len(self._arriving)

    def expect(self, request: int, attempt: int, source: int, replay: bool) -> None:
        """A move begins; `reserve` comes next."""
        self._arriving[request] = _Arriving(request, attempt, source, replay)

    async def reserve(self, request: int, attempt: int, packed: bytes) -> Answer:
        """Makes room, or says why there is none."""
        arriving = self._get(request, attempt)
        try:
            if arriving is None:
                raise CapacityError("the move is over")
            hit_blocks = await self._make_room(arriving, packed)
        except (InvalidRequestError, CapacityError, EngineClosedError) as error:
            reason = str(error)
            self.drop(request, attempt)
            return lambda machine, now: machine.refused(request, attempt, reason, now)
        return lambda machine, now: machine.reserved(request, attempt, hit_blocks, now)

    async def _make_room(self, arriving: _Arriving, packed: bytes) -> int:
        if self._engine.draining:
            raise EngineClosedError("this engine drains")
        begun = parcel.unpack(self._engine.limits, packed)
        if arriving.replay:
            limit = self._engine.limits.config.max_num_waiting
            if self._engine.stats().num_waiting >= limit:
                raise CapacityError(f"{limit} requests are waiting, which is max_num_waiting")
            arriving.begun = begun
            return 0
        ticket, hit_blocks = await self._engine.call(lambda engine: engine.migration.reserve(begun, BACKSTOP_MS))
        arriving.begun, arriving.ticket = begun, ticket
        return hit_blocks

    async def store(self, peer: int, frame: bytes, payload: memoryview | None) -> bool:
        """Blocks of an arrival: whether they are here, whole. Raises FrameError for what is no frame of blocks."""
        request, _epoch, attempt, _stage, _part, _is_last, keys, _digests = _core.decode_blocks(frame)
        arriving = self._get(request, attempt)
        if arriving is None or arriving.ticket is None or arriving.source != peer or payload is None:
            return False
        async with arriving.writing:
            if arriving.dropped:
                return False
            if not await _verify(frame, np.frombuffer(payload, np.uint8)):
                log.error("blocks of request %d from engine %d are not what their digests say", request, peer)
                return False
            try:
                await self._write(arriving.ticket, keys, payload)
            except KvliteError as error:
                log.info("blocks of request %d find no place: %s", request, error)
                return False
        return True

    async def _write(self, ticket: int, keys: Int32, payload: memoryview) -> None:
        places = [self._migration.import_block(ticket, choice, index) for choice, index in keys.tolist()]
        blocks = np.asarray(places, np.int32)
        if len(payload) <= SMALL_BYTES:
            self._copier.store(blocks, payload)
        else:
            await asyncio.to_thread(self._copier.store, blocks, payload)
        for choice, index in keys.tolist():
            self._migration.import_filled(ticket, choice, index)

    def drop(self, request: int, attempt: int) -> _Arriving | None:
        """The move is over here: nothing more is stored. `cancel` comes next."""
        arriving = self._get(request, attempt)
        if arriving is not None:
            arriving.dropped = True
            del self._arriving[request]
        return arriving

    async def cancel(self, arriving: _Arriving) -> None:
        """Gives the reservation back, once nothing is being written."""
        async with arriving.writing:
            if arriving.ticket is not None:
                ticket = arriving.ticket
                await self._engine.call(lambda engine: engine.migration.import_cancel(ticket))

    def commit(self, request: int, attempt: int, epoch: int, packed: bytes) -> None:
        """The request was granted: it lives here from now on, or the front-end hears that there is no place for it."""
        arriving = self._get(request, attempt)
        assert arriving is not None and arriving.begun is not None, "what was granted had been reserved"
        del self._arriving[request]
        begun, ticket = arriving.begun, arriving.ticket
        try:
            final = parcel.unpack(self._engine.limits, packed, begun)
        except InvalidRequestError as error:
            log.error("request %d was granted, and its tail cannot be read: %s", request, error)
            final = None
        outputs: Sequence[Sequence[int] | None] = (begun if final is None else final).outputs
        lengths = [None if ids is None else len(ids) for ids in outputs]

        async def start() -> RawStream:
            if final is None:
                raise CapacityError("the tail of a move cannot be read")
            return await self._arrive(ticket, final)

        self._live.begin(request, epoch, lengths, start)

    async def _arrive(self, ticket: int | None, final: Moving) -> RawStream:
        """With its KV; without, or when the core finds that some is missing, its tokens are computed again."""
        num_choices = final.request.params.n
        if ticket is not None:
            try:
                return await self._engine.adopt(
                    lambda engine: engine.migration.import_commit(ticket, final), num_choices
                )
            except (InvalidRequestError, CapacityError) as error:
                log.error("a granted request is replayed: %s", error)
                await self._engine.call(lambda engine: engine.migration.import_cancel(ticket))
        outputs = [None if ids is None else np.asarray(ids, np.int32) for ids in final.outputs]
        try:
            return await self._engine.adopt(lambda engine: engine.resume(final.request, outputs), num_choices)
        except KvliteError as error:
            raise CapacityError(f"a granted request found no place: {error}") from error

    def _get(self, request: int, attempt: int) -> _Arriving | None:
        arriving = self._arriving.get(request)
        return arriving if arriving is not None and arriving.attempt == attempt else None


async def _verify(frame: bytes, payload: NDArray[np.uint8]) -> bool:
    if len(payload) <= SMALL_BYTES:
        return _core.verify_blocks(frame, payload)
    return await asyncio.to_thread(_core.verify_blocks, frame, payload)
