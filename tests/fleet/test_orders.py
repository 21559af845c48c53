"""Orders of the front-end about documents: each gets one answer, also when it fails or is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvlite import AsyncEngine, CapacityError, InvalidRequestError
from kvlite.fleet.messages import (
    CancelOrder,
    CreateDocument,
    DeleteDocument,
    Drain,
    FromWorker,
    ListDocuments,
    Reply,
    UpdateDocument,
)
from kvlite.fleet.orders import ORDERS_MAX, Orders
from tests.engines import engine
from tests.fleet.small_fleet import run


class Answers:
    """Stands for the uplink."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[FromWorker] = asyncio.Queue()

    def post(self, message: FromWorker) -> None:
        self.queue.put_nowait(message)

    async def next(self) -> Reply:
        reply = await self.queue.get()
        assert isinstance(reply, Reply)
        return reply


@asynccontextmanager
async def orders() -> AsyncIterator[tuple[Orders, Answers, AsyncEngine]]:
    served, answers = AsyncEngine(engine()), Answers()
    made = Orders(served, answers)  # type: ignore[arg-type]
    try:
        yield made, answers, served
    finally:
        made.close()
        served.close()


def test_a_document_is_made_listed_changed_and_forgotten() -> None:
    async def main() -> None:
        async with orders() as (made, answers, _):
            made.obey(CreateDocument(1, 7, "d", "Nora lives in Bergen."))
            (info,) = (await answers.next()).documents
            assert (info.id, info.state, info.pinned) == ("d", "ready", False)
            made.obey(UpdateDocument(2, 7, "d", pinned=True, keep_ttl=False, ttl_s=60.0))
            (info,) = (await answers.next()).documents
            assert info.pinned and info.expires is not None
            made.obey(ListDocuments(3, 7))
            assert [each.id for each in (await answers.next()).documents] == ["d"]
            made.obey(ListDocuments(4, 8, "d"))
            assert not (await answers.next()).found
            made.obey(DeleteDocument(5, 7, "d"))
            assert (await answers.next()).found
            made.obey(DeleteDocument(6, 7, "d"))
            reply = await answers.next()
            assert (reply.order, reply.found) == (6, False)

    run(main())


def test_what_cannot_be_done_is_answered_with_the_error() -> None:
    async def main() -> None:
        async with orders() as (made, answers, _):
            made.obey(CreateDocument(1, 7, "not an id", "text"))
            failure = (await answers.next()).failure
            assert failure is not None and isinstance(failure.error(), InvalidRequestError)

    run(main())


def test_a_cancelled_order_is_answered_and_gone() -> None:
    async def main() -> None:
        async with orders() as (made, answers, served):
            made.obey(CreateDocument(9, 7, "d", "Nora lives in Bergen."))
            made.obey(CancelOrder(9))
            made.obey(CancelOrder(10))
            failure = (await answers.next()).failure
            assert failure is not None and failure.kind == "closed"
            assert served.list_documents(7) == []
            made.obey(Drain(11, 5.0))
            assert (await answers.next()) == Reply(11, True)
            assert served.draining

    run(main())


def test_orders_beyond_the_limit_are_refused_at_once() -> None:
    async def main() -> None:
        async with orders() as (made, answers, _):
            for n in range(ORDERS_MAX + 1):
                made.obey(ListDocuments(n, 7))
            reply = await answers.next()
            assert reply.order == ORDERS_MAX and reply.failure is not None
            assert isinstance(reply.failure.error(), CapacityError)

    run(main())
