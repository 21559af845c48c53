"""`kvlite fleet serve` as a process with its workers, for end-to-end tests; watched over HTTP and by process id."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvlite.demo import HOST, free_port, wait_until_ready
from tests.e2e.conftest import DEADLINE_S, POLL_S, Server

SMALL = ("--deterministic", "--kv-cache-bytes", "32MiB", "--max-num-seqs", "16", "--num-threads", "2")
READY_S = 240.0
PROMPT = " Rain fell on the"
LONG = {
    "prompt": PROMPT, "max_tokens": 2000, "ignore_eos": True, "stream": True, "return_token_ids": True,
    "temperature": 1.0, "seed": 7,
}  # fmt: skip
"""Longer than any test reads it."""
SHORT = {"max_tokens": 120}


class FleetServer(Server):
    """Two engines on the shipped model."""

    def __init__(self, *arguments: str, engines: int = 2, environ: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.key = None
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        flags = ("--engines", str(engines), "--port", str(self.port), *SMALL, *arguments)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvlite.cli", "fleet", "serve", *flags],
            stderr=self._stderr, text=True, env=os.environ | (environ or {}),
        )  # fmt: skip

    @property
    def said(self) -> str:
        """What it wrote to standard error."""
        self._stderr.seek(0)
        return self._stderr.read()

    def wait_until_ready(self) -> None:
        """A start is three processes that load torch, beside whatever else this machine does."""
        wait_until_ready(self.process, self.port, READY_S, self.key)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def status(self) -> dict[str, Any]:
        code, answer = self.call("GET", "/v1/fleet")
        assert code == 200, answer
        return answer

    def until(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status for which `holds`."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            status = self.status()
            if holds(status):
                return status
            time.sleep(POLL_S)
        raise AssertionError(f"never held within {DEADLINE_S:g} s; last status: {status}")

    def until_up(self) -> dict[int, int]:
        """Process ids by engine, once every engine is up."""
        status = self.until(lambda status: all(engine["state"] == "up" for engine in status["engines"]))
        return {engine["id"]: engine["pid"] for engine in status["engines"]}

    def request(self, name: str) -> dict[str, Any] | None:
        """A request under way."""
        status = self.status()
        every = [*status["waiting"], *(request for engine in status["engines"] for request in engine["requests"])]
        return next((request for request in every if request["name"] == name), None)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`kvlite fleet ...` against this server."""
        return subprocess.run(
            [sys.executable, "-m", "kvlite.cli", "fleet", *arguments, "--url", self.url],
            capture_output=True, text=True, timeout=DEADLINE_S,
        )  # fmt: skip


class Answer:
    """A stream that is being read."""

    def __init__(self, server: FleetServer, body: dict[str, Any] | None = None) -> None:
        self._response = server.open("POST", "/v1/completions", LONG | (body or {}))
        self.ids: list[int] = []
        self.finish: str | None = None
        self.name = ""
        self.error: Any = None
        self.done = False

    def read(self, num_tokens: int = 1 << 30) -> list[int]:
        """Reads until there are so many tokens, or the end."""
        while len(self.ids) < num_tokens and not self.done:
            line = self._response.readline().strip()
            if not line.startswith(b"data: "):
                assert line == b"" and not self._response.isclosed(), f"the stream was cut after {len(self.ids)} tokens"
                continue
            self._take(line.removeprefix(b"data: "))
        return self.ids

    def _take(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        event = json.loads(data)
        self.error = event.get("error", self.error)
        self.name = event.get("id", self.name)
        for choice in event.get("choices", ()):
            self.ids += choice.get("token_ids", ())
            self.finish = choice["finish_reason"] or self.finish

    def leave(self) -> None:
        self._response.connection.close()  # type: ignore[attr-defined]
        self._response.close()


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie of the system's."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"{[pid for pid in pids if is_running(pid)]} still run"
        time.sleep(POLL_S)


def send(pid: int, number: signal.Signals) -> None:
    os.kill(pid, number)
