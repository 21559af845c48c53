"""The migration machines through the binding: stub and module agree, frames survive the way, errors name themselves."""

from __future__ import annotations

import ast
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvlite import _core
from kvlite._core import FrameError, InvalidArgument, Mover, Owner
from tests.test_core_binding import module_signature, stub_names, stub_signature

LIMITS = {
    "max_moves": 2,
    "max_inflight_bytes": 1 << 20,
    "block_bytes": 64,
    "max_stages": 3,
    "reserve_ms": 100,
    "ack_ms": 100,
    "freeze_ms": 100,
    "claim_ms": 100,
}
REQUEST = 2**64 - 1
POOL = np.random.default_rng(7).integers(0, 256, (6, 64), dtype=np.uint8)


def mover(engine: int, **changes: int) -> Mover:
    return Mover(engine, **(LIMITS | changes))


def kinds(effects: list[tuple[Any, ...]]) -> list[int]:
    return [effect[0] for effect in effects]


def frame_of(effects: list[tuple[Any, ...]], peer: int) -> bytes:
    [frame] = [effect[2] for effect in effects if effect[:2] == (Mover.SEND, peer)]
    return frame


# -- the stub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Mover, Owner])
def test_the_stub_names_the_methods_and_constants_of_the_machines(cls: type):
    tree = ast.parse(Path(str(_core.__file__)).with_name("_core.pyi").read_text(encoding="utf-8"))
    node = stub_names(tree.body)[cls.__name__]
    assert isinstance(node, ast.ClassDef)
    methods = stub_names(node.body)
    constants = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    named = methods.keys() - {"__new__"} | constants
    assert named == {name for name in dir(cls) if not name.startswith("_")}
    for name, method in methods.items():
        assert isinstance(method, ast.FunctionDef)
        target = cls if name == "__new__" else getattr(cls, name)
        assert module_signature(target) == stub_signature(method), name


def test_constants_number_the_effects_and_name_results_and_frames():
    effects = [Mover.SEND, Mover.EXPORT, Mover.STAGE, Mover.FREEZE, Mover.TAIL, Mover.THAW, Mover.RELEASE]
    effects += [Mover.RESERVE, Mover.CANCEL, Mover.COMMIT, Mover.DONE]
    assert effects == list(range(11))
    assert list(range(5)) == [Owner.SEND, Owner.SWITCH, Owner.DELIVER, Owner.REPLAY, Owner.MOVED]
    assert Mover.RESULTS == ("moved", "refused", "aborted", "reclaimed", "ended", "failed")
    assert Mover.FRAME_KINDS[Mover.BLOCKS] == "blocks"
    assert Mover.OWNER == -1


# -- a whole move ------------------------------------------------------------------------------------------------------


def blocks_frame(stage: int, keys: list[tuple[int, int]], rows: list[int], **changes: Any) -> bytes:
    fields = {"request": REQUEST, "epoch": 0, "attempt": 1, "stage": stage, "part": 0, "is_last": True} | changes
    return _core.encode_blocks(
        **fields, keys=np.array(keys, np.int32).reshape(-1, 2), pool=POOL, blocks=np.array(rows, np.int32)
    )


def prepared(source: Mover, order: bytes) -> bytes:
    """The PREPARE of a source that was given an order."""
    assert source.frame(Mover.OWNER, order, 0) == [(Mover.EXPORT, REQUEST, 1, 0)]
    return frame_of(source.exported(REQUEST, 1, b"manifest", 2, 0), 1)


def test_a_move_goes_from_order_to_commit_over_bytes():
    owner, source, target = Owner(), mover(0), mover(1)
    assert owner.add(REQUEST, 0, 2, False) == 0
    [(kind, engine, order)] = owner.order(REQUEST, 1, False, 0)
    assert (kind, engine, Mover.FRAME_KINDS[_core.frame_kind(order)]) == (Owner.SEND, 0, "move")
    assert owner.moving(REQUEST) == 1

    assert target.frame(0, prepared(source, order), 0) == [(Mover.RESERVE, REQUEST, 1, 0, b"manifest", 100, False)]
    reserved = frame_of(target.reserved(REQUEST, 1, 1, 0), 0)
    assert source.frame(1, reserved, 0) == [(Mover.STAGE, REQUEST, 1, 0, 1, 0, 1, False)]
    assert source.moves() == [(REQUEST, 1, 1, True, "staging")]
    assert target.moves() == [(REQUEST, 1, 0, False, "receiving")]
    first = blocks_frame(0, [(0, 1), (1, 1)], [4, 2])
    assert source.staged(REQUEST, 1, 0, 2, 2, 0) == []
    ack = frame_of(target.blocks(0, first, True, 0), 0)
    assert source.frame(1, ack, 0) == [(Mover.FREEZE, REQUEST, 1)]
    assert source.frozen(REQUEST, 1, 0) == [(Mover.STAGE, REQUEST, 1, 0, 1, 1, 1, True)]
    assert source.staged(REQUEST, 1, 1, 1, 0, 0) == [(Mover.TAIL, REQUEST, 1)]
    tail = frame_of(source.tail(REQUEST, 1, b"final", [3, 2], [[5, 6, 7], None], 0), 1)
    assert source.next_wake_ms() == 100

    assert target.frame(0, tail, 0) == []
    effects = target.blocks(0, blocks_frame(1, [(0, 2)], [5]), True, 0)
    claim = frame_of(effects, Mover.OWNER)
    assert owner.tokens(REQUEST, 0, 0, 1, 0, 2) == (0, 2)
    assert owner.frame(1, claim, 0) == [], "the end of choice 1 is still to come"
    assert owner.finish(REQUEST, 0, 0, 1)
    due = owner.due()
    assert kinds(due) == [Owner.DELIVER, Owner.SEND, Owner.SEND, Owner.SWITCH, Owner.MOVED]
    assert due[0] == (Owner.DELIVER, REQUEST, 0, 0, [5, 6, 7])
    assert due[3] == (Owner.SWITCH, REQUEST, 1, 1)
    assert due[4] == (Owner.MOVED, REQUEST, 0, 1, 2, 3, "")
    assert target.frame(Mover.OWNER, due[1][2], 0) == [(Mover.COMMIT, REQUEST, 1, 1, b"final", False)]
    assert source.frame(Mover.OWNER, due[2][2], 0) == [
        (Mover.RELEASE, REQUEST, 1, 0),
        (Mover.DONE, REQUEST, 1, 0, 2, 3, ""),
    ]
    assert owner.owner(REQUEST) == (1, 1)
    assert owner.positions(REQUEST) == [3, 2]
    assert source.moves() == target.moves() == []


def test_a_dead_engine_is_replayed_and_its_ghost_is_fenced():
    owner = Owner()
    owner.add(5, 0, 1, False)
    assert owner.tokens(5, 0, 0, 0, 0, 4) == (0, 4)
    assert owner.engine_down(0, 0) == [(Owner.REPLAY, 5, -1)]
    assert owner.owner(5) == (-1, 0)
    assert owner.replay(5, 1) == 1
    assert owner.tokens(5, 0, 0, 0, 4, 1) == (0, 0)
    [(kind, engine, revoked)] = owner.fence(5, 0, 0)
    assert (kind, engine) == (Owner.SEND, 0)
    assert mover(0).frame(Mover.OWNER, revoked, 0) == [(Mover.RELEASE, 5, 0, 0)]
    assert owner.fence(5, 1, 1) == []
    owner.remove(5)
    assert owner.owner(5) is None


# -- blocks ------------------------------------------------------------------------------------------------------------


def test_blocks_frames_say_what_was_read_and_verify_it():
    frame = blocks_frame(3, [(0, 9), (2, 1)], [5, 0], part=4, is_last=False)
    assert _core.frame_kind(frame) == Mover.BLOCKS
    request, epoch, attempt, stage, part, is_last, keys, digests = _core.decode_blocks(frame)
    assert (request, epoch, attempt, stage, part, is_last) == (REQUEST, 0, 1, 3, 4, False)
    assert keys.dtype == np.int32
    assert keys.tolist() == [[0, 9], [2, 1]]
    assert len(digests) == 64
    payload = POOL[[5, 0]].reshape(-1)
    assert _core.verify_blocks(frame, payload)
    assert _core.verify_blocks(frame, memoryview(payload.tobytes()))
    assert not _core.verify_blocks(frame, POOL[[0, 5]].reshape(-1))
    assert not _core.verify_blocks(frame, payload[:-1])
    empty = blocks_frame(0, [], [])
    assert _core.decode_blocks(empty)[6].shape == (0, 2)
    assert _core.verify_blocks(empty, np.empty(0, np.uint8))


def test_rows_of_a_pool_may_lie_apart_but_not_their_bytes():
    wide = np.zeros((4, 100), np.uint8)
    wide[:, :64] = POOL[:4]
    keys, rows = np.array([[0, 0]], np.int32), np.array([3], np.int32)
    apart = _core.encode_blocks(1, 0, 1, 0, 0, True, keys, wide[:, :64], rows)
    assert _core.verify_blocks(apart, POOL[3])
    with pytest.raises(InvalidArgument, match="pool has stride"):
        _core.encode_blocks(1, 0, 1, 0, 0, True, keys, wide[:, ::2], rows)


@pytest.mark.parametrize(
    ("param", "keys", "rows"),
    [("blocks", [(0, 0)], [6]), ("blocks", [(0, 0)], [-1]), ("keys", [(0, 0), (0, 1)], [1]), ("keys", [(0, -1)], [1])],
)
def test_blocks_that_do_not_exist_are_refused_by_name(param: str, keys: list[tuple[int, int]], rows: list[int]):
    with pytest.raises(InvalidArgument) as caught:
        blocks_frame(0, keys, rows)
    assert caught.value.param == param


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_frame_with_any_byte_flipped_is_refused_and_changes_nothing():
    owner = Owner()
    owner.add(1, 0, 1, False)
    [(_, _, order)] = owner.order(1, 1, False, 0)
    source = mover(0)
    for at in range(len(order)):
        broken = bytearray(order)
        broken[at] ^= 1
        with pytest.raises(FrameError):
            source.frame(Mover.OWNER, bytes(broken), 0)
    with pytest.raises(FrameError, match="allowed are 28"):
        source.frame(Mover.OWNER, b"", 0)
    with pytest.raises(FrameError, match="kind"):
        source.frame(1, blocks_frame(0, [], []), 0)
    with pytest.raises(FrameError, match="may not send"):
        source.frame(1, order, 0)
    assert source.moves() == []
    assert issubclass(FrameError, ValueError)


@pytest.mark.parametrize("name", list(LIMITS))
def test_a_limit_out_of_range_is_refused_by_name(name: str):
    for value in (0, -1, 2**60):
        with pytest.raises(InvalidArgument, match=f"{name} is {value}, allowed are 1 to"):
            mover(0, **{name: value})


def test_orders_and_answers_that_make_no_sense_are_refused_by_name():
    owner = Owner()
    owner.add(1, 0, 1, False)
    for param, call in [
        ("to", lambda: owner.order(1, 0, False, 0)),
        ("request", lambda: owner.order(2, 0, False, 0)),
        ("request", lambda: owner.positions(2)),
        ("request", lambda: owner.replay(1, 1)),
        ("engine", lambda: owner.add(3, -1, 1, False)),
        ("num_choices", lambda: owner.add(3, 0, 0, False)),
        ("engine", lambda: mover(-1)),
        ("outputs", lambda: mover(0).tail(1, 1, b"", [1, 2], [[1]], 0)),
        ("outputs", lambda: mover(0).tail(1, 1, b"", [2], [[1]], 0)),
    ]:
        with pytest.raises(InvalidArgument) as caught:
            call()
        assert caught.value.param == param
    with pytest.raises(FrameError, match="gap"):
        owner.tokens(1, 0, 0, 0, 1, 1)


# -- cost --------------------------------------------------------------------------------------------------------------

COSTS: dict[str, Any] = {
    "len": 8192,
    "hit": 0,
    "kv_bytes_per_token": 131_072,
    "link_bytes_per_s": 1.25e9,
    "prefill_tokens_per_s": 200.0,
    "decode_tokens_per_s": 20.0,
    "step_s": 0.05,
}


def test_the_cost_model_copies_over_a_fast_link_and_computes_over_a_slow_one():
    copy, copy_s, replay_s, gap_s = _core.decide_move(**COSTS)
    assert copy
    assert copy_s < 1 < 40 < replay_s
    assert gap_s < 0.06
    copy, copy_s, replay_s, gap_s = _core.decide_move(**(COSTS | {"link_bytes_per_s": 1e6}))
    assert not copy
    assert copy_s > replay_s
    assert gap_s == pytest.approx(replay_s + 0.05)


@pytest.mark.parametrize("name", ["link_bytes_per_s", "prefill_tokens_per_s", "decode_tokens_per_s", "step_s"])
def test_a_rate_that_is_no_number_is_refused(name: str):
    for value in (float("nan"), float("inf"), -1.0):
        with pytest.raises(InvalidArgument) as caught:
            _core.decide_move(**(COSTS | {name: value}))
        assert caught.value.param == name


# -- threads -----------------------------------------------------------------------------------------------------------


def test_digests_of_one_pool_are_computed_by_several_threads_at_once():
    expected = blocks_frame(0, [(0, i) for i in range(6)], list(range(6)))
    frames: list[bytes] = []
    run = [
        threading.Thread(target=lambda: frames.append(blocks_frame(0, [(0, i) for i in range(6)], list(range(6)))))
        for _ in range(4)
    ]
    for thread in run:
        thread.start()
    for thread in run:
        thread.join()
    assert frames == [expected] * 4
