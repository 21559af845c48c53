"""A request on its way between engines, as bytes: the core's manifest, the request's spec, outputs, report.

What the movers' frames carry as "manifest" is one of these: the protocol never looks inside, the core sees its own part
alone. Decoding is strict, every length is checked against the request it belongs to, and the request passes the wall
of `spec.decode`. Called by mover.py on both sides.
"""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from kvlite.errors import InvalidRequestError
from kvlite.fleet.messages import Scores
from kvlite.fleet.spec import decode, encode, pack_ids, unpack_ids
from kvlite.migration import Moving
from kvlite.output import readable, unreadable
from kvlite.request import RequestLimits, ValidatedRequest
from kvlite.reuse_types import ReuseReport
from kvlite.runner.sampler import RawLogprobs
from kvlite.types import N_CEILING, TokenLogprobs

VERSION = 1
SHORTEST_TIMEOUT_S = 0.001


class Parcel(Struct, frozen=True, forbid_unknown_fields=True):
    """`Moving` on the wire. `spec` None: the destination has it from the first parcel of this move."""

    version: int
    spec: bytes | None
    manifest: bytes
    outputs: Annotated[list[bytes | None], Meta(max_length=N_CEILING)]
    """Per choice, int32 little-endian; None for one that has ended."""
    reuse: ReuseReport | None
    prompt_logprobs: list[Scores | None] | None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Parcel)


def pack(moving: Moving, *, with_request: bool = True) -> bytes:
    """The request on its way as bytes; `with_request` False leaves out what the first parcel said already."""
    left_s = moving.deadline_ms / 1000 - time.monotonic()
    spec = encode(moving.request, moving.seed, timeout_s=max(left_s, SHORTEST_TIMEOUT_S)) if with_request else None
    shown = moving.prompt_logprobs
    return _encoder.encode(
        Parcel(
            version=VERSION,
            spec=spec,
            manifest=moving.manifest,
            outputs=[None if ids is None else pack_ids(list(ids)) for ids in moving.outputs],
            reuse=moving.reuse,
            prompt_logprobs=None if shown is None else [_scores(each) for each in shown],
        )
    )


def unpack(limits: RequestLimits, packed: bytes | memoryview, first: Moving | None = None) -> Moving:
    """What `pack` packed, checked against `limits`; `first` has the request of a parcel without one.

    Raises InvalidRequestError. The manifest is checked by the core, in `Migration.reserve` and `import_commit`.
    """
    try:
        parcel = _decoder.decode(packed)
    except (msgspec.DecodeError, ValueError) as error:
        raise InvalidRequestError("manifest", f"cannot be read: {error}") from None
    if parcel.version != VERSION:
        raise InvalidRequestError("manifest", f"version {parcel.version}, this engine reads version {VERSION}")
    if parcel.spec is not None:
        request = decode(limits, parcel.spec)
        deadline_ms = int((time.monotonic() + request.timeout_s) * 1000)
    elif first is not None:
        request, deadline_ms = first.request, first.deadline_ms
    else:
        raise InvalidRequestError("manifest", "has no request, and none came before it")
    assert request.params.seed is not None, "a decoded spec has a seed"
    return Moving(
        request=request,
        seed=request.params.seed,
        manifest=parcel.manifest,
        outputs=_outputs(limits, request, parcel),
        reuse=parcel.reuse,
        prompt_logprobs=_prompt_logprobs(request, parcel),
        deadline_ms=deadline_ms,
    )


def _outputs(limits: RequestLimits, request: ValidatedRequest, parcel: Parcel) -> tuple[tuple[int, ...] | None, ...]:
    if len(parcel.outputs) != request.params.n:
        raise InvalidRequestError("manifest", f"outputs of {len(parcel.outputs)} choices, n is {request.params.n}")
    outputs: list[tuple[int, ...] | None] = []
    for packed in parcel.outputs:
        if packed is None:
            outputs.append(None)
            continue
        if len(packed) > 4 * request.max_tokens:
            raise InvalidRequestError("manifest", f"{len(packed) // 4} output ids, max_tokens is {request.max_tokens}")
        ids = unpack_ids(packed)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < limits.vocab_size:
            raise InvalidRequestError("manifest", f"an output id is out of range: must be 0 to {limits.vocab_size - 1}")
        outputs.append(tuple(ids.tolist()))
    return tuple(outputs)


def _prompt_logprobs(request: ValidatedRequest, parcel: Parcel) -> tuple[TokenLogprobs | None, ...] | None:
    found = parcel.prompt_logprobs
    if found is None:
        return None
    if request.params.prompt_logprobs is None or len(found) != len(request.prompt_ids):
        raise InvalidRequestError("manifest", f"{len(found)} prompt log-probabilities that were not asked for")
    return tuple(
        None if each is None else readable(RawLogprobs(*msgspec.structs.astuple(each)), None) for each in found
    )


def _scores(logprobs: TokenLogprobs | None) -> Scores | None:
    if logprobs is None:
        return None
    raw = unreadable(logprobs)
    return Scores(raw.token_id, raw.logprob, raw.rank, raw.top_ids, raw.top_logprobs)
