"""The routes of text: bytes in, checked call, engine, answer out.

Owns `create_app` and the walk of one request; calls.py parses and tokenises in a worker thread, off the event loop.
Knows the engine as `ServingEngine` and no deeper. A client that goes away aborts its request in every phase. Called by
__main__.py and by tests.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from kvlite.config import EngineConfig
from kvlite.errors import InvalidRequestError, KvliteError
from kvlite.server.calls import Calls
from kvlite.server.documents import DocumentRoutes
from kvlite.server.failures import HttpError, error_body, headers_of, status_of
from kvlite.server.fleet import FleetMeter, FleetRoutes
from kvlite.server.gate import Caller, ClientGone, Gate, Keys, read_body, unless_gone
from kvlite.server.metrics import Meter
from kvlite.server.protocol import UnknownModelError
from kvlite.server.replies import EventStream, json_response, refusals
from kvlite.server.serving import ServingEngine
from kvlite.server.stream import event_stream, whole_answer
from kvlite.server.wire import Call, Prompt, Wire
from kvlite.types import Delta

if TYPE_CHECKING:
    from kvlite.fleet.frontend import FleetEngine

CLIENT_GONE_STATUS = 499
"""nginx's number for an answer that nobody waits for; seen in the access log only."""


def create_app(engine: ServingEngine, config: EngineConfig, model: str, *, fleet: FleetEngine | None = None) -> ASGIApp:
    """The application of one engine, or of a `fleet`, which is the engine then. `model` is its name in the API."""
    routes = _Routes(engine, config, model, fleet)
    app = FastAPI(title="kvlite", version=version(), docs_url=None, redoc_url=None)
    answers = (400, 401, 404, 408, 413, 429, 500, 503, 504)
    for path, handler, method, statuses in (
        ("/v1/chat/completions", routes.chat, "POST", answers),
        ("/v1/completions", routes.complete, "POST", answers),
        ("/v1/models", routes.models, "GET", (401,)),
        ("/v1/models/{model_id:path}", routes.model, "GET", (401, 404)),
        ("/health", routes.health, "GET", (503,)),
        ("/ready", routes.ready, "GET", (401, 503)),
        ("/version", routes.version, "GET", (401,)),
        ("/metrics", routes.metrics, "GET", (401,)),
    ):
        app.add_api_route(path, handler, methods=[method], responses=refusals(*statuses))
    DocumentRoutes(engine, config).attach(app)
    if fleet is not None:
        FleetRoutes(fleet, config).attach(app)
    for kind in (KvliteError, HTTPException, RequestValidationError, ClientGone, Exception):
        app.add_exception_handler(kind, _refuse)
    return Gate(app, Keys(config.api_key, config.admin_key))


def version() -> str:
    """Of the installed package."""
    return importlib.metadata.version("kvlite")


async def _refuse(request: Request, error: Exception) -> Response:
    """Every error in OpenAI's shape."""
    if isinstance(error, ClientGone):
        return Response(status_code=CLIENT_GONE_STATUS)
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path}: {error.detail}"
        error = HttpError(error.status_code, code, message, dict(error.headers or {}))
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        error = InvalidRequestError(".".join(map(str, first["loc"])), str(first["msg"]))
    return json_response(error_body(error), status_of(error), headers_of(error))


class _Routes:
    """The handlers of one engine."""

    def __init__(self, engine: ServingEngine, config: EngineConfig, model: str, fleet: FleetEngine | None) -> None:
        self._engine = engine
        self._fleet = fleet
        self._created = int(time.time())
        self._meter = Meter(model, engine.stats)
        if fleet is not None:
            FleetMeter(fleet, model, self._meter.registry)
        self._config = config
        self._model = model
        self._calls = Calls(engine, model)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        arrival = self._meter.now()
        call, wire = await self._prepare(request, self._calls.chat)
        return await self._answer(request, call, wire, arrival)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        arrival = self._meter.now()
        call, wire = await self._prepare(request, self._calls.completion)
        return await self._answer(request, call, wire, arrival)

    async def models(self) -> Response:
        """GET /v1/models."""
        return json_response({"object": "list", "data": [self._model_card()]})

    async def model(self, model_id: str) -> Response:
        """GET /v1/models/{id}."""
        if model_id != self._model:
            raise UnknownModelError(model_id, self._model)
        return json_response(self._model_card())

    async def health(self) -> Response:
        """GET /health: can this process still answer? Open to everybody."""
        if not self._engine.healthy:
            return json_response({"status": "dead"}, 503)
        return json_response({"status": "ok"})

    async def ready(self) -> Response:
        """GET /ready: should a balancer send requests here?"""
        if not self._engine.healthy or self._engine.draining:
            return json_response({"status": "not ready"}, 503)
        return json_response({"status": "ready"})

    async def version(self) -> Response:
        """GET /version."""
        return json_response({"version": version()})

    async def metrics(self) -> Response:
        """GET /metrics."""
        return Response(self._meter.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "kvlite",
            "max_model_len": self._engine.limits.max_model_len,
        }

    async def _prepare(
        self, request: Request, make: Callable[[bytes, str, int], tuple[Call, Wire]]
    ) -> tuple[Call, Wire]:
        body = await read_body(request.receive, self._config.max_body_bytes)
        caller: Caller = request.state.caller
        return await asyncio.to_thread(make, body, request.state.request_id, caller.tenant)

    async def _answer(self, request: Request, call: Call, wire: Wire, arrival: float) -> Response:
        def source(prompt: Prompt) -> AsyncGenerator[Delta, None]:
            return self._meter.watch(self._start(call, prompt), arrival)

        if not call.options.stream:
            return json_response(await unless_gone(request.receive, whole_answer(source, call, wire)))
        events = event_stream(source, call, wire)
        # The first event decides the status: capacity and validation errors are no 200.
        first = await unless_gone(request.receive, _next(events))
        return EventStream(first, events)

    def _start(self, call: Call, prompt: Prompt) -> AsyncGenerator[Delta, None]:
        """One prompt's deltas. In a fleet it goes by the answer's id, with its number where there are several."""
        if self._fleet is None:
            return self._engine.stream_validated(prompt.request)
        number = next(n for n, each in enumerate(call.prompts) if each is prompt)
        name = call.id if len(call.prompts) == 1 else f"{call.id}-{number}"
        return self._fleet.stream_validated(prompt.request, name)


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)
