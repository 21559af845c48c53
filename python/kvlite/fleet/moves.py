"""Moves that were ordered: how each is to be done, what came of it, and how long its client waited for a token.

Owns the orders under way and the choice between copying and replaying; the protocol itself is `_core`'s. A report is
made once per order, when the request goes on (or does not) wherever it is then. Called by frontend.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from kvlite import _core
from kvlite.errors import InvalidRequestError, KvliteError
from kvlite.fleet.members import Member
from kvlite.fleet.messages import Moved
from kvlite.fleet.streams import Stream

ASSUMED_LINK_BYTES_PER_S = 1e9
"""Until something went over a link: about what shared memory gives a busy process."""

log = logging.getLogger("kvlite.fleet")


class MoveHow(StrEnum):
    """What a move takes along."""

    AUTO = "auto"
    """What is expected to be faster."""
    COPY = "copy"
    """The KV."""
    REPLAY = "replay"
    """The tokens alone: the destination computes their KV again."""


class UnknownRequestError(InvalidRequestError):
    """No request under way has that name (HTTP 404)."""

    def __init__(self, name: str) -> None:
        super().__init__("request", f"{name[:80]!r} is not under way: kvlite fleet status lists those that are")


class MoveConflictError(KvliteError):
    """The request or the engine is in a state in which this move cannot begin (HTTP 409)."""


@dataclass(frozen=True)
class MoveReport:
    """What became of one order."""

    request: str
    """As the API calls it."""
    id: int
    source: int
    to: int
    how: MoveHow
    """COPY or REPLAY."""
    result: str
    """moved, refused (no room), aborted, reclaimed (the destination did not take it in time), ended (so did the
    request) or failed (an engine died). Whatever it is, the request lost nothing."""
    reason: str
    """Why it did not move; empty when it did."""
    tokens: int
    """Output tokens that the client had when the move began."""
    stages: int
    blocks: int
    bytes: int
    """KV that was sent."""
    seconds: float
    """From the order to the first token behind the move."""
    gap_s: float | None
    """Between the last token of the source and the first one of the destination; None: the request had none yet, or
    ended first."""

    @property
    def moved(self) -> bool:
        """Whether it is where it was to go."""
        return self.result == _core.Mover.RESULTS[0]


@dataclass
class _Order:
    stream: Stream
    source: int
    to: int
    how: MoveHow
    tokens: int
    since: float
    report: asyncio.Future[MoveReport]
    block_bytes: int
    paused_at: float | None = None
    """When the last token came before the request changed hands."""
    switched: bool = False
    gap_s: float | None = None
    sent_bytes: int | None = None
    end: tuple[str, int, int, str] | None = None
    """result, stages, blocks, reason."""


class Moves:
    """The orders under way, at most one per request. `tell` hears of every report."""

    def __init__(self, tell: Callable[[MoveReport], None]) -> None:
        self._tell = tell
        self._orders: dict[int, _Order] = {}

    def __len__(self) -> int:
        return len(self._orders)

    def begin(self, stream: Stream, source: Member, to: int, how: MoveHow) -> asyncio.Future[MoveReport]:
        """An order that was given. Raises MoveConflictError when the last one is not reported yet."""
        if stream.id in self._orders:
            raise MoveConflictError(f"request {stream.name} is being moved already")
        report: asyncio.Future[MoveReport] = asyncio.get_running_loop().create_future()
        self._orders[stream.id] = _Order(
            stream, source.id, to, how, stream.num_tokens, time.monotonic(), report, source.hello.block_bytes
        )
        return report

    def forget(self, request: int) -> None:
        """The order was refused before it began."""
        self._orders.pop(request, None)

    def sent(self, message: Moved) -> None:
        """What the source says of the move; comes before the end."""
        order = self._orders.get(message.request)
        if order is not None:
            order.sent_bytes = message.sent_bytes

    def switched(self, request: int, engine: int) -> None:
        """The request belongs to `engine` now."""
        order = self._orders.get(request)
        if order is not None and engine == order.to:
            order.switched = True
            order.paused_at = order.stream.token_at

    def token(self, request: int, at: float) -> None:
        """Tokens came for the client, from whoever owns the request now; `at` on the clock of time.monotonic."""
        order = self._orders.get(request)
        if order is not None and order.switched and order.gap_s is None and order.paused_at is not None:
            order.gap_s = at - order.paused_at
            self._finish(order)

    def ended(self, request: int, result: int, stages: int, blocks: int, reason: str) -> None:
        """The protocol's word: index of `Mover.RESULTS`."""
        order = self._orders.get(request)
        if order is not None and order.end is None:
            order.end = (_core.Mover.RESULTS[result], stages, blocks, reason)
            self._finish(order)

    def stream_over(self, request: int) -> None:
        """The request has ended: nothing more will come."""
        order = self._orders.get(request)
        if order is not None:
            if order.end is None:
                order.end = ("moved", 0, 0, "") if order.switched else ("ended", 0, 0, "the request ended first")
            self._finish(order, over=True)

    def engine_gone(self, engine: int) -> None:
        """Ends what the protocol has not, of orders whose source is gone and has nobody to report."""
        for order in list(self._orders.values()):
            if order.source == engine and order.end is None:
                order.end = ("moved", 0, 0, "") if order.switched else ("failed", 0, 0, f"engine {engine} is gone")
                self._finish(order)

    def _finish(self, order: _Order, *, over: bool = False) -> None:
        """Reports, once the end is known and, for a request that has moved, its next token came."""
        if order.end is None:
            return
        result, stages, blocks, reason = order.end
        if result == "moved" and order.paused_at is not None and order.gap_s is None and not over:
            return
        del self._orders[order.stream.id]
        report = MoveReport(
            request=order.stream.name,
            id=order.stream.id,
            source=order.source,
            to=order.to,
            how=order.how,
            result=result,
            reason=reason,
            tokens=order.tokens,
            stages=stages,
            blocks=blocks,
            bytes=blocks * order.block_bytes if order.sent_bytes is None else order.sent_bytes,
            seconds=time.monotonic() - order.since,
            gap_s=order.gap_s,
        )
        log.info("%s", _line(report))
        self._tell(report)
        if not order.report.done():
            order.report.set_result(report)


def decide(stream: Stream, source: Member, to: Member) -> MoveHow:
    """Whether to copy or to replay; the figures go to the log."""
    num_tokens = len(stream.request.prompt_ids) + stream.num_tokens
    measured = 0.0 if source.stats is None else source.stats.link_bytes_per_s.get(to.id, 0.0)
    link, hello = measured or ASSUMED_LINK_BYTES_PER_S, to.hello
    per_token = max(source.hello.block_bytes // source.hello.block_size, 1)
    copy, copy_s, replay_s, gap_s = _core.decide_move(
        len=num_tokens,
        hit=0,
        kv_bytes_per_token=per_token,
        link_bytes_per_s=link,
        prefill_tokens_per_s=hello.prefill_tokens_per_s,
        decode_tokens_per_s=1 / hello.step_s if hello.step_s else 0.0,
        step_s=hello.step_s,
    )
    how = MoveHow.COPY if copy else MoveHow.REPLAY
    log.info(
        "move %s: %s; %d tokens of %d bytes: copy %.1f ms at %.0f MB/s%s, replay %.1f ms at %.0f tokens/s, gap %.1f ms",
        stream.name, how, num_tokens, per_token, copy_s * 1e3, link / 1e6, "" if measured else " (assumed)",
        replay_s * 1e3, hello.prefill_tokens_per_s, gap_s * 1e3,
    )  # fmt: skip
    return how


def _line(report: MoveReport) -> str:
    gap = "" if report.gap_s is None else f", gap {report.gap_s * 1e3:.1f} ms"
    why = f" ({report.reason})" if report.reason else ""
    return (
        f"move {report.request} from engine {report.source} to {report.to} by {report.how}: {report.result}{why} after "
        f"{report.tokens} tokens; {report.stages} stages, {report.bytes} bytes, {report.seconds * 1e3:.1f} ms{gap}"
    )
