"""The generator of questions: a reader who knows nothing but the sentences must find the same answers and kinds."""

from __future__ import annotations

import re

import pytest
from tokenizers import Tokenizer

from kvlite.bench.quality import language
from kvlite.bench.quality.generator import CROSS_KINDS, KINDS, Context, contexts
from kvlite.startup import SHIPPED_MODEL

SORT_OF = {value: sort for sort in language.ATTRIBUTES for value in sort.values}
AGAIN = {sort.again.removeprefix("{S}"): sort for sort in language.ATTRIBUTES}


def read(context: Context) -> dict[str, tuple[str, str]]:
    """Question text -> (answer, kind), by reading the sentences from first to last."""
    found: dict[str, tuple[str, str]] = {}
    person, holders, values, trips = ("", -1), dict[str, tuple[str, int]](), {}, dict[str, list[tuple[str, int]]]()
    for number, document in enumerate(context.documents):
        for sentence in re.findall(r"[^.]+\.", document):
            first, rest = sentence.strip().split(" ", 1)
            name, kind, role = first, "local", rest.split(" ")[0]
            if first in ("He", "She"):
                name, kind = person[0], "pronoun" if person[1] != number else "incoref"
            elif first == "The" and role in holders:
                name, kind = holders[role][0], "role" if holders[role][1] != number else "incoref"
            elif first not in language.MEN + language.WOMEN:
                continue
            again = AGAIN.get(f" {rest}")
            words = re.findall(r"[a-zA-Z]+", rest)
            if again is not None:
                value, where = values[again]
                kind = "that" if where != number else "incoref"
                found[again.question.format(S=name)] = (value, kind)
            elif words[-1] in language.ROLES:
                holders[words[-1]] = (name, number)
            elif words[0] in ("travelled", "went"):
                trips.setdefault(name, []).append((words[-1], number))
                values[language.HOME] = (words[-1], number)
            else:
                sort = SORT_OF[words[-1]]
                values[sort] = (words[-1], number)
                found[sort.question.format(S=name)] = (words[-1], kind)
            if first == name:
                person = (name, number)
    for name, made in trips.items():
        if made[0][1] != made[-1][1]:
            found[language.TRIP_QUESTION.format(S=name)] = (made[-1][0], "last")
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_reader_of_the_sentences_finds_the_answer_and_the_kind_of_every_question(seed: int) -> None:
    source, asked = contexts(seed, per_kind=2), 0
    for _ in range(25):
        context = source()
        found = read(context)
        for question in context.questions:
            assert found[question.text] == (question.answer, question.kind)
            told = re.findall(r"[^.]+\.", context.documents[question.place.document])[question.place.sentence]
            assert told.endswith("too.") or question.answer in told
            asked += 1
    assert asked > 25 * len(KINDS)


def test_every_context_has_questions_of_every_kind_and_no_more_than_asked() -> None:
    source = contexts(5, per_kind=2, kinds=CROSS_KINDS)
    for _ in range(20):
        context = source()
        assert {question.kind for question in context.questions} == set(CROSS_KINDS)
        assert all(len(context.of_kind(kind)) <= 2 for kind in CROSS_KINDS)
        assert len({question.text for question in context.questions}) == len(context.questions)


def test_a_seed_gives_its_contexts_again_and_another_seed_gives_others() -> None:
    one, same, other = contexts(7), contexts(7), contexts(8)
    first = [one() for _ in range(3)]
    assert first == [same() for _ in range(3)]
    assert first != [other() for _ in range(3)]


def test_every_word_is_one_token_of_the_shipped_model() -> None:
    tokenizer = Tokenizer.from_file(str(SHIPPED_MODEL / "tokenizer.json"))
    source = contexts(9, per_kind=2)
    for _ in range(30):
        context = source()
        texts = [*context.documents, *(f"{one.text} {one.answer}" for one in context.questions), language.SYSTEM]
        for text in texts:
            parts = re.findall(r" [A-Za-z]+|[^A-Za-z ]", f" {text}")
            assert tokenizer.encode(f" {text}").tokens == [part.replace(" ", "Ġ") for part in parts]
