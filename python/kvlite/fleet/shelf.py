"""Documents of a fleet: their texts are here, their KV is on every engine.

Owns the store that prompts are made from, so that a document's id means the same text wherever its request runs. What
the engines keep is a cache: an engine that comes back gets every document again, and one that has lost a segment makes
it at the next use. One event loop. FleetEngine is built on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvlite.documents import (
    PUBLIC_TENANT,
    DocumentInfo,
    DocumentState,
    DocumentStore,
    StoredDocument,
    check_new,
    check_ttl,
    new_id,
)
from kvlite.errors import EngineClosedError, InvalidRequestError, KvliteError
from kvlite.fleet.members import Member
from kvlite.fleet.messages import CreateDocument, DeleteDocument, FromOwner, ListDocuments, Reply, UpdateDocument
from kvlite.fleet.wire import OversizedError
from kvlite.library import KEEP
from kvlite.reuse_types import Document
from kvlite.tokenizer import Tokenizer

RESTORED_AT_ONCE = 8
_WORST = (DocumentState.EVICTED, DocumentState.MAKING, DocumentState.READY)

log = logging.getLogger("kvlite.fleet")


class FleetDocuments:
    """The part of FleetEngine that keeps documents. `members` is the living engines by number, and changes."""

    def __init__(self, members: Mapping[int, Member], tokenizer: Tokenizer, max_documents: int) -> None:
        self._members = members
        self._tokenizer = tokenizer
        self._store = DocumentStore(max_documents)
        self._restoring: set[asyncio.Task[None]] = set()

    def _check_accepting(self) -> None:
        """Raises when nothing new may begin."""
        raise NotImplementedError

    async def create_document(
        self,
        document: Document,
        *,
        tenant: int = 0,
        public: bool = False,
        pinned: bool = False,
        ttl_s: float | None = None,
    ) -> DocumentInfo:
        """Computes a document's KV on every engine and keeps the document by its id; returns when it is ready.

        One of the same id is replaced. Cancelling the call ends it. Raises InvalidRequestError (document.text,
        document.id, ttl_s), CapacityError when the store or one of the pools has no room.
        """
        self._check_accepting()
        check_new(document, ttl_s)
        assert document.text is not None, "it was checked"
        owner, id, now = PUBLIC_TENANT if public else tenant, document.id or new_id(), self._store.now
        ids = await asyncio.to_thread(self._tokenizer.document_ids, document)
        packed, expires = np.asarray(ids, np.int32).tobytes(), None if ttl_s is None else now + ttl_s
        stored = StoredDocument(id, document.text, document.title, owner, packed, now, expires, pinned)
        try:
            await self._everywhere(lambda order: self._creation(order, stored))
            old = self._store.get(owner, id)
            if old is not None and old.tenant == owner:
                stored = replace(stored, created=old.created)
            self._store.put(stored)
        except OversizedError as error:
            raise InvalidRequestError("document.text", f"is too large for a link between processes: {error}") from None
        except KvliteError:
            self._forget(stored)
            raise
        return stored.info(DocumentState.READY)

    async def get_document(self, tenant: int, id: str) -> DocumentInfo | None:
        """The tenant's own document of that id, else the public one."""
        stored = self._store.get(tenant, id)
        if stored is None:
            return None
        states = await self._states(tenant, id)
        return stored.info(states.get((id, _is_public(stored)), DocumentState.EVICTED))

    async def list_documents(self, tenant: int) -> list[DocumentInfo]:
        """The tenant's own and the public ones, oldest first."""
        states = await self._states(tenant, None)
        return [
            stored.info(states.get((stored.id, _is_public(stored)), DocumentState.EVICTED))
            for stored in self._store.list(tenant)
        ]

    async def update_document(
        self, tenant: int, id: str, *, public: bool = False, pinned: bool | None = None, ttl_s: float | None = KEEP
    ) -> DocumentInfo | None:
        """Pins, unpins, sets or clears the time to live; None when there is no such document.

        One that is pinned while its KV is not there is computed first. Raises InvalidRequestError or CapacityError.
        """
        owner = PUBLIC_TENANT if public else tenant
        keep = ttl_s == KEEP
        if not keep:
            check_ttl(ttl_s)
        stored = self._store.get(owner, id)
        if stored is None or stored.tenant != owner:
            return None
        own_ttl = None if keep else ttl_s
        await self._everywhere(lambda order: UpdateDocument(order, tenant, id, public, pinned, keep, own_ttl))
        if not keep:
            stored = replace(stored, expires=None if ttl_s is None else self._store.now + ttl_s)
        if pinned is not None:
            stored = replace(stored, pinned=pinned)
        self._store.put(stored)
        return await self.get_document(tenant, id)

    async def delete_document(self, tenant: int, id: str, *, public: bool = False) -> bool:
        """Forgets a document and its KV; requests that use it go on. False when there is no such document."""
        stored = self._store.delete(PUBLIC_TENANT if public else tenant, id)
        if stored is not None:
            self._forget(stored)
        return stored is not None

    def _restore(self, member: Member) -> None:
        """An engine that came back learns every document, a few at a time; requests need not wait for it."""
        waiting = iter(self._store.all())

        async def work() -> None:
            for stored in waiting:
                try:
                    await member.ask(lambda order, stored=stored: self._creation(order, stored))
                except EngineClosedError:
                    return
                except KvliteError as error:
                    log.warning("document %s is not kept on engine %d: %s", stored.id, member.id, error)

        for _ in range(min(RESTORED_AT_ONCE, len(self._store))):
            self._run(work())

    def _forget(self, stored: StoredDocument) -> None:
        """Tells every engine; nobody waits for the answers."""

        async def ask() -> None:
            try:
                await self._everywhere(
                    lambda order: DeleteDocument(order, _tenant(stored), stored.id, _is_public(stored))
                )
            except KvliteError as error:
                log.warning("document %s may be left on an engine: %s", stored.id, error)

        self._run(ask())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._restoring.add(task)
        task.add_done_callback(self._restoring.discard)

    def _creation(self, order: int, stored: StoredDocument) -> CreateDocument:
        left = None if stored.expires is None else max(stored.expires - self._store.now, 0.001)
        return CreateDocument(
            order, _tenant(stored), stored.id, stored.text, stored.title, _is_public(stored), stored.pinned, left
        )

    async def _states(self, tenant: int, id: str | None) -> dict[tuple[str, bool], DocumentState]:
        """By (id, whether it is public): the worst state on any engine; one that an engine lacks is absent."""
        replies = await self._everywhere(lambda order: ListDocuments(order, tenant, id))
        found: dict[tuple[str, bool], list[DocumentState]] = {}
        for reply in replies:
            for info in reply.documents:
                found.setdefault((info.id, info.public), []).append(info.state)
        return {
            key: min(states, key=_WORST.index) if len(states) == len(replies) else DocumentState.EVICTED
            for key, states in found.items()
        }

    async def _everywhere(self, make: Callable[[int], FromOwner]) -> Sequence[Reply]:
        """Answers of the engines that lived on. Raises the first failure; EngineClosedError when none lives."""
        asked = list(self._members.values())
        answers = await asyncio.gather(*(member.ask(make) for member in asked), return_exceptions=True)
        replies = [answer for answer in answers if isinstance(answer, Reply)]
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, EngineClosedError):
                raise answer
        if not replies:
            raise EngineClosedError("no engine is up: one is being started")
        return replies


def _is_public(stored: StoredDocument) -> bool:
    return stored.tenant == PUBLIC_TENANT


def _tenant(stored: StoredDocument) -> int:
    """As orders name it: public documents are nobody's."""
    return 0 if _is_public(stored) else stored.tenant
