"""`ValidatedRequest`: the one wall. Nothing else reaches the engine, and whoever holds one need not check again.

Owns every check of a request against the limits of this model, pool and configuration. Knows neither HTTP nor text.
Called by Engine and AsyncEngine, so HTTP and embedded use refuse the same things in the same words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvlite.checks import check_integer, check_number
from kvlite.config import TIMEOUT_S_MAX, EngineConfig, Policy
from kvlite.documents import PUBLIC_TENANT
from kvlite.errors import InvalidRequestError
from kvlite.reuse import ReuseMethod, resolve
from kvlite.reuse_types import EncodedPrompt, Reuse, ReuseMode, SegmentSpan
from kvlite.types import GenerationDefaults, RequestOptions, SamplingParams

PRIORITY_LIMIT = 1_000_000
TENANT_LIMIT = PUBLIC_TENANT - 1


@dataclass(frozen=True)
class RequestLimits:
    """What requests are checked against; fixed for the life of an engine."""

    config: EngineConfig
    vocab_size: int
    max_model_len: int
    pool_tokens: int
    """Tokens that the whole KV pool holds."""
    defaults: GenerationDefaults
    num_layers: int = 1
    """Bounds options of reuse methods."""


@dataclass(frozen=True)
class Blending:
    """How the segments of a request are reused."""

    method: ReuseMethod
    ratio: float
    """Share of the reused rows that is recomputed."""


@dataclass(frozen=True)
class SegmentOrder:
    """The prompt is a segment to be computed alone and kept; nothing is sampled."""

    pinned: bool


@dataclass(frozen=True)
class ValidatedRequest:
    """A request that can be served: made by `validate` and `validate_segment` only."""

    prompt_ids: NDArray[np.int32]
    params: SamplingParams
    """Resolved: the model's defaults are filled in, max_tokens is a number that fits."""
    options: RequestOptions
    """Resolved: `reuse` says what is done, with method and ratio where segments are reused."""
    timeout_s: float
    stop_ids: frozenset[int]
    """Ids that end a choice: stop_token_ids, and the model's EOS ids unless ignore_eos."""
    eos_ids: frozenset[int]
    text: str | None = None
    """The prompt's text, when it came as text."""
    spans: tuple[SegmentSpan, ...] = ()
    """Segments of the prompt, under every reuse mode."""
    blending: Blending | None = None
    """None: segments are computed as any other text."""
    segment: SegmentOrder | None = None
    fallback: str | None = None
    """Why `blending` differs from what `options` ask."""
    raw: bool = False
    """Ids and log-probabilities alone come out: the stream's owner makes the text and looks for stop strings."""

    @property
    def max_tokens(self) -> int:
        """Output tokens per choice at most."""
        assert self.params.max_tokens is not None
        return self.params.max_tokens

    @property
    def reuse(self) -> Reuse:
        """What is done with the cache."""
        assert self.options.reuse is not None
        return self.options.reuse


def validate(
    limits: RequestLimits,
    prompt: Sequence[int] | NDArray[np.int32] | EncodedPrompt,
    params: SamplingParams,
    options: RequestOptions | None = None,
    text: str | None = None,
) -> ValidatedRequest:
    """Checks everything and fills in defaults. Raises InvalidRequestError with field, value and range."""
    _check_params(limits, params)
    options = options or RequestOptions()
    timeout_s = _check_options(limits, options)
    spans: tuple[SegmentSpan, ...] = ()
    if isinstance(prompt, EncodedPrompt):
        prompt, spans, text = prompt.ids, prompt.spans, prompt.text
    ids = _check_prompt(limits, prompt)
    _check_spans(limits, spans, len(ids))
    reuse, blending, fallback = _resolve_reuse(limits, options.reuse, params, spans)
    max_tokens = _max_tokens(limits, len(ids), params)
    if params.min_tokens > max_tokens:
        raise InvalidRequestError("min_tokens", f"{params.min_tokens} is above max_tokens={max_tokens}")
    total = params.n * (len(ids) + max_tokens)
    if total > limits.config.max_request_tokens:
        raise InvalidRequestError(
            "max_tokens", f"n * (prompt + max_tokens) is {total} tokens, at most {limits.config.max_request_tokens}"
        )
    eos = frozenset[int]() if params.ignore_eos else frozenset(limits.defaults.eos_token_ids)
    return ValidatedRequest(
        prompt_ids=ids,
        params=replace(params.resolved(limits.defaults), max_tokens=max_tokens),
        options=replace(options, reuse=reuse),
        timeout_s=timeout_s,
        stop_ids=eos | frozenset(params.stop_token_ids),
        eos_ids=eos,
        text=text,
        spans=spans,
        blending=blending,
        fallback=fallback,
    )


def validate_segment(
    limits: RequestLimits, ids: Sequence[int] | NDArray[np.int32], options: RequestOptions, *, pinned: bool = False
) -> ValidatedRequest:
    """A request that makes a segment; `options.tenant` may be PUBLIC_TENANT. Raises InvalidRequestError."""
    checked = replace(options, tenant=0) if options.tenant == PUBLIC_TENANT else options
    timeout_s = _check_options(limits, checked)
    return ValidatedRequest(
        prompt_ids=_check_prompt(limits, ids),
        params=SamplingParams(max_tokens=1).resolved(limits.defaults),
        options=replace(options, reuse=Reuse.PREFIX),
        timeout_s=timeout_s,
        stop_ids=frozenset(),
        eos_ids=frozenset(),
        segment=SegmentOrder(pinned),
    )


def recheck(limits: RequestLimits, request: ValidatedRequest) -> ValidatedRequest:
    """The same request under another engine's limits, or as it came over a wire. Raises InvalidRequestError.

    `blending`, `fallback` and the ending ids stay what they are: they were decided where the request began.
    """
    assert request.segment is None, "a segment is made where it was asked for"
    reuse, blending = request.reuse, request.blending
    if blending is not None:
        asked = replace(reuse, ratio=blending.ratio)
    else:
        asked = Reuse.PREFIX if reuse.is_blended else reuse
    prompt = EncodedPrompt(request.prompt_ids, request.spans, text=request.text)  # pyright: ignore[reportArgumentType]
    checked = validate(limits, prompt, request.params, replace(request.options, reuse=asked))
    if blending is not None and checked.blending != blending:
        raise InvalidRequestError("reuse_options", f"{blending.method.name} at {blending.ratio} is not what is blended")
    for id in request.stop_ids | request.eos_ids:
        check_integer("stop_token_ids", id, 0, limits.vocab_size - 1)
    return replace(
        checked,
        options=request.options,
        stop_ids=request.stop_ids,
        eos_ids=request.eos_ids,
        fallback=request.fallback,
        raw=request.raw,
    )


def resolve_method(limits: RequestLimits, reuse: Reuse) -> Blending:
    """Method and ratio with the engine's defaults filled in. Raises InvalidRequestError."""
    config = limits.config
    name = config.reuse_method if reuse.method is None else reuse.method
    method = resolve(name, reuse.options, limits.num_layers)
    return Blending(method, method.ratio(config.recompute_ratio if reuse.ratio is None else reuse.ratio))


def _resolve_reuse(
    limits: RequestLimits, asked: Reuse | None, params: SamplingParams, spans: tuple[SegmentSpan, ...]
) -> tuple[Reuse, Blending | None, str | None]:
    """What is done: reuse with its defaults filled in, how segments are blended, why it is not done as set."""
    reuse = Reuse(ReuseMode(limits.config.reuse.value)) if asked is None else asked
    if not reuse.is_blended:
        if reuse.method is not None or reuse.ratio is not None or reuse.options:
            raise InvalidRequestError("reuse_options", f"need reuse=blend or verify, not {reuse.mode}")
        return reuse, None, None
    blending = resolve_method(limits, reuse)
    wants_logprobs = params.prompt_logprobs is not None and reuse.mode is ReuseMode.BLEND
    if wants_logprobs and asked is not None and spans:
        raise InvalidRequestError("prompt_logprobs", "not available with reuse=blend: the prompt is not computed whole")
    reuse = replace(reuse, ratio=blending.ratio, method=blending.method.name)
    if spans and wants_logprobs:
        return reuse, None, "prompt_logprobs need the whole prompt: computed exactly"
    return reuse, blending if spans else None, None


def _check_spans(limits: RequestLimits, spans: tuple[SegmentSpan, ...], prompt_len: int) -> None:
    if len(spans) > limits.config.max_documents:
        raise InvalidRequestError("documents", f"{len(spans)} are too many: at most {limits.config.max_documents}")
    end = 0
    for span in spans:
        if span.start < end or span.start + span.length > prompt_len:
            raise InvalidRequestError(
                "prompt", f"segment {span.id} at {span.start} overlaps another or leaves the {prompt_len} tokens"
            )
        end = span.start + span.length


def _check_prompt(limits: RequestLimits, prompt_ids: Sequence[int] | NDArray[np.int32]) -> NDArray[np.int32]:
    wrong = InvalidRequestError("prompt", "must be text or a flat list of integer token ids")
    is_array = isinstance(prompt_ids, np.ndarray) and prompt_ids.ndim == 1
    if not is_array and not isinstance(prompt_ids, Sequence):
        raise wrong
    if len(prompt_ids) == 0:
        raise InvalidRequestError("prompt", "is empty: at least one token is needed")
    if len(prompt_ids) >= limits.max_model_len:
        raise InvalidRequestError(
            "prompt",
            f"has {len(prompt_ids)} tokens, at most {limits.max_model_len - 1} fit beside one token of output "
            f"(max_model_len={limits.max_model_len})",
        )
    try:
        ids = np.asarray(prompt_ids)
    except (ValueError, OverflowError):
        ids = np.zeros(0)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise wrong
    bad = np.flatnonzero((ids < 0) | (ids >= limits.vocab_size))
    if len(bad):
        raise InvalidRequestError(
            "prompt", f"token id {ids[bad[0]]} at index {bad[0]} is out of range: must be 0 to {limits.vocab_size - 1}"
        )
    if len(ids) >= limits.pool_tokens:
        raise InvalidRequestError(
            "prompt", f"has {len(ids)} tokens, the KV pool holds {limits.pool_tokens}: raise kv_cache_bytes"
        )
    return np.ascontiguousarray(ids, dtype=np.int32)


def _max_tokens(limits: RequestLimits, prompt_len: int, params: SamplingParams) -> int:
    room = min(limits.max_model_len, limits.pool_tokens) - prompt_len
    wanted = params.max_tokens
    if wanted is None:
        return max(min(limits.defaults.max_tokens or room, room), min(params.min_tokens, room))
    if prompt_len + wanted > limits.max_model_len:
        raise InvalidRequestError(
            "max_tokens",
            f"{wanted} is out of range: must be 1 to {room} with a prompt of {prompt_len} tokens "
            f"(max_model_len={limits.max_model_len})",
        )
    if wanted > room:
        raise InvalidRequestError(
            "max_tokens",
            f"prompt and output need {prompt_len + wanted} tokens, the KV pool holds {limits.pool_tokens}: "
            "raise kv_cache_bytes or lower max_tokens",
        )
    return wanted


def _check_params(limits: RequestLimits, params: SamplingParams) -> None:
    config = limits.config

    def at_most(param: str, value: int | None, high: int) -> None:
        if value is not None and value > high:
            raise InvalidRequestError(param, f"{value} is above the limit of {high}")

    at_most("n", params.n, min(config.max_n, config.max_num_seqs))
    at_most("logprobs", params.logprobs, config.max_logprobs)
    at_most("prompt_logprobs", params.prompt_logprobs, config.max_logprobs)
    at_most("logit_bias", len(params.logit_bias), config.max_logit_bias)
    at_most("stop", len(params.stop_strings), config.max_stop)
    for stop in params.stop_strings:
        size = len(stop.encode("utf-8", "surrogatepass"))
        if size > config.max_stop_bytes:
            raise InvalidRequestError("stop", f"a stop string has {size} bytes, at most {config.max_stop_bytes}")
    for param, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        for id in ids:
            if id >= limits.vocab_size:
                raise InvalidRequestError(param, f"token id {id} is out of range: must be 0 to {limits.vocab_size - 1}")


def _check_options(limits: RequestLimits, options: RequestOptions) -> float:
    check_integer("priority", options.priority, -PRIORITY_LIMIT, PRIORITY_LIMIT)
    policy = limits.config.policy
    if options.priority != 0 and policy is not Policy.PRIORITY:
        given = f"{options.priority} is not allowed: must be 0, because this engine's policy is {policy.value}"
        raise InvalidRequestError("priority", f"{given}, which knows no levels (start it with --policy priority)")
    check_integer("tenant", options.tenant, 0, TENANT_LIMIT)
    if options.reuse is not None and not isinstance(options.reuse, Reuse):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidRequestError("reuse", f"{options.reuse!r} is not allowed: must be a kvlite.Reuse")
    check_number("timeout_s", options.timeout_s, 0.0, TIMEOUT_S_MAX, optional=True)
    if options.timeout_s == 0:
        raise InvalidRequestError("timeout_s", "0 is out of range: must be above 0 and at most 1e6")
    return limits.config.request_timeout_s if options.timeout_s is None else options.timeout_s
