"""What users ask of reuse, and what they are told: wrong values name their field; reports add up."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from kvlite import Document, InvalidRequestError, Reuse, ReuseMode, Segment
from kvlite.reuse_types import SegmentSpan, VerifyReport


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: Reuse.blend(float("nan")), "reuse_options.recompute_ratio"),
        (lambda: Reuse.blend(1.01), "reuse_options.recompute_ratio"),
        (lambda: Reuse.verify(-0.1), "reuse_options.recompute_ratio"),
        (lambda: Reuse.blend("half"), "reuse_options.recompute_ratio"),  # type: ignore[arg-type]
        (lambda: Reuse.blend(True), "reuse_options.recompute_ratio"),
        (lambda: Reuse.blend(method=5), "reuse_options.method"),  # type: ignore[arg-type]
        (lambda: Reuse("of"), "reuse"),  # type: ignore[arg-type]
        (lambda: Reuse(["blend"]), "reuse"),  # type: ignore[arg-type]
        (lambda: Reuse(ReuseMode.BLEND, options=[1]), "reuse_options"),  # type: ignore[arg-type]
        (lambda: Reuse(ReuseMode.BLEND, options={str(n): n for n in range(17)}), "reuse_options"),
        (lambda: Document(""), "document.text"),
        (lambda: Document(), "document.text"),
        (lambda: Document(5), "document.text"),  # type: ignore[arg-type]
        (lambda: Document("a", id=""), "document.id"),
        (lambda: Document("a", id="a/b"), "document.id"),
        (lambda: Document("a", id="x" * 65), "document.id"),
        (lambda: Document("a", id=7), "document.id"),  # type: ignore[arg-type]
        (lambda: Document("a", title="x" * 513), "document.title"),
        (lambda: Segment(""), "prompt"),
        (lambda: Segment([]), "prompt"),
        (lambda: Segment(5), "prompt"),  # type: ignore[arg-type]
        (lambda: Segment("a", id="\n"), "prompt"),
        (lambda: SegmentSpan(0, 0, "a"), "prompt"),
    ],
)
def test_a_bad_value_names_its_field(make: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make()
    assert caught.value.param == param
    assert len(str(caught.value)) < 200, "a huge value is not repeated"


def test_modes_have_their_words_and_nothing_can_be_changed() -> None:
    assert Reuse("blend", 0.2).mode is ReuseMode.BLEND  # type: ignore[arg-type]
    assert Reuse.blend(0.2, "deviation", check_layer=2) == Reuse(ReuseMode.BLEND, 0.2, "deviation", {"check_layer": 2})
    assert [reuse.is_blended for reuse in (Reuse.OFF, Reuse.PREFIX, Reuse.blend(), Reuse.verify())] == [
        False, False, True, True,
    ]  # fmt: skip
    with pytest.raises(FrozenInstanceError):
        Reuse.OFF.ratio = 0.5  # type: ignore[misc]
    options = {"window": 3}
    reuse = Reuse(ReuseMode.BLEND, options=options)
    options["window"] = 4
    assert reuse.options == {"window": 3}


@pytest.mark.parametrize(
    ("equal", "exact", "blended", "first"), [(3, 3, 3, None), (0, 3, 3, 0), (2, 2, 5, 2), (4, 9, 4, 4), (0, 0, 0, None)]
)
def test_the_first_difference_is_where_answers_part_or_one_ends(
    equal: int, exact: int, blended: int, first: int | None
) -> None:
    assert VerifyReport(0.0, True, 0.0, equal, exact, blended, (), "").first_difference == first
