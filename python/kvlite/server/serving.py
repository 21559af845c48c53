"""`ServingEngine`: what the server needs of an engine. `AsyncEngine` is one; so is `FleetEngine`, over many processes.

Owns the protocol alone. Read by the server's modules.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable
from typing import TYPE_CHECKING, Protocol

from kvlite.library import KEEP
from kvlite.request import ValidatedRequest
from kvlite.reuse_types import Document
from kvlite.server.calls import TextSide
from kvlite.types import Delta, EngineStats

if TYPE_CHECKING:
    from kvlite.documents import DocumentInfo


class ServingEngine(TextSide, Protocol):
    """Docstrings are those of AsyncEngine."""

    @property
    def healthy(self) -> bool:
        """Whether it can still answer."""
        ...

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        ...

    def stats(self) -> EngineStats:
        """Counters and gauges of now."""
        ...

    def stream_validated(self, request: ValidatedRequest) -> AsyncGenerator[Delta]:
        """Deltas as they come; closing the iterator aborts the request."""
        ...

    async def create_document(
        self,
        document: Document,
        *,
        tenant: int = 0,
        public: bool = False,
        pinned: bool = False,
        ttl_s: float | None = None,
    ) -> DocumentInfo:
        """Keeps a document and computes its KV."""
        ...

    def get_document(self, tenant: int, id: str) -> DocumentInfo | Awaitable[DocumentInfo | None] | None:
        """The tenant's own document of that id, else the public one."""
        ...

    def list_documents(self, tenant: int) -> list[DocumentInfo] | Awaitable[list[DocumentInfo]]:
        """The tenant's own and the public ones, oldest first."""
        ...

    async def update_document(
        self, tenant: int, id: str, *, public: bool = False, pinned: bool | None = None, ttl_s: float | None = KEEP
    ) -> DocumentInfo | None:
        """Pins, unpins, sets or clears the time to live."""
        ...

    async def delete_document(self, tenant: int, id: str, *, public: bool = False) -> bool:
        """Forgets a document and its KV."""
        ...

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for the running ones."""
        ...

    def close(self) -> None:
        """Ends every request; blocks, so it is called off the event loop."""
        ...
