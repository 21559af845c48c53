"""Every method's scores against dense attention of a plain twin, and the rows that methods without a look choose."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from kvlite.reuse import ReuseMethod, Scope, resolve
from tests.reuse.conftest import INTERPRETED
from tests.reuse.stage import PREFIX, Place, Rows, Stage, checkpoint, decoder
from tests.reuse.test_laws import DOCS, Layout
from tests.reuse.twin import Seen, Text, Twin

NUM_LAYERS = 3
FAMILIES = ["qwen2-window"] if INTERPRETED else ["llama3", "qwen3-window"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


class Blend:
    """One blended prompt with its documents placed, on the stage and in the twin."""

    def __init__(self, family: str, backend: str) -> None:
        made = decoder(family, backend)
        self.stage, self.layout = Stage(made), Layout()
        self.twin = Twin(checkpoint(family)[1], [made.config.window(i) for i in range(NUM_LAYERS)])
        self.text = self.twin.text(len(self.layout.tokens))
        self.places = self.layout.place(0, [self.stage.make(doc) for doc in self.layout.docs])
        for start, doc in zip(self.layout.starts, self.layout.docs, strict=True):
            alone = self.twin_alone(doc)
            self.twin.place(self.text, start, alone, len(PREFIX))
        self.keys = range(self.layout.reused[0], self.layout.reused[-1] + 1)

    def twin_alone(self, doc: list[int]) -> Text:
        tokens = [*PREFIX, *doc]
        alone = self.twin.text(len(tokens))
        self.twin.run(alone, range(len(tokens)), tokens)
        return alone

    def seen(self, positions: list[int], depth: int | None = None) -> list[Seen]:
        return self.twin.run(self.text, positions, [self.layout.tokens[p] for p in positions], depth)

    def scored(self, positions: list[int], scoring: range, method: ReuseMethod, number: int = 0) -> Any:
        """(weight, value) over the keys, as tensors."""
        rows = self.layout.rows(0, positions, score=(method, scoring, self.keys, number))
        answer = self.stage.run([rows], self.places)
        self.places = []
        return tuple(torch.from_numpy(part) for part in answer.scores[0])

    def at_reused(self, full: torch.Tensor) -> torch.Tensor:
        """Entries of a tensor over the keys, or over all positions, at reused positions."""
        offset = self.keys.start if len(full) == len(self.keys) else 0
        return full[torch.tensor(self.layout.reused) - offset]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.allclose(ours, theirs, rtol=2e-4, atol=1e-5), (ours - theirs).abs().max()


def squares(seen: Seen) -> torch.Tensor:
    return (seen.new_v - seen.old_v).square().sum((1, 2))


def test_query_is_the_attention_of_the_scoring_rows_over_all_heads_and_layers(family: str, backend: str) -> None:
    blend = Blend(family, backend)
    new = blend.layout.new
    scoring = range(len(new) - 2, len(new))
    weight, value = blend.scored(new, scoring, resolve("query", {"hop": False}, NUM_LAYERS))
    expected = sum(layer.attention[:, scoring].sum((0, 1)) for layer in blend.seen(new))
    assert isinstance(expected, torch.Tensor)
    assert_close(blend.at_reused(weight), blend.at_reused(expected))
    assert (value == 1).all() and (blend.at_reused(weight) >= 0).all() and bool(weight.any())


def test_a_query_window_takes_the_mean_of_its_keys(backend: str) -> None:
    blend = Blend(FAMILIES[0], backend)
    new = blend.layout.new
    scoring = range(len(new) - 2, len(new))
    weight, _ = blend.scored(new, scoring, resolve("query", {"hop": False}, NUM_LAYERS))
    smooth, _ = blend.scored(new, scoring, resolve("query", {"hop": False, "window": 5}, NUM_LAYERS))
    for n, found in enumerate(smooth):
        assert float(found) == pytest.approx(float(weight[max(n - 2, 0) : n + 3].mean()), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("check_layer", [1, 2])
def test_deviation_is_the_squared_change_of_values_at_the_check_layer(
    check_layer: int, family: str, backend: str
) -> None:
    blend = Blend(family, backend)
    every = list(range(len(blend.layout.tokens)))
    method = resolve("deviation", {"check_layer": check_layer}, NUM_LAYERS)
    weight, value = blend.scored(every, range(len(every)), method)
    expected = squares(blend.seen(every, check_layer)[-1])
    assert (weight == 1).all()
    assert_close(blend.at_reused(value), blend.at_reused(expected))


def test_the_maximum_over_layers_is_of_changes_relative_to_the_rows_own_values(family: str, backend: str) -> None:
    blend = Blend(family, backend)
    every = list(range(len(blend.layout.tokens)))
    method = resolve("deviation", {"check_layer": 2, "max_over_layers": True}, NUM_LAYERS)
    _, value = blend.scored(every, range(len(every)), method)
    layers = blend.seen(every, 2)[1:]
    expected = torch.stack([squares(layer) / layer.old_v.square().sum((1, 2)) for layer in layers]).amax(0)
    assert_close(blend.at_reused(value), blend.at_reused(expected))


def test_gradual_filtering_looks_one_layer_deeper_at_the_rows_that_are_left(family: str, backend: str) -> None:
    blend = Blend(family, backend)
    method = resolve("deviation", {"gradual": 2}, NUM_LAYERS)
    every = list(range(len(blend.layout.tokens)))
    kept = sorted([*blend.layout.new, *blend.layout.reused[::2]])
    blend.scored(every, range(len(every)), method)
    blend.seen(every, 1)
    weight, value = blend.scored(kept, range(len(kept)), method, 1)
    expected = torch.zeros(len(every))
    expected[kept] = squares(blend.seen(kept, 2)[-1])
    assert_close(blend.at_reused(value), blend.at_reused(expected))
    seen = torch.zeros(len(every))
    seen[kept] = 1
    assert torch.equal(blend.at_reused(weight), blend.at_reused(seen))


@pytest.mark.parametrize("check_layer", [1, 2])
def test_attention_deviation_is_attention_received_below_times_change_at_the_check_layer(
    check_layer: int, family: str, backend: str
) -> None:
    blend = Blend(family, backend)
    every = list(range(len(blend.layout.tokens)))
    method = resolve("attention-deviation", {"check_layer": check_layer}, NUM_LAYERS)
    weight, value = blend.scored(every, range(len(every)), method)
    seen = blend.seen(every, check_layer)
    assert_close(blend.at_reused(weight), blend.at_reused(seen[-2].attention.sum((0, 1))))
    change = (seen[-1].new_v - seen[-1].old_v).abs().sum((1, 2))
    assert_close(blend.at_reused(value), blend.at_reused(change))


def test_a_decode_step_asks_again_for_the_weights_alone_and_goes_on(family: str, backend: str) -> None:
    blend = Blend(family, backend)
    last = len(blend.layout.tokens) - 1
    blend.stage.run([blend.layout.rows(0, blend.layout.new[:-1])], blend.places)
    blend.places = []
    method = resolve("attention-deviation", {"decode_rows": 3}, NUM_LAYERS)
    entry = (method, range(1), blend.keys, 1)
    answer = blend.stage.run([blend.layout.rows(0, [last], sample=True, score=entry)])
    blend.seen(blend.layout.new[:-1])
    weight, value = (torch.from_numpy(part) for part in answer.scores[0])
    assert_close(blend.at_reused(weight), blend.at_reused(blend.seen([last])[0].attention.sum((0, 1))))
    assert not value.any() and len(answer.tokens) == 1


def naive_links(seen: list[Seen], length: int) -> torch.Tensor:
    """[length, 3] of a segment, row by row and key by key."""
    first = len(PREFIX)
    links = torch.zeros(length, 3)
    mean = torch.stack([layer.attention.mean(0) for layer in seen])
    for j in range(length):
        links[j, 2] = mean[:, first + j, :first].sum(1).mean()
        earlier = mean[:, first + j, first + 1 : first + j].amax(0)
        if len(earlier):
            parent = int(earlier.argmax()) + 1
            links[j, :2] = torch.tensor([j - parent, float(earlier.max())])
    return links


@pytest.mark.parametrize("chunks", [1, 3])
def test_links_are_each_rows_strongest_look_inside_its_segment_in_any_chunks(
    chunks: int, family: str, backend: str
) -> None:
    blend, doc = Blend(family, backend), DOCS[0]
    tokens, segment = [*PREFIX, *doc], blend.stage.segment(doc)
    cuts = [0, len(tokens)] if chunks == 1 else [0, len(PREFIX), len(PREFIX) + 3, len(tokens)]
    for start, end in pairwise(cuts):
        done = max(start - len(PREFIX), 0)
        into = segment if end > len(PREFIX) else None
        blend.stage.run([Rows(4, range(start, end), tokens[start:end], into=into, into_from=done)])
    blend.stage.run([Rows(3, [0], [3])], [Place(2, 20, segment)])
    alone = blend.twin.text(len(tokens))
    expected = naive_links(blend.twin.run(alone, range(len(tokens)), tokens), len(doc))
    assert_close(blend.stage.links(2, range(20, 20 + len(doc))), expected)
    assert expected[2:, 0].min() > 0 and bool((expected[:, 2] > 0).any())


@pytest.mark.parametrize(("method", "miss_weight", "num_rows"), [("hybrid", 3, 1), ("query", 0, 2)])
def test_attention_hops_once_along_the_links(
    method: str, miss_weight: int, num_rows: int, family: str, backend: str
) -> None:
    blend = Blend(family, backend)
    new = blend.layout.new
    weight, value = blend.scored(new, range(len(new) - 2, len(new)), resolve(method, {}, NUM_LAYERS))
    mass = sum(layer.attention[:, -num_rows:].sum((0, 1)) for layer in blend.seen(new))
    assert isinstance(mass, torch.Tensor)
    expected = torch.zeros(len(blend.layout.tokens))
    for start, doc in zip(blend.layout.starts, blend.layout.docs, strict=True):
        tokens = [*PREFIX, *doc]
        links = naive_links(blend.twin.run(blend.twin.text(len(tokens)), range(len(tokens)), tokens), len(doc))
        own = mass[start : start + len(doc)] * (1 + miss_weight * links[:, 2])
        expected[start : start + len(doc)] = torch.maximum(expected[start : start + len(doc)], own)
        for j, (offset, strength, _) in enumerate(links.tolist()):
            parent = start + j - int(offset)
            expected[parent] = max(float(expected[parent]), strength * float(own[j]))
    assert_close(blend.at_reused(weight), blend.at_reused(expected))
    assert (value == 1).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("query", {"hop": False}),
        ("query", {"hop": False, "window": 3}),
        ("deviation", {"check_layer": 2}),
        ("attention-deviation", {}),
    ],
)
def test_chunks_add_up_to_the_scores_of_the_whole(name: str, options: dict[str, Any], backend: str) -> None:
    method = resolve(name, options, NUM_LAYERS)
    (scope, _, _), *_ = method.rounds(NUM_LAYERS, 0.5)
    whole, parts = Blend(FAMILIES[0], backend), Blend(FAMILIES[0], backend)
    rows = whole.layout.new if scope is Scope.NEW else list(range(len(whole.layout.tokens)))
    first = len(whole.layout.new) - 2 if scope is Scope.NEW else 0
    weight, value = whole.scored(rows, range(first, len(rows)), method)
    cut = len(rows) - 1
    found = [parts.scored(rows[:cut], range(first, cut), method), parts.scored(rows[cut:], range(1), method)]
    assert_close(parts.at_reused(found[0][0] + found[1][0]), whole.at_reused(weight))
    assert_close(parts.at_reused(torch.maximum(found[0][1], found[1][1])), whole.at_reused(value))


def test_boundary_takes_the_first_rows_of_every_segment_but_the_first() -> None:
    spans = [(2, 4), (6, 3), (12, 5)]
    scores = resolve("boundary", {}, NUM_LAYERS).scores(20, spans)
    assert scores is not None and scores.dtype == np.float32 and len(scores) == 20
    reused = [p for start, length in spans for p in range(start, start + length)]
    ranked = sorted(reused, key=lambda p: (-scores[p], p))
    assert ranked == [6, 12, 7, 13, 8, 14, 15, 16, 2, 3, 4, 5]


def test_random_is_a_shuffle_of_its_own_for_each_seed() -> None:
    first, again, other = (resolve("random", {"seed": seed}, NUM_LAYERS).scores(50, []) for seed in (3, 3, 4))
    assert first is not None and again is not None and other is not None
    assert first.tolist() == again.tolist() != other.tolist()
    assert sorted(first.tolist()) == list(range(1, 51))


def test_none_asks_for_no_row_whatever_the_ratio() -> None:
    method = resolve("none", {}, NUM_LAYERS)
    assert method.ratio(0.7) == 0 and not method.rounds(NUM_LAYERS, 0.7)
    assert resolve("query", {}, NUM_LAYERS).ratio(0.7) == 0.7
