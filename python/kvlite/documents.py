"""`DocumentStore`: documents by id, per tenant and public ones; and what a caller may know of them.

Owns texts, ids, titles and times; a document that is unknown, expired or another tenant's is not there, and nothing
tells the three apart. Knows neither HTTP nor the cache: segments are the core's, and come and go without the store.
Safe in any thread. Called by library.py, the fleet's shelf, and prompts.py for documents that a request names by id.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from kvlite.checks import check_number
from kvlite.errors import CapacityError, InvalidRequestError, UnknownDocumentError
from kvlite.reuse_types import Document

PUBLIC_TENANT = (1 << 31) - 1
"""Whose documents every tenant may use; no request is its own."""
TTL_LIMIT_S = 10 * 365 * 24 * 3600.0
BYTES_LIMIT = 256 << 20
"""Of all texts together."""


class DocumentState(StrEnum):
    """Where a document's KV is."""

    READY = "ready"
    MAKING = "making"
    EVICTED = "evicted"
    """The text is kept; the KV is made again at the next use."""


@dataclass(frozen=True)
class StoredDocument:
    """One document and whose it is."""

    id: str
    text: str
    title: str | None
    tenant: int
    ids: bytes
    """Of its segment, as int32."""
    created: float
    """Unix seconds, as `expires`."""
    expires: float | None = None
    pinned: bool = False

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Of its segment."""
        return np.frombuffer(self.ids, np.int32)

    @property
    def document(self) -> Document:
        """As a request would bring it."""
        return Document(self.text, self.id, self.title)

    def info(self, state: DocumentState) -> DocumentInfo:
        """What a caller may know of it."""
        return DocumentInfo(
            id=self.id,
            title=self.title,
            tokens=len(self.token_ids),
            state=state,
            pinned=self.pinned,
            public=self.tenant == PUBLIC_TENANT,
            created=self.created,
            expires=self.expires,
        )


@dataclass(frozen=True)
class DocumentInfo:
    """What a caller may know of a document."""

    id: str
    title: str | None
    tokens: int
    state: DocumentState
    pinned: bool
    public: bool
    created: float
    """Unix seconds, as `expires`."""
    expires: float | None


class DocumentStore:
    """At most `max_documents` of them and BYTES_LIMIT over all tenants; one tenant gets half of either."""

    def __init__(self, max_documents: int, clock: Callable[[], float] = time.time) -> None:
        self._max_documents = max_documents
        self._clock = clock
        self._lock = threading.Lock()
        self._documents: dict[tuple[int, str], StoredDocument] = {}
        self._held: dict[int, tuple[int, int]] = {}
        """(documents, bytes) of every tenant that has any."""

    def __len__(self) -> int:
        return len(self._documents)

    @property
    def now(self) -> float:
        """Unix seconds."""
        return self._clock()

    def put(self, document: StoredDocument) -> StoredDocument | None:
        """Keeps it; returns the one of the same tenant and id that it replaces. Raises CapacityError when full."""
        with self._lock:
            old = self._documents.get((document.tenant, document.id))
            count, size = int(old is None), _size(document) - (0 if old is None else _size(old))
            share = 1 if document.tenant == PUBLIC_TENANT else 2
            everybody = [sum(each) for each in zip((0, 0), *self._held.values(), strict=True)]
            held = self._held.get(document.tenant, (0, 0))
            for taken, part, whole in ((everybody, 1, "all tenants"), (held, share, "one tenant")):
                most = max(self._max_documents // part, min(self._max_documents, 1))
                if count and taken[0] >= most:
                    raise CapacityError(f"{most} documents are kept for {whole} at most: delete one first")
                if size > 0 and taken[1] + size > BYTES_LIMIT // part:
                    raise CapacityError(f"{BYTES_LIMIT // part} bytes of documents are kept for {whole} at most")
            self._count(document.tenant, count, size)
            self._documents[document.tenant, document.id] = document
            return old

    def _count(self, tenant: int, count: int, size: int) -> None:
        held = self._held.pop(tenant, (0, 0))
        if held[0] + count:
            self._held[tenant] = (held[0] + count, held[1] + size)

    def get(self, tenant: int, id: str) -> StoredDocument | None:
        """The tenant's own document of that id, else the public one."""
        with self._lock:
            for owner in (tenant, PUBLIC_TENANT):
                found = self._documents.get((owner, id))
                if found is not None and not self._is_over(found):
                    return found
            return None

    def list(self, tenant: int) -> list[StoredDocument]:
        """The tenant's own and the public ones, oldest first."""
        with self._lock:
            mine = [found for (owner, _), found in self._documents.items() if owner in (tenant, PUBLIC_TENANT)]
        return sorted((found for found in mine if not self._is_over(found)), key=lambda found: found.created)

    def all(self) -> list[StoredDocument]:
        """Those of every tenant, oldest first."""
        with self._lock:
            every = list(self._documents.values())
        return sorted((found for found in every if not self._is_over(found)), key=lambda found: found.created)

    def delete(self, tenant: int, id: str) -> StoredDocument | None:
        """Forgets the document that `tenant` owns; public ones are PUBLIC_TENANT's."""
        with self._lock:
            found = self._documents.pop((tenant, id), None)
            if found is not None:
                self._count(tenant, -1, -_size(found))
            return None if found is None or self._is_over(found) else found

    def expire(self) -> list[StoredDocument]:
        """Forgets those whose time is over, and returns them. O(documents)."""
        with self._lock:
            over = [found for found in self._documents.values() if self._is_over(found)]
            for found in over:
                del self._documents[found.tenant, found.id]
                self._count(found.tenant, -1, -_size(found))
            return over

    def is_shared(self, document: StoredDocument) -> bool:
        """Whether another document of the same tenant is the same segment. O(documents)."""
        return self._holds(document, pinned=False)

    def is_pinned(self, document: StoredDocument) -> bool:
        """Whether another document of the same tenant is the same segment and pinned. O(documents)."""
        return self._holds(document, pinned=True)

    def _holds(self, document: StoredDocument, *, pinned: bool) -> bool:
        with self._lock:
            return any(
                found.tenant == document.tenant
                and found.id != document.id
                and found.ids == document.ids
                and (found.pinned or not pinned)
                for found in self._documents.values()
            )

    def _is_over(self, document: StoredDocument) -> bool:
        return document.expires is not None and document.expires <= self._clock()


def check_new(document: Document, ttl_s: float | None) -> None:
    """Refuses a document that cannot be kept. Raises InvalidRequestError (document.text, ttl_s)."""
    if document.text is None:
        raise InvalidRequestError("document.text", "is missing: must be text of at least one character")
    check_ttl(ttl_s)


def check_ttl(ttl_s: float | None) -> None:
    """Raises InvalidRequestError (ttl_s); None is for ever."""
    check_number("ttl_s", ttl_s, 0.001, TTL_LIMIT_S, optional=True)


def resolve(store: DocumentStore, documents: Sequence[Document | str], tenant: int, limit: int) -> list[Document]:
    """Documents of a request, every one with its text; a plain text is a document.

    Raises InvalidRequestError for more than `limit` and for an id that occurs twice, UnknownDocumentError for one that
    `tenant` cannot see.
    """
    if isinstance(documents, str) or not isinstance(documents, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidRequestError("documents", "must be a list of documents")
    if len(documents) > limit:
        raise InvalidRequestError("documents", f"{len(documents)} are too many: at most {limit} per request")
    found: list[Document] = []
    seen: set[str] = set()
    for n, given in enumerate(documents):
        document = Document(given) if isinstance(given, str) else given
        if not isinstance(document, Document):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError(f"documents[{n}]", "must be a kvlite.Document or a text")
        if document.id is not None and document.id in seen:
            raise InvalidRequestError(f"documents[{n}].id", f"{document.id!r} occurs twice")
        if document.id is not None:
            seen.add(document.id)
        found.append(document if document.text is not None else _stored(store, document, n, tenant))
    return found


def _stored(store: DocumentStore, document: Document, n: int, tenant: int) -> Document:
    assert document.id is not None, "a document has a text or an id"
    stored = store.get(tenant, document.id)
    if stored is None:
        raise UnknownDocumentError(f"documents[{n}].id", document.id)
    return stored.document if document.title is None else replace(stored.document, title=document.title)


def new_id() -> str:
    """An id that nobody can guess."""
    return f"doc_{secrets.token_hex(8)}"


def _size(document: StoredDocument) -> int:
    return len(document.text) * 4 + len(document.ids)
