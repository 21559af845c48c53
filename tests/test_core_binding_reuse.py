"""Blended reuse through kvlite._core: segments made ahead, placed and scored through the arenas, reports, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvlite import _core
from tests.core_driver import Driver

DOCUMENT = np.arange(40, 50, dtype=np.int32)


def blend(**changes: Any) -> tuple[Any, ...]:
    """Positions 3..13 are a document; 2 of its rows are recomputed, the last ones."""
    values: dict[str, Any] = {
        "spans": np.array([[3, 10]], np.int32),
        "method_id": 5,
        "ratio": 0.2,
        "rounds": [],
        "scores": np.arange(15, dtype=np.float32),
        "decode_rows": 0,
    }
    return tuple((values | changes).values())


def prompt_with_document() -> list[int]:
    return [1, 2, 3, *DOCUMENT.tolist(), 7, 8]


def ready(driver: Driver, tenant: int = 0, pinned: bool = False) -> int:
    handle = driver.core.add_segment(DOCUMENT, tenant=tenant, pinned=pinned, deadline_ms=None, now_ms=0)
    assert driver.core.segment(tenant, DOCUMENT)["state"] == "wanted"  # type: ignore[index]
    assert driver.run(4)[1] == [[handle, -1, 0]]
    return handle


def test_a_segment_made_ahead_is_placed_and_the_report_says_where_every_token_came_from():
    driver = Driver(canonical_prefix=[9, 8])
    ready(driver)
    state = {"len": 10, "state": "ready", "tenant": 0, "pinned": False, "num_users": 0, "num_hits": 0, "num_blocks": 3}
    assert driver.core.segment(0, DOCUMENT) == state
    handle = driver.add(prompt_with_document(), blend=blend())
    driver.step()
    [[seq_row, position, length, offset, first, count]] = driver.counted("place", 6)
    assert (position, length, offset, first, count) == (3, 10, 0, 0, 3)
    assert driver.region("admitted")[0].tolist() == [handle, 0, seq_row, 0, 0]
    header = driver.region("header")
    assert driver.region("positions")[: header[1]].tolist() == [0, 1, 2, 11, 12, 13, 14]
    report = {"prefix_tokens": 0, "blended_tokens": 8, "recomputed_tokens": 2, "computed_tokens": 5, "spans": [1]}
    assert driver.core.reuse_report(handle) == report
    driver.complete()
    assert driver.run()[1] == [[handle, 0, 1]]
    assert driver.core.reuse_report(handle) is None
    stats = driver.core.stats()
    assert (stats["blended_tokens_total"], stats["recomputed_tokens_total"], stats["segments_made_total"]) == (8, 2, 1)
    assert (stats["num_segments"], stats["segment_blocks"], stats["segment_hit_tokens_total"]) == (1, 3, 10)
    driver.core.audit()


def test_a_scoring_round_asks_through_the_arena_and_the_answer_chooses_the_rows():
    driver = Driver()
    ready(driver)
    driver.add(prompt_with_document(), blend=blend(rounds=[(0, 1.0, 0.2)], scores=None))
    driver.step()
    assert driver.counted("score", 8) == [[0, 3, 2, 3, 13, 5, 0]]
    answer = np.zeros((10, 2), np.float32)
    answer[:, 1] = 1
    answer[[4, 6], 0] = 3
    driver.region("scored")[:10] = answer.view(np.int32)
    driver.complete()
    driver.step()
    assert driver.region("positions")[: driver.region("header")[1]].tolist() == [7, 9, 13, 14]


def test_another_tenant_finds_a_segment_only_when_it_is_public():
    driver = Driver()
    ready(driver, tenant=1)
    assert driver.core.segment(0, DOCUMENT) is None
    assert not driver.core.pin_segment(0, DOCUMENT, True) and not driver.core.drop_segment(0, DOCUMENT)
    ready(driver, tenant=2**31 - 1)
    assert driver.core.segment(0, DOCUMENT)["tenant"] == 2**31 - 1  # type: ignore[index]
    assert driver.core.segment(1, DOCUMENT)["tenant"] == 1  # type: ignore[index]
    assert not driver.core.drop_segment(0, DOCUMENT)


def test_pins_survive_a_clear_and_a_dropped_segment_is_not_found():
    driver = Driver()
    ready(driver, pinned=True)
    assert driver.core.stats()["pinned_blocks"] == 3
    driver.core.clear_cache()
    assert driver.core.segment(0, DOCUMENT)["pinned"] is True  # type: ignore[index]
    assert driver.core.pin_segment(0, DOCUMENT, False)
    driver.core.clear_cache()
    assert driver.core.segment(0, DOCUMENT) is None
    ready(driver)
    assert driver.core.drop_segment(0, DOCUMENT) and not driver.core.drop_segment(0, DOCUMENT)
    assert driver.core.stats()["free_blocks"] == 64


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"spans": np.zeros((1, 3), np.int32)}, "spans"),
        ({"spans": np.zeros(2, np.int32)}, "spans"),
        ({"spans": np.array([[-1, 2]], np.int32)}, "spans"),
        ({"spans": np.array([[3, 0]], np.int32)}, "spans"),
        ({"spans": np.array([[3, 13]], np.int32)}, "spans"),
        ({"spans": np.array([[3, 4], [6, 2]], np.int32)}, "spans"),
        ({"spans": np.array([[i, 1] for i in range(5)], np.int32)}, "spans"),
        ({"method_id": -1}, "method_id"),
        ({"method_id": 2**31}, "method_id"),
        ({"ratio": 1.01}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"rounds": [(2, 1.0, 0.2)]}, "rounds"),
        ({"rounds": [(0, 1.0, -0.1)]}, "rounds"),
        ({"rounds": [(1, 1.5, 0.2)]}, "rounds"),
        ({"rounds": [(1, 1.0, 0.2)] * 99}, "rounds"),
        ({"scores": np.zeros(14, np.float32)}, "scores"),
        ({"scores": np.zeros(15, np.float64)}, "scores"),
        ({"decode_rows": 17}, "decode_rows"),
        ({"decode_rows": -1}, "decode_rows"),
    ],
)
def test_a_bad_blend_names_its_part_and_changes_nothing(changes: dict[str, Any], param: str):
    driver = Driver()
    with pytest.raises(_core.InvalidArgument) as caught:
        driver.add(prompt_with_document(), blend=blend(**changes))
    assert caught.value.param == param
    assert driver.core.stats()["num_requests"] == 0


def test_log_probabilities_of_the_prompt_and_a_blend_exclude_each_other():
    with pytest.raises(_core.InvalidArgument) as caught:
        Driver().add(prompt_with_document(), blend=blend(), prompt_logprobs=True)
    assert caught.value.param == "blend"


@pytest.mark.parametrize(
    ("ids", "tenant", "param"),
    [([], 0, "ids"), ([100], 0, "ids"), ([1] * 65, 0, "ids"), ([1], -1, "tenant"), ([1], 2**31, "tenant")],
)
def test_a_bad_segment_names_its_parameter(ids: list[int], tenant: int, param: str):
    driver = Driver()
    with pytest.raises(_core.InvalidArgument) as caught:
        driver.core.add_segment(np.array(ids, np.int32), tenant=tenant, pinned=False, deadline_ms=None, now_ms=0)
    assert caught.value.param == param


def test_pins_that_leave_too_little_for_a_live_request_are_capacity():
    driver = Driver(num_blocks=16, segment_cache_ratio=1.0)
    driver.add([1] * 10, max_tokens=50)
    with pytest.raises(_core.CapacityError, match="pinned"):
        driver.core.add_segment(DOCUMENT, tenant=0, pinned=True, deadline_ms=None, now_ms=0)
