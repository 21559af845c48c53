"""`Engine`: prompts in, tokens out, in your own process.

Owns the front ends over the loop: prompts and conversations to requests, one request or a list of them to outputs,
streams, documents computed ahead. One thread at a time; the server reaches it through AsyncEngine.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args, overload
from weakref import WeakValueDictionary

from kvlite.config import TIMEOUT_S_MAX, EngineConfig
from kvlite.documents import DocumentState, StoredDocument
from kvlite.engine_stream import EngineStream, Home
from kvlite.errors import InvalidRequestError
from kvlite.interrupts import uninterrupted
from kvlite.library import Library, check_made
from kvlite.migration import How, MigrationReport, hand_over
from kvlite.output import Collector, Throughput
from kvlite.progress import Bar
from kvlite.prompts import ChatPrompt, ChatPrompts, Part, Prompt, is_parts, is_single, of_prompt
from kvlite.request import ValidatedRequest, validate
from kvlite.reuse_types import Document, EncodedPrompt, PrecomputeReport, Reuse, Segment
from kvlite.startup import build
from kvlite.tokenizer import Message
from kvlite.types import Delta, FinishReason, RequestOptions, RequestOutput, SamplingParams
from kvlite.workload import Workloads, feeding_order


class Engine(Workloads):
    """A model with its cache. `model` is a directory (default: the small one that ships) or a whole EngineConfig.

    `overrides` are fields of EngineConfig; KVLITE_ variables are read too. Raises ConfigError or ModelLoadError.
    """

    def __init__(
        self, model: str | Path | EngineConfig | None = None, *, progress: bool | None = None, **overrides: Any
    ) -> None:
        if isinstance(model, EngineConfig):
            assert not overrides, "settings come from the EngineConfig or as overrides, not both"
            config = model
        else:
            config = EngineConfig.from_env(model=None if model is None else str(model), **overrides)
        with Bar("loading", unit="B", wanted=progress) as bar:
            super().__init__(config, build(config, bar.update))
        self.library = Library(self._core, self.documents, self.tokenizer, self.limits)
        self._streams: WeakValueDictionary[int, EngineStream] = WeakValueDictionary()
        """Who reads a box of its own; one that is dropped must end."""
        self._home = Home(self._open, self._advance, self._forget)

    def validate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        reuse: Reuse | None = None,
    ) -> ValidatedRequest:
        """The one wall: text, ids or parts, checked against every limit. `reuse` goes before that of `options`.

        Raises InvalidRequestError. Safe in any thread.
        """
        params = params or SamplingParams()
        if reuse is not None:
            options = replace(options or RequestOptions(), reuse=reuse)
        if isinstance(prompt, str):
            return validate(self.limits, self.tokenizer.encode(prompt), params, options, text=prompt)
        if is_parts(prompt):
            prompt = self.tokenizer.encode_parts(cast("Sequence[Part]", prompt))
        return validate(self.limits, cast("Sequence[int] | EncodedPrompt", prompt), params, options)

    def prepare_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        documents: Sequence[Document | str] = (),
        reuse: Reuse | None = None,
        **variables: Any,
    ) -> ChatPrompt:
        """A conversation over documents as a request: the same ids under every reuse mode. Safe in any thread.

        `variables` reach the chat template (add_generation_prompt, ...). Raises InvalidRequestError, which names
        documents by their index, and UnknownDocumentError.
        """
        if reuse is not None:
            options = replace(options or RequestOptions(), reuse=reuse)
        prompts = ChatPrompts(self.limits, self.tokenizer, self.documents)
        return prompts.prepare(messages, documents, params, options, variables)

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        reuse: Reuse | None = None,
    ) -> int:
        """Queues a request for `step`; returns its handle. Raises InvalidRequestError or CapacityError."""
        return self.add_validated(self.validate(prompt, params, options, reuse=reuse))

    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]  a str is a Sequence[str] too
        self,
        prompts: str | Sequence[int] | EncodedPrompt | Sequence[Part],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        reuse: Reuse | None = None,
        progress: bool | None = None,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]] | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        options: RequestOptions | None = None,
        *,
        reuse: Reuse | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[str] | Sequence[Sequence[int]] | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        options: RequestOptions | None = None,
        *,
        reuse: Reuse | None = None,
        progress: bool | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """One prompt (text, ids, or parts with a Segment) or a list of them; outputs in the order of the prompts.

        `options` and `reuse` hold for all. All are checked before any starts; a list of any length is fed as the queue
        has room, computed in the order that shares most, and has no time limit but that of `options`. `progress`: a bar
        with tokens/s and the share of the prompts that came from the cache; None shows it on a terminal. Ctrl-C ends
        what runs, and the engine goes on.
        Raises InvalidRequestError, of a list as `prompts[index]`; what goes wrong later is a finish reason.
        """
        if is_single(prompts):
            assert params is None or isinstance(params, SamplingParams), "one prompt has one SamplingParams"
            return self._run_all([self.validate(cast("Prompt", prompts), params, options, reuse=reuse)], progress)[0]
        each = cast("Sequence[Prompt]", prompts)
        every = [params] * len(each) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(every) != len(each):
            raise InvalidRequestError("params", f"{len(every)} for {len(each)} prompts: give one, or one for each")
        options = options or RequestOptions()
        if options.timeout_s is None:
            options = replace(options, timeout_s=TIMEOUT_S_MAX)
        checked: list[ValidatedRequest] = []
        for number, (prompt, own) in enumerate(zip(each, every, strict=True)):
            try:
                checked.append(self.validate(prompt, own, options, reuse=reuse))
            except InvalidRequestError as error:
                raise of_prompt(number, error) from None
        return self._run_all(checked, progress)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        documents: Sequence[Document | str] = (),
        reuse: Reuse | None = None,
        **variables: Any,
    ) -> RequestOutput:
        """Answers a conversation over `documents`; `variables` reach the chat template. Raises as `prepare_chat`."""
        prompt = self.prepare_chat(messages, params, options, documents=documents, reuse=reuse, **variables)
        return self._run_all([prompt.request], None)[0]

    def precompute(
        self,
        documents: Sequence[Document | Segment | str],
        *,
        tenant: int = 0,
        pinned: bool = False,
        progress: bool | None = None,
    ) -> list[PrecomputeReport]:
        """Computes the KV of documents, or parts of prompts, ahead of requests that bring them.

        Documents with an id may be named by it then. Returns when all were made; what does not fit at once is evicted
        as ever. Raises InvalidRequestError, or CapacityError when there is no room beside what is pinned.
        """
        stored: dict[int, StoredDocument] = {}
        orders: list[ValidatedRequest] = []
        for n, each in enumerate(documents):
            if isinstance(each, Segment):
                orders.append(self.library.prepare_segment(each, tenant=tenant, pinned=pinned))
                continue
            document = Document(each) if isinstance(each, str) else each
            made, order = self.library.prepare(document, tenant=tenant, pinned=pinned)
            orders.append(order)
            if document.id is not None:
                stored[n] = made
        states = [self.library.state(tenant, order.prompt_ids) for order in orders]
        with Bar("computing", unit="documents", wanted=progress) as bar, closing(self.run(orders)) as outcomes:
            for num_done, (at, outcome) in enumerate(outcomes, 1):
                if isinstance(outcome, InvalidRequestError):
                    raise outcome
                check_made(outcome)
                if at in stored:
                    self.library.put(stored[at])
                bar.update(num_done, len(orders))
        names = [None if isinstance(each, str) else each.id for each in documents]
        return [
            PrecomputeReport(id, len(order.prompt_ids), state is DocumentState.READY)
            for id, order, state in zip(names, orders, states, strict=True)
        ]

    def pin(self, document: Document, *, pinned: bool = True, tenant: int = 0) -> bool:
        """A pinned document's KV is never evicted. False when its KV is not there. Raises CapacityError."""
        return self.library.pin(document, tenant, pinned)

    def drop(self, document: Document, *, tenant: int = 0) -> bool:
        """Forgets a document and its KV; requests that use it go on. False when there was nothing to forget."""
        return self.library.drop(document, tenant)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        reuse: Reuse | None = None,
    ) -> EngineStream:
        """Deltas as they come; the last one has `usage`. The request is checked now and starts at the first `next`.

        Closing the iterator early aborts the request. Several may be open at once; each steps the engine for all.
        """
        return self.stream_validated(self.validate(prompt, params, options, reuse=reuse))

    def stream_validated(self, request: ValidatedRequest) -> EngineStream:
        """`stream` for a request that has passed `validate` or `prepare_chat`."""
        return EngineStream(self._home, request)

    def migrate(self, request: int | EngineStream, to: Engine, *, how: How = "auto") -> MigrationReport:
        """Moves a running, waiting or preempted request to another engine of this process, where it goes on.

        `request`: a stream, which goes on too and steps `to` from now on; or the handle of one that `add` gave, whose
        deltas come out of `to.step()` under `report.handle`. `how`: copy its KV, replay its tokens, auto = copy. In
        deterministic mode its tokens are those of a request that never moved. Steps this engine once. Raises
        InvalidRequestError (request, to, how), CapacityError when `to` has no room; the request goes on here then.
        """
        self._check_open()
        to._check_open()
        handle = self._movable(request)
        if how not in get_args(How):
            raise InvalidRequestError("how", f"{how!r} is not one of {', '.join(get_args(How))}")
        if to is self:
            raise InvalidRequestError("to", "is the engine that the request is on: give another")
        if self._runner.pool.shape != to._runner.pool.shape:
            raise InvalidRequestError("to", f"has KV of another shape: {to._runner.pool.shape}")
        with uninterrupted():
            report = hand_over(self, to, handle, how, self._advance)
            stream, box = self._streams.pop(handle, None), self._boxes.pop(handle, None)
            if stream is not None and box is not None:
                to._streams[report.handle], to._boxes[report.handle] = stream, box
                stream.home, stream.handle = to._home, report.handle
        return report

    def _movable(self, request: int | EngineStream) -> int:
        if isinstance(request, EngineStream):
            if request.handle is None or request.home is not self._home:
                state = "has not started" if request.handle is None else "is not on this engine"
                raise InvalidRequestError("request", f"the stream {state}")
            return request.handle
        if request in self._boxes and request not in self._streams:
            raise InvalidRequestError("request", f"{request} is read by a call of this engine that has not returned")
        return request

    def _open(self, stream: EngineStream, request: ValidatedRequest) -> int:
        handle = self.add_validated(request)
        self._boxes[handle] = stream.box
        self._streams[handle] = stream
        return handle

    def _run_all(self, requests: list[ValidatedRequest], progress: bool | None) -> list[RequestOutput]:
        collectors: dict[int, Collector] = {}
        outputs: dict[int, RequestOutput] = {}
        done = Throughput()
        order = feeding_order(requests, self.config.max_num_waiting)
        made = self.run((requests[number] for number in order), is_workload=len(requests) > 1)
        with Bar("generating", unit="requests", wanted=progress) as bar, closing(made) as outcomes:
            for at, outcome in outcomes:
                number = order[at]
                if isinstance(outcome, InvalidRequestError):
                    raise outcome if len(requests) == 1 else of_prompt(number, outcome)
                collector = collectors.setdefault(number, Collector(requests[number]))
                done.add(outcome)
                if collector.push(outcome):
                    outputs[number] = collectors.pop(number).output()
                bar.update(len(outputs), len(requests), done.note)
        return [outputs[number] for number in range(len(requests))]

    def _forget(self, handle: int) -> None:
        """Nobody reads this request any more: it is aborted if it lives."""
        self._streams.pop(handle, None)
        super()._forget(handle)

    def close(self, reason: FinishReason = FinishReason.CANCELLED, error: str | None = None) -> list[Delta]:
        """Ends everything and returns the last deltas; later calls raise EngineClosedError. Twice is fine."""
        self._boxes.clear()
        self._streams.clear()
        return super().close(reason, error)
