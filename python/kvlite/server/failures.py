"""Errors as HTTP: which status, and OpenAI's body {"error": {message, type, param, code}}.

Owns the one table from exceptions to status codes. Knows no endpoint. Called by app.py, gate.py and stream.py.
"""

from __future__ import annotations

import math
from typing import Any

from kvlite.errors import CapacityError, EngineClosedError, InvalidRequestError, KvliteError, UnknownDocumentError
from kvlite.server.protocol import UnknownModelError

MESSAGE_CHARS = 500
"""Longest message that a client gets back; a bad value may be as long as the body."""


class RequestTimeoutError(KvliteError):
    """The request reached its time limit before its answer was complete (HTTP 504)."""

    def __init__(self, message: str = "the request reached its time limit") -> None:
        super().__init__(message)


class HttpError(KvliteError):
    """A refusal that has no other class: status, code and message as they go out."""

    def __init__(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}
        self.param = param


def status_of(error: Exception) -> int:
    """HTTP status of an error."""
    match error:
        case HttpError():
            return error.status
        case UnknownModelError() | UnknownDocumentError():
            return 404
        case InvalidRequestError():
            return 400
        case CapacityError():
            return 429
        case EngineClosedError():
            return 503
        case RequestTimeoutError():
            return 504
        case _:
            return 500


def headers_of(error: Exception) -> dict[str, str]:
    """Headers that belong to an error."""
    match error:
        case HttpError():
            return error.headers
        case CapacityError():
            return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
        case EngineClosedError():
            return {"retry-after": "1"}
        case _:
            return {}


def error_body(error: Exception) -> dict[str, Any]:
    """OpenAI's error object. Errors of ours that are not meant for users show their kind alone."""
    message, param, code = str(error), None, None
    match error:
        case HttpError():
            kind = "invalid_request_error" if error.status < 500 else "server_error"
            param, code = error.param, error.code
        case UnknownDocumentError():
            kind, param, code = "invalid_request_error", error.param, "document_not_found"
        case InvalidRequestError():
            kind, param, code = "invalid_request_error", error.param, "invalid_value"
        case UnknownModelError():
            kind, param, code = "invalid_request_error", "model", "model_not_found"
        case CapacityError():
            kind, code = "rate_limit_error", "rate_limit_exceeded"
        case EngineClosedError():
            kind, code = "server_error", "shutting_down"
        case RequestTimeoutError():
            kind, code = "timeout_error", "request_timeout"
        case KvliteError():
            kind, code = "server_error", "engine_error"
        case _:
            kind, code, message = "server_error", "internal_error", f"internal error ({type(error).__name__})"
    if len(message) > MESSAGE_CHARS:
        message = message[:MESSAGE_CHARS] + "..."
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
