"""`Twins`: requests that are computed twice, blended and exactly, and what the comparison says.

Owns the pairs: `verify` answers exactly and holds its last delta back until the blended twin has ended; a sampled
blended request is followed by one exact token for the quality floor. Nobody outside sees a twin. Every visible request
ends exactly once, whatever happens to its twin. Knows neither core nor runner. Called by loop.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import takewhile

import torch

from kvlite.agreement import AgreementMonitor
from kvlite.errors import CapacityError, InvalidRequestError
from kvlite.request import Blending, ValidatedRequest
from kvlite.reuse_types import Reuse, ReuseMode, ReuseReport, VerifyReport
from kvlite.types import Delta, FinishReason

SHADOWS_LIMIT = 4
"""Samples under way at once; further ones are left out."""
GOOD_ENDS = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class Start:
    """How the loop starts a request."""

    use_cache: bool = True
    """Whether prefix hits are taken."""
    captured: bool = False
    """Whether the logits of its first token are wanted."""
    is_urgent: bool = True
    """False: behind everybody, where the policy knows levels of priority."""
    seed: int | None = None


@dataclass
class _Pair:
    """A visible request and its twin, which may not have started yet."""

    request: ValidatedRequest
    """As asked."""
    visible: int = -1
    hidden: int | None = None
    tokens: list[int] = field(default_factory=list[int])
    """Of the visible choice 0."""
    twin_tokens: list[int] = field(default_factory=list[int])
    twin_text: str = ""
    twin_report: ReuseReport | None = None
    twin_end: FinishReason | None = None
    held: Delta | None = None
    """The visible request's last delta, which waits for the twin."""
    logits: torch.Tensor | None = None
    """[V] fp32 of the visible first token."""
    twin_logits: torch.Tensor | None = None
    exact_first: bool = False
    """Of a sample: whether the visible request is the exact one."""


class Twins:
    """`start` and `abort` are the loop's; `logits` is where it puts first logits by handle."""

    def __init__(
        self,
        start: Callable[[ValidatedRequest, Start], int],
        abort: Callable[[int], bool],
        logits: dict[int, torch.Tensor],
        monitor: AgreementMonitor,
    ) -> None:
        self._start = start
        self._abort = abort
        self._logits = logits
        self._monitor = monitor
        self._verified: dict[int, _Pair] = {}
        """By visible handle, until its last delta is out."""
        self._sampled: dict[int, _Pair] = {}
        """By visible handle, until it has ended."""
        self._hidden: dict[int, _Pair] = {}
        """By hidden handle."""

    def add(self, request: ValidatedRequest) -> int:
        """Starts a request, with its twin if it is to be verified. Raises what `start` raises."""
        if request.blending is None:
            return self._start(request, Start())
        if request.reuse.mode is ReuseMode.VERIFY:
            return self._add_verified(request)
        key = (request.blending.method, request.blending.ratio)
        decision = self._monitor.decide(*key)
        asked = request
        if decision.fallback is not None:
            used = None if decision.ratio is None else Blending(request.blending.method, decision.ratio)
            request = replace(request, blending=used, fallback=decision.fallback)
        handle = self._start(request, Start(captured=decision.sampled))
        if decision.sampled:
            self._sampled[handle] = _Pair(asked, handle)
        return handle

    def _add_verified(self, request: ValidatedRequest) -> int:
        params = replace(request.params, n=1, logprobs=None, prompt_logprobs=None)
        options = replace(request.options, reuse=replace(request.reuse, mode=ReuseMode.BLEND))
        # Without the cache: a prefix hit on what the exact one computes would leave nothing to compare.
        hidden = self._start(replace(request, params=params, options=options), Start(use_cache=False, captured=True))
        pair = _Pair(request, hidden=hidden)
        self._hidden[hidden] = pair
        try:
            pair.visible = self._start(replace(request, blending=None), Start(captured=True))
        except BaseException:
            self._abort(hidden)
            raise
        self._verified[pair.visible] = pair
        return pair.visible

    def abort(self, handle: int) -> bool:
        """For a visible request that has ended but waits for its twin: the twin is ended, its own end comes next."""
        pair = self._verified.get(handle)
        return pair is not None and pair.held is not None and pair.hidden is not None and self._abort(pair.hidden)

    def holds(self, handle: int) -> bool:
        """Whether the request is one of a verified pair, or a twin: neither can leave without the other."""
        return handle in self._verified or handle in self._hidden

    def leave(self, handle: int) -> None:
        """A visible request goes to another engine: it is no sample here any more."""
        self._sampled.pop(handle, None)
        self._logits.pop(handle, None)

    def sift(self, deltas: list[Delta]) -> list[Delta]:
        """What of `deltas` the outside sees, in order."""
        shown: list[Delta] = []
        for delta in deltas:
            if delta.handle in self._hidden:
                shown += self._hidden_delta(self._hidden[delta.handle], delta)
            elif delta.handle in self._verified:
                shown += self._verified_delta(self._verified[delta.handle], delta)
            else:
                shown.append(delta)
                if delta.usage is not None and delta.handle in self._sampled:
                    self._follow(self._sampled.pop(delta.handle), delta)
        return shown

    def end_all(self, deltas: list[Delta]) -> list[Delta]:
        """`sift` when the engine closes: nothing waits for a twin any more."""
        held = [pair.held for pair in self._verified.values() if pair.held is not None]
        shown = [delta for delta in deltas if delta.handle not in self._hidden]
        self._verified.clear()
        self._hidden.clear()
        self._sampled.clear()
        self._logits.clear()
        return [*held, *shown]

    def _verified_delta(self, pair: _Pair, delta: Delta) -> list[Delta]:
        if delta.index == 0:
            pair.tokens += delta.token_ids
        if delta.usage is None:
            return [delta]
        pair.logits = self._logits.pop(delta.handle, None)
        pair.held = delta
        if delta.finish_reason not in GOOD_ENDS and pair.twin_end is None and pair.hidden is not None:
            self._abort(pair.hidden)
            return [self._release(pair)]
        return [self._release(pair)] if pair.twin_end is not None else []

    def _hidden_delta(self, pair: _Pair, delta: Delta) -> list[Delta]:
        pair.twin_tokens += delta.token_ids
        pair.twin_text += delta.text
        if delta.usage is None:
            return []
        del self._hidden[delta.handle]
        pair.twin_logits = self._logits.pop(delta.handle, None)
        pair.twin_end, pair.twin_report = delta.finish_reason, delta.reuse
        if pair.request.reuse.mode is not ReuseMode.VERIFY:
            self._record(pair)
        elif pair.held is not None and pair.visible in self._verified:
            return [self._release(pair)]
        return []

    def _release(self, pair: _Pair) -> Delta:
        """The visible request's last delta, with what is known of the twin."""
        delta = pair.held
        assert delta is not None, "only an ended request is released"
        del self._verified[pair.visible]
        if delta.reuse is None:
            return delta
        report = pair.twin_report
        both = pair.logits is not None and pair.twin_logits is not None
        if report is None or pair.twin_end not in GOOD_ENDS or not both:
            end = "has not ended" if pair.twin_end is None else f"ended with reason {pair.twin_end}"
            return replace(delta, reuse=replace(delta.reuse, fallback=f"not verified: the blended twin {end}"))
        verify = _compare(pair)
        return replace(delta, reuse=replace(report, mode=ReuseMode.VERIFY, exact=True, verify=verify))

    def _follow(self, pair: _Pair, delta: Delta) -> None:
        """A sampled request has ended: one token of it is computed the other way."""
        pair.logits = self._logits.pop(pair.visible, None)
        report, asked = delta.reuse, pair.request.blending
        assert asked is not None, "only blended requests are sampled"
        if pair.logits is None or report is None or delta.finish_reason not in GOOD_ENDS:
            return
        was_exact = report.ratio is None
        if not was_exact and report.exact:
            return
        params = replace(pair.request.params, n=1, max_tokens=1, min_tokens=0, logprobs=None, prompt_logprobs=None)
        reuse = pair.request.reuse if was_exact else Reuse.PREFIX
        blending = Blending(asked.method, self._monitor.probe_ratio(asked.method, asked.ratio)) if was_exact else None
        options = replace(pair.request.options, reuse=reuse)
        twin = replace(pair.request, params=params, options=options, blending=blending)
        if len(self._hidden) >= SHADOWS_LIMIT:
            return
        try:
            pair.hidden = self._start(twin, Start(use_cache=not was_exact, captured=True, is_urgent=False))
        except (CapacityError, InvalidRequestError):  # no room for a sample; the next one will do
            return
        pair.exact_first = was_exact
        self._hidden[pair.hidden] = pair

    def _record(self, pair: _Pair) -> None:
        blending = pair.request.blending
        if pair.logits is None or pair.twin_logits is None or blending is None or pair.twin_end not in GOOD_ENDS:
            return
        both = (pair.logits, pair.twin_logits)
        exact, blended = both if pair.exact_first else both[::-1]
        self._monitor.record(blending.method, blending.ratio, top1_equal(exact, blended), kl(exact, blended))


def _compare(pair: _Pair) -> VerifyReport:
    exact, blended = pair.logits, pair.twin_logits
    assert exact is not None and blended is not None, "both were captured"
    equal = takewhile(lambda both: both[0] == both[1], zip(pair.tokens, pair.twin_tokens, strict=False))
    return VerifyReport(
        kl=kl(exact, blended),
        top1_equal=top1_equal(exact, blended),
        max_logit_difference=float((exact - blended).abs().max()),
        equal_tokens=sum(1 for _ in equal),
        exact_tokens=len(pair.tokens),
        blended_tokens=len(pair.twin_tokens),
        blended_token_ids=tuple(pair.twin_tokens),
        blended_text=pair.twin_text,
    )


def kl(exact: torch.Tensor, blended: torch.Tensor) -> float:
    """KL(exact || blended) of two rows of logits [V], nats, never below 0."""
    p, q = torch.log_softmax(exact.double(), dim=-1), torch.log_softmax(blended.double(), dim=-1)
    return max(float((p.exp() * (p - q)).sum()), 0.0)


def top1_equal(exact: torch.Tensor, blended: torch.Tensor) -> bool:
    """Whether both rows of logits have their maximum at the same place."""
    return int(exact.argmax()) == int(blended.argmax())
