"""Moves, limits and the end, as the front-end sees them; workers drive the real migration machines without blocks."""

from __future__ import annotations

import asyncio

import pytest

from kvlite import _core
from kvlite.errors import CapacityError, EngineClosedError, InvalidRequestError
from kvlite.fleet.messages import Add, Finish, Peers, Shutdown
from kvlite.fleet.moves import MoveConflictError, MoveHow, UnknownRequestError
from kvlite.types import EngineStats, FinishReason
from tests.fleet.fake_worker import IDS, REPORT, FakeWorker, Reader, fleet, request_of, started, stats
from tests.fleet.link_pairs import run


def test_a_moved_request_goes_on_at_the_destination_and_its_source_is_not_heard_any_more():
    async def main() -> None:
        async with fleet(2) as cluster:
            reader, add = await started(cluster, name="chatcmpl-x")
            source, target = cluster.workers[0], cluster.workers[1]
            source.give(add.request, *IDS[:3])
            await reader.has(3)
            moving = asyncio.create_task(cluster.engine.move("chatcmpl-x", 1, MoveHow.COPY))
            while target.epochs.get(add.request) != 1:
                await target._news.wait()
                target._news.clear()
            status = cluster.engine.status()
            assert [len(engine.requests) for engine in status.engines] == [0, 1]
            assert (status.engines[1].requests[0].epoch, status.engines[1].requests[0].tokens) == (1, 3)
            assert not moving.done(), "the client has no token of the destination yet"
            source.give(add.request, 99, epoch=0, position=3)
            await source.heard_frame("revoked")
            target.requests[add.request] = IDS[:3]
            target.give(add.request, *IDS[3:])
            report = await moving
            assert report.moved and report.gap_s is not None and report.gap_s >= 0
            assert (report.request, report.source, report.to, report.how) == ("chatcmpl-x", 0, 1, MoveHow.COPY)
            assert (report.tokens, report.bytes, report.reason) == (3, 12345, "")
            target.end(add.request, FinishReason.LENGTH, reuse=REPORT)
            await reader.task
            assert reader.ids == IDS

    run(main())


def test_a_destination_hears_which_choices_were_cut_while_the_request_moved():
    async def main() -> None:
        async with fleet(2) as cluster:
            reader, add = await started(cluster, stop=["Oslo"], n=2)
            source, target = cluster.workers[0], cluster.workers[1]
            source.give(add.request, *IDS)
            (finish,) = await source.heard(Finish)
            source.requests[add.request] = IDS[: finish.kept_len]
            cluster.engine._requests.carry([(_core.Owner.SWITCH, add.request, 1, 1)])
            (told,) = await target.heard(Finish)
            assert (told.choice, told.kept_len, told.epoch) == (0, finish.kept_len, 1)
            reader.task.cancel()

    run(main())


@pytest.mark.parametrize("how", [MoveHow.COPY, MoveHow.REPLAY])
def test_a_destination_without_room_is_named_and_the_request_stays(how: MoveHow):
    async def main() -> None:
        async with fleet(2) as cluster:
            reader, add = await started(cluster)
            cluster.workers[1].has_room = False
            report = await cluster.engine.move(str(add.request), 1, how)
            assert (report.result, report.moved, report.gap_s) == ("refused", False, None)
            assert "no room" in report.reason
            cluster.workers[0].give(add.request, *IDS)
            cluster.workers[0].end(add.request, FinishReason.LENGTH)
            await reader.task
            assert reader.ids == IDS

    run(main())


def test_a_move_that_cannot_begin_says_why():
    async def main() -> None:
        async with fleet(3, up=False) as cluster:
            await cluster.join(0)
            await cluster.join(1)
            _, add = await started(cluster, name="same")
            for name, engine, error, says in (
                ("nothing", 1, UnknownRequestError, "not under way"),
                ("9" * 30, 1, UnknownRequestError, "not under way"),
                ("same", 9, InvalidRequestError, "must be 0 to 2"),
                ("same", -1, InvalidRequestError, "must be 0 to 2"),
                ("same", 0, InvalidRequestError, "already"),
                ("same", 2, MoveConflictError, "starting"),
            ):
                with pytest.raises(error, match=says):
                    await cluster.engine.move(name, engine)
            Reader(cluster, request_of(), "same")
            await cluster.workers[1].heard(Add)
            with pytest.raises(InvalidRequestError, match="names 2 requests: use a number, 1, 2"):
                await cluster.engine.move("same", 1)
            report = await cluster.engine.move(str(add.request), 1, MoveHow.REPLAY)
            assert report.moved

    run(main())


def test_two_orders_for_one_request_are_one_order_and_a_conflict():
    async def main() -> None:
        async with fleet(3) as cluster:
            reader, add = await started(cluster)
            cluster.workers[0].give(add.request, *IDS[:3])
            await reader.has(3)
            first = asyncio.create_task(cluster.engine.move(str(add.request), 1, MoveHow.COPY))
            await asyncio.sleep(0)
            with pytest.raises(MoveConflictError, match="already"):
                await cluster.engine.move(str(add.request), 2, MoveHow.COPY)
            reader.task.cancel()
            report = await first
            assert report.result in ("moved", "ended")

    run(main())


def test_a_source_that_dies_before_it_is_done_fails_the_move_and_the_request_is_replayed():
    async def main() -> None:
        async with fleet(2) as cluster:
            reader, add = await started(cluster)
            cluster.workers[0].give(add.request, *IDS[:3])
            await reader.has(3)
            cluster.workers[0].die()
            moving = asyncio.create_task(cluster.engine.move(str(add.request), 1, MoveHow.COPY))
            report = await moving
            assert (report.result, report.moved) == ("failed", False)
            (again,) = await cluster.workers[1].heard(Add)
            assert again.epoch == 1
            cluster.workers[1].give(add.request, *IDS[3:])
            cluster.workers[1].end(add.request, FinishReason.LENGTH)
            await reader.task
            assert reader.ids == IDS

    run(main())


def test_requests_beyond_every_queue_are_refused_at_once():
    async def main() -> None:
        async with fleet(1, up=False) as cluster:
            worker = await cluster.join(0, max_num_waiting=2)
            Reader(cluster, request_of())
            Reader(cluster, request_of())
            await worker.heard(Add, 2)
            with pytest.raises(CapacityError, match="max_num_waiting"):
                cluster.engine.stream_validated(request_of())
            worker.say(stats(stats=EngineStats(num_running=1)))
            await worker.heard(Peers)
            while cluster.engine.members[0].stats is None:
                await asyncio.sleep(0)
            Reader(cluster, request_of())
            await worker.heard(Add, 3)

    run(main())


def test_the_sum_of_the_engines_statistics_is_the_fleets():
    async def main() -> None:
        async with fleet(2) as cluster:
            finished = {FinishReason.STOP: 2}
            one = EngineStats(num_running=1, num_blocks=10, finished=finished, num_agreement_samples=1, agreement=1.0)
            two = EngineStats(num_running=2, num_blocks=10, finished=finished, num_agreement_samples=3, agreement=0.0)
            for engine, each in enumerate((one, two)):
                cluster.workers[engine].say(stats(stats=each))
                while cluster.engine.members[engine].stats is None:
                    await asyncio.sleep(0)
            total = cluster.engine.stats()
            assert (total.num_running, total.num_blocks, total.agreement) == (3, 20, 0.25)
            assert total.finished == {FinishReason.STOP: 4}

    run(main())


def test_a_drain_waits_for_running_requests_and_refuses_new_ones():
    async def main() -> None:
        async with fleet(1) as cluster:
            reader, add = await started(cluster)
            assert await cluster.engine.drain(0.01) is False
            with pytest.raises(EngineClosedError):
                cluster.engine.stream_validated(request_of())
            draining = asyncio.create_task(cluster.engine.drain(60))
            cluster.workers[0].give(add.request, 11)
            cluster.workers[0].end(add.request, FinishReason.LENGTH)
            assert await draining is True
            await reader.task

    run(main())


def test_closing_ends_every_stream_as_cancelled_and_tells_the_workers_to_exit():
    async def main() -> None:
        async with fleet(2) as cluster:
            reader, add = await started(cluster)
            cluster.workers[0].give(add.request, *IDS[:2])
            await reader.has(2)
            await asyncio.to_thread(cluster.engine.close)
            await reader.task
            assert (reader.last.finish_reason, reader.last.usage is not None) == (FinishReason.CANCELLED, True)
            for worker in cluster.workers.values():
                await worker.heard(Shutdown)
            await asyncio.gather(*cluster.serving.values())
            assert not cluster.engine.healthy

    run(main())


def test_a_fake_worker_keeps_its_promise_that_tokens_follow_each_other():
    async def main() -> None:
        async with fleet(1) as cluster:
            worker: FakeWorker = cluster.workers[0]
            worker.requests[5] = [1, 2]
            assert worker.tokens(5, [3]).position == 2
            assert worker.requests[5] == [1, 2, 3]

    run(main())
