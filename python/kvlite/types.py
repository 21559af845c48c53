"""What goes in and comes out: SamplingParams, outputs, deltas, usage, statistics.

Owns shapes and absolute ranges; limits that the operator sets are checked in request.py. Imports leaves
alone. Every class is frozen: a value that passed its constructor is in range for ever. Used by everyone.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from kvlite.checks import INT32_MAX, check_flag, check_integer, check_number
from kvlite.errors import InvalidRequestError
from kvlite.reuse_types import Reuse, ReuseReport

# Ceilings that no configuration lifts; config.py holds the lower limits that an operator sets.
N_CEILING = 128
STOP_CEILING = 64
STOP_BYTES_CEILING = 4096
STOP_IDS_CEILING = 32
LOGPROBS_CEILING = 1024
LOGIT_BIAS_CEILING = 1 << 16


class FinishReason(StrEnum):
    """Why a choice ended; exactly one per choice."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What generation_config.json says for fields that a request leaves None. Raises InvalidRequestError."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_distribution(self)
        check_integer("max_new_tokens", self.max_tokens, 1, INT32_MAX, optional=True)
        if len(self.eos_token_ids) > STOP_IDS_CEILING:
            raise InvalidRequestError("eos_token_id", f"{len(self.eos_token_ids)} ids, at most {STOP_IDS_CEILING}")
        for token in self.eos_token_ids:
            check_integer("eos_token_id", token, 0, INT32_MAX)


def _check_distribution(given: GenerationDefaults | SamplingParams) -> None:
    """The fields that a model's generation_config.json gives defaults for."""
    check_number("temperature", given.temperature, 0.0, 100.0, optional=True)
    check_number("top_p", given.top_p, 0.0, 1.0, optional=True)
    if given.top_p == 0:
        raise InvalidRequestError("top_p", "0 is out of range: must be above 0 and at most 1")
    check_integer("top_k", given.top_k, -1, INT32_MAX, optional=True)
    check_number("min_p", given.min_p, 0.0, 1.0, optional=True)
    check_number("repetition_penalty", given.repetition_penalty, 0.01, 100.0, optional=True)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. None means: what the model's generation_config.json says.

    temperature 0 is greedy. top_k 0 (or -1) and top_p 1 are off. Penalties count prompt and output for repetition,
    output alone for presence and frequency. Raises InvalidRequestError with the field, the value and the range.
    """

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    max_tokens: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    """Top log-probabilities per output token beside the chosen one's; 0 gives the chosen one alone."""
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        check_integer("n", self.n, 1, N_CEILING)
        _check_distribution(self)
        check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_integer("seed", self.seed, -(1 << 63), (1 << 63) - 1, optional=True)
        check_integer("min_tokens", self.min_tokens, 0, INT32_MAX)
        check_integer("max_tokens", self.max_tokens, 1, INT32_MAX, optional=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError("min_tokens", f"{self.min_tokens} is above max_tokens={self.max_tokens}")
        check_integer("logprobs", self.logprobs, 0, LOGPROBS_CEILING, optional=True)
        check_integer("prompt_logprobs", self.prompt_logprobs, 0, LOGPROBS_CEILING, optional=True)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            check_flag(name, getattr(self, name))
        object.__setattr__(self, "logit_bias", self._checked_bias())
        object.__setattr__(self, "stop", self._checked_stop())
        object.__setattr__(self, "stop_token_ids", self._checked_stop_ids())

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whatever form it was given in."""
        assert isinstance(self.stop, tuple)
        return self.stop

    def resolved(self, defaults: GenerationDefaults) -> SamplingParams:
        """A copy whose None fields (but max_tokens, seed and logprobs) hold the model's; top_k -1 becomes 0."""
        top_k = defaults.top_k if self.top_k is None else self.top_k
        penalty = self.repetition_penalty
        return replace(
            self,
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=max(top_k, 0),
            min_p=defaults.min_p if self.min_p is None else self.min_p,
            repetition_penalty=defaults.repetition_penalty if penalty is None else penalty,
        )

    def _checked_bias(self) -> dict[int, float]:
        if not isinstance(self.logit_bias, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError("logit_bias", "must map token ids to numbers between -100 and 100")
        if len(self.logit_bias) > LOGIT_BIAS_CEILING:
            raise InvalidRequestError("logit_bias", f"{len(self.logit_bias)} entries, at most {LOGIT_BIAS_CEILING}")
        for token, bias in self.logit_bias.items():
            check_integer("logit_bias", token, 0, INT32_MAX)
            check_number("logit_bias", bias, -100.0, 100.0)
        return {token: float(bias) for token, bias in self.logit_bias.items()}

    def _checked_stop(self) -> tuple[str, ...]:
        if not isinstance(self.stop, str | Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError("stop", f"{reprlib.repr(self.stop)} is neither text nor a list of texts")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stop) > STOP_CEILING:
            raise InvalidRequestError("stop", f"{len(stop)} strings, at most {STOP_CEILING}")
        for text in stop:
            if not isinstance(text, str) or not text:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InvalidRequestError("stop", "every stop string must be text of at least one character")
            size = len(text.encode("utf-8", "surrogatepass"))
            if size > STOP_BYTES_CEILING:
                raise InvalidRequestError("stop", f"a stop string has {size} bytes, at most {STOP_BYTES_CEILING}")
        return stop

    def _checked_stop_ids(self) -> tuple[int, ...]:
        if not isinstance(self.stop_token_ids, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError("stop_token_ids", f"{reprlib.repr(self.stop_token_ids)} is no list of token ids")
        ids = tuple(self.stop_token_ids)
        if len(ids) > STOP_IDS_CEILING:
            raise InvalidRequestError("stop_token_ids", f"{len(ids)} ids, at most {STOP_IDS_CEILING}")
        for token in ids:
            check_integer("stop_token_ids", token, 0, INT32_MAX)
        return ids


@dataclass(frozen=True)
class RequestOptions:
    """Everything of a request but its tokens and sampling. Checked with the request, by `request.validate`."""

    priority: int = 0
    """Lower is served earlier, under the policy `priority`; every other one allows 0 alone."""
    timeout_s: float | None = None
    """None: the engine's request_timeout_s."""
    tenant: int = 0
    """Nothing is shared between tenants."""
    reuse: Reuse | None = None
    """None: as the engine's settings say."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of one token under the model's unmodified distribution; rank 1 is the most likely."""

    token_id: int
    text: str
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One position: the token that stands there and the most likely ones, best first."""

    chosen: Logprob
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV came from the cache: the same beginning, or a segment that was not recomputed."""

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Delta:
    """What one choice gained since its last delta. The last one carries `finish_reason`; nothing follows it."""

    handle: int
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token id when asked, else empty."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it."""
    error: str | None = None
    """What went wrong, when the reason is error."""
    usage: Usage | None = None
    """Of the whole request; on the last delta of its last choice."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """On the first delta of choice 0, when asked; the first entry is None."""
    reuse: ReuseReport | None = None
    """Of the whole request, beside `usage`; None when it ended before it was admitted."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One finished choice."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One finished request; `outputs` in the order of the choices."""

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    usage: Usage
    prompt: str | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    reuse: ReuseReport | None = None
    """None when the request ended before it was admitted."""

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids of the first choice."""
        return self.outputs[0].token_ids


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start and gauges of now, for /metrics and `kvlite top`."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    owned_blocks: int = 0
    host_blocks: int = 0
    """Blocks of the host tier that hold KV."""
    host_hit_tokens: int = 0
    """Tokens copied back from there, for prompts and after preemptions."""
    demoted_blocks: int = 0
    """Blocks copied there."""
    promoted_blocks: int = 0
    """Blocks copied back."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    blended_tokens: int = 0
    """Prompt tokens taken from segments and kept."""
    recomputed_tokens: int = 0
    """Prompt tokens taken from segments and recomputed."""
    segment_hit_tokens: int = 0
    """Prompt tokens that segments were placed for, kept or recomputed."""
    num_segments: int = 0
    segment_blocks: int = 0
    pinned_blocks: int = 0
    num_documents: int = 0
    num_agreement_samples: int = 0
    """Blended requests that were also computed exactly."""
    agreement: float | None = None
    """Share of the last of them with the same most likely first token."""
    kl_divergence: float | None = None
    """KL(exact || blended) of their first token, nats, mean."""
    num_fallbacks: int = 0
    """Blended requests that the quality floor had computed at a higher ratio, or exactly."""
    generated_tokens: int = 0
    num_steps: int = 0
    num_failed_steps: int = 0
    num_preemptions: int = 0
    num_migrations_out: int = 0
    """Requests that went on on another engine."""
    num_migrations_in: int = 0
    num_imports_cancelled: int = 0
    """Reservations for requests that did not come."""
    finished: Mapping[FinishReason, int] = field(default_factory=dict[FinishReason, int])
    """Ended choices by reason."""

    @property
    def kv_cache_usage(self) -> float:
        """Share of the pool that running sequences own, 0 to 1."""
        return self.owned_blocks / self.num_blocks if self.num_blocks else 0.0
