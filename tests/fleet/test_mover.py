"""The mover's surroundings: damaged blocks, frames out of turn, links that come and go, the queue to the front-end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kvlite import _core
from kvlite.fleet.messages import FromWorker, Moved, Tokens, decode_from_worker
from kvlite.fleet.mover import now_ms
from kvlite.fleet.moves import MoveHow
from kvlite.fleet.uplink import QUEUED_MAX, Uplink
from kvlite.fleet.wire import Channel, OversizedError
from tests.engines import essence, ids
from tests.fleet.small_fleet import SEEDED, Fleet, alone, fleet, run

PROMPT = ids(50, 3)
FRAME_MAX = 2000


def tokens(request: int, num_tokens: int = 1) -> Tokens:
    return Tokens(request, 0, 0, 0, [5] * num_tokens)


class SlowLink:
    """Takes a frame when it is told to."""

    def __init__(self) -> None:
        self.sent: list[bytes | list[int]] = []
        self.gate = asyncio.Event()

    async def send(self, channel: Channel, frame: bytes) -> None:
        await self.gate.wait()
        if len(frame) > FRAME_MAX:
            raise OversizedError("too large")
        requests = [message.request for message in decode_from_worker(frame) if isinstance(message, Tokens)]
        self.sent.append(frame if channel is Channel.MIGRATION else requests)


def test_messages_that_wait_together_are_one_frame_and_keep_their_place_among_frames() -> None:
    async def main() -> None:
        link = SlowLink()
        uplink = Uplink(link)  # type: ignore[arg-type]
        sending = asyncio.create_task(uplink.run())
        for what in (tokens(1), tokens(2), b"\x90", tokens(3), b"\x90", b"\x90", tokens(4), tokens(5)):
            uplink.post_frame(what) if isinstance(what, bytes) else uplink.post(what)
        link.gate.set()
        await uplink.flushed()
        assert link.sent == [[1, 2], b"\x90", [3], b"\x90", b"\x90", [4, 5]]
        sending.cancel()

    run(main())


def test_a_message_too_large_for_the_link_is_reported_and_the_others_go_out() -> None:
    async def main() -> None:
        link, reported = SlowLink(), list[FromWorker]()
        uplink = Uplink(link)  # type: ignore[arg-type]
        uplink.on_oversized = lambda message, error: reported.append(message)
        link.gate.set()
        sending = asyncio.create_task(uplink.run())
        for message in (tokens(1), tokens(2, FRAME_MAX), tokens(3)):
            uplink.post(message)
        await uplink.flushed()
        assert link.sent == [[1], [3]] and reported == [tokens(2, FRAME_MAX)]
        sending.cancel()

    run(main())


def test_who_reads_streams_waits_for_a_front_end_that_does_not() -> None:
    async def main() -> None:
        link = SlowLink()
        uplink = Uplink(link)  # type: ignore[arg-type]
        for n in range(QUEUED_MAX):
            uplink.post(Moved(n, 0, 1, 0, 0.0, 0.0, 0, 0, 0))
        waiting = asyncio.create_task(uplink.room())
        await asyncio.sleep(0)
        assert not waiting.done()
        sending = asyncio.create_task(_take_one(uplink, link))
        await waiting
        sending.cancel()

    run(main())


async def _take_one(uplink: Uplink, link: SlowLink) -> None:
    link.send = _swallow  # type: ignore[method-assign]
    await uplink.run()


async def _swallow(channel: Channel, frame: bytes) -> None:
    return None


def test_blocks_that_are_not_what_their_digests_say_are_not_taken() -> None:
    (expected,) = alone(PROMPT, SEEDED)

    async def main() -> None:
        async with fleet() as made:
            peers: Any = made.workers[0]._peers
            send = peers.send

            async def flip(to: int, frame: bytes, payload: list[memoryview]) -> None:
                await send(to, frame, [memoryview(bytes(each)[:-1] + b"\x77") for each in payload])

            peers.send = flip
            reader = await made.stream(PROMPT, SEEDED)
            report = await made.front.move("r", 1, MoveHow.COPY)
            assert report.result == "aborted" and "blocks did not arrive as they were sent" in report.reason
            peers.send = send
            assert (await made.front.move("r", 1, MoveHow.COPY)).result == "moved"
            assert essence(await reader.finish()) == essence(expected)
            await made.settled()

    run(main())


def _a_grant() -> bytes:
    """A frame that only the front-end may send."""
    owner = _core.Owner()
    owner.add(1, 0, 1, False)
    return owner.order(1, 1, False, now_ms())[0][2]


@pytest.mark.parametrize("make", [lambda: b"", lambda: b"garbage" * 9, _a_grant], ids=["empty", "garbage", "an order"])
def test_a_worker_that_says_what_it_may_not_say_loses_its_link_and_nothing_else(make: Callable[[], bytes]) -> None:
    (expected,) = alone(PROMPT, SEEDED)

    async def main() -> None:
        async with fleet() as made:
            reader = await made.stream(PROMPT, SEEDED)
            assert (await made.front.move("r", 1, MoveHow.COPY)).result == "moved"
            link = _link(made, 0, 1)
            link.post(Channel.MIGRATION, make())
            await asyncio.wait_for(_until_ended(link), 10.0)
            assert (await made.front.move("r", 0, MoveHow.COPY)).result == "moved"
            assert essence(await reader.finish()) == essence(expected)
            await made.settled()

    run(main())


def test_engines_know_how_fast_their_link_is_before_anything_moves() -> None:
    async def main() -> None:
        async with fleet(3) as made:
            for n, worker in enumerate(made.workers):
                while len(worker._peers.rates()) < 2:
                    await asyncio.sleep(0.001)
                assert set(worker._peers.rates()) == {0, 1, 2} - {n}

    run(main())


def _link(made: Fleet, engine: int, peer: int) -> Any:
    return made.workers[engine]._peers._peers[peer].links[0]


async def _until_ended(link: Any) -> None:
    while link.ended is None:
        await asyncio.sleep(0.001)
