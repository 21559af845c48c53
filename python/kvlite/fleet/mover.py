"""`Mover`: carries out what the migration machine of one engine asks for, and tells it what came of it.

Owns the machine (`_core.Mover`), its clock, and one lane per move in which effects are carried out in order; frames go
out at once. The machine decides everything; `exporter.py` and `importer.py` do it. One event loop. Called by worker.py
with frames and ends of links.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from kvlite import _core
from kvlite.errors import KvliteError
from kvlite.fleet.effects import EffectKind, MoveResult
from kvlite.fleet.exporter import Answer, Effects, Exporter
from kvlite.fleet.importer import Importer
from kvlite.fleet.messages import OWNER, Moved
from kvlite.fleet.peers import Peers
from kvlite.fleet.uplink import Uplink

Job: TypeAlias = Callable[[], Awaitable[Answer | None]]
_Lane: TypeAlias = tuple[int, bool]
"""Request, and whether it leaves."""

log = logging.getLogger("kvlite.fleet")


class Mover:
    """All moves of one engine."""

    def __init__(
        self, machine: _core.Mover, exporter: Exporter, importer: Importer, peers: Peers, uplink: Uplink
    ) -> None:
        self._machine = machine
        self._exporter = exporter
        self._importer = importer
        self._peers = peers
        self._uplink = uplink
        self._lanes: dict[_Lane, deque[tuple[Job, int | None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarm: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def num_leaving(self) -> int:
        """Moves whose source is here."""
        return len(self._exporter)

    @property
    def num_arriving(self) -> int:
        """Moves whose destination is here."""
        return len(self._importer)

    def frame(self, peer: int, frame: bytes) -> None:
        """A frame of the front-end's or another mover's machine, but blocks. Raises FrameError."""
        self._carry_out(self._machine.frame(peer, frame, now_ms()))

    async def blocks(self, peer: int, frame: bytes, payload: memoryview | None) -> None:
        """A frame of blocks: returns when its payload is not needed any more. Raises FrameError."""
        stored = await self._importer.store(peer, frame, payload)
        self._carry_out(self._machine.blocks(peer, frame, stored, now_ms()))

    def link_down(self, peer: int) -> None:
        """The link to a peer has ended, or could not be opened."""
        self._carry_out(self._machine.link_down(peer, now_ms()))

    def ended(self, request: int) -> None:
        """A live request has ended here."""
        self._carry_out(self._machine.ended(request, now_ms()))

    def close(self) -> None:
        """Nothing more is carried out."""
        self._closed = True
        if self._alarm is not None:
            self._alarm.cancel()
        for task in self._tasks:
            task.cancel()

    def _tick(self) -> None:
        self._carry_out(self._machine.tick(now_ms()))

    def _carry_out(self, effects: Effects) -> None:
        """In order, but figures of moves that are over first: they go out before the machine's word on them."""
        if self._closed:
            return
        for effect in sorted(effects, key=lambda effect: effect[0] != EffectKind.DONE):
            kind = EffectKind(effect[0])
            log.debug("effect %s %s", kind.name, effect[1:4])
            match kind:
                case EffectKind.SEND:
                    self._send(*effect[1:])
                case EffectKind.DONE:
                    self._done(*effect[1:])
                case EffectKind.RESERVE | EffectKind.CANCEL | EffectKind.COMMIT:
                    self._arrival(kind, *effect[1:])
                case _:
                    self._departure(kind, *effect[1:])
        self._set_alarm()

    def _send(self, peer: int, frame: bytes) -> None:
        if peer == OWNER:
            self._uplink.post_frame(frame)
        else:
            self._peers.post(peer, frame)

    def _departure(self, kind: EffectKind, request: int, attempt: int, *more: Any) -> None:
        exporter = self._exporter
        jobs: dict[EffectKind, Job] = {
            EffectKind.EXPORT: lambda: exporter.export(request, attempt),
            EffectKind.STAGE: lambda: exporter.stage(request, attempt, *more),
            EffectKind.FREEZE: lambda: exporter.freeze(request, attempt),
            EffectKind.TAIL: lambda: exporter.tail(request, attempt),
            EffectKind.THAW: lambda: exporter.thaw(request, attempt, *more),
            EffectKind.RELEASE: lambda: exporter.release(request, *more),
        }
        if kind is EffectKind.EXPORT:
            exporter.expect(request, attempt, *more)
        can_fail = kind not in (EffectKind.THAW, EffectKind.RELEASE)
        self._queue((request, True), jobs[kind], attempt if can_fail else None)

    def _arrival(self, kind: EffectKind, request: int, attempt: int, *more: object) -> None:
        importer = self._importer
        if kind is EffectKind.RESERVE:
            source, packed, _ttl_ms, replay = more
            assert isinstance(source, int) and isinstance(packed, bytes)
            importer.expect(request, attempt, source, bool(replay))
            self._queue((request, False), lambda: importer.reserve(request, attempt, packed), None)
        elif kind is EffectKind.COMMIT:
            epoch, packed, _replay = more
            assert isinstance(epoch, int) and isinstance(packed, bytes)
            importer.commit(request, attempt, epoch, packed)
        else:
            arriving = importer.drop(request, attempt)
            if arriving is not None:
                self._queue((request, False), lambda: importer.cancel(arriving), None)

    def _done(self, request: int, attempt: int, result: int, stages: int, blocks: int, reason: str) -> None:
        """The move is over at its source."""
        leaving = self._exporter.end(request, attempt)
        log.info("move of request %d, attempt %d: %s %s", request, attempt, MoveResult(result).name.lower(), reason)
        if leaving is None:
            return
        now = time.monotonic()
        self._uplink.post(
            Moved(
                request=request,
                epoch=leaving.epoch,
                to=leaving.to,
                result=result,
                seconds=now - leaving.since,
                frozen_s=0.0 if leaving.frozen_at is None else now - leaving.frozen_at,
                stages=stages,
                blocks=blocks,
                sent_bytes=leaving.sent_bytes,
            )
        )

    def _queue(self, lane: _Lane, job: Job, attempt: int | None) -> None:
        """`attempt`: of the move that fails when the job does."""
        jobs = self._lanes.get(lane)
        if jobs is None:
            jobs = self._lanes[lane] = deque()
            task = asyncio.ensure_future(self._run(lane, jobs))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        jobs.append((job, attempt))

    async def _run(self, lane: _Lane, jobs: deque[tuple[Job, int | None]]) -> None:
        """Works a lane off; it is gone when it is empty."""
        while jobs:
            job, attempt = jobs.popleft()
            answer = await self._do(lane[0], job, attempt)
            if answer is not None and not self._closed:
                try:
                    self._carry_out(answer(self._machine, now_ms()))
                except Exception:  # ours: this move waits for its timeout, all others go on
                    log.exception("request %d: the machine did not take an answer", lane[0])
        del self._lanes[lane]

    async def _do(self, request: int, job: Job, attempt: int | None) -> Answer | None:
        try:
            return await job()
        except KvliteError as error:
            reason = str(error)
            log.info("request %d does not move: %s", request, reason)
        except Exception as error:  # ours: the move fails, the request and its engine go on
            reason = f"a step of the move failed: {error!r}"
            log.exception("request %d", request)
        return None if attempt is None else lambda machine, now: machine.failed(request, attempt, reason, now)

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        wake_ms = self._machine.next_wake_ms()
        if wake_ms is not None and not self._closed:
            self._alarm = asyncio.get_running_loop().call_later(max(wake_ms - now_ms(), 0) / 1000, self._tick)


def now_ms() -> int:
    """The machine's clock, and the core's."""
    return time.monotonic_ns() // 1_000_000
