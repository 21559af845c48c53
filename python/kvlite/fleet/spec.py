"""`RequestSpec`: a request on the wire, for an engine that makes no text: ids, sampling, limits, what it reuses.

Owns the shape, and both directions: `encode` on the front-end's side, `decode` on the engine's. Decoding is strict, and
what it gives has passed `request.validate` again, against the limits of the engine that decodes: a spec from the wire
meets the same wall as a prompt from HTTP. Called by frontend.py, worker.py and mover.py.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from kvlite.checks import INT32_MAX
from kvlite.errors import InvalidRequestError
from kvlite.request import Blending, RequestLimits, ValidatedRequest, recheck
from kvlite.reuse import resolve
from kvlite.reuse_types import OPTIONS_CEILING, OptionValue, Reuse, ReuseMode, SegmentSpan, check_id
from kvlite.types import LOGIT_BIAS_CEILING, STOP_IDS_CEILING, RequestOptions, SamplingParams

VERSION = 1
SPANS_MAX = 4096
TEXT_MAX = 512
"""Characters of a name or a reason."""

TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=INT32_MAX)]
Text: TypeAlias = Annotated[str, Meta(max_length=TEXT_MAX)]
EndIds: TypeAlias = Annotated[list[TokenId], Meta(max_length=2 * STOP_IDS_CEILING)]


class SamplingSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """SamplingParams with every default filled in, without what only text needs."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    logit_bias: Annotated[dict[TokenId, float], Meta(max_length=LOGIT_BIAS_CEILING)]
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=STOP_IDS_CEILING)]
    min_tokens: int
    max_tokens: int
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None


class ReuseSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """What was asked of the cache, and what is done: `blend_ratio` None means that nothing is blended."""

    mode: ReuseMode
    ratio: float | None
    method: Text | None
    options: Annotated[dict[Text, OptionValue], Meta(max_length=OPTIONS_CEILING)]
    blend_ratio: float | None
    fallback: Text | None


class RequestSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """One request. Made by `encode`; only `decode` makes a ValidatedRequest of it."""

    version: int
    prompt: bytes
    """Ids, int32 little-endian."""
    sampling: SamplingSpec
    stop_ids: EndIds
    eos_ids: EndIds
    priority: int
    tenant: int
    timeout_s: float
    """From the moment at which the engine takes it."""
    spans: Annotated[list[tuple[int, int, Text]], Meta(max_length=SPANS_MAX)]
    """(start, length, id) of every segment."""
    reuse: ReuseSpec


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(RequestSpec)


def encode(request: ValidatedRequest, seed: int, *, timeout_s: float | None = None) -> bytes:
    """The request as bytes. `seed`: what its tokens are drawn with on every engine; `timeout_s`: what is left of it.

    Stop strings, text and everything about text stay behind.
    """
    assert request.segment is None, "a segment is made where it was asked for"
    params = request.params
    assert params.temperature is not None and params.top_p is not None and params.top_k is not None
    assert params.min_p is not None and params.repetition_penalty is not None, "params are resolved"
    sampling = SamplingSpec(
        n=params.n,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        seed=seed,
        logit_bias=dict(params.logit_bias),
        stop_token_ids=list(params.stop_token_ids),
        min_tokens=params.min_tokens,
        max_tokens=request.max_tokens,
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
    )
    reuse, blending = request.reuse, request.blending
    spec = RequestSpec(
        version=VERSION,
        prompt=pack_ids(request.prompt_ids),
        sampling=sampling,
        stop_ids=sorted(request.stop_ids),
        eos_ids=sorted(request.eos_ids),
        priority=request.options.priority,
        tenant=request.options.tenant,
        timeout_s=request.timeout_s if timeout_s is None else timeout_s,
        spans=[(span.start, span.length, span.id) for span in request.spans],
        reuse=ReuseSpec(
            mode=reuse.mode,
            ratio=reuse.ratio,
            method=reuse.method,
            options=dict(reuse.options),
            blend_ratio=None if blending is None else blending.ratio,
            fallback=None if request.fallback is None else request.fallback[:TEXT_MAX],
        ),
    )
    return _encoder.encode(spec)


def decode(limits: RequestLimits, spec: bytes | memoryview) -> ValidatedRequest:
    """The request, raw and with its seed in `params`, checked against `limits`. Raises InvalidRequestError."""
    try:
        found = _decoder.decode(spec)
    except (msgspec.DecodeError, ValueError) as error:
        raise InvalidRequestError("spec", f"cannot be read: {error}") from None
    if found.version != VERSION:
        raise InvalidRequestError("spec", f"version {found.version}, this engine reads version {VERSION}")
    return recheck(limits, _request_of(limits, found))


def pack_ids(ids: NDArray[np.int32] | list[int]) -> bytes:
    """Ids as int32 little-endian."""
    return np.asarray(ids, "<i4").tobytes()


def unpack_ids(packed: bytes) -> NDArray[np.int32]:
    """What `pack_ids` packed. Raises InvalidRequestError for a length that is no whole number of ids."""
    if len(packed) % 4:
        raise InvalidRequestError("spec", f"{len(packed)} bytes are no whole number of int32 ids")
    return np.frombuffer(packed, "<i4").astype(np.int32)


def _request_of(limits: RequestLimits, spec: RequestSpec) -> ValidatedRequest:
    """What the spec says; `recheck` comes next."""
    given, reuse = spec.sampling, spec.reuse
    for _, _, id in spec.spans:
        check_id("prompt", id)
    asked = Reuse(reuse.mode, reuse.ratio, reuse.method, reuse.options)
    if asked.is_blended == (reuse.method is None or reuse.ratio is None):
        raise InvalidRequestError("reuse_options", f"reuse={reuse.mode} with method {reuse.method}: not resolved")
    blending = None
    if asked.is_blended:
        method = resolve(reuse.method or "", reuse.options, limits.num_layers)
        blending = None if reuse.blend_ratio is None else Blending(method, reuse.blend_ratio)
    elif reuse.blend_ratio is not None:
        raise InvalidRequestError("reuse_options", f"reuse={reuse.mode} blends nothing")
    return ValidatedRequest(
        prompt_ids=unpack_ids(spec.prompt),
        params=SamplingParams(**msgspec.structs.asdict(given)),
        options=RequestOptions(spec.priority, spec.timeout_s, spec.tenant, asked),
        timeout_s=spec.timeout_s,
        stop_ids=frozenset(spec.stop_ids),
        eos_ids=frozenset(spec.eos_ids),
        spans=tuple(SegmentSpan(*span) for span in spec.spans),
        blending=blending,
        fallback=reuse.fallback,
        raw=True,
    )
