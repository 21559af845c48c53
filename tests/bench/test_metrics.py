"""Percentiles against numpy's; goodput, rates and counts on records that are made by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvlite.bench.metrics import Objective, Record, percentile, summary

LOOSE = Objective(ttft_ms=1e9, tpot_ms=1e9)


def record(due_s: float, *piece_s: float, error: str | None = None) -> Record:
    """One token per piece; ends with the last one."""
    end = piece_s[-1] if piece_s else due_s
    return Record(due_s, due_s, list(piece_s), num_tokens=len(piece_s), end_s=end, error=error, prompt_tokens=10)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("percent", [0, 1, 50, 90, 99, 100])
def test_percentiles_are_numpys(count: int, percent: float) -> None:
    draw = random.Random(count)
    values = [draw.expovariate(1.0) for _ in range(count)]
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_a_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)


def test_rates_count_tokens_of_whole_answers_over_the_whole_run() -> None:
    figures = summary([record(0.0, 1.0, 2.0), record(2.0, 4.0)], LOOSE)
    assert figures["output_tokens"] == 3
    assert figures["duration_s"] == 4.0
    assert figures["tokens_per_s"] == 0.75
    assert figures["requests_per_s"] == 0.5


def test_failed_requests_count_as_errors_and_never_as_speed() -> None:
    broken = record(0.0, 0.001, error="broke off")
    figures = summary([record(0.0, 1.0, 2.0), broken], LOOSE)
    assert (figures["errors"], figures["output_tokens"], figures["slo_share"]) == (1, 2, 0.5)
    assert figures["ttft_ms_p50"] == 1000.0
    assert figures["error_kinds"] == {"broke off": 1}


def test_goodput_needs_both_halves_of_the_objective() -> None:
    objective = Objective(ttft_ms=1000, tpot_ms=500)
    late_start = record(0.0, 1.5, 1.6)
    slow_tokens = record(0.0, 0.5, 2.0)
    on_the_line = record(0.0, 1.0, 1.5)
    assert [objective.met(one) for one in (late_start, slow_tokens, on_the_line)] == [False, False, True]
    assert summary([late_start, slow_tokens, on_the_line], objective)["goodput_rps"] == pytest.approx(0.5)


def test_gaps_between_pieces_are_pooled_over_requests() -> None:
    figures = summary([record(0.0, 1.0, 1.1, 1.3), record(0.0, 2.0)], LOOSE)
    assert figures["itl_ms_p50"] == pytest.approx(150.0)
    assert figures["tpot_ms_p50"] == pytest.approx(150.0)


def test_a_server_that_counts_other_tokens_than_the_client_is_named() -> None:
    agreeing, other = record(0.0, 1.0), record(0.0, 1.0)
    agreeing.usage_tokens, other.usage_tokens = 1, 2
    assert summary([agreeing, other], LOOSE)["count_disagreements"] == 1
    assert "count_disagreements" not in summary([agreeing], LOOSE)
