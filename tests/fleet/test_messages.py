"""Control messages: what is sent is what arrives, and nothing else is believed."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from kvlite import CapacityError, EngineClosedError, EngineError, FinishReason, InvalidRequestError
from kvlite.documents import DocumentInfo, DocumentState
from kvlite.errors import KvliteError
from kvlite.fleet import messages as m
from kvlite.reuse_types import ReuseMode, ReuseReport, SegmentHit, SegmentReport, VerifyReport
from kvlite.types import EngineStats

REPORT = ReuseReport(
    ReuseMode.VERIFY, False, 1, 2, 3, 4,
    segments=(SegmentReport("a", 3, SegmentHit.MADE),), method="query", ratio=0.1,
    verify=VerifyReport(0.1, True, 0.2, 3, 4, 5, (1, 2), "x"),
)  # fmt: skip
INFO = DocumentInfo("a", None, 3, DocumentState.READY, False, True, 1.0, None)
SCORES = m.Scores(5, -0.5, 2, (1, 5), (-0.25, -0.5))
FROM_WORKER: list[m.FromWorker] = [
    m.Hello(1, 2, m.PROTOCOL, "unix:x", 1 << 63, "float32", "cpu", True, 9, 2, 256, 16, 64, 4, 64, 8, 8, 1.5, 0.5),
    m.Tokens(1, 2, 3, 4, [5], [SCORES], [None, SCORES]),
    m.Ended(1, 2, 3, FinishReason.STOP, 4, last=True, reuse=REPORT),
    m.Refused(1, 2, m.Failure("capacity", "full")),
    m.Reply(7, documents=[INFO]),
    m.Moved(1, 2, 3, 0, 0.5, 0.25, 2, 3, 4096),
    m.Stats(EngineStats(num_running=1, finished={FinishReason.STOP: 3}), True, False, 0, 1, {2: 1e9}),
]
FROM_OWNER: list[m.FromOwner] = [
    m.Add((1 << 64) - 1, 2, b"spec", [b"\1\0\0\0", None]),
    m.Abort(1),
    m.Finish(1, 2, 0, 9),
    m.Peers({0: "unix:a", 1: "tcp:b:1"}),
    m.Drain(3, 1.5),
    m.Shutdown(),
    m.CreateDocument(1, 2, "id", "text", "title", True, True, 3.0),
    m.UpdateDocument(1, 2, "id", True, None, False, None),
    m.DeleteDocument(1, 2, "id"),
    m.ListDocuments(1, 2),
    m.CancelOrder(1),
]


def packed(**fields: Any) -> bytes:
    return msgspec.msgpack.encode([fields])


def test_every_message_arrives_as_it_was_sent() -> None:
    assert m.decode_from_worker(m.encode(FROM_WORKER)) == FROM_WORKER
    assert m.decode_from_owner(m.encode(FROM_OWNER)) == FROM_OWNER


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x90\x90",
        msgspec.msgpack.encode({"type": "Abort", "request": 1}),
        packed(type="Surprise", request=1),
        packed(type="Abort"),
        packed(type="Abort", request=1, more=2),
        packed(type="Abort", request="1"),
        packed(type="Abort", request=-1),
        packed(type="Finish", request=1, epoch=0, choice=128, kept_len=0),
        packed(type="Drain", order=1, timeout_s=-1.0),
        packed(type="Add", request=1, epoch=0, spec=b"", outputs=[None] * 129),
        m.encode([m.Abort(n) for n in range(m.MESSAGES_MAX)]) + b"\0",
        msgspec.msgpack.encode([{"type": "Abort", "request": 1}] * (m.MESSAGES_MAX + 1)),
        m.encode(FROM_WORKER),
    ],
)
def test_a_frame_that_is_not_ours_is_refused(frame: bytes) -> None:
    with pytest.raises(m.MessageError, match="cannot be read"):
        m.decode_from_owner(frame)


def test_a_worker_may_not_say_what_only_the_front_end_says() -> None:
    with pytest.raises(m.MessageError, match="of a worker cannot be read"):
        m.decode_from_worker(m.encode([m.Shutdown()]))


def test_flipped_and_cut_frames_are_read_as_messages_or_refused() -> None:
    whole, rng, num_refused = m.encode(FROM_WORKER), random.Random(1), 0
    for _ in range(3000):
        damaged = bytearray(whole[: rng.randrange(len(whole) + 1)])
        for _ in range(rng.randrange(4)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            m.decode_from_worker(bytes(damaged))
        except m.MessageError:
            num_refused += 1
    assert num_refused > 2000


@pytest.mark.parametrize(
    "error", [InvalidRequestError("n", "is 9"), CapacityError("full"), EngineClosedError("bye"), EngineError("broken")]
)
def test_an_error_crosses_the_link_as_itself(error: KvliteError) -> None:
    again = m.Failure.of(error).error()
    assert type(again) is type(error) and str(again) == str(error)


def test_a_setup_is_one_line_and_is_read_strictly() -> None:
    setup = m.Setup(engine=1, owner="unix:o", listen="tcp:127.0.0.1:0", config={"max_num_seqs": 4, "model": None})
    line = m.encode_setup(setup)
    assert line.count(b"\n") == 1 and m.decode_setup(line) == setup
    for wrong in (b"", b"{}", line.replace(b"max_moves", b"min_moves"), line.replace(b"16", b"0", 1)):
        with pytest.raises(m.MessageError, match="setup"):
            m.decode_setup(wrong)
