"""What the migration machine of an engine asks for, as enumerations: kinds of effects, results, words of frames.

Owns names alone; the numbers are `_core`'s, which lists the items of every effect at its class `Mover`. Called by
mover.py, which carries effects out, and by whoever reads a result.
"""

from __future__ import annotations

from enum import IntEnum

from kvlite import _core


class EffectKind(IntEnum):
    """First item of an effect."""

    SEND = _core.Mover.SEND
    EXPORT = _core.Mover.EXPORT
    STAGE = _core.Mover.STAGE
    FREEZE = _core.Mover.FREEZE
    TAIL = _core.Mover.TAIL
    THAW = _core.Mover.THAW
    RELEASE = _core.Mover.RELEASE
    RESERVE = _core.Mover.RESERVE
    CANCEL = _core.Mover.CANCEL
    COMMIT = _core.Mover.COMMIT
    DONE = _core.Mover.DONE


class MoveResult(IntEnum):
    """How a move ended at its source."""

    MOVED = 0
    REFUSED = 1
    """The destination had no room, or does not fit."""
    ABORTED = 2
    """The source went on: the destination was slow, or its link broke, before the tail."""
    RECLAIMED = 3
    """The source went on under a new epoch: nobody claimed the request in time."""
    ENDED = 4
    """The request ended while it was moving."""
    FAILED = 5


def frame_name(frame: bytes) -> str:
    """What kind of frame it is, in the machine's words. Raises `_core.FrameError`."""
    return _core.Mover.FRAME_KINDS[_core.frame_kind(frame)]
