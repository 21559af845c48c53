"""Probes inside a forward pass: what they are shown, and what rows that leave change for those that stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvlite.models import LayerRows, load_model, rows_to_the_end
from tests.models.alone import rows_alone
from tests.models.driver import Driver
from tests.models.make import make, prompt


class Looker:
    """Remembers what it saw."""

    def __init__(self, rows: range, seq_row: int, depth: int | None) -> None:
        self.rows, self.seq_row, self.depth = rows, seq_row, depth
        self.shown: list[tuple[int, str]] = []
        self.positions: list[list[int]] = []
        self.v: list[torch.Tensor] = []

    def before_store(self, at: LayerRows) -> None:
        self.shown.append((at.layer, "before"))
        self.positions.append(at.positions.tolist())
        self.v.append(at.v.clone())
        self.was_empty = bool(at.stored_v().isnan().all())

    def after_attention(self, at: LayerRows) -> None:
        self.shown.append((at.layer, "after"))
        assert torch.equal(at.stored_v(), at.v) and at.lse.shape == at.q.shape[:2]
        assert at.last_key.tolist() == at.positions.tolist()

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    make("qwen3", tmp_path)
    return Driver(
        load_model(tmp_path, device="cpu", dtype=torch.float32, max_model_len=128, ops=rows_alone(), deterministic=True)
    )


def test_rows_leave_at_their_depth_and_the_others_do_not_notice(driver: Driver) -> None:
    texts = [prompt(n, n) for n in (5, 9, 7, 4)]
    decoder = driver.decoder
    expected = [driver.run([(driver.row(), text)])[0] for text in texts]
    rows = [driver.row() for _ in texts]
    batch = driver.batch(list(zip(rows, texts, strict=True)))
    first = Looker(range(5, 14), rows[1].index, 1)
    second = Looker(range(16, 21), rows[2].index, 2)
    staying = Looker(range(21, 25), rows[3].index, None)
    hidden = decoder.forward(batch, driver.pool, [staying, second, first])
    kept = rows_to_the_end([staying, second, first], 25)
    assert kept is not None and kept.tolist() == [*range(5), 14, 15, *range(21, 25)]
    assert torch.equal(hidden, torch.cat([expected[0], expected[2][:2], expected[3]]))
    assert first.shown == [(0, "before"), (0, "after"), (1, "before")]
    assert second.shown == [(0, "before"), (0, "after"), (1, "before"), (1, "after"), (2, "before")]
    assert len(staying.shown) == 6
    assert second.positions == [[2, 3, 4, 5, 6]] * 3 and staying.positions == [[0, 1, 2, 3]] * 3
    assert first.was_empty and second.was_empty and staying.was_empty
    assert driver.kv(rows[1])[:1].isfinite().all() and driver.kv(rows[1])[1:].isnan().all()
    assert driver.kv(rows[2])[2, :, 2:].isnan().all() and driver.kv(rows[2])[2, :, :2].isfinite().all()


def test_a_batch_whose_rows_all_leave_gives_no_hidden_state(driver: Driver) -> None:
    row = driver.row()
    probe = Looker(range(6), row.index, 1)
    hidden = driver.decoder.forward(driver.batch([(row, prompt(6))]), driver.pool, [probe])
    assert hidden.shape == (0, driver.decoder.config.hidden_size)
    assert rows_to_the_end([probe], 6) is not None and rows_to_the_end([], 6) is None
    assert driver.kv(row)[:1].isfinite().all() and driver.kv(row)[1:].isnan().all()
