"""Moves through the binding: signatures, types and errors; which moves keep a stream is the Rust tests' to say."""

from __future__ import annotations

import numpy as np
import pytest

from kvlite import _core
from tests.core_driver import Driver

IMPORTED = 3


def prompt(length: int = 13) -> list[int]:
    return list(range(1, length + 1))


def running(steps: int = 4, **changes: object) -> tuple[Driver, int]:
    driver = Driver()
    handle = driver.add(prompt(), max_tokens=20, **changes)
    for _ in range(steps):
        driver.step()
        driver.complete()
    return driver, handle


def freeze(driver: Driver, handle: int) -> None:
    driver.core.freeze(handle)
    driver.step()
    driver.complete()
    assert driver.core.is_frozen(handle)


def test_a_request_moves_with_its_blocks_and_goes_on_behind_its_output() -> None:
    a, handle = running()
    b = Driver()
    ticket, hits = b.core.reserve(a.core.export_begin(handle), 0, 1000)
    left = a.core.export_left(handle)
    hold, rows = a.core.export_stage(handle, hits)
    assert (rows.dtype, rows.shape, hits, left) == (np.int32, (3, 3), 0, 3)
    assert rows[:, :2].tolist() == [[0, 0], [0, 1], [0, 2]]
    freeze(a, handle)
    tail, last = a.core.export_stage(handle, hits)
    assert last[:, :2].tolist() == [[0, 3]]
    for choice, index, _ in [*rows.tolist(), *last.tolist()]:
        block = b.core.import_block(ticket, choice, index)
        assert 0 <= block < 64 and b.core.import_block(ticket, choice, index) == block
        b.core.import_filled(ticket, choice, index)
    for number in (hold, tail):
        a.core.transfer_done(number)
    moved = b.core.import_commit(ticket, a.core.export_final(handle), 0)
    assert a.core.export_commit(handle) and not a.core.export_commit(handle)
    assert a.core.stats()["owned_blocks"] == 0 and a.core.stats()["migrations_out_total"] == 1
    b.step()
    assert b.counted("admitted", 10) == [[moved, 0, 0, IMPORTED, 13]]
    b.complete()
    committed, finished = b.run()
    assert [row[1] for row in committed] == list(range(4, 20))
    assert finished == [[moved, 0, 1]]
    assert b.core.stats()["prefill_tokens_total"] == 0 and b.core.stats()["migrations_in_total"] == 1
    for driver in (a, b):
        driver.core.audit()


def test_an_aborted_move_leaves_both_sides_as_they_were() -> None:
    a, handle = running()
    b = Driver()
    ticket, _ = b.core.reserve(a.core.export_begin(handle), 0, None)
    b.core.import_extend(ticket, 5)
    freeze(a, handle)
    assert a.core.export_abort(handle)
    assert b.core.import_cancel(ticket) and not b.core.import_cancel(ticket)
    assert b.core.stats()["free_blocks"] == 64 and b.core.stats()["imports_cancelled_total"] == 1
    assert a.run()[1] == [[handle, 0, 1]]


def test_a_replay_continues_positions_and_leaves_ended_choices_out() -> None:
    driver = Driver()
    outputs = [np.array([5, 6], np.int32), None, np.array([], np.int32)]
    handle = driver.add(prompt(), n=3, max_tokens=4, outputs=outputs)
    driver.step()
    admitted = driver.counted("admitted", 10)
    driver.complete()
    committed, finished = driver.run()
    assert {(row[0], row[1], row[3]) for row in admitted} <= {(handle, 0, IMPORTED), (handle, 2, IMPORTED)}
    assert sorted(row[1] for row in committed) == [0, 1, 2, 2, 3, 3]
    assert sorted(finished) == [[handle, 0, 1], [handle, 2, 1]]


def test_what_cannot_be_served_names_its_argument_and_changes_nothing() -> None:
    a, handle = running()
    manifest = a.core.export_begin(handle)
    other = Driver(model_digest=1)
    small = Driver(num_blocks=4)
    cases = [
        ("handle", lambda: a.core.export_begin(99)),
        ("handle", lambda: a.core.export_begin(handle)),
        ("handle", lambda: a.core.export_final(handle)),
        ("skip_blocks", lambda: a.core.export_stage(handle, -1)),
        ("hold", lambda: a.core.transfer_done(7)),
        ("ticket", lambda: a.core.import_block(7, 0, 0)),
        ("manifest", lambda: a.core.reserve(manifest[:-1], 0, None)),
        ("manifest", lambda: other.core.reserve(manifest, 0, None)),
        ("max_tokens", lambda: small.core.reserve(manifest, 0, None)),
        ("outputs", lambda: a.add([1], n=2, outputs=[None])),
    ]
    for param, call in cases:
        with pytest.raises(_core.InvalidArgument) as caught:
            call()
        assert getattr(caught.value, "param", "") == param, str(caught.value)
    full = Driver(max_num_seqs=1)
    full.add(prompt(5))
    full.step()
    with pytest.raises(_core.CapacityError, match="1 rows are needed, 0 are free"):
        full.core.reserve(manifest, 0, None)
    for driver in (a, other, small, full):
        driver.core.audit()
