"""From a request body to a `Call`: checked, tokenised, and within what one call may ask for.

Owns the walk from fields to prompts that the engine takes. Knows of an engine its text side alone, and nothing of HTTP:
app.py calls it in a worker thread, kvlite.batch for every line of a file.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from kvlite.config import EngineConfig
from kvlite.errors import InvalidRequestError
from kvlite.prompts import ChatPrompt
from kvlite.request import RequestLimits, validate
from kvlite.reuse_types import Document
from kvlite.server.fields import Json
from kvlite.server.protocol import Limits, Options, parse_chat, parse_completion
from kvlite.server.wire import Call, ChatWire, Prompt, TextWire
from kvlite.tokenizer import Message, Tokenizer
from kvlite.types import RequestOptions, SamplingParams

SHIPPED_MODEL_NAME = "kvlite-small"


class TextSide(Protocol):
    """What of an engine makes prompts. Docstrings are those of Engine."""

    tokenizer: Tokenizer

    @property
    def limits(self) -> RequestLimits:
        """What requests are checked against."""
        ...

    def prepare_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        documents: Sequence[Document | str] = (),
        reuse: None = None,
        **variables: Any,
    ) -> ChatPrompt:
        """A conversation as a request; for any thread but that of an event loop."""
        ...


def model_name(config: EngineConfig, directory: Path) -> str:
    """Name of the model in the API: as configured, else of its directory; the shipped model has one of its own."""
    if config.served_model_name is not None:
        return config.served_model_name
    return SHIPPED_MODEL_NAME if config.model is None else directory.resolve().name


class Calls:
    """Makes calls of one engine; `model` is its name in the API."""

    def __init__(self, engine: TextSide, model: str) -> None:
        self._engine = engine
        self._limits = Limits(model, engine.limits)

    def chat(self, body: bytes | Json, request_id: str, tenant: int = 0) -> tuple[Call, ChatWire]:
        """A body of /v1/chat/completions. Raises InvalidRequestError or UnknownModelError."""
        chat = parse_chat(body, self._limits, tenant)
        with _renamed("prompt", "messages"):
            prepared = self._engine.prepare_chat(
                chat.messages,
                chat.options.params,
                chat.options.request,
                documents=chat.documents,
                reuse=None,
                add_generation_prompt=chat.add_generation_prompt,
                **chat.template_variables,
            )
        options = replace(chat.options, warnings=(*chat.options.warnings, *prepared.warnings))
        call = self._call("chatcmpl-" + request_id, options, (Prompt(prepared.request),))
        return call, ChatWire(call, self._engine.tokenizer.token_bytes)

    def completion(self, body: bytes | Json, request_id: str, tenant: int = 0) -> tuple[Call, TextWire]:
        """A body of /v1/completions. Raises as `chat`; errors name the prompt by its index."""
        tokenizer = self._engine.tokenizer
        completion = parse_completion(body, self._limits, tenant)
        prompts: list[Prompt] = []
        for i, prompt in enumerate(completion.prompts):
            ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            text = ""
            if completion.echo:
                text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
            field = "prompt" if len(completion.prompts) == 1 else f"prompt[{i}]"
            with _renamed("prompt", field):
                checked = validate(self._limits.engine, ids, completion.options.params, completion.options.request)
            prompts.append(Prompt(checked, text))
        call = self._call("cmpl-" + request_id, completion.options, tuple(prompts), completion.echo)
        return call, TextWire(call, tokenizer.token_text)

    def _call(self, id: str, options: Options, prompts: tuple[Prompt, ...], echo: bool = False) -> Call:
        """Every prompt is checked before any of them starts; this checks what they ask for together."""
        requests = [prompt.request for prompt in prompts]
        wanted = sum(len(request.prompt_ids) + request.max_tokens for request in requests) * options.params.n
        allowed = self._limits.engine.config.max_request_tokens
        if wanted > allowed:
            raise InvalidRequestError("prompt", f"the call asks for {wanted} tokens, at most {allowed} are allowed")
        return Call(id, int(time.time()), self._limits.model, options, prompts, echo)


@contextmanager
def _renamed(param: str, field: str) -> Generator[None]:
    """Errors about `param` name `field`, which is where it stands in the body."""
    try:
        yield
    except InvalidRequestError as error:
        if error.param != param:
            raise
        raise InvalidRequestError(field, error.message) from None
