"""/v1/fleet: engines, their requests, and moving a request from one to another; with the metrics of it.

Owns the routes, who may use them, their JSON and the families of metrics that a fleet has beside an engine's. A move is
an order to the fleet; how it is carried out is none of this file's business. Attached by app.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvlite.config import EngineConfig
from kvlite.errors import InvalidRequestError
from kvlite.fleet.moves import MoveConflictError, MoveHow, MoveReport, UnknownRequestError
from kvlite.server.failures import HttpError
from kvlite.server.fields import Fields, parse_object
from kvlite.server.gate import Caller, Keys, read_body
from kvlite.server.metrics import PREFIX
from kvlite.server.replies import json_response, refusals

if TYPE_CHECKING:
    from kvlite.fleet.frontend import FleetEngine

PATH = "/v1/fleet"
NAME_CHARS = 128
RESULTS = ("moved", "refused", "aborted", "reclaimed", "ended", "failed")
GAP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
SECONDS_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
BYTES_BUCKETS = tuple(float(1 << n) for n in range(12, 36, 2))
STAGES_BUCKETS = (0, 1, 2, 3, 4, 6, 8, 16)


@dataclass(frozen=True)
class MoveOrder:
    """A checked body of POST /v1/fleet/move."""

    request: str
    engine: int
    how: MoveHow


def parse_move(body: bytes) -> MoveOrder:
    """Check a body. Raises InvalidRequestError."""
    fields = Fields(parse_object(body))
    request = fields.raw("request")
    if isinstance(request, int) and not isinstance(request, bool) and 0 < request < 1 << 63:
        request = str(request)
    if not isinstance(request, str) or not 0 < len(request) <= NAME_CHARS:
        fields.refuse("request", request, f"the id of an answer (at most {NAME_CHARS} characters), or its number")
    engine = fields.integer("engine", 0, 1 << 16)
    if engine is None:
        fields.refuse("engine", None, "the number of an engine")
    how = MoveHow(fields.choice("how", tuple(MoveHow)) or MoveHow.AUTO)
    if unread := fields.unread():
        raise InvalidRequestError(unread[0], "unknown field: allowed are request, engine, how")
    return MoveOrder(request, engine, how)


class FleetRoutes:
    """The handlers of one fleet. For the admin; for everybody where nobody needs a key."""

    def __init__(self, fleet: FleetEngine, config: EngineConfig) -> None:
        self._fleet = fleet
        self._config = config
        self._is_open = Keys(config.api_key, config.admin_key).is_open and config.admin_key is None

    def attach(self, app: FastAPI) -> None:
        """Adds the routes, each with the statuses that it may answer."""
        app.add_api_route(PATH, self.status, methods=["GET"], responses=refusals(401, 403))
        statuses = (400, 401, 403, 404, 408, 409, 413)
        app.add_api_route(PATH + "/move", self.move, methods=["POST"], responses=refusals(*statuses))

    async def status(self, request: Request) -> Response:
        """GET /v1/fleet."""
        self._check(request.state.caller)
        return json_response({"object": "fleet", **asdict(self._fleet.status())})

    async def move(self, request: Request) -> Response:
        """POST /v1/fleet/move: answers when the request goes on, there or here; `result` says which."""
        self._check(request.state.caller)
        order = parse_move(await read_body(request.receive, self._config.max_body_bytes))
        try:
            report = await self._fleet.move(order.request, order.engine, order.how)
        except UnknownRequestError as error:
            raise HttpError(404, "request_not_found", str(error), param="request") from None
        except MoveConflictError as error:
            raise HttpError(409, "move_conflict", str(error)) from None
        return json_response({"object": "fleet.move", **asdict(report)})

    def _check(self, caller: Caller) -> None:
        if self._is_open or caller.is_admin:
            return
        missing = "" if self._config.admin_key is not None else "; this server has none: set KVLITE_ADMIN_KEY"
        raise HttpError(403, "admin_key_required", f"the fleet is seen and changed with the admin key only{missing}")


class FleetMeter:
    """Counts and times every move of a fleet; says which engines are up."""

    def __init__(self, fleet: FleetEngine, model: str, registry: CollectorRegistry) -> None:
        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, help, ("model_name",), buckets=buckets, registry=registry).labels(model)

        self._model = model
        self._moves = Counter(
            PREFIX + "migrations", "Orders to move a request, by result.", ("model_name", "result"), registry=registry
        )
        for result in RESULTS:
            self._moves.labels(model, result)
        self._seconds = histogram("migration_seconds", "From the order to the first token behind it.", SECONDS_BUCKETS)
        self._bytes = histogram("migration_bytes", "KV that a move has sent.", BYTES_BUCKETS)
        self._stages = histogram("migration_stages", "Copies of one move.", STAGES_BUCKETS)
        self._gap = histogram("migration_gap_seconds", "Between two tokens, across a move.", GAP_BUCKETS)
        registry.register(_Engines(fleet, model))
        fleet.on_move = self._observe

    def _observe(self, report: MoveReport) -> None:
        self._moves.labels(self._model, report.result).inc()
        if report.moved:
            self._seconds.observe(report.seconds)
            self._bytes.observe(report.bytes)
            self._stages.observe(report.stages)
        if report.gap_s is not None:
            self._gap.observe(report.gap_s)


class _Engines(Collector):
    """What is read at scrape time."""

    def __init__(self, fleet: FleetEngine, model: str) -> None:
        self._fleet = fleet
        self._model = model

    def collect(self) -> Iterator[Metric]:
        """One family per number, one sample per engine."""
        status = self._fleet.status()
        up = GaugeMetricFamily(PREFIX + "engine_up", "1 while an engine serves.", labels=("model_name", "engine"))
        requests = GaugeMetricFamily(
            PREFIX + "engine_requests", "Requests that an engine has.", labels=("model_name", "engine")
        )
        for engine in status.engines:
            up.add_metric((self._model, str(engine.id)), float(engine.pid is not None))
            requests.add_metric((self._model, str(engine.id)), len(engine.requests))
        yield up
        yield requests
