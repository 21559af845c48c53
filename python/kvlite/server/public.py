"""Documents that the operator publishes at start, for every tenant to use and none to change.

Owns the file of --public-documents: read and checked before the model loads, computed before the server is ready.
Called by __main__.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvlite.config import EngineConfig
from kvlite.errors import CapacityError, ConfigError, InvalidRequestError
from kvlite.progress import Bar
from kvlite.reuse_types import Document
from kvlite.server.reuse_fields import parse_public_document

if TYPE_CHECKING:
    from kvlite.server.serving import ServingEngine

FIELD = "public_documents"
AT_ONCE = 8
"""Documents that are computed beside each other, so that a step has enough rows."""


def read_public_documents(config: EngineConfig) -> list[Document]:
    """The documents of the file, one JSON object a line, blank lines skipped. Raises ConfigError with the line."""
    if config.public_documents is None:
        return []
    path = Path(config.public_documents)
    documents: list[Document] = []
    ids: set[str | None] = set()
    try:
        with path.open("rb") as lines:
            while line := lines.readline(config.max_body_bytes + 1):
                number = len(documents) + 1
                if not line.strip():
                    continue
                if len(line) > config.max_body_bytes:
                    raise ConfigError(FIELD, f"{path}: document {number} is larger than {config.max_body_bytes} bytes")
                document = parse_public_document(line)
                if document.id in ids:
                    raise ConfigError(FIELD, f"{path}: document {number}: id {document.id!r} appears twice")
                ids.add(document.id)
                documents.append(document)
                if len(documents) > config.max_stored_documents:
                    raise ConfigError(
                        FIELD, f"{path}: more than {config.max_stored_documents} documents: raise max_stored_documents"
                    )
    except OSError as error:
        raise ConfigError(FIELD, f"{path} cannot be read: {error.strerror}") from None
    except InvalidRequestError as error:
        raise ConfigError(FIELD, f"{path}: document {len(documents) + 1}: {error}") from None
    return documents


async def publish(engine: ServingEngine, documents: Sequence[Document]) -> None:
    """Stores and computes every document. Raises ConfigError for one that cannot be kept."""
    waiting = iter(documents)
    num_done = 0
    with Bar("public documents", unit="documents") as bar:

        async def work() -> None:
            nonlocal num_done
            for document in waiting:
                try:
                    await engine.create_document(document, public=True)
                except (InvalidRequestError, CapacityError) as error:
                    raise ConfigError(FIELD, f"document {document.id!r} cannot be kept: {error}") from None
                num_done += 1
                bar.update(num_done, len(documents))

        workers = [asyncio.create_task(work()) for _ in range(min(AT_ONCE, len(documents)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
