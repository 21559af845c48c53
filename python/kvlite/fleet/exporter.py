"""`Exporter`: what the source of a move does: export, stages while decoding goes on, freeze, tail; thaw or release.

Owns what is known of each move that leaves: its figures, and what was fetched from the core at the freeze. Decides
nothing: every method carries out one effect of the machine and returns the answer for it. Copies read held blocks
in threads beside the engine's. Called by mover.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from kvlite import _core
from kvlite.async_engine import AsyncEngine
from kvlite.engine import Engine
from kvlite.errors import EngineError, InvalidRequestError
from kvlite.fleet import parcel
from kvlite.fleet.copier import KVCopier
from kvlite.fleet.live import Live, LiveRequests
from kvlite.fleet.pace import Pace
from kvlite.fleet.peers import Peers
from kvlite.fleet.wire import Payload
from kvlite.migration import Migration, Moving
from kvlite.runner.plan import Int32

PART_BYTES = 2 << 20
"""Payload of one frame, unless a block is larger: hashed and copied in less time than a decode step would notice."""
SMALL_BYTES = 2 << 20
"""What is hashed or stored faster than a thread takes over, which wants the GIL as often as an engine's does."""

Effects: TypeAlias = list[tuple[Any, ...]]
Answer: TypeAlias = Callable[[_core.Mover, int], Effects]
"""(machine, now in ms): tells the machine what came of an effect."""


_Held: TypeAlias = tuple[int, Int32]
"""A hold and its rows (choice, index, pool block)."""

log = logging.getLogger("kvlite.fleet")


@dataclass(eq=False)
class Leaving:
    """One move at its source."""

    request: int
    attempt: int
    epoch: int
    live: Live | None = None
    """None until it is exported."""
    to: int = 0
    since: float = field(default_factory=time.monotonic)
    frozen_at: float | None = None
    skip_blocks: int | None = None
    """Set by the first stage; None: nothing is copied so far."""
    held: _Held | None = None
    """The last blocks, of a frozen request."""
    final: Moving | None = None
    sent_bytes: int = 0
    over: bool = False
    """The machine has ended the move: what is still done for it is in vain."""

    def take_held(self) -> _Held | None:
        """`held`, once."""
        held, self.held = self.held, None
        return held


class Exporter:
    """The moves that leave one engine, by request."""

    def __init__(
        self, engine: AsyncEngine, migration: Migration, copier: KVCopier, live: LiveRequests, peers: Peers, pace: Pace
    ) -> None:
        """`migration` is the engine's. Its calls that go to the core alone are made here, beside the steps: the core
        takes one caller at a time. All others run on the engine thread."""
        self._engine = engine
        self._migration = migration
        self._copier = copier
        self._live = live
        self._peers = peers
        self._pace = pace
        self._leaving: dict[int, Leaving] = {}
        try:
            self._rows = copier.pool_rows()
        except EngineError:  # on a GPU
            self._rows = None

    def __len__(self) -> int:
        return len(self._leaving)

    def end(self, request: int, attempt: int) -> Leaving | None:
        """The machine has ended the move; its figures."""
        leaving = self._leaving.get(request)
        if leaving is None or leaving.attempt != attempt:
            return None
        leaving.over = True
        held = leaving.take_held()
        if held is not None:
            self._migration.transfer_done(held[0])
        return self._leaving.pop(request)

    def expect(self, request: int, attempt: int, epoch: int) -> None:
        """A move begins; `export` comes next."""
        self._leaving[request] = Leaving(request, attempt, epoch)

    async def export(self, request: int, attempt: int) -> Answer:
        """The manifest as of now."""
        leaving = self._get(request, attempt)
        live = await self._live.started(request)
        if live is None or live.epoch != leaving.epoch or leaving.over:
            return lambda machine, now: machine.exported(request, attempt, None, 0, now)
        leaving.live = live
        try:
            moving = await self._engine.call(lambda engine: engine.migration.export_begin(live.handle))
        except InvalidRequestError as error:
            log.info("request %d cannot move: %s", request, error)
            return lambda machine, now: machine.exported(request, attempt, None, 0, now)
        packed, num_choices = parcel.pack(moving), len(live.sent)
        return lambda machine, now: machine.exported(request, attempt, packed, num_choices, now)

    async def stage(
        self, request: int, attempt: int, epoch: int, to: int, stage: int, skip_blocks: int, final: bool
    ) -> Answer:
        """Copies what was written since the last stage; the final one is what the freeze has fetched."""
        leaving, live = self._exported(request, attempt)
        handle = live.handle
        leaving.to, leaving.skip_blocks = to, skip_blocks
        held = leaving.take_held() if final else None
        hold, rows = self._migration.export_stage(handle, skip_blocks) if held is None else held
        try:
            await self._copy(leaving, (request, epoch, attempt, stage), rows)
        finally:
            self._migration.transfer_done(hold)
        left = 0 if final else self._migration.export_left(handle)
        return lambda machine, now: machine.staged(request, attempt, stage, len(rows), left, now)

    async def freeze(self, request: int, attempt: int) -> Answer:
        """Waits for the step boundary; what the tail needs is fetched in the same moment."""
        leaving, live = self._exported(request, attempt)
        handle, skip_blocks = live.handle, leaving.skip_blocks

        def is_frozen(engine: Engine) -> bool:
            engine.migration.freeze(handle)
            return engine.migration.is_frozen(handle)

        def last_words(engine: Engine) -> tuple[_Held | None, Moving]:
            held = None if skip_blocks is None else engine.migration.export_stage(handle, skip_blocks)
            return held, engine.migration.export_final(handle)

        leaving.frozen_at = time.monotonic()
        held, final = await self._engine.call(last_words, when=is_frozen)
        if leaving.over:
            if held is not None:
                self._migration.transfer_done(held[0])
        else:
            leaving.held, leaving.final = held, final
        return lambda machine, now: machine.frozen(request, attempt, now)

    async def tail(self, request: int, attempt: int) -> Answer:
        """The final manifest, once every token of the request is on its way to the front-end."""
        leaving, live = self._exported(request, attempt)
        assert leaving.final is not None, "the request is frozen"
        final = leaving.final
        await live.reached([None if ids is None else len(ids) for ids in final.outputs])
        packed, positions = parcel.pack(final, with_request=False), list(live.sent)
        return lambda machine, now: machine.tail(request, attempt, packed, positions, final.outputs, now)

    async def thaw(self, request: int, attempt: int, epoch: int) -> None:
        """The request goes on here, under `epoch`."""
        live = self._live.get(request)
        if live is None:
            return
        live.epoch = max(live.epoch, epoch)
        await self._engine.call(lambda engine: engine.migration.export_abort(live.handle))

    async def release(self, request: int, epoch: int) -> None:
        """The request lives elsewhere: frozen it leaves at once, else it is ended in silence."""
        live = self._live.get(request)
        if live is None or live.epoch > epoch:
            return
        try:
            await self._live.leave(live)
        except InvalidRequestError as error:
            log.info("request %d is not here any more, and was not frozen: %s", request, error)
            self._live.discard(live)

    def _get(self, request: int, attempt: int) -> Leaving:
        leaving = self._leaving.get(request)
        if leaving is None or leaving.attempt != attempt:
            raise EngineError(f"attempt {attempt} to move request {request} is over")
        return leaving

    def _exported(self, request: int, attempt: int) -> tuple[Leaving, Live]:
        leaving = self._get(request, attempt)
        assert leaving.live is not None, "a move begins with its export"
        return leaving, leaving.live

    async def _copy(self, leaving: Leaving, stage: tuple[int, int, int, int], rows: Int32) -> None:
        """Sends blocks in parts, those of a request that decodes on at the pace; returns when their memory is not
        needed any more. Raises LinkError."""
        per_part = max(PART_BYTES // self._copier.block_bytes, 1)
        for part, start in enumerate(range(0, len(rows), per_part)):
            if leaving.frozen_at is None:
                await self._pace.turn()
            if leaving.over:
                raise EngineError("the move is over")
            some = rows[start : start + per_part]
            is_last = start + per_part >= len(rows)
            num_bytes = len(some) * self._copier.block_bytes
            if num_bytes <= SMALL_BYTES:
                frame, payload, busy_s = self._part(stage, part, is_last, some)
            else:
                frame, payload, busy_s = await asyncio.to_thread(self._part, stage, part, is_last, some)
            self._pace.took(self._peers.payload_cost(leaving.to) * busy_s)
            await self._peers.send(leaving.to, frame, payload)
            leaving.sent_bytes += num_bytes

    def _part(
        self, stage: tuple[int, int, int, int], part: int, is_last: bool, rows: Int32
    ) -> tuple[bytes, Payload, float]:
        """A frame, where its payload lies, and the processor time that this took in seconds."""
        began_s = time.thread_time()
        blocks = np.ascontiguousarray(rows[:, 2])
        keys = np.ascontiguousarray(rows[:, :2])
        payload = self._copier.payload(blocks)
        pool, where = self._rows, blocks
        if pool is None:
            pool = np.frombuffer(payload[0], np.uint8).reshape(len(blocks), -1)
            where = np.arange(len(blocks), dtype=np.int32)
        frame = _core.encode_blocks(*stage, part, is_last, keys, pool, where)
        return frame, payload, time.thread_time() - began_s
