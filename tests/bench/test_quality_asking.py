"""One context asked of the shipped model: what is counted is what was computed, the two ends are where they must be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvlite import Engine
from kvlite.bench.quality.asking import Answer, Asked, Asker, Rule
from kvlite.bench.quality.figures import FULL, NONE
from kvlite.bench.quality.generator import CROSS_KINDS, Context, contexts
from kvlite.bench.quality.meter import metered
from kvlite.models import load_config
from kvlite.startup import SHIPPED_MODEL

ALL, SOME, MASKED = Rule("query", 1.0), Rule("query", 0.15), Rule("query", 0.15, bottom_right=True)


@pytest.fixture(scope="module")
def context() -> Context:
    return contexts(31, per_kind=2)()


@pytest.fixture(scope="module")
def asker(context: Context) -> Iterator[Asker]:
    config, _family = load_config(SHIPPED_MODEL)
    with (
        metered(config) as meter,
        Engine(device="cpu", num_threads=2, max_num_seqs=8, kv_cache_bytes=1 << 28) as engine,
    ):
        made = Asker(engine, meter, config.num_layers)
        made.context(0, context, [FULL, NONE, SOME, ALL, MASKED], controls=[FULL])
        made.verify(context, [SOME, ALL])
        assert not meter.bottom_right
        yield made


def asked(asker: Asker, rule: Rule) -> Asked:
    return asker.asked[rule]


def crossing(found: Asked) -> list[tuple[str, str]]:
    return [(answer.question, answer.text) for answer in found.answers if answer.kind in CROSS_KINDS]


def test_every_question_across_documents_is_asked_under_every_rule_and_others_under_controls(
    asker: Asker, context: Context
) -> None:
    questions = [one.text for one in context.questions if one.kind in CROSS_KINDS]
    for rule in (NONE, SOME, ALL, MASKED):
        assert [question for question, _ in crossing(asked(asker, rule))] == questions
        assert len(asked(asker, rule).answers) == len(questions)
    assert {answer.question for answer in asked(asker, FULL).answers} == {one.text for one in context.questions}


def test_all_rows_recomputed_answer_as_exact_prefill(asker: Asker) -> None:
    assert crossing(asked(asker, ALL)) == crossing(asked(asker, FULL))
    assert asked(asker, ALL).top1 == [True] * 3
    assert max(asked(asker, ALL).kl) < 1e-6 < min(asked(asker, SOME).kl)


def test_token_layers_are_counted_at_the_products(asker: Asker) -> None:
    assert asked(asker, FULL).computed_share == [pytest.approx(1.0)]
    assert asked(asker, ALL).computed_share == [pytest.approx(1.0)]
    assert asked(asker, NONE).computed_share == [pytest.approx(0.0, abs=0.02)]
    assert 0.15 <= asked(asker, SOME).computed_share[0] < 0.25


def test_the_wrong_mask_computes_as_much_and_answers_otherwise(asker: Asker) -> None:
    assert asked(asker, MASKED).computed_share == asked(asker, SOME).computed_share
    assert crossing(asked(asker, MASKED)) != crossing(asked(asker, SOME))


def test_answers_are_right_exactly_when_they_are_the_word(asker: Asker, context: Context) -> None:
    words = {one.text: one.answer for one in context.questions}
    found: list[Answer] = asked(asker, FULL).answers
    assert all(answer.is_right == (answer.text.strip() == words[answer.question]) for answer in found)
    assert any(answer.is_right for answer in found)
