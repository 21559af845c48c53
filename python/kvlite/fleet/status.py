"""What a fleet looks like now: engines, requests, and the sum of their statistics.

Owns the shapes of `kvlite fleet status` and of the admin route, as frozen dataclasses. Reads members and streams, and
changes nothing. Called by frontend.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from kvlite import _core
from kvlite.fleet.members import EngineState, Member
from kvlite.fleet.messages import Stats
from kvlite.fleet.streams import Stream
from kvlite.types import EngineStats, FinishReason

_MEANS = ("agreement", "kl_divergence")
"""Of sampled requests: averaged with the number of samples."""


@dataclass(frozen=True)
class RequestStatus:
    """One request under way."""

    id: int
    """Its number in the fleet."""
    name: str
    """Of its answer in the API."""
    engine: int | None
    """None: it waits for an engine to be replayed on."""
    epoch: int
    tokens: int
    """Output tokens that its client was given."""
    moving_to: int | None
    replays: int
    """How often its engine died."""


@dataclass(frozen=True)
class EngineStatus:
    """One engine. What it has not said is None."""

    id: int
    state: EngineState
    pid: int | None
    running: int | None
    waiting: int | None
    free_blocks: int | None
    """Blocks that hold nothing or only what may be evicted."""
    num_blocks: int | None
    moves_out: int
    """Requests that are leaving now."""
    moves_in: int
    requests: tuple[RequestStatus, ...]


@dataclass(frozen=True)
class FleetStatus:
    """All of it."""

    engines: tuple[EngineStatus, ...]
    waiting: tuple[RequestStatus, ...]
    """Requests that are on no engine."""
    draining: bool


def status_of(
    states: Mapping[int, EngineState],
    members: Mapping[int, Member],
    streams: Mapping[int, Stream],
    owner: _core.Owner,
    *,
    draining: bool,
) -> FleetStatus:
    """Every engine and every request under way. O(both)."""
    found: dict[int | None, list[RequestStatus]] = {}
    for stream in streams.values():
        engine, epoch = owner.owner(stream.id) or (None, 0)
        engine = engine if engine in members else None
        found.setdefault(engine, []).append(
            RequestStatus(
                id=stream.id,
                name=stream.name,
                engine=engine,
                epoch=epoch,
                tokens=stream.num_tokens,
                moving_to=owner.moving(stream.id),
                replays=stream.num_replays,
            )
        )
    engines = tuple(_engine(id, state, members.get(id), tuple(found.get(id, ()))) for id, state in states.items())
    return FleetStatus(engines, tuple(found.get(None, ())), draining)


def _engine(id: int, state: EngineState, member: Member | None, requests: tuple[RequestStatus, ...]) -> EngineStatus:
    report = None if member is None else member.stats
    stats = None if report is None else report.stats
    return EngineStatus(
        id=id,
        state=state,
        pid=None if member is None else member.hello.pid,
        running=None if stats is None else stats.num_running,
        waiting=None if stats is None else stats.num_waiting,
        free_blocks=None if stats is None else stats.free_blocks + stats.cached_blocks,
        num_blocks=None if member is None else member.hello.num_blocks,
        moves_out=0 if report is None else report.moves_out,
        moves_in=0 if report is None else report.moves_in,
        requests=requests,
    )


def add_stats(reports: Sequence[Stats | None], num_documents: int) -> EngineStats:
    """Counters and gauges of all engines together."""
    every = [report.stats for report in reports if report is not None]
    sums: dict[str, Any] = {
        item.name: sum(getattr(stats, item.name) for stats in every)
        for item in fields(EngineStats)
        if item.name not in (*_MEANS, "finished")
    }
    sampled = [stats for stats in every if stats.num_agreement_samples]
    num_samples = sum(stats.num_agreement_samples for stats in sampled)
    means: dict[str, Any] = {
        name: sum((getattr(stats, name) or 0.0) * stats.num_agreement_samples for stats in sampled) / num_samples
        for name in _MEANS
        if num_samples
    }
    finished: Counter[FinishReason] = Counter()
    for stats in every:
        finished.update(stats.finished)
    return replace(EngineStats(**sums, **means, finished=finished), num_documents=num_documents)
