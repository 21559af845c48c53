"""What a body says about documents and the reuse of KV, as checked values.

Owns `documents`, `reuse` and `reuse_options` of requests and the bodies of /v1/documents; methods and their options are
checked behind request.py's wall, which knows them. Called by protocol.py and documents.py in a worker thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from kvlite.config import EngineConfig
from kvlite.errors import InvalidRequestError
from kvlite.reuse_types import ID_PATTERN, OPTIONS_CEILING, TITLE_CEILING, Document, OptionValue, Reuse, ReuseMode
from kvlite.server.fields import Fields, parse_object, shown

TTL_S_MIN, TTL_S_MAX = 0.001, 10 * 365 * 24 * 3600.0
OPTION_CHARS = 64
OWN_OPTIONS = ("method", "recompute_ratio")
"""Of `reuse_options`; the others are those of the method."""


@dataclass(frozen=True)
class Retention:
    """How long a stored document stays, and who may use it."""

    pinned: bool
    ttl_s: float | None
    public: bool


@dataclass(frozen=True)
class NewDocuments:
    """A checked body of POST /v1/documents."""

    documents: tuple[Document, ...]
    retention: Retention
    listed: bool
    """The body had a list, so the answer has one."""


@dataclass(frozen=True)
class Change:
    """A checked body of POST /v1/documents/{id}; what is not given stays as it is."""

    pinned: bool | None
    ttl_s: float | None
    changes_ttl: bool
    """Whether `ttl_s` is meant; None then lets the document stay for ever."""


def read_documents(fields: Fields, config: EngineConfig) -> tuple[Document, ...]:
    """`documents` of a chat request, () when absent or empty; one without text names a stored one.

    Raises InvalidRequestError: too many, an id twice, neither id nor text, empty text.
    """
    return () if fields.raw("documents") in (None, []) else _sources(fields, config, _document_or_id)


def read_reuse(fields: Fields, config: EngineConfig) -> tuple[Reuse | None, tuple[str, ...]]:
    """What a chat request wants, None: as the server does, and warnings. Raises InvalidRequestError.

    Names, options and ranges of methods are checked by `request.validate`, which knows them.
    """
    given = fields.choice("reuse", tuple(ReuseMode))
    mode = ReuseMode(given or config.reuse)
    value = fields.object("reuse_options") or {}
    if len(value) > OPTIONS_CEILING:
        fields.refuse("reuse_options", value, f"an object of at most {OPTIONS_CEILING} entries")
    inner = Fields(value, "reuse_options.")
    method = inner.text("method", OPTION_CHARS)
    ratio = inner.number("recompute_ratio", 0.0, 1.0)
    options = {name: _option(inner, name) for name in value if name not in OWN_OPTIONS and value[name] is not None}
    reuse = Reuse(mode, ratio, method, options)
    if not config.enable_prefix_caching:
        if given is not None and reuse.is_blended:
            raise InvalidRequestError("reuse", f"{shown(given)} needs a server with --enable-prefix-caching")
        return Reuse.OFF, ()
    if value and not reuse.is_blended:
        return Reuse(mode), (f"reuse_options have no effect with reuse={mode}",)
    return (None if given is None and not value else reuse), ()


def read_plain_reuse(fields: Fields, config: EngineConfig) -> Reuse:
    """The same for an endpoint without documents. Raises InvalidRequestError for whatever needs them."""
    if fields.raw("documents") not in (None, []):
        raise InvalidRequestError("documents", "a plain prompt has no place for them: use /v1/chat/completions")
    if fields.raw("reuse_options") not in (None, {}):
        raise InvalidRequestError("reuse_options", "a plain prompt is never blended: use /v1/chat/completions")
    given = fields.choice("reuse", tuple(ReuseMode))
    if given in (ReuseMode.BLEND, ReuseMode.VERIFY):
        raise InvalidRequestError(
            "reuse", f"{shown(given)} needs documents, for which a plain prompt has no place: must be off or prefix "
            "here, or use /v1/chat/completions",
        )  # fmt: skip
    return Reuse.OFF if (given or config.reuse) == ReuseMode.OFF else Reuse.PREFIX


def parse_new_documents(body: bytes, config: EngineConfig) -> NewDocuments:
    """Check the body of POST /v1/documents: one document, or `documents` with several. Raises InvalidRequestError."""
    fields = Fields(parse_object(body))
    listed = fields.raw("documents") is not None
    documents = _sources(fields, config, _document) if listed else (_document(fields),)
    retention = Retention(
        pinned=fields.flag("pinned", False),
        ttl_s=fields.number("ttl_s", TTL_S_MIN, TTL_S_MAX),
        public=fields.flag("public", False),
    )
    _refuse_unread(fields, "id, title, text or documents, and pinned, ttl_s, public")
    return NewDocuments(documents, retention, listed)


def parse_public_document(line: bytes) -> Document:
    """Check one line of --public-documents; its id is how requests name it. Raises InvalidRequestError."""
    fields = Fields(parse_object(line))
    document = _document(fields)
    _refuse_unread(fields, "id, title, text")
    if document.id is None:
        fields.refuse("id", None, "text that requests can name")
    return document


def parse_change(body: bytes) -> Change:
    """Check the body of POST /v1/documents/{id}. Raises InvalidRequestError."""
    fields = Fields(values := parse_object(body))
    pinned = None if fields.raw("pinned") is None else fields.flag("pinned", False)
    change = Change(pinned, fields.number("ttl_s", TTL_S_MIN, TTL_S_MAX), "ttl_s" in values)
    _refuse_unread(fields, "pinned, ttl_s")
    if change.pinned is None and not change.changes_ttl:
        raise InvalidRequestError("body", "changes nothing: give pinned, ttl_s or both")
    return change


def _sources(fields: Fields, config: EngineConfig, read: Callable[[Fields], Document]) -> tuple[Document, ...]:
    """A list of documents without an id twice."""
    found: list[Document] = []
    seen: set[str] = set()
    for entry, _ in fields.items("documents", config.max_documents):
        source = read(entry)
        _refuse_unread(entry, "id, title, text")
        if source.id in seen:
            raise InvalidRequestError(entry.path("id"), f"{shown(source.id)} names two documents of one request")
        if source.id is not None:
            seen.add(source.id)
        found.append(source)
    return tuple(found)


def _document_or_id(entry: Fields) -> Document:
    if entry.raw("text") is not None:
        return _document(entry)
    id = _id(entry)
    if id is None:
        entry.refuse("text", None, "text, or left out beside the id of a stored document")
    if entry.raw("title") is not None:
        raise InvalidRequestError(entry.path("title"), "a stored document has its own: leave the field out")
    return Document(None, id)


def _document(entry: Fields) -> Document:
    text = entry.text("text")
    if text is None or not text.strip():
        entry.refuse("text", text, "text with at least one visible character")
    return Document(text, _id(entry), entry.text("title", TITLE_CEILING))


def _id(entry: Fields) -> str | None:
    id = entry.text("id")
    if id is not None and not re.fullmatch(ID_PATTERN, id):
        entry.refuse("id", id, "1 to 64 letters, digits, '.', '_', ':' or '-', beginning with a letter or digit")
    return id


def _option(fields: Fields, name: str) -> OptionValue:
    value = fields.raw(name)
    if not isinstance(value, str | int | float) or (isinstance(value, str) and len(value) > OPTION_CHARS):
        fields.refuse(name, value, f"true, false, a number or text of at most {OPTION_CHARS} characters")
    return value


def _refuse_unread(fields: Fields, allowed: str) -> None:
    if unread := fields.unread():
        raise InvalidRequestError(unread[0], f"unknown field: allowed are {allowed}")
