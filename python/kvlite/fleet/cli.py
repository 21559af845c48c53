"""What `kvlite fleet move` and `kvlite fleet status` say to a running server, and what they print.

Owns two HTTP calls and their errors in words; the server's key comes from KVLITE_ADMIN_KEY, never from a command line.
Standard library only, so that the command starts at once. Called by cli.py.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.parse
from collections.abc import Mapping
from typing import Any, cast

from kvlite.errors import ConfigError, KvliteError

TIMEOUT_S = 120.0
"""A move takes as long as its copies; its own time limits end it much earlier."""
KEY_VARIABLE = "KVLITE_ADMIN_KEY"
ANSWER_BYTES_MAX = 16 << 20


class FleetCallError(KvliteError):
    """The server could not be asked, or refused."""


def call(url: str, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON that the server at `url` answers. Raises ConfigError (url) or FleetCallError."""
    connection = _connection(url)
    key = os.environ.get(KEY_VARIABLE)
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
        response = connection.getresponse()
        status, raw = response.status, response.read(ANSWER_BYTES_MAX)
    except (OSError, http.client.HTTPException) as error:
        raise FleetCallError(f"{url} does not answer: {str(error) or type(error).__name__}") from None
    finally:
        connection.close()
    answer = _object(raw)
    if answer is None:
        raise FleetCallError(f"{url} answered {status} without a JSON object: is it a kvlite server?")
    if status == 404 and answer.get("error", {}).get("code") == "not_found":
        raise FleetCallError(f"{url} is no fleet: start one with kvlite fleet serve")
    if status != 200:
        raise FleetCallError(str(answer.get("error", {}).get("message", f"status {status}")))
    return answer


def move_lines(answer: Mapping[str, Any]) -> str:
    """What came of a move, in a line or two."""
    who = f"{answer['request']}: engine {answer['source']} -> {answer['to']} by {answer['how']}: {answer['result']}"
    if answer["reason"]:
        who += f" ({answer['reason']})"
    gap = "" if answer["gap_s"] is None else f", gap {answer['gap_s'] * 1e3:.1f} ms"
    return (
        f"{who}\n{answer['tokens']} tokens before it, {answer['stages']} stages, {answer['blocks']} blocks, "
        f"{answer['bytes']} bytes, {answer['seconds'] * 1e3:.1f} ms{gap}"
    )


def status_lines(answer: Mapping[str, Any]) -> str:
    """Engines, each with its requests."""
    lines = ["the fleet drains: new requests are refused"] if answer["draining"] else []
    for engine in answer["engines"]:
        line = f"engine {engine['id']}  {engine['state']}"
        if engine["pid"] is not None:
            line += f"  process {engine['pid']}"
        if engine["running"] is not None:
            line += (
                f"  {engine['running']} running, {engine['waiting']} waiting, "
                f"{engine['free_blocks']} of {engine['num_blocks']} blocks free"
            )
        lines.append(line)
        lines += [f"  {_request(request)}" for request in engine["requests"]]
    if answer["waiting"]:
        lines.append("on no engine")
        lines += [f"  {_request(request)}" for request in answer["waiting"]]
    return "\n".join(lines)


def _request(request: Mapping[str, Any]) -> str:
    moving = "" if request["moving_to"] is None else f", moving to engine {request['moving_to']}"
    return f"{request['name']}  number {request['id']}, epoch {request['epoch']}, {request['tokens']} tokens{moving}"


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(raw)
    except ValueError:
        return None
    return cast("dict[str, Any]", answer) if isinstance(answer, dict) else None


def _connection(url: str) -> http.client.HTTPConnection:
    wrong = ConfigError("--url", f"{url[:200]!r} is not allowed: must be http://HOST:PORT or https://HOST:PORT")
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise wrong from None
    if parts.scheme not in ("http", "https") or not host or parts.path not in ("", "/") or parts.query:
        raise wrong
    made = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return made(host, port, timeout=TIMEOUT_S)
