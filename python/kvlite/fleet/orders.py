"""`Orders`: what the front-end asks of an engine beside requests: documents, and draining. Each gets one `Reply`.

Owns one task per order, so that a document that takes long holds up nothing, and `CancelOrder` can end it. Called by
worker.py.
"""

from __future__ import annotations

import asyncio
import logging

from kvlite.async_engine import AsyncEngine
from kvlite.documents import DocumentInfo
from kvlite.errors import CapacityError, EngineClosedError, EngineError, KvliteError
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

log = logging.getLogger("kvlite.fleet")

Order = CreateDocument | UpdateDocument | DeleteDocument | ListDocuments | Drain


class Orders:
    """The orders under way, by number."""

    def __init__(self, engine: AsyncEngine, uplink: Uplink) -> None:
        self._engine = engine
        self._uplink = uplink
        self._tasks: dict[int, asyncio.Task[Reply]] = {}

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
        task = self._tasks[message.order] = asyncio.ensure_future(self._carry_out(message))
        task.add_done_callback(lambda done: self._answer(message.order, done))

    def close(self) -> None:
        """Ends every order."""
        for task in self._tasks.values():
            task.cancel()

    def _answer(self, order: int, done: asyncio.Task[Reply]) -> None:
        del self._tasks[order]
        error = EngineClosedError("the order was cancelled") if done.cancelled() else done.exception()
        if error is None:
            self._uplink.post(done.result())
            return
        if not isinstance(error, KvliteError):
            log.error("order %d failed", order, exc_info=error)
            error = EngineError(f"the order failed: {error!r}")
        self._uplink.post(Reply(order, False, failure=Failure.of(error)))

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
