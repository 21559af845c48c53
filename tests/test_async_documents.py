"""AsyncEngine with documents: made once, kept by id, over in time, another tenant's never seen; twins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from kvlite import (
    AsyncEngine,
    CapacityError,
    Delta,
    Document,
    Engine,
    EngineClosedError,
    FinishReason,
    InvalidRequestError,
    RequestOptions,
    Reuse,
    SamplingParams,
    UnknownDocumentError,
)
from kvlite.documents import DocumentInfo, DocumentStore
from tests.engines import SMALL, engine
from tests.paced import TIMEOUT_S, Paced

GREEDY = SamplingParams(temperature=0, max_tokens=8)
NORA = Document("Nora works as a baker. Nora lives in Oslo.", id="nora", title="Who")
BEN = Document("Ben lives in Rome. Ben owns a boat.", id="ben")
ASKED = [{"role": "user", "content": "Where does Nora live?"}]


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, TIMEOUT_S))


@asynccontextmanager
async def serving(shipped: bool = False, **overrides: Any) -> AsyncIterator[AsyncEngine]:
    made = AsyncEngine(Engine(**(SMALL | overrides)) if shipped else engine(**overrides))
    try:
        yield made
        assert await asyncio.to_thread(made._wait_until_idle, TIMEOUT_S)
        made._engine._core.audit()
    finally:
        made.close()


async def answer(served: AsyncEngine, documents: list[Document], reuse: Reuse, tenant: int = 0) -> Delta:
    """The last delta of a chat."""
    options = RequestOptions(tenant=tenant, reuse=reuse)
    prompt = await asyncio.to_thread(served.prepare_chat, ASKED, GREEDY, options, documents=documents)
    deltas = [delta async for delta in served.stream_validated(prompt.request)]
    assert [delta.usage is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    return deltas[-1]


def hits(last: Delta) -> list[str]:
    assert last.reuse is not None
    return [segment.hit for segment in last.reuse.segments]


def names(infos: list[DocumentInfo]) -> list[str]:
    return [info.id for info in infos]


def test_a_document_is_made_kept_used_changed_and_deleted() -> None:
    async def main() -> None:
        async with serving() as served:
            info = await served.create_document(NORA)
            assert (info.id, info.title, info.state, info.pinned, info.public) == ("nora", "Who", "ready", False, False)
            assert info.expires is None and served.get_document(0, "nora") == info
            made = await served.create_document(Document(BEN.text), pinned=True, ttl_s=100)
            assert made.id.startswith("doc_") and made.pinned and made.expires == pytest.approx(made.created + 100)
            assert names(served.list_documents(0)) == ["nora", made.id]
            assert (
                hits(await answer(served, [Document(id="nora"), Document(id=made.id)], Reuse.blend())) == ["device"] * 2
            )
            changed = await served.update_document(0, made.id, pinned=False, ttl_s=None)
            assert changed is not None and not changed.pinned and changed.expires is None
            assert served.stats().pinned_blocks == 0 and served.stats().num_documents == 2
            assert await served.delete_document(0, "nora") and not await served.delete_document(0, "nora")
            assert served.get_document(0, "nora") is None and served.stats().num_segments == 1
            assert await served.update_document(0, "nora") is None

    run(main())


def test_tenants_see_their_own_and_public_documents_alone() -> None:
    async def main() -> None:
        async with serving() as served:
            await served.create_document(NORA, tenant=1)
            await served.create_document(BEN, public=True)
            assert names(served.list_documents(1)) == ["nora", "ben"] and names(served.list_documents(2)) == ["ben"]
            with pytest.raises(UnknownDocumentError) as caught:
                await answer(served, [Document(id="ben"), Document(id="nora")], Reuse.blend(), tenant=2)
            assert caught.value.param == "documents[1].id"
            assert hits(await answer(served, [Document(id="ben"), NORA], Reuse.blend(), tenant=2)) == ["device", "made"]
            assert hits(await answer(served, [NORA], Reuse.blend(), tenant=1)) == ["device"]
            assert not await served.delete_document(2, "ben"), "a public one is not the tenant's"
            public = served.get_document(2, "ben")
            assert public is not None and public.public and await served.delete_document(2, "ben", public=True)

    run(main())


def test_concurrent_creations_of_one_document_compute_it_once() -> None:
    async def main() -> None:
        async with serving() as served:
            infos = await asyncio.gather(*(served.create_document(replace(NORA, id=f"d{n}")) for n in range(6)))
            assert {info.state for info in infos} == {"ready"}
            assert served._engine._core.stats()["segments_made_total"] == 1
            for n in range(5):
                assert await served.delete_document(0, f"d{n}")
            assert hits(await answer(served, [NORA], Reuse.blend())) == ["device"], "the last one still needs it"

    run(main())


def test_a_new_text_under_an_old_id_replaces_it_and_keeps_its_age() -> None:
    async def main() -> None:
        async with serving() as served:
            first = await served.create_document(NORA, ttl_s=50)
            again = await served.create_document(replace(BEN, id="nora"))
            assert (again.created, again.expires, again.title) == (first.created, None, None)
            assert served.stats().num_segments == 1
            with pytest.raises(InvalidRequestError, match="ttl_s"):
                await served.create_document(NORA, ttl_s=0)

    run(main())


def test_documents_whose_time_is_over_are_gone_with_their_kv() -> None:
    async def main() -> None:
        async with serving() as served:
            now = [1000.0]
            served._engine.documents = store = DocumentStore(8, lambda: now[0])
            served._engine.library._store = store
            await served.create_document(NORA, ttl_s=5, pinned=True)
            now[0] = 1005.0
            assert served.get_document(0, "nora") is None
            stats = served.stats()
            assert (stats.num_documents, stats.num_segments, stats.pinned_blocks) == (0, 0, 0)

    run(main())


def test_a_creation_that_is_cancelled_or_refused_keeps_nothing() -> None:
    async def main() -> None:
        async with serving(max_stored_documents=1) as served:
            task = asyncio.create_task(served.create_document(NORA, pinned=True))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(served._wait_until_idle, TIMEOUT_S)
            assert served.get_document(0, "nora") is None and served.stats().pinned_blocks == 0
            await served.create_document(BEN)
            with pytest.raises(CapacityError, match="1 documents are kept"):
                await served.create_document(NORA)
            for document, param in ((Document("x " * 5000), "document.text"), (Document(id="lost"), "document.text")):
                with pytest.raises(InvalidRequestError) as caught:
                    await served.create_document(document)
                assert caught.value.param == param
            await served.drain(TIMEOUT_S)
            with pytest.raises(EngineClosedError):
                await served.create_document(NORA)

    run(main())


def test_verified_requests_end_once_beside_others_and_when_their_readers_leave() -> None:
    async def main() -> None:
        async with serving(shipped=True, deterministic=True) as served:
            modes = [Reuse.verify(0.3), Reuse.blend(0.3), Reuse.PREFIX, Reuse.verify(0.3)]
            lasts = await asyncio.gather(*(answer(served, [NORA, BEN], reuse, n) for n, reuse in enumerate(modes)))
            assert {last.finish_reason for last in lasts} == {FinishReason.STOP}
            assert [last.reuse is not None and last.reuse.verify is not None for last in lasts] == [
                True, False, False, True,
            ]  # fmt: skip
            options = RequestOptions(reuse=Reuse.verify())
            prompt = served.prepare_chat(
                ASKED, replace(GREEDY, max_tokens=50, ignore_eos=True), options, documents=[BEN]
            )
            for taken in range(4):
                stream = served.stream_validated(prompt.request)
                for _ in range(taken):
                    await anext(stream)
                await stream.aclose()
            assert await asyncio.to_thread(served._wait_until_idle, TIMEOUT_S)

    run(main())


def test_closing_ends_a_verified_request_once() -> None:
    async def main() -> None:
        served = AsyncEngine(engine())
        options = RequestOptions(reuse=Reuse.verify())
        long = replace(GREEDY, max_tokens=150, ignore_eos=True)
        stream = served.stream_validated(served.prepare_chat(ASKED, long, options, documents=[NORA]).request)
        pace = Paced(served)
        deltas = [await pace.until(anext(stream))]
        closing = asyncio.create_task(asyncio.to_thread(served.close))
        while not served._closing:
            await asyncio.sleep(0)
        pace.open()
        await closing
        deltas += [delta async for delta in stream]
        assert [delta.finish_reason for delta in deltas if delta.usage is not None] == [FinishReason.CANCELLED]

    run(main())
