"""/v1/documents: text whose KV is computed before anybody asks about it.

Owns the routes, their JSON and who may do what: a tenant sees its own documents and the public ones, the admin alone
changes those. The store itself lives behind the engine. Attached by app.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastapi import FastAPI, Request, Response

from kvlite.config import EngineConfig
from kvlite.errors import InvalidRequestError
from kvlite.server.failures import HttpError
from kvlite.server.fields import shown
from kvlite.server.gate import Caller, read_body, unless_gone
from kvlite.server.replies import json_response, refusals
from kvlite.server.reuse_fields import NewDocuments, parse_change, parse_new_documents

if TYPE_CHECKING:
    from kvlite.documents import DocumentInfo
    from kvlite.server.serving import ServingEngine

T = TypeVar("T")

PATH = "/v1/documents"
PAGE_DEFAULT = 20
PAGE_MAX = 100
Json = dict[str, Any]


class DocumentRoutes:
    """The handlers of one engine's documents."""

    def __init__(self, engine: ServingEngine, config: EngineConfig) -> None:
        self._engine = engine
        self._config = config

    def attach(self, app: FastAPI) -> None:
        """Adds the routes, each with the statuses that it may answer."""
        one = PATH + "/{document_id:path}"
        bad, denied, missing, body, busy = (400,), (401, 403), (404,), (408, 413), (429, 500, 503)
        for path, handler, method, statuses in (
            (PATH, self.create, "POST", (*bad, *denied, *body, *busy, 504)),
            (PATH, self.list, "GET", (*bad, 401)),
            (one, self.get, "GET", (401, *missing)),
            (one, self.update, "POST", (*bad, *denied, *missing, *body, *busy)),
            (one, self.update, "PATCH", (*bad, *denied, *missing, *body, *busy)),
            (one, self.delete, "DELETE", (*denied, *missing, *busy)),
        ):
            name = f"{method.lower()}_{handler.__name__}_document"
            app.add_api_route(path, handler, methods=[method], responses=refusals(*statuses), operation_id=name)

    async def create(self, request: Request) -> Response:
        """POST /v1/documents: answers when every document is ready; a client that leaves ends what is still made."""
        caller: Caller = request.state.caller
        raw = await read_body(request.receive, self._config.max_body_bytes)
        body = await asyncio.to_thread(parse_new_documents, raw, self._config)
        if body.retention.public and not caller.is_admin:
            raise _needs_admin("public documents are published")
        infos = await unless_gone(request.receive, self._create_all(caller, body))
        if not body.listed:
            return json_response(_shape(infos[0]))
        return json_response({"object": "list", "data": [_shape(info) for info in infos]})

    async def _create_all(self, caller: Caller, body: NewDocuments) -> Sequence[DocumentInfo]:
        keep = body.retention
        making = [
            self._engine.create_document(
                document, tenant=caller.tenant, pinned=keep.pinned, ttl_s=keep.ttl_s, public=keep.public
            )
            for document in body.documents
        ]
        return await _all(making, body.listed)

    async def list(self, request: Request) -> Response:
        """GET /v1/documents: own and public ones, oldest first; `limit` and `after` (an id) page through them."""
        caller: Caller = request.state.caller
        limit = _page_size(request.query_params.get("limit"))
        infos = await _now(self._engine.list_documents(caller.tenant))
        after = request.query_params.get("after")
        if after is not None:
            at = next((n for n, info in enumerate(infos) if info.id == after), None)
            if at is None:
                raise _unknown(after)
            infos = infos[at + 1 :]
        page = infos[:limit]
        return json_response(
            {
                "object": "list",
                "data": [_shape(info) for info in page],
                "first_id": page[0].id if page else None,
                "last_id": page[-1].id if page else None,
                "has_more": len(infos) > limit,
            }
        )

    async def get(self, request: Request, document_id: str) -> Response:
        """GET /v1/documents/{id}."""
        return json_response(_shape(await self._found(request.state.caller, document_id)))

    async def update(self, request: Request, document_id: str) -> Response:
        """POST or PATCH /v1/documents/{id}: pin, unpin, set or clear the time to live."""
        caller: Caller = request.state.caller
        raw = await read_body(request.receive, self._config.max_body_bytes)
        change = await asyncio.to_thread(parse_change, raw)
        known = await self._changeable(caller, document_id)
        life = {"ttl_s": change.ttl_s} if change.changes_ttl else {}
        changed = await self._engine.update_document(
            caller.tenant, document_id, public=known.public, pinned=change.pinned, **life
        )
        if changed is None:
            raise _unknown(document_id)
        return json_response(_shape(changed))

    async def delete(self, request: Request, document_id: str) -> Response:
        """DELETE /v1/documents/{id}: not found from now on; requests that use it now go on."""
        caller: Caller = request.state.caller
        known = await self._changeable(caller, document_id)
        if not await self._engine.delete_document(caller.tenant, document_id, public=known.public):
            raise _unknown(document_id)
        return json_response({"id": document_id, "object": "document.deleted", "deleted": True})

    async def _found(self, caller: Caller, document_id: str) -> DocumentInfo:
        info = await _now(self._engine.get_document(caller.tenant, document_id))
        if info is None:
            raise _unknown(document_id)
        return info

    async def _changeable(self, caller: Caller, document_id: str) -> DocumentInfo:
        info = await self._found(caller, document_id)
        if info.public and not caller.is_admin:
            raise _needs_admin(f"document {shown(document_id)} is public and is changed")
        return info


async def _now(value: T | Awaitable[T]) -> T:
    """What an engine knows at once, a fleet asks its engines for."""
    return await cast("Awaitable[T]", value) if isinstance(value, Awaitable) else value


async def _all(making: Sequence[Coroutine[Any, Any, T]], listed: bool) -> Sequence[T]:
    """The results in order. The first failure ends the others, and is raised as a fault of its place in the body."""
    tasks = [asyncio.create_task(work) for work in making]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for number, task in enumerate(tasks):
            error = task.exception() if task.done() else None
            if isinstance(error, InvalidRequestError):
                place = f"documents[{number}]." if listed else ""
                raise InvalidRequestError(place + error.param.removeprefix("document."), error.message) from None
            if error is not None:
                raise error
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _page_size(text: str | None) -> int:
    if text is None:
        return PAGE_DEFAULT
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= PAGE_MAX):
        raise InvalidRequestError("limit", f"{shown(text)} is not allowed: must be an integer between 1 and {PAGE_MAX}")
    return int(text)


def _shape(info: DocumentInfo) -> Json:
    """One document as JSON; its text is not sent back."""
    return {
        "id": info.id,
        "object": "document",
        "title": info.title,
        "tokens": info.tokens,
        "state": info.state,
        "pinned": info.pinned,
        "public": info.public,
        "created_at": int(info.created),
        "expires_at": None if info.expires is None else int(info.expires),
    }


def _unknown(document_id: str) -> HttpError:
    return HttpError(404, "document_not_found", f"document {shown(document_id)} does not exist", param="id")


def _needs_admin(what: str) -> HttpError:
    return HttpError(403, "admin_key_required", f"{what} with the server's admin key only", param="public")
