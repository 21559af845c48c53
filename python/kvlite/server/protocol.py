"""OpenAI's request bodies as checked values: a known field is honoured or refused, an unknown one is reported.

Owns the fields of /v1/chat/completions and /v1/completions and their meaning; knows the engine through `Limits` alone.
Ranges of sampling fields are SamplingParams' own. Called by calls.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from kvlite.errors import InvalidRequestError, KvliteError
from kvlite.request import PRIORITY_LIMIT, RequestLimits
from kvlite.reuse_types import Document
from kvlite.server.fields import Fields, Json, as_list, parse_object, shown
from kvlite.server.reuse_fields import read_documents, read_plain_reuse, read_reuse
from kvlite.types import STOP_IDS_CEILING, RequestOptions, SamplingParams

MAX_MESSAGES = 1024
RESERVED_VARIABLES = {
    "self", "messages", "tools", "documents", "add_generation_prompt", "specials", "variables", "params", "options",
    "reuse",
}  # fmt: skip
ROLES = ("system", "developer", "user", "assistant", "document")

SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output",
)  # fmt: skip
"""Handed to SamplingParams as they are; it checks type and range."""

LATER: Mapping[str, tuple[object, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "structured_outputs": ({},),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (),
    "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (),
    "continue_final_message": (False,), "suffix": ("",), "best_of": (1,), "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
}  # fmt: skip
"""Fields that this version cannot honour, each with the values that ask for nothing; any other value is a 400."""


class UnknownModelError(KvliteError):
    """The request names a model that this server does not have (HTTP 404)."""

    def __init__(self, model: str, served: str) -> None:
        super().__init__(f"model {shown(model)} does not exist; this server has {shown(served)}")
        self.model = model


@dataclass(frozen=True)
class Limits:
    """What a body is checked against: the engine's own limits, and the model's name in the API."""

    model: str
    engine: RequestLimits


@dataclass(frozen=True)
class Options:
    """What both endpoints ask in the same way."""

    params: SamplingParams
    request: RequestOptions
    stream: bool
    include_usage: bool
    return_token_ids: bool
    show_prompt_logprobs: bool
    """The client named prompt_logprobs; echo with logprobs asks the engine for them too, but shows them in its way."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class ChatRequest:
    """A checked body of /v1/chat/completions."""

    options: Options
    messages: tuple[dict[str, str], ...]
    documents: tuple[Document, ...]
    add_generation_prompt: bool
    template_variables: Mapping[str, str | int | float | bool | None]


@dataclass(frozen=True)
class CompletionRequest:
    """A checked body of /v1/completions; a prompt is text or token ids."""

    options: Options
    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool


def _fields(body: bytes | Json) -> Fields:
    return Fields(parse_object(body) if isinstance(body, bytes) else body)


def parse_chat(body: bytes | Json, limits: Limits, tenant: int = 0) -> ChatRequest:
    """Check a chat body of one tenant. Raises InvalidRequestError (400) or UnknownModelError (404)."""
    fields = _fields(body)
    _check_model(fields, limits)
    messages = tuple(_message(entry) for entry, _ in fields.items("messages", MAX_MESSAGES))
    wanted = fields.flag("logprobs", False)
    top = fields.integer("top_logprobs", 0, limits.engine.config.max_logprobs)
    if top is not None and not wanted:
        raise InvalidRequestError("top_logprobs", f"{top} needs logprobs=true")
    limit = fields.integer("max_completion_tokens", 1, limits.engine.max_model_len - 1)
    more: dict[str, Any] = {"logprobs": (top or 0) if wanted else None}
    if limit is not None:
        more["max_tokens"] = limit
    add_prompt = fields.flag("add_generation_prompt", True)
    variables = _template_variables(fields)
    documents = read_documents(fields, limits.engine.config)
    reuse, warnings = read_reuse(fields, limits.engine.config)
    options = _options(fields, limits, more, RequestOptions(tenant=tenant, reuse=reuse), warnings)
    return ChatRequest(options, messages, documents, add_prompt, variables)


def parse_completion(body: bytes | Json, limits: Limits, tenant: int = 0) -> CompletionRequest:
    """Check a completion body of one tenant. Raises InvalidRequestError (400) or UnknownModelError (404)."""
    fields = _fields(body)
    _check_model(fields, limits)
    prompts = _prompts(fields, limits)
    echo = fields.flag("echo", False)
    logprobs = fields.integer("logprobs", 0, limits.engine.config.max_logprobs)
    more: dict[str, Any] = {"logprobs": logprobs}
    if echo and logprobs is not None and fields.raw("prompt_logprobs") is None:
        more["prompt_logprobs"] = logprobs
    reuse = read_plain_reuse(fields, limits.engine.config)
    options = _options(fields, limits, more, RequestOptions(tenant=tenant, reuse=reuse))
    return CompletionRequest(options, prompts, echo)


def _check_model(fields: Fields, limits: Limits) -> None:
    model = fields.text("model")
    if model is not None and model != limits.model:
        raise UnknownModelError(model, limits.model)


def _options(
    fields: Fields,
    limits: Limits,
    more: dict[str, Any],
    request: RequestOptions,
    warnings: tuple[str, ...] = (),
) -> Options:
    """The shared fields; reads the last ones, so what is unread afterwards is unknown."""
    stream = fields.flag("stream", False)
    include_usage = _stream_options(fields, stream)
    sampling = {name: fields.raw(name) for name in SAMPLING_FIELDS} | _counts(fields, limits)
    given = {name: value for name, value in sampling.items() if value is not None}
    if stream and given.get("prompt_logprobs") is not None:
        raise InvalidRequestError("prompt_logprobs", "not available with stream=true")
    config = limits.engine.config
    params = SamplingParams(
        **cast("dict[str, Any]", given) | {name: value for name, value in more.items() if value is not None},
        stop=fields.texts("stop", config.max_stop, config.max_stop_bytes),
        stop_token_ids=fields.integers("stop_token_ids", 0, limits.engine.vocab_size - 1, STOP_IDS_CEILING),
        logit_bias=fields.bias("logit_bias", limits.engine.vocab_size, config.max_logit_bias),
    )
    options = Options(
        params=params,
        request=replace(request, priority=fields.integer("priority", -PRIORITY_LIMIT, PRIORITY_LIMIT) or 0),
        stream=stream,
        include_usage=include_usage,
        return_token_ids=fields.flag("return_token_ids", False),
        show_prompt_logprobs="prompt_logprobs" in given,
        warnings=warnings,
    )
    _refuse_later(fields)
    return _with_warnings(options, fields, config.strict_fields)


def _counts(fields: Fields, limits: Limits) -> dict[str, int | None]:
    """The numbers whose upper end this server sets, so that an error names what it really allows."""
    config, longest = limits.engine.config, limits.engine.max_model_len - 1
    return {
        "n": fields.integer("n", 1, min(config.max_n, config.max_num_seqs)),
        "prompt_logprobs": fields.integer("prompt_logprobs", 0, config.max_logprobs),
        "max_tokens": fields.integer("max_tokens", 1, longest),
        "min_tokens": fields.integer("min_tokens", 0, longest),
    }


def _stream_options(fields: Fields, stream: bool) -> bool:
    value = fields.object("stream_options")
    if value is None:
        return False
    if not stream:
        raise InvalidRequestError("stream_options", f"{shown(value)} is only allowed with stream=true")
    inner = Fields(value, "stream_options.")
    include_usage = inner.flag("include_usage", False)
    # Padding against traffic analysis is the only other option that clients send; false asks for nothing.
    if inner.flag("include_obfuscation", False):
        raise InvalidRequestError("stream_options.include_obfuscation", "true is not supported yet: leave it out")
    if unread := inner.unread():
        raise InvalidRequestError(unread[0], "unknown option: allowed is include_usage")
    return include_usage


def _refuse_later(fields: Fields) -> None:
    for name, neutral in LATER.items():
        value = fields.raw(name)
        if value is not None and not any(value == other and type(value) is type(other) for other in neutral):
            raise InvalidRequestError(name, f"{shown(value)} is not supported yet: leave the field out")


def _with_warnings(options: Options, fields: Fields, strict: bool) -> Options:
    unknown = fields.unread()
    if unknown and strict:
        raise InvalidRequestError(unknown[0], "unknown field, and the server runs with --strict-fields")
    warnings = (f"unknown field {shown(name)} was ignored" for name in unknown)
    return replace(options, warnings=(*options.warnings, *warnings))


def _message(entry: Fields) -> dict[str, str]:
    """One message with its content as a single text; `developer` is the newer spelling of `system`."""
    role = entry.choice("role", ROLES)
    if role is None:
        entry.refuse("role", None, "one of " + ", ".join(ROLES))
    message = {"role": "system" if role == "developer" else role, "content": _content(entry)}
    for name in ("tool_calls", "function_call", "audio", "tool_call_id"):
        if entry.raw(name):
            raise InvalidRequestError(entry.path(name), "not supported yet: leave the field out")
    if (name := entry.text("name", 64)) is not None:
        message["name"] = name
    entry.raw("refusal")
    if unread := entry.unread():
        raise InvalidRequestError(unread[0], "unknown field of a message: allowed are role, content, name")
    return message


def _content(entry: Fields) -> str:
    value = entry.raw("content")
    if isinstance(value, str):
        return value
    if not as_list(value):
        entry.refuse("content", value, "text or a list of text parts")
    texts: list[str] = []
    for part, _ in entry.items("content", MAX_MESSAGES):
        kind = part.text("type")
        if kind != "text":
            part.refuse("type", kind, "text (other kinds of content are not supported yet)")
        text = part.text("text")
        if text is None:
            part.refuse("text", None, "text")
        texts.append(text)
    return "\n".join(texts)


def _template_variables(fields: Fields) -> dict[str, str | int | float | bool | None]:
    """Switches such as enable_thinking. Scalars and words only: they reach the template outside its protection."""
    variables: dict[str, str | int | float | bool | None] = {}
    allowed = "true, false, a number or up to 64 letters, digits, blanks, dots, _ and -"
    for name, value in (fields.object("chat_template_kwargs") or {}).items():
        path = f"chat_template_kwargs.{name}"
        if not re.fullmatch("[a-z][a-z0-9_]{0,63}", name) or name in RESERVED_VARIABLES or name.endswith("_token"):
            raise InvalidRequestError("chat_template_kwargs", f"{shown(name)} is not allowed as a template variable")
        if isinstance(value, str) and not re.fullmatch(r"[A-Za-z0-9_. -]{0,64}", value):
            fields.refuse(path, value, allowed)
        if value is not None and not isinstance(value, str | int | float):
            fields.refuse(path, value, allowed)
        variables[name] = value
    return variables


def _prompts(fields: Fields, limits: Limits) -> tuple[str | tuple[int, ...], ...]:
    """str, [str], [int] or [[int]], as a tuple of prompts in the order given."""
    value = fields.raw("prompt")
    allowed = "text, a list of texts, a list of token ids or a list of lists of token ids, none of them empty"
    if isinstance(value, str) and value:
        return (value,)
    entries = as_list(value)
    if not entries:
        fields.refuse("prompt", value, allowed)
    if isinstance(entries[0], int):
        return (_ids("prompt", entries, limits),)
    if len(entries) > limits.engine.config.max_num_waiting:
        fields.refuse("prompt", entries, f"at most {limits.engine.config.max_num_waiting} prompts")
    prompts: list[str | tuple[int, ...]] = []
    for i, entry in enumerate(entries):
        name = f"prompt[{i}]"
        if isinstance(entry, str) and entry and isinstance(entries[0], str):
            prompts.append(entry)
        elif (ids := as_list(entry)) and isinstance(entries[0], list):
            prompts.append(_ids(name, ids, limits))
        else:
            fields.refuse(name, entry, allowed)
    return tuple(prompts)


def _ids(name: str, entries: list[object], limits: Limits) -> tuple[int, ...]:
    if len(entries) > limits.engine.max_model_len:
        raise InvalidRequestError(
            name, f"{len(entries)} tokens are too many: max_model_len is {limits.engine.max_model_len}"
        )
    ids: list[int] = []
    for i, token in enumerate(entries):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < limits.engine.vocab_size:
            raise InvalidRequestError(
                f"{name}[{i}]", f"{shown(token)} is no token id: must be between 0 and {limits.engine.vocab_size - 1}"
            )
        ids.append(token)
    return tuple(ids)
