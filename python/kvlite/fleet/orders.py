"""`Orders`: what the front-end asks of an engine beside requests: documents, and draining. Each gets one `Reply`.

Owns one task per order, so that a document that takes long holds up nothing, and `CancelOrder` can end it. Called by
worker.py.
"""

from __future__ import annotations

import asyncio

from kvlite.async_engine import AsyncEngine
from kvlite.documents import DocumentInfo
from kvlite.errors import CapacityError, EngineClosedError, KvliteError
from kvlite.fleet.messages import (
    CancelOrder,
    CreateDocument,
    DeleteDocument,
    Drain,
    Failure,
    ListDocuments,
    Reply,
    UpdateDocument,
)
from kvlite.fleet.uplink import Uplink
from kvlite.library import KEEP
from kvlite.reuse_types import Document

ORDERS_MAX = 1024
"""At once."""

Order = CreateDocument | UpdateDocument | DeleteDocument | ListDocuments | Drain


class Orders:
    """The orders under way, by number."""

    def __init__(self, engine: AsyncEngine, uplink: Uplink) -> None:
        self._engine = engine
        self._uplink = uplink
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def obey(self, message: Order | CancelOrder) -> None:
        """Begins an order, or ends one."""
        if isinstance(message, CancelOrder):
            task = self._tasks.get(message.order)
            if task is not None:
                task.cancel()
            return
        if len(self._tasks) >= ORDERS_MAX:
            error = CapacityError(f"{ORDERS_MAX} orders are under way")
            self._uplink.post(Reply(message.order, False, failure=Failure.of(error)))
            return
        self._tasks[message.order] = asyncio.ensure_future(self._answer(message))

    def close(self) -> None:
        """Ends every order."""
        for task in self._tasks.values():
            task.cancel()

    async def _answer(self, message: Order) -> None:
        try:
            reply = await self._carry_out(message)
        except KvliteError as error:
            reply = Reply(message.order, False, failure=Failure.of(error))
        except asyncio.CancelledError:
            reply = Reply(message.order, False, failure=Failure.of(EngineClosedError("the order was cancelled")))
        self._uplink.post(reply)
        del self._tasks[message.order]

    async def _carry_out(self, message: Order) -> Reply:
        engine, order = self._engine, message.order
        match message:
            case Drain():
                return Reply(order, await engine.drain(message.timeout_s))
            case CreateDocument():
                document = Document(message.text, message.id, message.title)
                return _one(
                    order,
                    await engine.create_document(
                        document,
                        tenant=message.tenant,
                        public=message.public,
                        pinned=message.pinned,
                        ttl_s=message.ttl_s,
                    ),
                )
            case UpdateDocument():
                ttl_s = KEEP if message.keep_ttl else message.ttl_s
                info = await engine.update_document(
                    message.tenant, message.id, public=message.public, pinned=message.pinned, ttl_s=ttl_s
                )
                return _one(order, info)
            case DeleteDocument():
                found = await engine.delete_document(message.tenant, message.id, public=message.public)
                return Reply(order, found)
            case ListDocuments():
                if message.id is None:
                    return Reply(order, documents=engine.list_documents(message.tenant))
                return _one(order, engine.get_document(message.tenant, message.id))


def _one(order: int, info: DocumentInfo | None) -> Reply:
    return Reply(order, info is not None, [] if info is None else [info])
