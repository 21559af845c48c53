"""Links: order, limits, ends. Every way a frame can be wrong ends the link with its own error; nothing hangs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvlite.errors import ConfigError
from kvlite.fleet.links import Link
from kvlite.fleet.tcp import Throttle
from kvlite.fleet.traffic import Rate
from kvlite.fleet.wire import (
    Channel,
    LinkClosedError,
    LinkDownError,
    OutboxFullError,
    OversizedError,
    Window,
)
from tests.fleet.link_pairs import KINDS, config, drain, pair, round_trip, run, take


@pytest.mark.parametrize("kind", KINDS)
def test_frames_and_payloads_arrive_whole_in_order_both_ways(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sizes = [int(size) for size in rng.integers(1, 1 << 15, 300)]
    payloads = [rng.bytes(size) if size % 3 else None for size in sizes]
    frames = [rng.bytes(int(size)) for size in rng.integers(0, 1 << 12, 300)]
    frames[7] = rng.bytes(1 << 20)

    async def talk(link: Link) -> None:
        for frame, payload in zip(frames, payloads, strict=True):
            view = None if payload is None else memoryview(payload)
            pieces = [view[:100], view[100:]] if view is not None and len(view) > 100 else view
            await link.send(Channel.MIGRATION if payload else Channel.CONTROL, frame, pieces)

    async def listen_to(link: Link) -> None:
        for number, (frame, payload) in enumerate(zip(frames, payloads, strict=True)):
            channel = Channel.MIGRATION if payload else Channel.CONTROL
            assert await take(link, 1) == [(channel, frame, payload)], number

    async def main() -> None:
        async with pair(kind, tmp_path) as (one, two):
            assert (one.peer, two.peer) == (1, 0)
            await asyncio.gather(talk(one), talk(two), listen_to(one), listen_to(two))
            assert one.bytes_per_s == 0.0 or one.bytes_per_s > 0

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_posts_and_sends_of_one_task_keep_their_order(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(kind, tmp_path) as (one, two):
            for number in range(1000):
                frame = number.to_bytes(2, "big")
                if number % 3:
                    one.post(Channel.CONTROL, frame)
                else:
                    await one.send(Channel.CONTROL, frame)
            found = await take(two, 500) + await take(two, 500)
            assert [frame for _, frame, _ in found] == [number.to_bytes(2, "big") for number in range(1000)]

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_payload_waits_until_there_is_room_in_the_window(kind: str, tmp_path: Path) -> None:
    half = memoryview(bytes(1 << 15))

    async def main() -> None:
        async with pair(kind, tmp_path) as (one, two):
            for name in (b"a", b"b"):
                await one.send(Channel.MIGRATION, name, half)
            waiting = asyncio.ensure_future(one.send(Channel.MIGRATION, b"c", half))
            assert (await anext(two))[1] == b"a"
            release = two.keep()
            assert (await anext(two))[1] == b"b"
            release_second = two.keep()
            release_second()
            await round_trip(one, two)
            assert not waiting.done()
            release()
            await waiting
            assert (await anext(two))[1] == b"c"

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_payload_that_is_kept_stays_as_it_was_sent(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(kind, tmp_path) as (one, two):
            await one.send(Channel.MIGRATION, b"kept", memoryview(b"\7" * 9000))
            _, _, kept = await anext(two)
            release = two.keep()
            for number in range(2):
                await one.send(Channel.MIGRATION, b"more", memoryview(bytes([number]) * 20000))
                assert bytes((await anext(two))[2] or b"") == bytes([number]) * 20000
            assert kept is not None and bytes(kept) == b"\7" * 9000
            release()

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_too_large_is_refused_here_and_the_link_lives_on(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        two_settings = config(1, frame_bytes_limit=4096, payload_bytes_limit=1000)
        async with pair(kind, tmp_path, two=two_settings) as (one, two):
            with pytest.raises(OversizedError, match="4097 bytes, must be at most 4096"):
                await one.send(Channel.CONTROL, bytes(4097))
            with pytest.raises(OversizedError, match="1001 bytes, must be between 1 and 1000"):
                await one.send(Channel.MIGRATION, b"", [memoryview(bytes(1000)), memoryview(b"x")])
            with pytest.raises(OversizedError, match="0 bytes"):
                await one.send(Channel.MIGRATION, b"", [])
            with pytest.raises(OversizedError):
                one.post(Channel.CONTROL, bytes(4097))
            await one.send(Channel.MIGRATION, bytes(4096), memoryview(b"x" * 1000))
            assert await take(two, 1) == [(Channel.MIGRATION, bytes(4096), b"x" * 1000)]

    run(main())


def test_a_link_without_a_window_carries_frames_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with pair("unix", tmp_path, config(-1, window_bytes=0)) as (one, two):
            assert one.limits.payload == 0
            with pytest.raises(OversizedError, match="between 1 and 0"):
                await two.send(Channel.MIGRATION, b"", memoryview(b"x"))
            assert await one.measure() == 0.0
            await two.send(Channel.CONTROL, b"x")
            assert await take(one, 1) == [(Channel.CONTROL, b"x", None)]

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_outbox_refuses_posts_and_holds_sends_back(kind: str, tmp_path: Path) -> None:
    frame = bytes(1 << 16)
    small = config(1, inbox_bytes_limit=1 << 16, outbox_bytes_limit=1 << 17)

    async def main() -> None:
        async with pair(kind, tmp_path, config(0, outbox_bytes_limit=1 << 17), small) as (one, two):
            posted = 0
            with pytest.raises(OutboxFullError, match="reads too slowly"):
                while posted < 1000:
                    one.post(Channel.CONTROL, frame)
                    posted += 1
            sending = asyncio.ensure_future(one.send(Channel.CONTROL, b"held back"))
            found = [await take(two, 1) for _ in range(posted)]
            assert {frames[0][1] for frames in found} == {frame}
            await sending
            assert await take(two, 1) == [(Channel.CONTROL, b"held back", None)]

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_send_that_is_cancelled_goes_out_whole_or_not_at_all(kind: str, tmp_path: Path) -> None:
    half = memoryview(bytes(1 << 15))

    async def main() -> None:
        async with pair(kind, tmp_path) as (one, two):
            sends = [asyncio.ensure_future(one.send(Channel.MIGRATION, bytes([n]), half)) for n in range(6)]
            await sends[0]
            for send in sends:
                send.cancel()
            done = await asyncio.gather(*sends, return_exceptions=True)
            went = [n for n, result in enumerate(done) if result is None]
            assert went and len(went) < 6
            await asyncio.gather(one.send(Channel.CONTROL, b"last"), round_trip_until(two, b"last", went))

    run(main())


async def round_trip_until(link: Link, last: bytes, expected: list[int]) -> None:
    found: list[int] = []
    async for _, frame, _ in link:
        if frame == last:
            break
        found.append(frame[0])
    assert found == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_goodbye_ends_the_iteration_and_later_sends_say_so(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(kind, tmp_path) as (one, two):
            for number in range(100):
                one.post(Channel.CONTROL, bytes([number]) * 5000)
            await one.finish()
            assert await drain(two) == [bytes([number]) * 5000 for number in range(100)]
            assert isinstance(two.ended, LinkClosedError)
            for link in (one, two):
                with pytest.raises(LinkClosedError):
                    await link.send(Channel.CONTROL, b"")
                assert await drain(link) == []
                link.close()

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_close_ends_every_wait(kind: str, tmp_path: Path) -> None:
    half = memoryview(bytes(1 << 15))

    async def main() -> None:
        async with pair(kind, tmp_path) as (one, two):
            waits = [asyncio.ensure_future(one.send(Channel.MIGRATION, b"", half)) for _ in range(5)]
            reading = asyncio.ensure_future(drain(one))
            measuring = asyncio.ensure_future(one.measure())
            two.post(Channel.CONTROL, b"x")
            await anext(two)
            one.close()
            found = await asyncio.gather(*waits, measuring, return_exceptions=True)
            assert sum(isinstance(result, LinkClosedError) for result in found) >= 4
            assert len(await reading) <= 1
            with pytest.raises(LinkDownError):
                await drain(two)

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_the_speed_of_a_link_is_measured_with_payloads_that_nobody_sees(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        large = {"window_bytes": 1 << 22}
        async with pair(kind, tmp_path, config(0, **large), config(1, **large)) as (one, two):
            assert one.bytes_per_s == 0.0
            assert await one.measure() > 0
            assert one.bytes_per_s > 0 and two.bytes_per_s == 0.0
            await one.send(Channel.CONTROL, b"x")
            assert await take(two, 1) == [(Channel.CONTROL, b"x", None)]

    run(main())


def test_the_speed_counts_from_the_later_of_start_and_release_before() -> None:
    rate = Rate()
    assert rate.bytes_per_s == 0.0
    rate.starts.extend([(1.0, 1 << 20), (1.1, 1 << 20), (9.0, 100)])
    rate.released(2.0)
    assert rate.bytes_per_s == 1 << 20
    rate.released(3.0)
    rate.released(99.0)
    assert rate.bytes_per_s == pytest.approx(1 << 20)


def test_a_throttle_is_a_line_that_catches_up_with_late_timers_and_saves_nothing_while_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> list[float]:
        now, late = 10.0, 0.0
        left: list[float] = []
        real = asyncio.sleep

        async def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds + late
            await real(0)

        throttle = Throttle(1000.0)
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
        monkeypatch.setattr(asyncio, "sleep", sleep)
        steps = ((1, 0.0, 0.0), (99, 0.0, 0.01), (5, 0.0, 0.0), (10, 0.0, 0.0), (100, 7.0, 0.0))
        for num_bytes, idle, lateness in steps:
            now, late = now + idle, lateness
            await throttle.take(num_bytes)
            left.append(now - 10.0)
        monkeypatch.undo()
        return left

    assert run(main()) == pytest.approx([0.001, 0.110, 0.110, 0.115, 7.215])


@pytest.mark.parametrize("kind", KINDS)
def test_throttled_links_deliver_the_same(kind: str, tmp_path: Path) -> None:
    payload = np.random.default_rng(2).bytes(1 << 17)

    async def main() -> None:
        large = {"window_bytes": 1 << 20}
        async with pair(
            kind, tmp_path, config(0, bytes_per_s_limit=5e6, payload_bytes_limit=1 << 18, **large), config(1, **large)
        ) as (one, two):
            for _ in range(3):
                await one.send(Channel.MIGRATION, b"x", memoryview(payload))
                assert await take(two, 1) == [(Channel.MIGRATION, b"x", payload)]
            assert one.bytes_per_s < 20e6

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_two_slow_sides_that_both_wait_for_room_free_each_other(kind: str, tmp_path: Path) -> None:
    half = memoryview(bytes(1 << 15))

    async def flood(link: Link) -> None:
        for _ in range(8):
            await link.send(Channel.MIGRATION, b"x", half)

    async def main() -> None:
        slow: dict[str, Any] = {"bytes_per_s_limit": 1e7, "payload_bytes_limit": 1 << 15}
        async with pair(kind, tmp_path, config(0, **slow), config(1, **slow)) as (one, two):
            found = await asyncio.gather(flood(one), flood(two), take(one, 8), take(two, 8))
            assert found[2] == found[3] == [(Channel.MIGRATION, b"x", bytes(half))] * 8

    run(main())


def test_a_window_never_hands_out_bytes_twice_and_halves_always_fit() -> None:
    rng = np.random.default_rng(3)
    window, taken = Window(1000), list[tuple[int, int]]()
    for _ in range(20000):
        size = int(rng.integers(1, 501))
        offset = window.take(size)
        if offset is None:
            assert taken
            taken.pop(0)
            window.release()
            continue
        assert offset + size <= 1000
        assert all(offset + size <= low or high <= offset for low, high in taken)
        taken.append((offset, offset + size))
        assert window.num_taken == len(taken)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"engine": -2}, "engine"),
        ({"fingerprint": b"short"}, "fingerprint"),
        ({"heartbeat_s": 0.0}, "heartbeat_s"),
        ({"timeout_s": 0.6}, "timeout_s"),
        ({"window_bytes": 1 << 40}, "window_bytes"),
        ({"frame_bytes_limit": 1}, "frame_bytes_limit"),
        ({"bytes_per_s_limit": 0.0}, "bytes_per_s_limit"),
        ({"bytes_per_s_limit": 1e6, "payload_bytes_limit": 1 << 24}, "half of timeout_s"),
        ({"stall_s": float("nan")}, "stall_s"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        config(**({"engine": 0} | changes))
