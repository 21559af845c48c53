"""Questions to a real engine, under one rule after the other: answers, time to the first token, rows computed.

A rule is a way to treat documents that the engine has seen before: exact prefill, or a blend with method and ratio.
Each context's documents are computed alone once, ahead of all questions. Exact requests run as another tenant, because
what they publish would serve as an exact prefix to blended ones, and so do those under the wrong mask. The first
question under a rule is asked alone, timed and counted, before the engine knows a recipe of that rule; the others go
together. Called by the scenario; owns no figure.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kvlite import Document, Engine, RequestOptions, Reuse, ReuseReport, SamplingParams
from kvlite.reuse_types import SegmentHit

from ..errors import BenchError
from . import language
from .generator import CROSS_KINDS, Context, Question
from .meter import Meter

BLENDING, EXACT, CHECKING, MASKED = 0, 1, 2, 3
"""Tenants: what one of them publishes, the others do not see."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=4)
"""An answer is a word and the end; more would be a wrong answer anyway."""
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {"plain-query": ("query", {"hop": False})}
"""Names of the table for methods with options."""


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    method: str
    """Of kvlite.reuse or VARIANTS, or `full`: exact prefill."""
    ratio: float = 0.0
    bottom_right: bool = False

    @property
    def name(self) -> str:
        """For people and for keys of the JSON."""
        if self.method in ("full", "none"):
            return self.method
        return f"{self.method} {self.ratio:.0%}" + (", bottom-right mask" if self.bottom_right else "")

    @property
    def reuse(self) -> Reuse:
        """What a request under this rule asks."""
        if self.method == "full":
            return Reuse.PREFIX
        method, options = VARIANTS.get(self.method, (self.method, {}))
        return Reuse.blend(self.ratio, method, **options)

    @property
    def tenant(self) -> int:
        """Who asks."""
        if self.bottom_right:
            return MASKED
        return EXACT if self.method == "full" else BLENDING


@dataclass(frozen=True)
class Answer:
    """What came of one question."""

    kind: str
    group: int
    """Its context."""
    question: str
    text: str
    is_right: bool


@dataclass
class Asked:
    """Everything that was asked under one rule."""

    answers: list[Answer] = field(default_factory=list[Answer])
    ttft_s: list[float] = field(default_factory=list[float])
    computed_share: list[float] = field(default_factory=list[float])
    """Token-layers computed beyond those of the text that is no document, over all token-layers of the documents."""
    kl: list[float] = field(default_factory=list[float])
    """KL(exact || blended) at the first answer token, nats."""
    top1: list[bool] = field(default_factory=list[bool])


class Asker:
    """An engine under the meter, and what was learned from it so far."""

    def __init__(self, engine: Engine, meter: Meter, num_layers: int) -> None:
        self._engine = engine
        self._meter = meter
        self._num_layers = num_layers
        self.asked: dict[Rule, Asked] = {}

    def context(self, group: int, context: Context, rules: Sequence[Rule], controls: Sequence[Rule]) -> None:
        """Every question under every rule of `rules`; questions that need no other document under `controls` alone."""
        documents = [Document(text) for text in context.documents]
        # Segments that thousands of questions hit would keep those of this context out of the store.
        self._engine.clear_cache()
        for tenant in {rule.tenant for rule in rules} - {EXACT}:
            self._engine.precompute(documents, tenant=tenant)
        later: list[tuple[Rule, Question]] = []
        for rule in rules:
            first, *others = [one for one in context.questions if rule in controls or one.kind in CROSS_KINDS]
            with self._mask(rule):
                self._keep(rule, group, first, self._timed(rule, documents, first))
                if rule.bottom_right:
                    # Alone as well: the wrong mask would meet rows of other rules in one plan.
                    for question in others:
                        self._keep(rule, group, question, self._together(documents, [(rule, question)])[0])
                else:
                    later += [(rule, question) for question in others]
        for (rule, question), text in zip(later, self._together(documents, later), strict=True):
            self._keep(rule, group, question, text)

    def verify(self, context: Context, rules: Sequence[Rule]) -> None:
        """How the first answer token's distribution differs from exact prefill, for one question of each kind."""
        documents = [Document(text) for text in context.documents]
        seen: dict[str, Question] = {one.kind: one for one in context.questions if one.kind in CROSS_KINDS}
        for rule in rules:
            for question in seen.values():
                options = RequestOptions(tenant=CHECKING, reuse=Reuse.verify(rule.ratio, rule.method))
                found = self._engine.chat(_messages(question), GREEDY, options, documents=documents).reuse
                if found is None or found.verify is None:
                    raise BenchError(f"verify under {rule.name} came back without a report")
                kept = self.asked.setdefault(rule, Asked())
                kept.kl.append(found.verify.kl)
                kept.top1.append(found.verify.top1_equal)

    @contextmanager
    def _mask(self, rule: Rule) -> Generator[None]:
        self._meter.bottom_right = rule.bottom_right
        try:
            yield
        finally:
            self._meter.bottom_right = False

    def _keep(self, rule: Rule, group: int, question: Question, text: str) -> None:
        answer = Answer(question.kind, group, question.text, text, text.strip() == question.answer)
        self.asked.setdefault(rule, Asked()).answers.append(answer)

    def _timed(self, rule: Rule, documents: list[Document], question: Question) -> str:
        """Asks alone; keeps the time to the first token and what was computed for it."""
        asked = self.asked.setdefault(rule, Asked())
        self._meter.reset()
        start = time.perf_counter()
        handle = self._add(rule, documents, question)
        text, report, token_layers = "", None, 0.0
        while self._engine.num_unfinished:
            for delta in self._engine.step():
                if delta.handle != handle:
                    continue
                if delta.token_ids and not token_layers:
                    asked.ttft_s.append(time.perf_counter() - start)
                    token_layers = self._meter.token_layers
                text += delta.text
                report = delta.reuse or report
        if report is None or not token_layers:
            raise BenchError(f"{rule.name}: a request ended without a first token or a report")
        asked.computed_share.append(self._share(rule, report, token_layers))
        return text

    def _share(self, rule: Rule, report: ReuseReport, token_layers: float) -> float:
        spans = sum(segment.tokens for segment in report.segments)
        if rule.method != "full" and any(segment.hit != SegmentHit.DEVICE for segment in report.segments):
            hits = [str(segment.hit) for segment in report.segments]
            raise BenchError(f"{rule.name}: documents were computed ahead, yet their segments came from {hits}")
        total = report.prefix_tokens + report.blended_tokens + report.recomputed_tokens + report.computed_tokens
        other = (total - report.prefix_tokens - spans) * self._num_layers
        return (token_layers - other) / (spans * self._num_layers)

    def _together(self, documents: list[Document], asked: Sequence[tuple[Rule, Question]]) -> list[str]:
        """Asks all at once; their texts, in order."""
        texts = {self._add(rule, documents, question): "" for rule, question in asked}
        while self._engine.num_unfinished:
            for delta in self._engine.step():
                texts[delta.handle] += delta.text
        return list(texts.values())

    def _add(self, rule: Rule, documents: list[Document], question: Question) -> int:
        options = RequestOptions(tenant=rule.tenant, reuse=rule.reuse)
        chat = self._engine.prepare_chat(_messages(question), GREEDY, options, documents=documents)
        return self._engine.add_validated(chat.request)


def _messages(question: Question) -> list[dict[str, Any]]:
    return [{"role": "system", "content": language.SYSTEM}, {"role": "user", "content": question.text}]
