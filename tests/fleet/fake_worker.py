"""Workers without an engine, for tests of the front-end: they say what a test tells them to, over real links.

`FakeWorker` speaks messages.py and drives the real migration machine of `_core` over requests that are lists of ids.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np

from kvlite import SamplingParams, _core
from kvlite.config import EngineConfig
from kvlite.documents import DocumentInfo, DocumentState
from kvlite.fleet.dial import shake_hands
from kvlite.fleet.frontend import FleetEngine
from kvlite.fleet.links import Link
from kvlite.fleet.messages import (
    PROTOCOL,
    Add,
    CreateDocument,
    DeleteDocument,
    Ended,
    FromOwner,
    FromWorker,
    Hello,
    ListDocuments,
    Moved,
    Peers,
    Reply,
    Stats,
    Tokens,
    UpdateDocument,
    decode_from_owner,
    encode,
)
from kvlite.fleet.wire import Channel, LinkError
from kvlite.request import RequestLimits, ValidatedRequest, validate
from kvlite.reuse_types import ReuseMode, ReuseReport
from kvlite.types import Delta, EngineStats, FinishReason, GenerationDefaults, RequestOptions
from tests.fleet.link_pairs import config as link_config
from tests.server.fakes import TOKENIZER

M = TypeVar("M")
VOCAB = TOKENIZER.vocab_size
EOS = 6
OWN_END = link_config(-1, window_bytes=0, fingerprint=bytes(32), block_bytes=0, frame_bytes_limit=1 << 16)
REPORT = ReuseReport(ReuseMode.PREFIX, True, 1, 0, 0, 2)
IDS = TOKENIZER.encode(" Nora lives in Oslo and Edgar lives in Rome", add_special_tokens=False)


def hello(engine: int, **changes: Any) -> Hello:
    values: dict[str, Any] = {
        "engine": engine, "pid": 1000 + engine, "protocol": PROTOCOL, "address": f"unix:/nowhere/{engine}",
        "model_digest": 7, "dtype": "float32", "device": "cpu", "deterministic": True, "vocab_size": VOCAB,
        "num_layers": 2, "max_model_len": 2048, "block_size": 16, "block_bytes": 4096, "num_blocks": 256,
        "pool_tokens": 4096, "max_num_seqs": 16, "max_num_waiting": 32, "prefill_tokens_per_s": 1e4, "step_s": 0.01,
    }  # fmt: skip
    return Hello(**(values | changes))


def stats(**changes: Any) -> Stats:
    values: dict[str, Any] = {
        "stats": EngineStats(), "healthy": True, "draining": False, "moves_out": 0, "moves_in": 0,
        "link_bytes_per_s": {},
    }  # fmt: skip
    return Stats(**(values | changes))


def request_of(prompt: str = "Hello there", **params: Any) -> ValidatedRequest:
    limits = _limits()
    return validate(limits, TOKENIZER.encode(prompt), SamplingParams(**({"max_tokens": 64} | params)), RequestOptions())


def _limits() -> RequestLimits:
    defaults = GenerationDefaults(eos_token_ids=(EOS,))
    return RequestLimits(EngineConfig(), VOCAB, 2048, 4096, defaults, 2)


class FakeWorker:
    """One engine. `inbox` has what the front-end said; orders about documents are answered by themselves."""

    def __init__(self, engine: int, link: Link, peers: dict[int, FakeWorker]) -> None:
        self.engine = engine
        self.link = link
        self.inbox: list[FromOwner] = []
        self.frames: list[bytes] = []
        self.requests: dict[int, list[int]] = {}
        """Output ids of choice 0, by request, of those that live here."""
        self.epochs: dict[int, int] = {}
        self.documents: dict[str, CreateDocument] = {}
        self.fails: dict[str, Any] = {}
        """Failure to answer the creation of a document with, by its id."""
        self.has_room = True
        self.holds = False
        """Whether creations of documents are not answered."""
        self._peers = peers
        self._news = asyncio.Event()
        self._mover = _core.Mover(
            engine, max_moves=4, max_inflight_bytes=1 << 20, block_bytes=4096, max_stages=4, reserve_ms=5000,
            ack_ms=5000, freeze_ms=5000, claim_ms=200,
        )  # fmt: skip
        self._reading = asyncio.create_task(self._read())

    def say(self, *messages: FromWorker) -> None:
        self.link.post(Channel.CONTROL, encode(list(messages)))

    def tokens(self, request: int, ids: Sequence[int], *, choice: int = 0, **more: Any) -> Tokens:
        """The next ids of a request that lives here, as it would say them."""
        outputs = self.requests.setdefault(request, [])
        position = more.pop("position", len(outputs) if choice == 0 else 0)
        message = Tokens(request, more.pop("epoch", self.epochs.get(request, 0)), choice, position, list(ids), **more)
        if choice == 0:
            outputs.extend(ids)
        return message

    def give(self, request: int, *ids: int, **more: Any) -> None:
        self.say(self.tokens(request, ids, **more))

    def end(self, request: int, reason: FinishReason = FinishReason.STOP, *, choice: int = 0, **more: Any) -> None:
        values: dict[str, Any] = {"num_tokens": len(self.requests.get(request, ())), "last": True} | more
        epoch = values.pop("epoch", self.epochs.get(request, 0))
        self.say(Ended(request, epoch, choice, reason, **values))

    async def heard(self, kind: type[M], count: int = 1) -> list[M]:
        """The first `count` messages of that kind, once there are so many."""
        while len(found := [message for message in self.inbox if isinstance(message, kind)]) < count:
            self._news.clear()
            await self._news.wait()
        return found

    async def heard_frame(self, name: str) -> bytes:
        """The first frame of that kind for the mover."""
        kind = _core.Mover.FRAME_KINDS.index(name)
        while not (found := [frame for frame in self.frames if _core.frame_kind(frame) == kind]):
            self._news.clear()
            await self._news.wait()
        return found[0]

    def die(self) -> None:
        """The process is killed."""
        self.link.close()
        self._reading.cancel()
        self._peers.pop(self.engine, None)
        for peer in self._peers.values():
            peer.act(peer._mover.link_down(self.engine, 0))

    async def _read(self) -> None:
        try:
            async for channel, frame, _payload in self.link:
                if channel is Channel.MIGRATION:
                    self.frames.append(frame)
                    self.act(self._mover.frame(_core.Mover.OWNER, frame, 0))
                else:
                    for message in decode_from_owner(frame):
                        self.inbox.append(message)
                        self._obey(message)
                self._news.set()
        except LinkError:
            return

    def _obey(self, message: FromOwner) -> None:
        if isinstance(message, Add):
            given = (message.outputs or [b""])[0]
            self.requests[message.request] = np.frombuffer(given or b"", "<i4").tolist()
            self.epochs[message.request] = message.epoch
        elif isinstance(message, CreateDocument) and self.holds:
            pass
        elif isinstance(message, CreateDocument):
            failure = self.fails.get(message.id)
            if failure is None:
                self.documents[message.id] = message
            self.say(Reply(message.order, failure=failure))
        elif isinstance(message, DeleteDocument):
            self.say(Reply(message.order, found=self.documents.pop(message.id, None) is not None))
        elif isinstance(message, UpdateDocument):
            self.say(Reply(message.order, found=message.id in self.documents))
        elif isinstance(message, ListDocuments):
            wanted = [item for item in self.documents.values() if message.id in (None, item.id)]
            self.say(Reply(message.order, documents=[_info(item) for item in wanted]))

    def act(self, effects: list[tuple[Any, ...]]) -> None:
        """Carries out what the machine asks for, at once, over ids instead of blocks."""
        for kind, *items in effects:
            self.act(self._one(kind, items))

    def _one(self, kind: int, items: list[Any]) -> list[tuple[Any, ...]]:
        mover, name = self._mover, {getattr(_core.Mover, name): name for name in _EFFECTS}[kind]
        match name, items:
            case "SEND", [peer, frame] if peer == _core.Mover.OWNER:
                self.link.post(Channel.MIGRATION, frame)
            case "SEND", [peer, frame]:
                if peer not in self._peers:
                    return mover.link_down(peer, 0)
                self._peers[peer].act(self._peers[peer]._mover.frame(self.engine, frame, 0))
            case "EXPORT", [request, attempt, epoch]:
                manifest = b"manifest" if self.epochs.get(request) == epoch else None
                return mover.exported(request, attempt, manifest, 1, 0)
            case "STAGE", [request, attempt, _epoch, _to, stage, _skip, _final]:
                return mover.staged(request, attempt, stage, 0, 0, 0)
            case "FREEZE", [request, attempt]:
                return mover.frozen(request, attempt, 0)
            case "TAIL", [request, attempt]:
                outputs = self.requests[request]
                return mover.tail(request, attempt, b"final", [len(outputs)], [outputs], 0)
            case "THAW", [request, _attempt, epoch]:
                self.epochs[request] = epoch
            case "RELEASE", [request, _attempt, epoch]:
                if self.epochs.get(request, epoch + 1) <= epoch:
                    del self.requests[request], self.epochs[request]
            case "RESERVE", [request, attempt, *_]:
                if self.has_room:
                    return mover.reserved(request, attempt, 0, 0)
                return mover.refused(request, attempt, "no room", 0)
            case "COMMIT", [request, _attempt, epoch, _manifest, _replay]:
                self.epochs[request] = epoch
                self._news.set()
            case "DONE", [request, _attempt, result, stages, blocks, _reason]:
                epoch = self.epochs.get(request, 0)
                self.say(Moved(request, epoch, 0, result, 0.1, 0.01, stages, blocks, 12345))
            case _:
                pass
        return []


_EFFECTS = ("SEND", "EXPORT", "STAGE", "FREEZE", "TAIL", "THAW", "RELEASE", "RESERVE", "CANCEL", "COMMIT", "DONE")


def _info(item: CreateDocument) -> DocumentInfo:
    return DocumentInfo(item.id, item.title, 3, DocumentState.READY, item.pinned, item.public, 1.0, None)


class Fleet:
    """A front-end and its fake workers, in one event loop."""

    def __init__(self, num_engines: int, **settings: Any) -> None:
        defaults = GenerationDefaults(eos_token_ids=(EOS,))
        self.engine = FleetEngine(EngineConfig(**settings), TOKENIZER, defaults, num_engines)
        self.workers: dict[int, FakeWorker] = {}
        self.serving: dict[int, asyncio.Task[None]] = {}

    async def connect(self, engine: int) -> FakeWorker:
        """A worker that has said nothing yet."""
        one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours, theirs = await asyncio.gather(
            shake_hands(one, OWN_END, caller=False),
            shake_hands(two, link_config(engine), caller=True),
        )
        self.serving[engine] = asyncio.create_task(self.engine.serve(ours))
        self.workers[engine] = FakeWorker(engine, theirs, self.workers)
        return self.workers[engine]

    async def join(self, engine: int, **changes: Any) -> FakeWorker:
        """A worker that is up."""
        worker = await self.connect(engine)
        worker.say(hello(engine, **changes))
        await self.engine.until_up(engine)
        await worker.heard(Peers)
        return worker

    async def kill(self, engine: int) -> None:
        self.workers[engine].die()
        await self.serving[engine]

    async def settle(self, engine: int) -> None:
        """Everything that this worker has said was heard."""
        seen = stats()
        self.workers[engine].say(seen)
        member = self.engine.members[engine]
        while member.stats != seen or member.stats is self._before:
            await asyncio.sleep(0)
        self._before = member.stats

    _before: Stats | None = None


@asynccontextmanager
async def fleet(num_engines: int = 2, up: bool = True, **settings: Any) -> AsyncIterator[Fleet]:
    made = Fleet(num_engines, **settings)
    try:
        for engine in range(num_engines if up else 0):
            await made.join(engine)
        yield made
    finally:
        await made.engine.shut()
        for worker in list(made.workers.values()):
            worker.link.close()
        await asyncio.gather(*made.serving.values(), return_exceptions=True)


class Reader:
    """Reads a stream in a task of its own."""

    def __init__(self, fleet: Fleet, request: ValidatedRequest, name: str = "") -> None:
        self.deltas: list[Delta] = []
        self._news = asyncio.Event()
        self._source = fleet.engine.stream_validated(request, name)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> list[Delta]:
        async for delta in self._source:
            self.deltas.append(delta)
            self._news.set()
        return self.deltas

    async def has(self, num_tokens: int) -> None:
        while len(self.ids) < num_tokens:
            self._news.clear()
            await self._news.wait()

    @property
    def ids(self) -> list[int]:
        return self.ids_of(0)

    def ids_of(self, choice: int) -> list[int]:
        return [id for delta in self.deltas if delta.index == choice for id in delta.token_ids]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def last(self) -> Delta:
        return self.deltas[-1]


async def started(cluster: Fleet, engine: int = 0, name: str = "", **params: Any) -> tuple[Reader, Add]:
    """A new request, once that engine has heard of it."""
    worker = cluster.workers[engine]
    before = sum(isinstance(message, Add) for message in worker.inbox)
    reader = Reader(cluster, request_of(**params), name)
    return reader, (await worker.heard(Add, before + 1))[-1]
