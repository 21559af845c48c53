"""Links under attack and on bad lines: each wrong frame ends the link with its own error, and silence is noticed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kvlite.fleet.dial import shake_hands
from kvlite.fleet.tcp import Wire
from kvlite.fleet.wire import (
    HEADER_BYTES,
    MAC_BYTES,
    MAGIC,
    VERSION,
    Channel,
    CutFrameError,
    EnvelopeError,
    ForeignEnvelopeError,
    ForgedFrameError,
    Inner,
    Limits,
    LinkClosedError,
    LinkDownError,
    LinkError,
    Opener,
    OversizedError,
    Sealer,
    SequenceError,
    SilentPeerError,
    StalledPeerError,
    _mac,
)
from tests.fleet.link_pairs import KINDS, bare, config, drain, pair, round_trip, run, stream_pair, take
from tests.fleet.proxy import Fault, Seen

FAULTS: list[tuple[Fault, tuple[type[LinkError], ...]]] = [
    (Fault.DROP, (SequenceError,)),
    (Fault.DOUBLE, (SequenceError,)),
    (Fault.SWAP, (SequenceError,)),
    (Fault.FLIP_HEADER, (ForgedFrameError,)),
    (Fault.FLIP_FRAME, (ForgedFrameError,)),
    (Fault.CUT, (CutFrameError,)),
    (Fault.FREEZE, (SilentPeerError, LinkDownError)),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("fault", "errors"), FAULTS, ids=lambda value: value.name if isinstance(value, Fault) else "")
def test_a_fault_on_the_way_ends_the_link_by_name_after_what_came_before(
    fault: Fault, errors: tuple[type[LinkError], ...], kind: str, tmp_path: Path
) -> None:
    def decide(seen: Seen) -> Fault:
        return fault if seen.frame == b"frame 3" else Fault.NONE

    async def main() -> None:
        quick: dict[str, Any] = {"heartbeat_s": 0.02, "timeout_s": 0.2}
        async with pair(kind, tmp_path, config(0, **quick), config(1, **quick), decide) as (one, two):
            with contextlib.suppress(LinkDownError):
                for number in range(6):
                    await one.send(Channel.MIGRATION, b"frame %d" % number, memoryview(b"payload"))
            found: list[bytes] = []
            with pytest.raises(errors):
                async for _, frame, _ in two:
                    found.append(frame)
            assert found == [b"frame %d" % n for n in range(4 if fault is Fault.DOUBLE else 3)]
            with pytest.raises(LinkDownError):
                await drain(one)
            if fault is Fault.FREEZE:
                assert SilentPeerError in (type(one.ended), type(two.ended))

    run(main())


def test_a_delayed_frame_is_late_and_nothing_else(tmp_path: Path) -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def decide(seen: Seen) -> Fault:
            if seen.upward and seen.frame == b"1":
                await go.wait()
            return Fault.NONE

        async with pair("tcp", tmp_path, decide=decide) as (one, two):
            for number in range(3):
                one.post(Channel.CONTROL, b"%d" % number)
            assert await take(two, 1) == [(Channel.CONTROL, b"0", None)]
            await round_trip(one, two)
            go.set()
            assert [frame for _, frame, _ in await take(two, 2)] == [b"1", b"2"]

    run(main())


Say = Callable[[Sealer, Wire], Awaitable[None]]


def sealed(channel: int, frame: bytes = b"", payload_len: int = 0, *, skip: int = 0, cut: int = 0) -> Say:
    """Sends a frame whose MACs are right; `skip` sequence numbers first; without its last `cut` bytes."""

    async def speak(sealer: Sealer, wire: Wire) -> None:
        for _ in range(skip):
            sealer.header(Channel.CONTROL, b"", 0)
        header = sealer.header(channel, frame, payload_len)  # type: ignore[arg-type]
        whole = header + frame + bytes(payload_len)
        with contextlib.suppress(LinkDownError):
            await wire.write([whole[: len(whole) - cut]])

    return speak


def raw(data: bytes) -> Say:
    async def speak(sealer: Sealer, wire: Wire) -> None:
        await wire.write([data])

    return speak


async def say_reserved_bits(sealer: Sealer, wire: Wire) -> None:
    fields = bytearray(sealer.header(Channel.CONTROL, b"", 0)[: HEADER_BYTES - MAC_BYTES])
    fields[6] = 1
    await wire.write([bytes(fields), _mac(sealer._keyed, bytes(fields))])


async def say_another_frame(sealer: Sealer, wire: Wire) -> None:
    await wire.write([sealer.header(Channel.CONTROL, b"abc", 0), b"abd"])


async def say_twice_the_window(sealer: Sealer, wire: Wire) -> None:
    for _ in range(3):
        await sealed(Channel.MIGRATION, b"", 1 << 15)(sealer, wire)


SAYINGS: dict[str, tuple[Say, type[LinkError], str]] = {
    "another protocol": (raw(b"HTTP/1.1 200 OK\r\n" * 8), ForeignEnvelopeError, "begins with b'HTTP'"),
    "another version": (raw(MAGIC + b"\7" + bytes(99)), ForeignEnvelopeError, f"has version 7, must be {VERSION}"),
    "no MAC": (raw(MAGIC + bytes([VERSION]) + bytes(99)), ForgedFrameError, "MAC of a header"),
    "unknown channel": (sealed(77), ForeignEnvelopeError, "channel 77"),
    "reserved bits": (say_reserved_bits, ForeignEnvelopeError, "reserved bits 1"),
    "large frame": (sealed(Channel.CONTROL, bytes(5000)), OversizedError, "5000 bytes, must be at most 4096"),
    "large payload": (sealed(Channel.MIGRATION, b"", 40000), OversizedError, "40000 bytes, must be at most 32768"),
    "beyond the window": (say_twice_the_window, OversizedError, "exceeds the window"),
    "skipped": (sealed(Channel.CONTROL, skip=2), SequenceError, "frame 2 came after a gap: the next is 0"),
    "other frame": (say_another_frame, ForgedFrameError, "MAC of a frame"),
    "released too much": (sealed(Inner.RELEASE, b"\1\0\0\0"), EnvelopeError, "released 1 payloads of 0"),
    "released nothing": (sealed(Inner.RELEASE, b""), EnvelopeError, "released 0 payloads of 0"),
    "a release with a payload": (sealed(Inner.RELEASE, b"", 9), EnvelopeError, "RELEASE has a payload"),
    "cut": (sealed(Channel.CONTROL, b"abc", cut=1), CutFrameError, "middle of a frame"),
    "cut payload": (sealed(Channel.MIGRATION, b"abc", 9, cut=1), CutFrameError, "middle of a frame"),
    "nothing": (raw(b""), LinkDownError, "without a goodbye"),
}


@pytest.mark.parametrize("name", SAYINGS)
def test_an_end_with_the_key_that_speaks_wrongly_is_cut_off_by_name(name: str) -> None:
    say, error, text = SAYINGS[name]

    async def main() -> None:
        here, there = stream_pair("tcp")
        one_settings = config(0, frame_bytes_limit=4096)
        link, liar = await asyncio.gather(
            shake_hands(here, one_settings, caller=True), shake_hands(there, config(1), caller=False)
        )
        wire = bare(there.dup())
        sealer = liar._sender._sealer
        liar._finish(LinkClosedError("the test speaks now"))
        await say(sealer, wire)
        if "cut" in name:
            wire._sock.shutdown(1)
        if name == "cut payload":
            wire.close()
        if name == "nothing":
            wire.close()
        with pytest.raises(error, match=text):
            await drain(link)
        assert type(link.ended) is error
        wire.close()

    run(main())


def test_no_bit_of_a_frame_may_change_and_no_frame_may_be_missing_or_doubled() -> None:
    limits = Limits(1 << 10, 1 << 10, 1 << 12)

    def read(parts: list[bytes]) -> None:
        opener = Opener(bytes(32), limits)
        for part in parts:
            opener.frame(opener.header(part[:HEADER_BYTES]), part[HEADER_BYTES:])

    sealer = Sealer(bytes(32))
    frames = [b"", b"one", b"two" * 9]
    whole = [sealer.header(Channel.MIGRATION, frame, len(frame)) + frame for frame in frames]
    read(whole)
    for bit in range(8 * len(whole[2])):
        changed = bytearray(whole[2])
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(EnvelopeError):
            read([*whole[:2], bytes(changed)])
    for wrong in ([*whole[:2], whole[1]], whole[1:], [whole[0], whole[2]], [whole[0], whole[2], whole[1]]):
        with pytest.raises(SequenceError):
            read(wrong)
    with pytest.raises(ForgedFrameError):
        Opener(b"\1" * 32, limits).header(whole[0])


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_peer_said_before_it_died_is_read_though_nothing_can_be_written(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(kind, tmp_path, two=config(1, inbox_bytes_limit=1 << 10)) as (one, two):
            for number in range(50):
                await one.send(Channel.CONTROL, bytes([number]) * 1000)
            while not one._sender.is_idle:
                await one._sender.went.wait()
            one._finish(LinkDownError("killed"))
            found = [(await anext(two))[1][0]]
            with pytest.raises(LinkDownError):
                while True:
                    await two.send(Channel.CONTROL, bytes(1 << 16))
            with pytest.raises(LinkDownError):
                async for _, frame, _ in two:
                    found.append(frame[0])
            assert found == list(range(50))

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_peer_said_is_read_though_it_died_while_a_frame_was_written(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        deaf: dict[str, Any] = {"inbox_bytes_limit": 1 << 10}
        async with pair(kind, tmp_path, config(0, **deaf), config(1, **deaf)) as (one, two):
            for number in range(50):
                await one.send(Channel.CONTROL, bytes([number]) * 1000)
            for _ in range(3):
                await two.send(Channel.CONTROL, bytes(1 << 22))
            assert not two._sender.is_idle
            one._finish(LinkDownError("killed"))
            found: list[int] = []
            with pytest.raises(LinkDownError):
                async for _, frame, _ in two:
                    found.append(frame[0])
            assert found == list(range(50))

    run(main())


def test_a_length_is_believed_before_anything_is_allocated_only_with_a_right_mac() -> None:
    async def main() -> None:
        here, there = stream_pair("tcp")
        link, liar = await asyncio.gather(
            shake_hands(here, config(0), caller=True), shake_hands(there, config(1), caller=False)
        )
        header = bytearray(liar._sender._sealer.header(Channel.CONTROL, b"", 0))
        header[16:20] = (1 << 20).to_bytes(4, "little")
        wire = bare(there.dup())
        liar._finish(LinkClosedError("the test speaks now"))
        await wire.write([bytes(header)])
        with pytest.raises(ForgedFrameError):
            await drain(link)
        wire.close()

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_side_sent_cannot_be_sent_back_to_it(kind: str) -> None:
    async def main() -> None:
        here, there = stream_pair(kind)
        link, liar = await asyncio.gather(
            shake_hands(here, config(0), caller=True), shake_hands(there, config(1), caller=False)
        )
        wire = bare(there.dup())
        liar._finish(LinkClosedError("the test speaks now"))
        link.post(Channel.CONTROL, b"order")
        await wire.write([await wire.read(56 + 5, inside=True)])
        with pytest.raises(ForgedFrameError):
            await drain(link)
        wire.close()

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_that_lives_but_takes_nothing_is_given_up(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        hasty = config(0, stall_s=0.1, outbox_bytes_limit=1 << 14)
        slow = config(1, inbox_bytes_limit=1 << 10)
        async with pair(kind, tmp_path, hasty, slow) as (one, _two):
            with pytest.raises(StalledPeerError, match=r"0\.1 s"):
                while True:
                    await one.send(Channel.CONTROL, bytes(1 << 14))
        async with pair(kind, tmp_path, hasty) as (one, two):
            with pytest.raises(StalledPeerError, match="used up no payload"):
                while True:
                    await one.send(Channel.MIGRATION, b"", memoryview(bytes(1 << 15)))
            assert two.ended is None or isinstance(two.ended, LinkDownError)

    run(main())


def test_heartbeats_keep_an_idle_link_and_a_consumer_that_is_busy_is_not_blamed_on_the_peer(tmp_path: Path) -> None:
    async def main() -> None:
        beats = 0
        enough = asyncio.Event()

        def decide(seen: Seen) -> Fault:
            nonlocal beats
            beats += seen.channel == Inner.PING
            if beats >= 50:
                enough.set()
            return Fault.NONE

        quick: dict[str, Any] = {"heartbeat_s": 0.01, "timeout_s": 0.1}
        async with pair("tcp", tmp_path, config(0, **quick), config(1, **quick), decide) as (one, two):
            await enough.wait()
            assert one.ended is None and two.ended is None
            await one.send(Channel.CONTROL, b"x")
            assert await take(two, 1) == [(Channel.CONTROL, b"x", None)]

    run(main())
