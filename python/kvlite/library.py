"""`Library`: stored documents and their segments, kept in step.

Owns what happens to a segment when its document is put, pinned, deleted or over: a segment lives as long as a document
of its tenant needs it, requests that use it keep it until they are done. Knows neither HTTP nor threads; the making of
a segment is a request, which the caller runs. Called by engine.py and async_engine.py, in any thread.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kvlite import _core
from kvlite.documents import (
    DocumentInfo,
    DocumentState,
    DocumentStore,
    StoredDocument,
    check_new,
    check_ttl,
    new_id,
)
from kvlite.errors import CapacityError, EngineError, InvalidRequestError
from kvlite.inflight import NO_ROOM
from kvlite.request import RequestLimits, ValidatedRequest, validate_segment
from kvlite.reuse_types import Document, Segment
from kvlite.tokenizer import Tokenizer
from kvlite.types import Delta, FinishReason, RequestOptions

KEEP = -1.0
"""As a ttl: leave the time as it is."""


class Library:
    """Over one core and one store."""

    def __init__(self, core: _core.Core, store: DocumentStore, tokenizer: Tokenizer, limits: RequestLimits) -> None:
        self._core = core
        self._store = store
        self._tokenizer = tokenizer
        self._limits = limits

    def prepare(
        self, document: Document, *, tenant: int = 0, pinned: bool = False, ttl_s: float | None = None
    ) -> tuple[StoredDocument, ValidatedRequest]:
        """A document to be put, and the request that makes its segment. Raises InvalidRequestError."""
        check_new(document, ttl_s)
        assert document.text is not None, "it was checked"
        ids = self._tokenizer.document_ids(document)
        self._check_length(ids)
        now = self._store.now
        expires = None if ttl_s is None else now + ttl_s
        stored = StoredDocument(
            document.id or new_id(), document.text, document.title, tenant, _packed(ids), now, expires, pinned
        )
        return stored, self.order(stored)

    def prepare_segment(self, segment: Segment, *, tenant: int = 0, pinned: bool = False) -> ValidatedRequest:
        """The request that makes a part of a prompt ahead of it. Raises InvalidRequestError."""
        content = segment.content
        ids = self._tokenizer.encode(content, add_special_tokens=False) if isinstance(content, str) else list(content)
        self._check_length(ids)
        return validate_segment(self._limits, ids, RequestOptions(tenant=tenant), pinned=pinned)

    def order(self, stored: StoredDocument) -> ValidatedRequest:
        """The request that makes its segment."""
        options = RequestOptions(tenant=stored.tenant)
        return validate_segment(self._limits, stored.token_ids, options, pinned=stored.pinned)

    def _check_length(self, ids: list[int]) -> None:
        config, limits = self._limits.config, self._limits
        room = int(limits.pool_tokens * config.segment_cache_ratio) // config.block_size * config.block_size
        if not ids:
            raise InvalidRequestError("document.text", "has no tokens")
        if len(ids) >= limits.max_model_len:
            raise InvalidRequestError(
                "document.text", f"has {len(ids)} tokens, at most {limits.max_model_len - 1} fit the model"
            )
        if len(ids) > room:
            raise InvalidRequestError(
                "document.text",
                f"has {len(ids)} tokens, the store of segments holds {room}: raise kv_cache_bytes or "
                f"segment_cache_ratio={config.segment_cache_ratio:g}",
            )

    def put(self, stored: StoredDocument) -> DocumentInfo:
        """Keeps a document whose segment was made; what it replaces loses its own. Raises CapacityError."""
        old = self._store.get(stored.tenant, stored.id)
        if old is not None and old.tenant == stored.tenant:
            stored = replace(stored, created=old.created)
        replaced = self._store.put(stored)
        if replaced is not None and replaced.ids != stored.ids:
            self._release(replaced)
        return self.info(stored)

    def info(self, stored: StoredDocument) -> DocumentInfo:
        """What a caller may know of it."""
        return stored.info(self.state(stored.tenant, stored.token_ids))

    def state(self, tenant: int, ids: NDArray[np.int32]) -> DocumentState:
        """Where the KV of a segment is that `tenant` may use."""
        found = self._core.segment(tenant, ids)
        if found is None:
            return DocumentState.EVICTED
        return DocumentState.READY if found["state"] == "ready" else DocumentState.MAKING

    def get(self, tenant: int, id: str) -> DocumentInfo | None:
        """The tenant's own document of that id, else the public one."""
        stored = self._store.get(tenant, id)
        return None if stored is None else self.info(stored)

    def list(self, tenant: int) -> list[DocumentInfo]:
        """The tenant's own and the public ones, oldest first."""
        return [self.info(stored) for stored in self._store.list(tenant)]

    def change(self, tenant: int, id: str, pinned: bool | None, ttl_s: float | None) -> StoredDocument | None:
        """The document with its new pin and time, already kept; None when `tenant` owns no such document.

        Raises InvalidRequestError, or CapacityError when pins would leave too little for requests.
        """
        stored = self._store.get(tenant, id)
        if stored is None or stored.tenant != tenant:
            return None
        if ttl_s != KEEP:
            check_ttl(ttl_s)
            stored = replace(stored, expires=None if ttl_s is None else self._store.now + ttl_s)
        if pinned is not None and pinned != stored.pinned:
            stored = replace(stored, pinned=pinned)
            if pinned or not self._store.is_pinned(stored):
                self._pin(stored)
        self._store.put(stored)
        return stored

    def pin(self, document: Document, tenant: int, pinned: bool) -> bool:
        """Pins the segment of `document`, stored or not. False when there is none. Raises CapacityError."""
        if document.id is not None and self.change(tenant, document.id, pinned, KEEP) is not None:
            return self._core.segment(tenant, self._ids_of(document, tenant)) is not None
        return self._pin_ids(tenant, self._ids_of(document, tenant), pinned)

    def drop(self, document: Document, tenant: int) -> bool:
        """Forgets `document` and its segment, stored or not. False when there was neither."""
        if document.id is not None and self.delete(tenant, document.id):
            return True
        return self._core.drop_segment(tenant, self._ids_of(document, tenant))

    def _ids_of(self, document: Document, tenant: int) -> NDArray[np.int32]:
        stored = self._store.get(tenant, document.id) if document.text is None and document.id is not None else None
        if stored is not None:
            return stored.token_ids
        return np.asarray(() if document.text is None else self._tokenizer.document_ids(document), np.int32)

    def _pin(self, stored: StoredDocument) -> None:
        self._pin_ids(stored.tenant, stored.token_ids, stored.pinned)

    def _pin_ids(self, tenant: int, ids: NDArray[np.int32], pinned: bool) -> bool:
        try:
            return self._core.pin_segment(tenant, ids, pinned)
        except _core.CapacityError as error:
            raise CapacityError(str(error)) from None

    def delete(self, tenant: int, id: str) -> bool:
        """Forgets the document that `tenant` owns, and its segment; requests that use it go on."""
        stored = self._store.delete(tenant, id)
        if stored is not None:
            self._release(stored)
        return stored is not None

    def expire(self) -> None:
        """Forgets the documents whose time is over, and their segments."""
        for stored in self._store.expire():
            self._release(stored)

    def _release(self, stored: StoredDocument) -> None:
        """A document is gone: its segment too, unless another one needs it."""
        if not self._store.is_shared(stored):
            self._core.drop_segment(stored.tenant, stored.token_ids)
        elif stored.pinned and not self._store.is_pinned(stored):
            self._pin(replace(stored, pinned=False))


def _packed(ids: list[int]) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


def check_made(last: Delta) -> None:
    """Raises unless the request that made a segment ended well."""
    if last.finish_reason is FinishReason.STOP:
        return
    reason = last.error or f"it ended with reason {last.finish_reason}"
    failed = last.finish_reason is FinishReason.ERROR and last.error != NO_ROOM
    raise (EngineError if failed else CapacityError)(f"the document could not be computed: {reason}")
