"""Figures of answers made by hand, the gate that refuses figures which prove nothing, and the meter between the ops."""

from __future__ import annotations

import pytest
import torch

from kvlite import ops
from kvlite.bench.errors import BenchError
from kvlite.bench.quality import rules
from kvlite.bench.quality.asking import Answer, Asked, Rule
from kvlite.bench.quality.figures import FULL, NONE, gate, keys, row, table
from kvlite.bench.quality.meter import Meter, bottom_right_last_key

QUERY, ALL = Rule("query", 0.15), Rule("query", 1.0)


def asked(num_right: int, *, wrong: str = " Rome") -> Asked:
    """A hundred answers to questions across documents, so many of them right, and one to a control."""
    kinds = ("pronoun", "role", "that", "that")
    answers = [
        Answer(kinds[at % 4], at // 4, f"{at}?", " Oslo" if at < num_right else wrong, at < num_right)
        for at in range(100)
    ]
    answers.append(Answer("local", 0, "?", " Oslo", True))
    return Asked(answers, ttft_s=[0.05, 0.03, 0.04], computed_share=[0.1, 0.2])


def outcome(full: int = 99, none: int = 24, query: int = 84) -> dict[Rule, Asked]:
    return {FULL: asked(full), NONE: asked(none), QUERY: asked(query), ALL: asked(full)}


def test_a_row_counts_questions_across_documents_and_shows_controls_beside() -> None:
    figures = row(QUERY, outcome())
    assert figures["questions"] == 100
    assert figures["exact_match"] == 0.84
    assert figures["exact_match_local"] == 1.0
    assert figures["exact_match_last"] is None
    assert figures["gap_recovered"] == pytest.approx(60 / 75)
    assert figures["token_layers"] == pytest.approx(0.15)
    assert figures["ttft_ms"] == pytest.approx(40.0)
    assert "kl" not in figures


def test_a_target_finds_its_key_and_the_best_method_of_a_ratio_is_named() -> None:
    found = outcome() | {Rule("hybrid", 0.15): asked(95), Rule("query", 0.15, bottom_right=True): asked(98)}
    found_keys = keys(found, {rule: row(rule, found) for rule in found})
    assert found_keys["gap_recovered_query_15"] == pytest.approx(0.8)
    assert found_keys["gap_recovered_hybrid_15"] == found_keys["gap_recovered_best_15"]
    assert found_keys["best_method_15"] == "hybrid"
    assert "gap_recovered_best_100" not in found_keys
    assert found_keys["x_ttft"]["query 15%"] == 1.0


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (outcome(full=85), "does not know the language"),
        (outcome(none=90), "there is no gap"),
        (outcome() | {ALL: asked(98)}, "are not those of exact prefill"),
        (outcome() | {ALL: asked(99, wrong=" Bern")}, "are not those of exact prefill"),
    ],
)
def test_the_gate_passes_a_clear_gap_and_refuses_the_rest(found: dict[Rule, Asked], word: str) -> None:
    assert gate(outcome()) is None
    with pytest.raises(BenchError, match=word):
        gate(found)


def test_the_table_has_a_line_per_rule() -> None:
    found = outcome()
    lines = table({rule: row(rule, found) for rule in found}).splitlines()
    assert len(lines) == 1 + len(found)
    assert "query 15%" in lines[3] and "84.0%" in lines[3] and "local 100%" in lines[3]


def test_rules_begin_with_the_two_ends_and_end_with_the_wrong_mask() -> None:
    made = rules(["query", "random"], [5, 15])
    assert made[:2] == [FULL, NONE]
    assert {(one.method, one.ratio) for one in made[2:6]} == {
        ("query", 0.05), ("query", 0.15), ("random", 0.05), ("random", 0.15),
    }  # fmt: skip
    assert made[-1] == Rule("query", 0.15, bottom_right=True)
    assert len(set(made)) == len(made)


def test_a_mask_aligned_at_the_end_is_exact_for_the_last_rows_alone() -> None:
    query_start, context_len = torch.tensor([0, 3, 6]).int(), torch.tensor([10, 8]).int()
    last_key = torch.tensor([7, 8, 9, 1, 4, 7]).int()
    assert bottom_right_last_key(query_start, context_len, last_key).tolist() == [7, 8, 9, 5, 6, 7]


def test_the_meter_counts_rows_through_layers_and_leaves_the_head_out() -> None:
    meter = Meter(row_weights=40, head_shape=(9, 4))
    watched = meter.ops(ops.select(torch.device("cpu"), "reference"))
    x = torch.randn(5, 4)
    watched.linear(x, torch.randn(6, 4), None, torch.empty(5, 6))
    watched.linear(x, torch.randn(4, 4), None, torch.empty(5, 4))
    watched.linear(x, torch.randn(9, 4), None, torch.empty(5, 9))
    assert meter.token_layers == 5.0
    meter.reset()
    assert meter.token_layers == 0.0
