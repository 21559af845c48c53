"""From answers to figures: a row per rule, the table that people read, the keys that a target can name, and the gate.

Pure. Exact match is over the questions that need another document, with controls beside; the gap is what position
repair alone loses of exact prefill.
"""

from __future__ import annotations

import statistics as averages
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import BenchError
from .asking import Answer, Asked, Rule
from .generator import CONTROL_KINDS, CROSS_KINDS
from .statistics import gap_interval, gap_recovered, share

FULL_AT_LEAST = 0.9
"""Exact match of exact prefill: below, the model does not know the task and nothing is measured."""
GAP_AT_LEAST = 0.2
"""Between exact prefill and position repair alone: below, the questions prove nothing."""

FULL, NONE = Rule("full"), Rule("none")


def row(rule: Rule, asked: Mapping[Rule, Asked]) -> dict[str, Any]:
    """Everything about one rule."""
    mine = asked[rule]
    cross = crossing(mine)
    right = share([answer.is_right for answer in cross])
    found: dict[str, Any] = {
        "method": rule.method,
        "ratio": None if rule.method == "full" else rule.ratio,
        "mask": "bottom-right" if rule.bottom_right else "exact",
        "questions": right.asked,
        "exact_match": round(right.value, 4),
        "exact_match_95": _rounded(right.interval),
    }
    for kind in CONTROL_KINDS + CROSS_KINDS:
        of_kind = share([answer.is_right for answer in mine.answers if answer.kind == kind])
        found[f"exact_match_{kind}"] = round(of_kind.value, 4) if of_kind.asked else None
    none, full = crossing(asked[NONE]), crossing(asked[FULL])
    gap = gap_recovered(right.value, _value(none), _value(full))
    interval = gap_interval([answer.group for answer in cross], _right(cross), _right(none), _right(full))
    found["gap_recovered"] = None if gap is None else round(gap, 4)
    found["gap_recovered_95"] = None if interval is None else _rounded(interval)
    found["token_layers"] = round(averages.mean(mine.computed_share), 4)
    found["ttft_ms"] = round(averages.median(mine.ttft_s) * 1e3, 2)
    if mine.kl:
        found |= {"kl": round(averages.mean(mine.kl), 5), "top1_agreement": round(share(mine.top1).value, 4)}
    return found


def keys(asked: Mapping[Rule, Asked], rows: Mapping[Rule, dict[str, Any]]) -> dict[str, Any]:
    """gap_recovered_<method>_<percent> of every rule, and gap_recovered_best_<percent> with the method's name."""
    found: dict[str, Any] = {"questions": len(crossing(asked[FULL])), "x_ttft": {}}
    best: dict[int, tuple[float, str]] = {}
    for rule, figures in rows.items():
        gap = figures["gap_recovered"]
        if rule.method in ("full", "none") or gap is None:
            continue
        percent = round(rule.ratio * 100)
        name = f"{rule.method.replace('-', '_')}_{percent}" + ("_bottom_right" if rule.bottom_right else "")
        found[f"gap_recovered_{name}"] = gap
        if not rule.bottom_right and rule.ratio < 1.0:
            best[percent] = max(best.get(percent, (gap, rule.method)), (gap, rule.method))
    for percent, (gap, method) in sorted(best.items()):
        found |= {f"gap_recovered_best_{percent}": gap, f"best_method_{percent}": method}
    full = rows[FULL]["ttft_ms"]
    found["x_ttft"] = {rule.name: round(full / figures["ttft_ms"], 2) for rule, figures in rows.items() if rule != FULL}
    return found


def gate(asked: Mapping[Rule, Asked]) -> None:
    """Raises BenchError when the figures would prove nothing, or when all rows recomputed are not exact prefill."""
    full, none = crossing(asked[FULL]), crossing(asked[NONE])
    if _value(full) < FULL_AT_LEAST:
        raise BenchError(
            f"exact prefill answers {_value(full):.1%} of the questions across documents; at least {FULL_AT_LEAST:.0%} "
            "are needed, so this model does not know the language"
        )
    if _value(full) - _value(none) < GAP_AT_LEAST:
        raise BenchError(
            f"position repair alone answers {_value(none):.1%} and exact prefill {_value(full):.1%}: there is no gap, "
            "so either nothing was reused or the documents do not need each other"
        )
    exact = {(one.group, one.question): one.text for one in full}
    for rule, found in asked.items():
        if rule.method in ("full", "none") or rule.ratio < 1.0:
            continue
        answers = crossing(found)
        different = sum(exact[one.group, one.question] != one.text for one in answers)
        if different:
            raise BenchError(f"{rule.name}: {different} of {len(answers)} answers are not those of exact prefill")


def table(rows: Mapping[Rule, dict[str, Any]]) -> str:
    """What people read: percent, milliseconds."""
    head = f"{'rule':32} {'exact match':>22} {'gap':>6} {'95 %':>12} {'layers':>7} {'TTFT':>8}   kinds"
    lines = [head]
    for rule, one in rows.items():
        low, high = one["exact_match_95"]
        gap, around = one["gap_recovered"], one["gap_recovered_95"]
        shown = "-" if gap is None else f"{gap:.0%}"
        between = "-" if around is None else f"{around[0]:.0%}-{around[1]:.0%}"
        kinds = " ".join(
            f"{kind} {one[f'exact_match_{kind}']:.0%}"
            for kind in CROSS_KINDS + CONTROL_KINDS
            if one[f"exact_match_{kind}"] is not None
        )
        lines.append(
            f"{rule.name:32} {one['exact_match']:>8.1%} ({low:.1%}-{high:.1%})"
            f" {shown:>6} {between:>12} {one['token_layers']:>7.1%} {one['ttft_ms']:>5.0f} ms   {kinds}"
        )
    return "\n".join(lines)


def crossing(asked: Asked) -> list[Answer]:
    """Answers to questions that need another document."""
    return [answer for answer in asked.answers if answer.kind in CROSS_KINDS]


def _right(answers: Sequence[Answer]) -> list[bool]:
    return [answer.is_right for answer in answers]


def _value(answers: Sequence[Answer]) -> float:
    return share(_right(answers)).value


def _rounded(interval: tuple[float, float]) -> list[float]:
    return [round(end, 4) for end in interval]
