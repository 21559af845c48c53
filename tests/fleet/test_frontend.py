"""The front-end over workers that say what a test tells them to: streams, replays, and what no engine may say."""

from __future__ import annotations

import numpy as np
import pytest

from kvlite.errors import CapacityError, EngineClosedError, EngineError, InvalidRequestError
from kvlite.fleet import requests, spec
from kvlite.fleet.members import EngineState
from kvlite.fleet.messages import Abort, Add, Failure, Finish, Refused, Scores
from kvlite.fleet.wire import Channel
from kvlite.types import FinishReason
from tests.fleet.fake_worker import EOS, IDS, REPORT, VOCAB, Reader, fleet, hello, request_of, started, stats
from tests.fleet.link_pairs import run
from tests.server.fakes import TOKENIZER


def test_a_stream_has_the_text_of_its_tokens_and_the_engines_report():
    async def main() -> None:
        async with fleet(1) as cluster:
            reader, add = await started(cluster)
            worker = cluster.workers[0]
            worker.give(add.request, *IDS[:3])
            worker.give(add.request, *IDS[3:])
            worker.give(add.request, EOS)
            worker.end(add.request, reuse=REPORT)
            await reader.task
            assert reader.ids == [*IDS, EOS]
            assert reader.text == TOKENIZER.decode(IDS)
            assert (reader.last.finish_reason, reader.last.reuse) == (FinishReason.STOP, REPORT)
            assert reader.last.usage is not None and reader.last.usage.completion_tokens == len(IDS) + 1
            assert [delta for delta in reader.deltas[:-1] if delta.usage or delta.finish_reason] == []
            assert cluster.engine.status().engines[0].requests == ()

    run(main())


def test_an_engine_is_told_ids_and_a_seed_but_no_stop_string():
    async def main() -> None:
        async with fleet(1, seed=3) as cluster:
            _, add = await started(cluster, prompt="Where is Nora", stop=["Oslo"], max_tokens=9, temperature=0.5)
            decoded = spec.decode(cluster.engine.limits, add.spec)
            assert decoded.prompt_ids.tolist() == TOKENIZER.encode("Where is Nora")
            assert decoded.params.stop_strings == ()
            assert decoded.params.seed is not None
            assert (add.epoch, add.outputs, decoded.max_tokens) == (0, None, 9)

    run(main())


def test_a_stop_string_ends_the_choice_here_and_its_engine_is_told_how_much_it_keeps():
    async def main() -> None:
        async with fleet(1) as cluster:
            reader, add = await started(cluster, stop=["Oslo"])
            worker = cluster.workers[0]
            worker.give(add.request, *IDS)
            (finish,) = await worker.heard(Finish)
            kept = finish.kept_len
            assert "Oslo" in TOKENIZER.decode(IDS[:kept]) and "Oslo" not in TOKENIZER.decode(IDS[: kept - 1])
            worker.give(add.request, IDS[0])
            await cluster.settle(0)
            assert not reader.task.done(), "the last delta waits for the engine's report"
            worker.end(add.request, FinishReason.LENGTH, num_tokens=kept, reuse=REPORT)
            await reader.task
            assert reader.ids == IDS[:kept]
            assert reader.text == TOKENIZER.decode(IDS[:kept]).partition("Oslo")[0]
            assert (reader.last.finish_reason, reader.last.stop_reason) == (FinishReason.STOP, "Oslo")
            assert reader.last.reuse == REPORT

    run(main())


def test_a_stop_strings_end_does_not_wait_for_ever_for_its_engines_report(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requests, "LAST_WORD_S", 0.0)

    async def main() -> None:
        async with fleet(1) as cluster:
            reader, add = await started(cluster, stop=["Oslo"])
            cluster.workers[0].give(add.request, *IDS)
            await reader.task
            assert (reader.last.finish_reason, reader.last.reuse) == (FinishReason.STOP, None)
            await cluster.workers[0].heard(Abort)

    run(main())


def test_the_engine_with_the_fewest_requests_gets_the_next():
    async def main() -> None:
        async with fleet(3) as cluster:
            for count in range(1, 3):
                for _ in range(3):
                    Reader(cluster, request_of())
                for worker in cluster.workers.values():
                    await worker.heard(Add, count)
            first, second = await cluster.workers[1].heard(Add, 2)
            cluster.workers[1].end(first.request, FinishReason.LENGTH)
            await cluster.settle(1)
            Reader(cluster, request_of())
            assert (await cluster.workers[1].heard(Add, 3))[:2] == [first, second]

    run(main())


def test_log_probabilities_come_with_their_tokens_and_those_of_the_prompt_once():
    async def main() -> None:
        async with fleet(1) as cluster:
            reader, add = await started(cluster, logprobs=1, prompt_logprobs=0)
            one = Scores(IDS[0], -0.5, 1, (IDS[0],), (-0.5,))
            prompt = [None, Scores(9, -1.5, 2, (), ())]
            worker = cluster.workers[0]
            worker.give(add.request, IDS[0], logprobs=[one], prompt_logprobs=prompt)
            worker.give(add.request, IDS[1], logprobs=[one], prompt_logprobs=prompt)
            worker.end(add.request, FinishReason.LENGTH)
            await reader.task
            assert [delta.prompt_logprobs is not None for delta in reader.deltas].count(True) == 1
            first = next(delta for delta in reader.deltas if delta.prompt_logprobs)
            assert first.prompt_logprobs[0] is None and first.prompt_logprobs[1].chosen.logprob == -1.5
            shown = [entry for delta in reader.deltas for entry in delta.logprobs]
            assert [(entry.chosen.token_id, entry.chosen.text) for entry in shown] == [
                (IDS[0], TOKENIZER.token_text(IDS[0]))
            ] * 2

    run(main())


def test_a_dead_engines_requests_go_on_elsewhere_behind_what_their_clients_have():
    async def main() -> None:
        async with fleet(2) as cluster:
            reader, add = await started(cluster, n=2)
            cluster.workers[0].give(add.request, *IDS[:4])
            cluster.workers[0].give(add.request, 11, choice=1)
            cluster.workers[0].end(add.request, choice=1, num_tokens=1, last=False)
            await reader.has(4)
            await cluster.kill(0)
            (again,) = await cluster.workers[1].heard(Add)
            assert (again.request, again.epoch) == (add.request, 1)
            assert again.outputs == [np.asarray(IDS[:4], "<i4").tobytes(), None]
            old, new = spec.decode(cluster.engine.limits, add.spec), spec.decode(cluster.engine.limits, again.spec)
            assert old.params.seed == new.params.seed
            assert new.timeout_s < old.timeout_s, "the time that has passed is not given again"
            cluster.workers[1].give(add.request, *IDS[4:])
            cluster.workers[1].end(add.request, FinishReason.LENGTH, num_tokens=len(IDS), reuse=REPORT)
            await reader.task
            assert reader.ids == IDS
            assert reader.ids_of(1) == [11]
            text = "".join(delta.text for delta in reader.deltas if delta.index == 0)
            assert text == TOKENIZER.decode(IDS)

    run(main())


def test_a_request_that_no_engine_can_take_over_waits_for_one():
    async def main() -> None:
        async with fleet(2) as cluster:
            reader, add = await started(cluster)
            cluster.workers[0].give(add.request, *IDS[:2])
            await reader.has(2)
            await cluster.kill(1)
            await cluster.kill(0)
            assert [status.name for status in cluster.engine.status().waiting] == [str(add.request)]
            with pytest.raises(EngineClosedError, match="no engine is up"):
                cluster.engine.stream_validated(request_of())
            worker = await cluster.join(1)
            (again,) = await worker.heard(Add)
            assert again.epoch == 1
            worker.give(add.request, *IDS[2:])
            worker.end(add.request, FinishReason.LENGTH)
            await reader.task
            assert reader.ids == IDS

    run(main())


def test_what_waits_for_an_engine_ends_with_its_time_and_when_every_engine_was_given_up():
    async def main() -> None:
        async with fleet(1) as cluster:
            late, _ = await started(cluster)
            request = next(iter(cluster.engine._requests.streams.values()))
            request.deadline = 0.0
            stuck = Reader(cluster, request_of())
            await cluster.workers[0].heard(Add, 2)
            await cluster.kill(0)
            await late.task
            assert late.last.finish_reason is FinishReason.TIMEOUT
            cluster.engine.give_up(0)
            await stuck.task
            assert (stuck.last.finish_reason, stuck.last.usage is not None) == (FinishReason.ERROR, True)
            assert not cluster.engine.healthy
            with pytest.raises(EngineError, match="given up"):
                cluster.engine.stream_validated(request_of())

    run(main())


def test_a_choice_whose_tokens_say_that_it_is_over_is_not_replayed():
    async def main() -> None:
        async with fleet(2) as cluster:
            by_length, one = await started(cluster, max_tokens=2)
            cluster.workers[0].give(one.request, 11, 12)
            await by_length.has(2)
            await cluster.kill(0)
            await by_length.task
            assert by_length.last.finish_reason is FinishReason.LENGTH
            by_eos, two = await started(cluster, 1)
            cluster.workers[1].give(two.request, 11, EOS)
            await by_eos.has(2)
            await cluster.kill(1)
            await by_eos.task
            assert by_eos.last.finish_reason is FinishReason.STOP

    run(main())


def test_a_request_that_its_engines_die_of_ends_with_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requests, "REPLAYS_MAX", 1)

    async def main() -> None:
        async with fleet(3) as cluster:
            reader, _ = await started(cluster)
            await cluster.kill(0)
            await cluster.workers[1].heard(Add)
            await cluster.kill(1)
            await reader.task
            assert reader.last.finish_reason is FinishReason.ERROR
            assert reader.last.error == "its engine died 2 times"
            assert cluster.engine.members[2].requests == set()

    run(main())


def test_a_replay_that_finds_no_room_is_tried_again():
    async def main() -> None:
        async with fleet(2) as cluster:
            reader, add = await started(cluster)
            await cluster.kill(0)
            worker = cluster.workers[1]
            (again,) = await worker.heard(Add)
            worker.say(Refused(add.request, again.epoch, Failure("capacity", "full")))
            _, third = await worker.heard(Add, 2)
            assert (third.request, third.epoch) == (add.request, again.epoch)
            worker.end(add.request, FinishReason.LENGTH)
            await reader.task

    run(main())


def test_tokens_of_an_old_epoch_are_dropped_and_their_engine_is_told():
    async def main() -> None:
        async with fleet(2) as cluster:
            reader, add = await started(cluster)
            cluster.workers[0].give(add.request, *IDS[:2])
            await reader.has(2)
            await cluster.kill(0)
            zombie = await cluster.join(0)
            await cluster.workers[1].heard(Add)
            zombie.give(add.request, 99, position=2, epoch=0)
            zombie.end(add.request, num_tokens=3, epoch=0)
            await zombie.heard_frame("revoked")
            cluster.workers[1].give(add.request, *IDS[2:])
            cluster.workers[1].end(add.request, FinishReason.LENGTH)
            await reader.task
            assert reader.ids == IDS

    run(main())


@pytest.mark.parametrize(
    "say",
    [
        lambda worker, id: worker.give(id, 11, position=5),
        lambda worker, id: worker.give(id, VOCAB),
        lambda worker, id: worker.give(id, 11, choice=1),
        lambda worker, id: worker.give(id, 11, logprobs=[Scores(11, -1.0, 1, (), ())]),
        lambda worker, id: worker.end(id, num_tokens=3),
        lambda worker, id: worker.end(id, choice=4, num_tokens=0),
        lambda worker, id: worker.say(hello(0)),
        lambda worker, id: worker.say(stats(healthy=False)),
        lambda worker, id: worker.link.post(Channel.CONTROL, b"\xff"),
        lambda worker, id: worker.link.post(Channel.MIGRATION, b"no frame of ours"),
    ],
    ids=["gap", "id", "choice", "logprobs", "early end", "end of no choice", "two hellos", "broken", "bytes", "frame"],
)
def test_an_engine_that_says_what_no_engine_may_is_let_go_and_its_requests_go_on(say):
    async def main() -> None:
        async with fleet(2) as cluster:
            reader, add = await started(cluster)
            say(cluster.workers[0], add.request)
            await cluster.serving[0]
            assert cluster.engine.states[0] is EngineState.DOWN
            (again,) = await cluster.workers[1].heard(Add)
            assert again.outputs == [b""]
            cluster.workers[1].give(add.request, 11)
            cluster.workers[1].end(add.request, FinishReason.LENGTH)
            await reader.task
            assert reader.ids == [11]

    run(main())


@pytest.mark.parametrize(
    "changes",
    [{"model_digest": 8}, {"protocol": 99}, {"block_size": 32}, {"dtype": "bfloat16"}, {"engine": 1}, {"engine": 7}],
)
def test_a_worker_that_does_not_belong_to_the_fleet_is_not_let_in(changes):
    async def main() -> None:
        async with fleet(2, up=False) as cluster:
            await cluster.join(0)
            worker = await cluster.connect(1)
            worker.say(hello(**({"engine": 1} | changes)) if "engine" not in changes else hello(changes["engine"] - 1))
            await cluster.serving[1]
            assert list(cluster.engine.members) == [0]
            assert cluster.engine.states[1] is EngineState.STARTING

    run(main())


def test_a_worker_begins_with_its_hello_and_comes_once():
    async def main() -> None:
        async with fleet(2, up=False) as cluster:
            early = await cluster.connect(1)
            early.say(stats())
            await cluster.serving[1]
            await cluster.join(0)
            first = cluster.serving[0]
            twin = await cluster.connect(0)
            twin.say(hello(0))
            await cluster.serving[0]
            assert not first.done()
            assert list(cluster.engine.members) == [0]
            first.cancel()

    run(main())


def test_a_client_that_leaves_aborts_its_request_and_its_late_tokens_are_nobodys():
    async def main() -> None:
        async with fleet(1) as cluster:
            reader, add = await started(cluster)
            reader.task.cancel()
            (abort,) = await cluster.workers[0].heard(Abort)
            assert abort.request == add.request
            cluster.workers[0].give(add.request, 11)
            await cluster.settle(0)
            assert cluster.engine.members[0].requests == set()
            assert cluster.engine.status().engines[0].requests == ()

    run(main())


def test_a_refused_request_fails_with_the_engines_own_error():
    async def main() -> None:
        async with fleet(1) as cluster:
            for failure, error in (
                (Failure("capacity", "full"), CapacityError),
                (Failure("invalid", "bad", "prompt"), InvalidRequestError),
                (Failure("failed", "oh"), EngineError),
            ):
                reader, add = await started(cluster)
                cluster.workers[0].say(Refused(add.request, add.epoch, failure))
                with pytest.raises(error):
                    await reader.task

    run(main())
