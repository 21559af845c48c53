"""`Migration`: how a request leaves an engine and how it arrives; `hand_over`: both, in one process and one thread.

Owns what of a move is not blocks: the core's manifest with the request, its seed, its outputs and its report around
it, and the checks of a destination's limits. Every method is the engine thread's, between two steps. Knows no link and
no protocol: the fleet's mover decides when, here is how. Called by engine.py and the fleet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch

from kvlite import _core
from kvlite.errors import CapacityError, InvalidRequestError
from kvlite.inflight import InFlight, Tracked
from kvlite.interrupts import uninterrupted
from kvlite.request import RequestLimits, ValidatedRequest, recheck
from kvlite.reuse_types import ReuseReport
from kvlite.runner.kv_pool import KVPool
from kvlite.runner.model_runner import ModelRunner
from kvlite.runner.plan import Int32, as_rows
from kvlite.tokenizer import Tokenizer
from kvlite.twins import Twins
from kvlite.types import TokenLogprobs

How: TypeAlias = Literal["auto", "copy", "replay"]
COPIED_BLOCKS = 64
"""Blocks that are copied at once: bounds the memory in between."""
RESERVE_MS = 60_000
"""Time to live of a reservation in one process, where nobody waits for a link."""


@dataclass(frozen=True)
class Moving:
    """A request on its way, as of the moment it was exported: everything but its KV."""

    request: ValidatedRequest
    seed: int
    manifest: bytes
    """The core's."""
    outputs: tuple[tuple[int, ...] | None, ...]
    """Ids of each choice so far; None for one that has ended."""
    reuse: ReuseReport | None
    """None: never admitted yet."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    """What is known of those that were asked for; None: not asked, or shown already."""
    deadline_ms: int
    """On this machine's clock; another machine goes by what the manifest says is left."""

    @property
    def num_tokens(self) -> int:
        """Prompt and output of every choice that lives."""
        return len(self.request.prompt_ids) + sum(len(ids) for ids in self.outputs if ids is not None)


@dataclass(frozen=True)
class MigrationReport:
    """What a move within one process did."""

    how: Literal["copy", "replay"]
    """Of a request that had no KV yet (it waited): replay, of nothing."""
    handle: int
    """The request's number on the engine where it is now."""
    tokens: int
    """Known when it moved: prompt and outputs."""
    blocks: int
    """Copied."""
    bytes: int
    stages: int
    """Copies; all but the last while the request could still have gone on."""
    hit_tokens: int
    """Prompt tokens that the destination had in its cache."""
    gap_s: float
    """From the freeze to the moment at which the destination may go on."""


class Migration:
    """The moves of one engine."""

    def __init__(
        self,
        core: _core.Core,
        runner: ModelRunner,
        inflight: InFlight,
        twins: Twins,
        limits: RequestLimits,
        tokenizer: Tokenizer,
    ) -> None:
        self._core = core
        self._runner = runner
        self._inflight = inflight
        self._twins = twins
        self._limits = limits
        self._tokenizer = tokenizer

    # Leaving

    def export_begin(self, handle: int) -> Moving:
        """The request as of now; it goes on. Raises InvalidRequestError for one that cannot move: unknown or ended,
        verified against a twin, being exported already.
        """
        tracked = self.tracked(handle)
        if self._twins.holds(handle):
            raise InvalidRequestError("request", f"{handle} is verified against a twin, which cannot move")
        with _named():
            return self._moving(tracked, self._core.export_begin(handle))

    def export_stage(self, handle: int, skip_blocks: int) -> tuple[int, Int32]:
        """(hold, rows [K, 3] of choice, index in its sequence, pool block): what was written since the last stage.

        Full blocks only until the request is frozen. `skip_blocks`: leading prompt blocks that the destination has.
        The blocks keep their bytes until `transfer_done(hold)`; any thread may read them.
        """
        self.tracked(handle)
        with _named():
            return self._core.export_stage(handle, skip_blocks)

    def transfer_done(self, hold: int) -> None:
        """The blocks of that stage were read. Also after the request has ended or moved."""
        with _named():
            self._core.transfer_done(hold)

    def export_left(self, handle: int) -> int:
        """Blocks that `export_stage` would give now."""
        self.tracked(handle)
        with _named():
            return self._core.export_left(handle)

    def freeze(self, handle: int) -> None:
        """No later plan names the request. A second time is fine; `export_abort` thaws it."""
        self.tracked(handle)
        with _named():
            self._core.freeze(handle)

    def is_frozen(self, handle: int) -> bool:
        """Whether it is frozen and no plan that was made before names it: the tail can be exported.

        Raises InvalidRequestError when it has ended, perhaps by the plan that was waited for.
        """
        self.tracked(handle)
        with _named():
            return self._core.is_frozen(handle)

    def export_final(self, handle: int) -> Moving:
        """The frozen request, as the destination must have it. Raises InvalidRequestError when it is not frozen."""
        tracked = self.tracked(handle)
        with _named():
            return self._moving(tracked, self._core.export_final(handle))

    def export_abort(self, handle: int) -> bool:
        """The request stays and goes on where it was; False when it has ended meanwhile."""
        return handle in self._inflight and self._core.export_abort(handle)

    def export_commit(self, handle: int) -> Tracked:
        """The request lives elsewhere: everything it held here is free, nothing of it comes out any more.

        Raises InvalidRequestError when it is not frozen, or has ended meanwhile; its end comes out as ever then.
        """
        self.tracked(handle)
        with _named():
            if not self._core.export_commit(handle):
                raise InvalidRequestError("request", f"{handle} has ended on this engine")
        self._twins.leave(handle)
        return self._inflight.release(handle)

    # Arriving

    def reserve(self, moving: Moving, ttl_ms: int = RESERVE_MS) -> tuple[int, int]:
        """(ticket, leading prompt blocks that are here already): room for the request, for `ttl_ms` from now.

        Raises InvalidRequestError for what does not fit this engine's model or limits, CapacityError for no room now.
        """
        recheck(self._limits, moving.request)
        now_ms = _now_ms()
        with _named():
            return self._core.reserve(
                moving.manifest, now_ms, now_ms + ttl_ms, method_id=self._method_id(moving.request)
            )

    def import_block(self, ticket: int, choice: int, index: int) -> int:
        """The pool block to which block `index` of a choice is to be written. Raises CapacityError."""
        with _named():
            return self._core.import_block(ticket, choice, index)

    def import_filled(self, ticket: int, choice: int, index: int) -> None:
        """The block's bytes are there, and they are the right ones."""
        with _named():
            self._core.import_filled(ticket, choice, index)

    def import_extend(self, ticket: int, ttl_ms: int | None) -> None:
        """From now on the reservation lives for `ttl_ms`; None: until `import_commit` or `import_cancel`."""
        with _named():
            self._core.import_extend(ticket, None if ttl_ms is None else _now_ms() + ttl_ms)

    def import_cancel(self, ticket: int) -> bool:
        """Gives the reservation back; what arrived of an exact prompt stays cached. False: it has expired.

        No copy into its blocks may be under way.
        """
        with _named():
            return self._core.import_cancel(ticket)

    def import_commit(self, ticket: int, final: Moving, tracked: Tracked | None = None) -> int:
        """The request lives here from now on; returns its handle. The next plan may name it.

        `tracked`: what the other engine's `export_commit` gives in the same process, with text on its way. Raises
        InvalidRequestError when a block is missing; the reservation is still there then.
        """
        with _named():
            handle = self._core.import_commit(
                ticket, final.manifest, _now_ms(), method_id=self._method_id(final.request)
            )
        self._inflight.adopt(handle, self._arrived(final) if tracked is None else tracked)
        return handle

    def _arrived(self, final: Moving) -> Tracked:
        tracked = Tracked(-1, final.request, final.seed, self._tokenizer, deadline_ms=final.deadline_ms)
        tracked.resume(final.outputs)
        tracked.reuse = final.reuse
        tracked.prompt_logprobs = None if final.prompt_logprobs is None else list(final.prompt_logprobs)
        return tracked

    def take_from(self, other: Migration, handle: int, ticket: int, hit_blocks: int) -> int:
        """Copies what the other engine in this process would send next; returns how many blocks that was."""
        hold, rows = other.export_stage(handle, hit_blocks)
        try:
            targets = [self.import_block(ticket, choice, index) for choice, index, _ in as_rows(rows)]
            source, target = other._runner.pool.data, self._runner.pool.data
            for start in range(0, len(rows), COPIED_BLOCKS):
                part = slice(start, start + COPIED_BLOCKS)
                to, blocks = torch.tensor(targets[part]), torch.tensor(rows[part, 2], dtype=torch.int64)
                target[to.to(target.device)] = source[blocks.to(source.device)].to(target.device)
            for choice, index, _ in as_rows(rows):
                self.import_filled(ticket, choice, index)
        finally:
            other.transfer_done(hold)
        return len(rows)

    @property
    def pool(self) -> KVPool:
        """Where the blocks lie, for whoever copies them."""
        return self._runner.pool

    @property
    def block_bytes(self) -> int:
        """KV of one block."""
        return self._runner.pool.shape.bytes_per_block

    @property
    def block_size(self) -> int:
        """Tokens of one block."""
        return self._runner.pool.shape.block_size

    def _method_id(self, request: ValidatedRequest) -> int | None:
        return None if request.blending is None else self._runner.methods.intern(request.blending.method)

    def tracked(self, handle: int) -> Tracked:
        """What the stream's side knows of a request. Raises InvalidRequestError when it is not here."""
        tracked = self._inflight.get(handle)
        if tracked is None:
            raise InvalidRequestError("request", f"{handle} is unknown on this engine, or has ended")
        return tracked

    def _moving(self, tracked: Tracked, manifest: bytes) -> Moving:
        shown = tracked.prompt_logprobs
        return Moving(
            request=tracked.request,
            seed=tracked.seed,
            manifest=manifest,
            outputs=tuple(None if ids is None else tuple(ids) for ids in tracked.outputs),
            reuse=tracked.reuse,
            prompt_logprobs=None if shown is None else tuple(shown),
            deadline_ms=tracked.deadline_ms,
        )


class Side(Protocol):
    """An engine, as far as moves in one process go."""

    migration: Migration

    def restart(self, tracked: Tracked) -> int:
        """Queues what another engine computed so far, without its KV; returns the handle. Raises CapacityError."""
        ...


def hand_over(source: Side, target: Side, handle: int, how: How, advance: Callable[[], None]) -> MigrationReport:
    """Moves a request within one process; `advance` steps the source once. Returns when it lives at the target.

    On every error the request goes on at the source, and the target has nothing. Raises InvalidRequestError, also when
    the request ends in the step that the move waits for, and CapacityError.
    """
    leaving, arriving = source.migration, target.migration
    moving = leaving.export_begin(handle)
    stages = num_blocks = hit_blocks = 0
    ticket: int | None = None
    try:
        if how != "replay":
            ticket, hit_blocks = arriving.reserve(moving)
            if leaving.export_left(handle):
                num_blocks += arriving.take_from(leaving, handle, ticket, hit_blocks)
                stages += 1
        began = time.perf_counter()
        leaving.freeze(handle)
        while not leaving.is_frozen(handle):
            advance()
        if ticket is not None:
            last = arriving.take_from(leaving, handle, ticket, hit_blocks)
            num_blocks, stages = num_blocks + last, stages + (last > 0)
        with uninterrupted():
            final = leaving.export_final(handle)
            tracked = leaving.tracked(handle)
            new = target.restart(tracked) if ticket is None else arriving.import_commit(ticket, final, tracked)
            leaving.export_commit(handle)
    except BaseException:
        if ticket is not None:
            arriving.import_cancel(ticket)
        leaving.export_abort(handle)
        raise
    return MigrationReport(
        how="copy" if num_blocks or hit_blocks else "replay",
        handle=new,
        tokens=final.num_tokens,
        blocks=num_blocks,
        bytes=num_blocks * arriving.block_bytes,
        stages=stages,
        hit_tokens=hit_blocks * arriving.block_size,
        gap_s=time.perf_counter() - began,
    )


@contextmanager
def _named() -> Generator[None]:
    """The core's refusals as kvlite's own errors."""
    try:
        yield
    except _core.InvalidArgument as error:
        param = getattr(error, "param", "request")
        raise InvalidRequestError("request" if param == "handle" else param, str(error)) from None
    except _core.CapacityError as error:
        raise CapacityError(str(error)) from None


def _now_ms() -> int:
    """On the clock of the core's steps."""
    return time.monotonic_ns() // 1_000_000
