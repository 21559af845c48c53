"""The laws of reused text at the level of one plan: what a placed, scored or recomputed row is, bit by bit.

Each with every backend; test_interpreted.py runs this file once more with the Triton kernels interpreted.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvlite.reuse import resolve
from tests.models.make import prompt
from tests.reuse.conftest import INTERPRETED
from tests.reuse.stage import PREFIX, Place, Rows, Segment, Stage, decoder

FAMILIES = ["qwen2-window"] if INTERPRETED else ["llama3", "qwen2-window", "qwen3", "mistral"]
"""The interpreter is slow: one family, with windows and without the many small norms of heads."""
LENGTHS = [6, 1, 3, 1, 1, 2] if INTERPRETED else [11, 1, 6, 3, 2, 5]
*DOCS, HEAD, GAP, QUESTION = (prompt(length, 1 + n) for n, length in enumerate(LENGTHS))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


class Layout:
    """prefix, head, document 0, gap, document 1, document 2, question: what is reused and what is new."""

    def __init__(self, docs: list[list[int]] = DOCS) -> None:
        self.tokens = [*PREFIX, *HEAD]
        self.starts: list[int] = []
        for n, doc in enumerate(docs):
            self.tokens += GAP if n == 1 else []
            self.starts.append(len(self.tokens))
            self.tokens += doc
        self.docs = docs
        self.tokens += QUESTION
        self.reused = [p for start, doc in zip(self.starts, docs, strict=True) for p in range(start, start + len(doc))]
        self.new = [p for p in range(len(self.tokens)) if p not in self.reused]

    def place(self, row: int, segments: list[Segment]) -> list[Place]:
        return [Place(row, start, segment) for start, segment in zip(self.starts, segments, strict=True)]

    def rows(self, row: int, positions: list[int], **more: object) -> Rows:
        return Rows(row, positions, [self.tokens[p] for p in positions], **more)  # type: ignore[arg-type]


def blended(stage: Stage, row: int, layout: Layout, chosen: list[int]) -> torch.Tensor:
    """Places all documents, computes the chosen and the new rows; the KV of the sequence."""
    segments = [stage.make(doc) for doc in layout.docs]
    positions = sorted([*chosen, *layout.new])
    stage.run([layout.rows(row, positions, sample=True)], layout.place(row, segments))
    return stage.kv(row, range(len(layout.tokens)))


def test_the_first_layer_is_bit_equal_to_a_full_prefill_at_any_offset(family: str, backend: str) -> None:
    stage, layout = Stage(decoder(family, backend)), Layout()
    stage.prefill(0, layout.tokens)
    segments = [stage.make(doc) for doc in layout.docs]
    stage.run([Rows(2, [0], [3])], layout.place(1, segments))
    full, placed = stage.kv(0, layout.reused), stage.kv(1, layout.reused)
    assert torch.equal(full[0], placed[0])
    assert not torch.equal(full[1:], placed[1:])


def test_a_segment_placed_where_it_was_computed_is_bit_equal_in_every_layer(family: str, backend: str) -> None:
    stage = Stage(decoder(family, backend))
    segment = stage.make(DOCS[0], row=2)
    stage.run([Rows(3, [0], [3])], [Place(0, len(PREFIX), segment)])
    keys = range(len(PREFIX), len(PREFIX) + len(DOCS[0]))
    assert torch.equal(stage.kv(0, keys), stage.kv(2, keys))


@pytest.mark.parametrize("distance", [1, 40])
def test_a_segment_moved_with_nothing_before_it_equals_itself_rotated(distance: int, family: str, backend: str) -> None:
    stage, ids = Stage(decoder(family, backend)), DOCS[0]
    segment = stage.make(ids, row=2, prefix=())
    there = [distance + i for i in range(len(ids))]
    stage.run([Rows(0, there, ids, last_keys=range(len(ids)))], [Place(1, distance, segment)])
    computed, placed = stage.kv(0, range(len(ids))), stage.kv(1, there)
    assert torch.equal(computed[0], placed[0])
    assert torch.allclose(computed, placed, atol=2e-5)


def test_parts_of_segments_and_the_same_segment_twice_are_placed_as_wholes_are(backend: str) -> None:
    stage, ids = Stage(decoder(FAMILIES[0], backend)), prompt(10, 1)
    segment = stage.make(ids)
    stage.run([Rows(3, [0], [3])], [Place(0, 5, segment), Place(0, 30, segment), Place(1, 5, segment)])
    stage.run([Rows(3, [0], [3])], [Place(2, 5, segment, 0, 3), Place(2, 8, segment, 3, 1), Place(2, 9, segment, 4)])
    whole = stage.kv(0, range(5, 15))
    assert torch.equal(stage.kv(1, range(5, 15)), whole) and torch.equal(stage.kv(2, range(5, 15)), whole)
    assert torch.equal(stage.kv(0, range(30, 40))[:, 1], whole[:, 1])
    assert not stage.kv(0, [4, 15, 29, 40]).isfinite().any()


@pytest.mark.parametrize("deterministic", [True, False])
def test_everything_recomputed_equals_a_full_prefill(deterministic: bool, family: str, backend: str) -> None:
    stage, layout = Stage(decoder(family, backend, deterministic)), Layout()
    expected = stage.prefill(0, layout.tokens).tokens
    segments = [stage.make(doc) for doc in layout.docs]
    positions = list(range(len(layout.tokens)))
    got = stage.run([layout.rows(1, positions, sample=True)], layout.place(1, segments)).tokens
    full, ours = stage.kv(0, positions), stage.kv(1, positions)
    assert torch.equal(full, ours) if deterministic else torch.allclose(full, ours, atol=1e-5)
    assert got == expected


def test_rows_after_p_never_change_what_is_recomputed_at_p(family: str, backend: str) -> None:
    """The leak of a bottom-right mask: a recomputed row that sees keys behind it."""
    layout = Layout()
    other = Layout([DOCS[0], DOCS[1], prompt(len(DOCS[2]), 9)])
    other.tokens[-2:] = prompt(2, 8)
    chosen = layout.reused[2::3]
    stage = Stage(decoder(family, backend))
    before, after = blended(stage, 0, layout, chosen), blended(stage, 1, other, chosen)
    p = layout.starts[2]
    assert torch.equal(before[:, :, :p], after[:, :, :p])
    assert not torch.equal(before[:, :, p:], after[:, :, p:])


def test_the_order_of_rows_in_a_plan_changes_nothing(family: str, backend: str) -> None:
    stage, layout = Stage(decoder(family, backend)), Layout()
    segments = [stage.make(doc) for doc in layout.docs]
    positions = [*layout.reused[::2], *layout.new]
    shuffled = [positions[i] for i in torch.randperm(len(positions), generator=torch.Generator().manual_seed(1))]
    stage.run([layout.rows(0, sorted(positions))], layout.place(0, segments))
    stage.run([layout.rows(1, shuffled)], layout.place(1, segments))
    keys = range(len(layout.tokens))
    ordered, mixed = stage.kv(0, keys), stage.kv(1, keys)
    # A Triton tile's product may round by a row's place in the tile.
    assert torch.allclose(ordered, mixed, atol=1e-5) if backend == "triton" else torch.equal(ordered, mixed)


def test_blends_a_prefill_and_a_decode_in_one_plan_are_what_they_are_alone(family: str, backend: str) -> None:
    """Two blends being scored (one leaves half-way, one stays), a plain prefill and a decode."""
    first, second = Layout(), Layout(DOCS[::-1])
    every, text = list(range(len(second.tokens))), prompt(9, 20)
    asks = (resolve("query", {}, 3), range(len(first.new) - len(QUESTION), len(first.new)), _hull(first), 0)
    rows = [
        Rows(3, [len(text)], [5], sample=True),
        second.rows(1, every, score=(resolve("deviation", {}, 3), every, _hull(second), 0)),
        Rows(2, range(13), prompt(13, 21), sample=True),
        first.rows(0, first.new, score=asks),
    ]
    outcomes = []
    for seed, plans in enumerate([[[one] for one in rows], [rows]]):
        stage = Stage(decoder(family, backend), seed=seed)
        stage.prefill(3, text)
        segments = {tuple(doc): stage.make(doc) for doc in DOCS}
        places = [
            place for layout, row in ((first, 0), (second, 1))
            for place in layout.place(row, [segments[tuple(doc)] for doc in layout.docs])
        ]  # fmt: skip
        answers = [stage.run(plan, places if n == 0 else ()) for n, plan in enumerate(plans)]
        outcomes.append((
            [score for answer in answers for score in answer.scores],
            [token for answer in answers for token in answer.tokens],
            [stage.kv(row, range(10)) for row in range(4)] + [stage.kv(1, range(len(second.tokens)))],
        ))  # fmt: skip
    for alone, together in zip(*(scores for scores, _, _ in outcomes), strict=True):
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(alone, together, strict=True))
    assert outcomes[0][1] == outcomes[1][1]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*(kv for _, _, kv in outcomes), strict=True))


def _hull(layout: Layout) -> range:
    return range(layout.reused[0], layout.reused[-1] + 1)


def test_rows_whose_cache_is_exact_do_not_deviate(family: str, backend: str) -> None:
    """The exact prefix, and a segment that stands right behind its own canonical prefix."""
    stage = Stage(decoder(family, backend))
    text = [*PREFIX, *DOCS[0], *DOCS[2], *QUESTION]
    end = len(PREFIX) + len(DOCS[0])
    segments = [stage.make(DOCS[0]), stage.make(DOCS[2])]
    stage.prefill(0, text[: len(PREFIX)])
    places = [Place(0, len(PREFIX), segments[0]), Place(0, end, segments[1])]
    for method in (resolve("deviation", {"check_layer": 2, "max_over_layers": True}, 3), resolve("deviation", {}, 3)):
        entry = (method, range(len(text)), range(end + len(DOCS[2])), 0)
        weight, value = stage.run([Rows(0, range(len(text)), text, score=entry)], places).scores[0]
        assert not value[:end].any() and weight.all()
        assert (value[end:] > 0).all()


def test_layers_below_the_check_layer_are_fresh_and_those_above_are_untouched(family: str, backend: str) -> None:
    stage, layout = Stage(decoder(family, backend)), Layout()
    stage.prefill(0, layout.tokens)
    segments = [stage.make(doc) for doc in layout.docs]
    stage.run([Rows(2, [0], [3])], layout.place(1, segments))
    placed = stage.kv(1, layout.reused)
    method, every = resolve("attention-deviation", {"check_layer": 2}, 3), list(range(len(layout.tokens)))
    stage.run([layout.rows(1, every, score=(method, every, _hull(layout), 0))])
    scored, full = stage.kv(1, layout.reused), stage.kv(0, layout.reused)
    assert torch.equal(scored[:2], full[:2])
    assert torch.equal(scored[2:], placed[2:]) and not torch.equal(placed[1:], full[1:])


def test_a_segment_is_stored_before_rope_and_its_maker_is_an_ordinary_prefill(family: str, backend: str) -> None:
    stage = Stage(decoder(family, backend))
    tokens = [*PREFIX, *DOCS[0]]
    segment = stage.segment(DOCS[0])
    made = stage.run([Rows(0, range(len(tokens)), tokens, sample=True, into=segment)])
    stage.prefill(1, tokens)
    assert torch.equal(stage.kv(0, range(len(tokens))), stage.kv(1, range(len(tokens))))
    first = stage.segment(DOCS[0])
    stage.run([Rows(0, [0], DOCS[0][:1], into=Segment(DOCS[0][:1], first.blocks))])
    at_zero = stage.kv(0, [0])
    assert torch.equal(at_zero[:, :, 0], stage.stored(first)[:, :, 0]), "position 0 is not rotated"
    assert len(made.tokens) == 1
