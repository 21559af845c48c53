"""Documents of a fleet: the text is the front-end's, every engine is told, and one that comes back is told again."""

from __future__ import annotations

import asyncio

import pytest

from kvlite.documents import DocumentState
from kvlite.errors import CapacityError, EngineClosedError, InvalidRequestError, UnknownDocumentError
from kvlite.fleet.messages import CancelOrder, CreateDocument, DeleteDocument, Failure, UpdateDocument
from kvlite.reuse_types import Document
from kvlite.types import RequestOptions
from tests.fleet.fake_worker import fleet, hello
from tests.fleet.link_pairs import run

NORA = Document("Nora lives in Oslo.", "nora", "A title")


def test_a_document_is_made_on_every_engine_under_one_id():
    async def main() -> None:
        async with fleet(2) as cluster:
            info = await cluster.engine.create_document(NORA, tenant=1, pinned=True, ttl_s=60)
            assert (info.id, info.state, info.pinned, info.tokens > 0) == ("nora", DocumentState.READY, True, True)
            for worker in cluster.workers.values():
                (told,) = await worker.heard(CreateDocument)
                assert (told.id, told.tenant, told.text, told.title, told.pinned) == (
                    "nora", 1, NORA.text, "A title", True,
                )  # fmt: skip
                assert told.ttl_s is not None and told.ttl_s <= 60
            unnamed = await cluster.engine.create_document(Document("Edgar lives in Rome."))
            ids = {(await worker.heard(CreateDocument, 2))[1].id for worker in cluster.workers.values()}
            assert ids == {unnamed.id}

    run(main())


def test_a_prompt_takes_the_text_of_a_document_by_its_id_and_nobody_elses():
    async def main() -> None:
        async with fleet(1) as cluster:
            await cluster.engine.create_document(NORA, tenant=1)
            messages = [{"role": "user", "content": "Where?"}]
            with pytest.raises(UnknownDocumentError):
                cluster.engine.prepare_chat(messages, documents=[Document(None, "nora")])
            options = RequestOptions(tenant=1)
            by_id = cluster.engine.prepare_chat(messages, None, options, documents=[Document(None, "nora")])
            in_line = cluster.engine.prepare_chat(messages, None, options, documents=[NORA])
            assert by_id.request.prompt_ids.tolist() == in_line.request.prompt_ids.tolist()
            assert [span.id for span in by_id.request.spans] == ["nora"]

    run(main())


def test_a_document_that_one_engine_cannot_keep_is_kept_by_none():
    async def main() -> None:
        async with fleet(2) as cluster:
            cluster.workers[1].fails["nora"] = Failure("capacity", "no room beside what is pinned")
            with pytest.raises(CapacityError, match="pinned"):
                await cluster.engine.create_document(NORA)
            await cluster.workers[0].heard(DeleteDocument)
            assert await cluster.engine.get_document(0, "nora") is None

    run(main())


def test_a_caller_that_leaves_cancels_the_order_on_every_engine():
    async def main() -> None:
        async with fleet(2) as cluster:
            for worker in cluster.workers.values():
                worker.holds = True
            making = asyncio.create_task(cluster.engine.create_document(NORA))
            told = [(await worker.heard(CreateDocument))[0] for worker in cluster.workers.values()]
            making.cancel()
            for worker, order in zip(cluster.workers.values(), told, strict=True):
                assert (await worker.heard(CancelOrder))[0].order == order.order
            assert not await cluster.engine.list_documents(0)

    run(main())


def test_an_engine_that_dies_meanwhile_does_not_fail_the_order():
    async def main() -> None:
        async with fleet(2) as cluster:
            cluster.workers[1].holds = True
            making = asyncio.create_task(cluster.engine.create_document(NORA))
            await cluster.workers[1].heard(CreateDocument)
            await cluster.kill(1)
            assert (await making).state is DocumentState.READY
            await cluster.kill(0)
            with pytest.raises(EngineClosedError, match="no engine is up"):
                await cluster.engine.create_document(NORA)

    run(main())


def test_an_engine_that_comes_back_learns_every_document_again_and_its_state_is_told_until_then():
    async def main() -> None:
        async with fleet(2) as cluster:
            await cluster.engine.create_document(NORA, tenant=1)
            await cluster.engine.create_document(Document("All may read.", "all"), public=True)
            await cluster.kill(1)
            worker = await cluster.connect(1)
            worker.holds = True
            worker.say(hello(1))
            told = await worker.heard(CreateDocument, 2)
            assert {(each.id, each.public) for each in told} == {("nora", False), ("all", True)}
            worker.holds = False
            states = {info.id: info.state for info in await cluster.engine.list_documents(1)}
            assert states == {"nora": DocumentState.EVICTED, "all": DocumentState.EVICTED}
            assert [info.id for info in await cluster.engine.list_documents(2)] == ["all"]

    run(main())


def test_a_change_and_an_end_reach_every_engine():
    async def main() -> None:
        async with fleet(2) as cluster:
            await cluster.engine.create_document(NORA, tenant=1, ttl_s=60)
            changed = await cluster.engine.update_document(1, "nora", pinned=True, ttl_s=None)
            assert changed is not None and (changed.pinned, changed.expires) == (True, None)
            for worker in cluster.workers.values():
                (told,) = await worker.heard(UpdateDocument)
                assert (told.pinned, told.keep_ttl, told.ttl_s) == (True, False, None)
            assert await cluster.engine.update_document(2, "nora", pinned=True) is None
            assert not await cluster.engine.delete_document(2, "nora")
            assert await cluster.engine.delete_document(1, "nora")
            for worker in cluster.workers.values():
                await worker.heard(DeleteDocument)
            assert await cluster.engine.get_document(1, "nora") is None

    run(main())


@pytest.mark.parametrize(
    ("document", "more", "param"),
    [
        (Document(None, "nora"), {}, "document.text"),
        (NORA, {"ttl_s": 0.0}, "ttl_s"),
        (NORA, {"ttl_s": float("nan")}, "ttl_s"),
        (NORA, {"ttl_s": 1e12}, "ttl_s"),
        (Document("Nora lives in Oslo. " * 4000), {}, "document.text"),
    ],
    ids=["no text", "no time", "nan", "too long", "too large"],
)
def test_what_no_engine_could_keep_reaches_none(document, more, param):
    async def main() -> None:
        async with fleet(1) as cluster:
            with pytest.raises(InvalidRequestError) as caught:
                await cluster.engine.create_document(document, **more)
            assert caught.value.param == param
            await cluster.engine.create_document(NORA)
            assert [each.id for each in await cluster.workers[0].heard(CreateDocument)] == ["nora"]

    run(main())
