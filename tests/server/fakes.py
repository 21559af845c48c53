"""An engine that says what a test tells it to, and an ASGI client that can go away."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import kvlite.config
from kvlite.config import EngineConfig
from kvlite.documents import DocumentInfo, DocumentState
from kvlite.errors import UnknownDocumentError
from kvlite.prompts import ChatPrompt
from kvlite.request import RequestLimits, ValidatedRequest, validate
from kvlite.reuse_types import Document, ReuseReport
from kvlite.server.app import create_app
from kvlite.tokenizer import Tokenizer
from kvlite.types import Delta, EngineStats, FinishReason, GenerationDefaults, RequestOptions, SamplingParams, Usage

SHIPPED_MODEL = Path(kvlite.config.__file__).parent / "model"
TOKENIZER = Tokenizer(SHIPPED_MODEL)
MODEL = "fake"
CREATED = 1_700_000_000.5
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}

Step = Delta | Exception | asyncio.Event
"""What a scripted stream does next: give a delta, fail, or wait."""


def delta(text: str = "", *ids: int, index: int = 0, end: FinishReason | None = None, **more: Any) -> Delta:
    return Delta(1, index, text, ids, finish_reason=end, **more)


def answer(text: str = "Oslo", prompt: int = 3, cached: int = 0, reuse: ReuseReport | None = None) -> list[Step]:
    """Two deltas that end well."""
    usage = Usage(prompt, 2, cached)
    return [delta(text, 300), delta("", 6, end=FinishReason.STOP, usage=usage, reuse=reuse)]


class WatchedTokenizer(Tokenizer):
    """Remembers the threads that encoded."""

    def __init__(self) -> None:
        super().__init__(SHIPPED_MODEL)
        self.threads: set[int] = set()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.threads.add(threading.get_ident())
        return super().encode(text, add_special_tokens=add_special_tokens)


class FakeDocuments:
    """The part of AsyncEngine that keeps documents, as one dictionary."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int | None, str], DocumentInfo] = {}
        self.failure: Exception | None = None
        self.hold: asyncio.Event | None = None
        self.num_making = 0
        self.num_abandoned = 0

    async def create_document(
        self, document: Document, *, tenant: int = 0, public: bool = False, pinned: bool = False, ttl_s: Any = None
    ) -> DocumentInfo:
        assert document.text is not None
        self.num_making += 1
        try:
            if self.hold is not None:
                await self.hold.wait()
        except asyncio.CancelledError:
            self.num_abandoned += 1
            raise
        if self.failure is not None and "bad" in document.text:
            raise self.failure
        id = document.id or f"doc_{len(self.kept)}"
        expires = None if ttl_s is None else CREATED + ttl_s
        size, state = len(document.text), DocumentState.READY
        info = DocumentInfo(id, document.title, size, state, pinned, public, CREATED, expires)
        self.kept[None if public else tenant, id] = info
        return info

    def get_document(self, tenant: int, id: str) -> DocumentInfo | None:
        return self.kept.get((tenant, id)) or self.kept.get((None, id))

    def list_documents(self, tenant: int) -> list[DocumentInfo]:
        return [info for (owner, _), info in self.kept.items() if owner in (tenant, None)]

    async def update_document(self, tenant: int, id: str, *, public: bool = False, pinned: Any = None, **more: Any):
        key = (None if public else tenant, id)
        if key not in self.kept:
            return None
        changes: dict[str, Any] = {} if pinned is None else {"pinned": pinned}
        if "ttl_s" in more:
            changes["expires"] = more["ttl_s"]
        self.kept[key] = replace(self.kept[key], **changes)
        return self.kept[key]

    async def delete_document(self, tenant: int, id: str, *, public: bool = False) -> bool:
        return self.kept.pop((None if public else tenant, id), None) is not None


@dataclass
class FakeEngine(FakeDocuments):
    """The part of AsyncEngine that the server uses. `scripts` are taken one per stream, in order."""

    scripts: list[Sequence[Step]] = field(default_factory=list)
    config: EngineConfig = field(default_factory=EngineConfig)
    tokenizer: Tokenizer = TOKENIZER
    healthy: bool = True
    draining: bool = False
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    asked: list[RequestOptions] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    documents: list[Sequence[Document]] = field(default_factory=list)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def limits(self) -> RequestLimits:
        return RequestLimits(self.config, self.tokenizer.vocab_size, 2048, 1 << 20, GenerationDefaults(max_tokens=8))

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=2, num_waiting=3, num_blocks=8, owned_blocks=2, prompt_tokens=50, cached_tokens=20,
            generated_tokens=7, num_preemptions=1, finished={FinishReason.STOP: 4}, blended_tokens=8,
            recomputed_tokens=3, segment_hit_tokens=9, num_segments=2, segment_blocks=4, pinned_blocks=1,
            num_documents=5, num_agreement_samples=10, agreement=0.9, kl_divergence=0.01, num_fallbacks=1,
        )  # fmt: skip

    def prepare_chat(
        self,
        messages: Any,
        params: SamplingParams,
        options: RequestOptions,
        *,
        documents: Sequence[Document],
        reuse: None,
        **variables: Any,
    ) -> ChatPrompt:
        self.documents.append(documents)
        for number, document in enumerate(documents):
            if document.text is None and self.get_document(options.tenant, document.id or "") is None:
                raise UnknownDocumentError(f"documents[{number}].id", document.id or "")
        ids = self.tokenizer.apply_chat_template(messages, **variables)
        return ChatPrompt(validate(self.limits, ids, params, options), self.warnings)

    async def stream_validated(self, request: ValidatedRequest) -> AsyncGenerator[Delta, None]:
        self.prompts.append(tuple(request.prompt_ids.tolist()))
        self.params.append(request.params)
        self.asked.append(request.options)
        script = self.scripts.pop(0)
        done = False
        try:
            for step in script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    self.started.set()
                    await step.wait()
                else:
                    yield step
            done = True
        finally:
            if not done:
                self.aborted.set()


@dataclass
class Reply:
    """A whole HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The events of a stream; the last one must be [DONE]."""
        lines = self.body.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""], lines[-2:]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


class Exchange:
    """One HTTP request under way. `body` may come in pieces; `leave` closes the connection."""

    def __init__(self, app: Any, method: str, path: str, headers: dict[str, str], body: Sequence[bytes]) -> None:
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.num_read = 0
        self.reads_at_most = 1 << 30
        for i, part in enumerate(body):
            self._inbox.put_nowait({"type": "http.request", "body": part, "more_body": i + 1 < len(body)})
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._messages: list[dict[str, Any]] = []
        scope = {
            "type": "http", "method": method, "path": path.partition("?")[0],
            "raw_path": path.partition("?")[0].encode(), "query_string": path.partition("?")[2].encode(),
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
            "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1), "root_path": "",
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        self.num_read += 1
        return await self._inbox.get()

    async def _send(self, message: dict[str, Any]) -> None:
        if len(self._messages) >= self.reads_at_most:
            await asyncio.Event().wait()
        self._messages.append(message)
        self.sent.put_nowait(message)

    def leave(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    async def reply(self) -> Reply:
        await self.task
        start, *rest = self._messages
        headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        return Reply(start["status"], headers, b"".join(message.get("body", b"") for message in rest))


class Client:
    """Talks to the application of one engine."""

    def __init__(self, engine: FakeEngine) -> None:
        self.app = create_app(engine, engine.config, MODEL)  # type: ignore[arg-type]

    def open(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> Exchange:
        if isinstance(body, list) and all(isinstance(part, bytes) for part in body):
            parts = body
        else:
            parts = [body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()]
        return Exchange(self.app, method, path, headers or {}, parts)

    async def get(self, path: str, headers: dict[str, str] | None = None) -> Reply:
        return await self.open("GET", path, headers=headers).reply()

    async def post(self, path: str, body: object, headers: dict[str, str] | None = None) -> Reply:
        return await self.open("POST", path, body, headers).reply()


def run(engine: FakeEngine, talk: Callable[[Client], Awaitable[Any]]) -> Any:
    """`talk` on a fresh event loop; ends within a minute or fails."""

    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await talk(Client(engine))

    return asyncio.run(bounded())
