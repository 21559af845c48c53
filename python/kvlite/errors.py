"""Errors by blame: the caller's, capacity, a model on disk, ours.

Owns the exception classes that cross a public boundary; knows nothing of HTTP (the server maps them to status codes).
A message is one sentence that names the thing, its value and what would be right. Raised everywhere, imports nothing.
"""

from __future__ import annotations


class KvliteError(Exception):
    """Root of everything that kvlite raises on purpose."""


class InvalidRequestError(KvliteError, ValueError):
    """The caller's request cannot be served as written; `param` names the field (HTTP 400)."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param
        self.message = message


class UnknownDocumentError(InvalidRequestError):
    """No stored document of this tenant, and no public one, has that id (HTTP 404)."""

    def __init__(self, param: str, id: str) -> None:
        super().__init__(param, f"document {id[:64]!r} does not exist: create it first, or send its text")
        self.id = id


class ConfigError(KvliteError, ValueError):
    """A setting has a value outside its range; `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class CapacityError(KvliteError):
    """A limit is reached now and may not be later (HTTP 429 or 503); retry after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class ModelLoadError(KvliteError):
    """A model directory cannot be used; the message says which file or tensor and why."""


class EngineClosedError(KvliteError):
    """The engine was closed before the call or while it waited."""

    def __init__(self, message: str = "the engine is closed") -> None:
        super().__init__(message)


class EngineError(KvliteError):
    """Our fault: a step failed. The requests of that step ended with FinishReason.ERROR; the engine goes on."""
