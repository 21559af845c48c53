"""Names, options and numbers of methods: what is refused, with which words."""

from __future__ import annotations

from typing import Any

import pytest

from kvlite.errors import CapacityError, InvalidRequestError
from kvlite.reuse import METHODS, MethodTable, Scope, registry, resolve

LAYERS = 6


@pytest.mark.parametrize("name", METHODS)
def test_a_name_gives_its_method_and_equal_options_an_equal_one(name: str) -> None:
    method = resolve(name, {}, LAYERS)
    assert method.name == name
    assert method == resolve(name, {}, LAYERS) and hash(method) == hash(resolve(name, {}, LAYERS))
    rounds = method.rounds(LAYERS, 0.15)
    scores = method.scores(10, [(2, 3)])
    assert bool(rounds) is (scores is None)
    assert all(0 < cost <= 1 and scope in Scope for scope, cost, _ in rounds)
    assert not rounds or rounds[-1].ratio == pytest.approx(0.15)


@pytest.mark.parametrize("name", ["", "Query", "cacheblend", None, 3])
def test_an_unknown_method_is_refused_with_all_names(name: Any) -> None:
    with pytest.raises(InvalidRequestError, match="none, boundary, random, deviation") as caught:
        resolve(name, {}, LAYERS)
    assert caught.value.param == "reuse_options.method"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("query", {"check_layer": 1}, "no option of method query, whose options are: hop, window"),
        ("none", {"seed": 1}, "whose options are: none"),
        ("query", {"window": 4}, "4 is even"),
        ("query", {"window": 65}, "between 1 and 63"),
        ("query", {"window": 3.0}, "not an integer"),
        ("random", {"seed": 1024}, "between 0 and 1023"),
        ("random", {"seed": True}, "not an integer"),
        ("deviation", {"check_layer": 0}, "between 1 and 5"),
        ("deviation", {"check_layer": 6}, "between 1 and 5"),
        ("deviation", {"max_over_layers": 1}, "not true or false"),
        ("deviation", {"gradual": 9}, "between 1 and 8"),
        ("deviation", {"check_layer": 4, "gradual": 3}, "from check_layer 4 on there are 2 layers"),
        ("attention-deviation", {"decode_rows": 17}, "between 0 and 16"),
    ],
)
def test_a_wrong_option_is_refused_by_name_value_and_range(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        resolve(name, options, LAYERS)
    assert caught.value.param == f"reuse_options.{list(options)[-1]}"


def test_a_model_of_one_layer_has_no_check_layer() -> None:
    with pytest.raises(InvalidRequestError, match="1 layer, 2 are needed"):
        resolve("deviation", {}, 1)
    assert resolve("query", {}, 1).name == "query"


@pytest.mark.parametrize("ratio", [-0.01, 1.01, float("nan"), float("inf"), "0.2", None, True])
@pytest.mark.parametrize("name", ["none", "boundary", "query"])
def test_a_ratio_outside_0_to_1_is_refused(name: str, ratio: Any) -> None:
    with pytest.raises(InvalidRequestError, match="between 0 and 1"):
        resolve(name, {}, LAYERS).ratio(ratio)


def test_gradual_rounds_go_deeper_and_keep_fewer_rows() -> None:
    rounds = resolve("deviation", {"gradual": 3, "check_layer": 2}, LAYERS).rounds(LAYERS, 0.125)
    assert [ratio for _, _, ratio in rounds] == pytest.approx([0.5, 0.25, 0.125])
    assert [cost for _, cost, _ in rounds] == pytest.approx([2.2 / 6, 3.2 / 6, 4.2 / 6])


def test_equal_methods_share_a_number_and_the_table_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MAX_METHODS", 3)
    table = MethodTable()
    made = [resolve("random", {"seed": seed}, LAYERS) for seed in range(4)]
    assert [table.intern(method) for method in (*made[:3], *made[:3])] == [0, 1, 2, 0, 1, 2]
    assert [table[number] for number in range(3)] == made[:3]
    with pytest.raises(CapacityError, match="all 3 reuse methods"):
        table.intern(made[3])
    assert table.intern(made[1]) == 1
