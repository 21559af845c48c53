"""One server process on the shipped model for all end-to-end tests, and a small HTTP client to watch it with."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvlite.demo import HOST, free_port, read_script, wait_until_ready

DEADLINE_S = 60.0
"""Bound of every wait; reaching it fails the test."""
POLL_S = 0.02


class Server:
    """A running `kvlite serve`. `key` is what its requests bring when they name none."""

    def __init__(self, *arguments: str, key: str | None = None) -> None:
        self.port = free_port()
        self.key = key
        command = [sys.executable, "-m", "kvlite.server", "--port", str(self.port), *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def wait_until_ready(self) -> None:
        wait_until_ready(self.process, self.port, DEADLINE_S, self.key)

    def open(self, method: str, path: str, body: object = None, key: str | None = None) -> http.client.HTTPResponse:
        """One request on a connection of its own; the response is unread."""
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = http.client.HTTPConnection(HOST, self.port, timeout=DEADLINE_S)
        headers = {"content-type": "application/json", "authorization": f"Bearer {key or self.key}"}
        connection.request(method, path, raw, headers)
        response = connection.getresponse()
        response.connection = connection  # type: ignore[attr-defined]
        return response

    def call(self, method: str, path: str, body: object = None, key: str | None = None) -> tuple[int, Any]:
        """Status and JSON."""
        response = self.open(method, path, body, key)
        try:
            return response.status, json.loads(response.read())
        finally:
            response.connection.close()  # type: ignore[attr-defined]

    def post_raw(self, path: str, body: object) -> socket.socket:
        """A request on a bare socket, sent whole, nothing read."""
        data = json.dumps(body).encode()
        key = f"authorization: Bearer {self.key}\r\n"
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\n{key}content-length: {len(data)}\r\n\r\n".encode()
        connection = socket.create_connection((HOST, self.port), timeout=DEADLINE_S)
        connection.sendall(head + data)
        return connection

    def metrics(self) -> dict[str, float]:
        """Samples by name; those with labels beside the model's are {name}/{label value}."""
        response = self.open("GET", "/metrics")
        text = response.read().decode()
        response.connection.close()  # type: ignore[attr-defined]
        samples: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = [value for key, value in sample.labels.items() if key != "model_name"]
                samples["/".join([sample.name.removeprefix("kvlite:"), *labels])] = sample.value
        return samples

    def wait_until(self, holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """The first metrics for which `holds`."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            metrics = self.metrics()
            if holds(metrics):
                return metrics
            time.sleep(POLL_S)
        raise AssertionError(f"never held within {DEADLINE_S:g} s; last metrics: {metrics}")

    def wait_until_idle(self) -> dict[str, float]:
        """The metrics when nothing runs and nobody owns a block."""
        return self.wait_until(
            lambda m: m["num_requests_running"] == m["num_requests_waiting"] == m["kv_cache_usage_perc"] == 0
        )

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    started = Server("--deterministic", "--kv-cache-bytes", "128MiB", "--max-num-seqs", "16")
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return openai_client(server, "unused")


def openai_client(server: Server, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{HOST}:{server.port}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="session")
def short_messages() -> list[dict[str, str]]:
    """Two documents and a question whose answer needs both: Edgar's, named in the first, is the home in the second."""
    script = read_script()
    return [
        {"role": "system", "content": script.system},
        {"role": "document", "content": script.documents[8]},
        {"role": "document", "content": script.documents[9]},
        {"role": "user", "content": "Where does Edgar live?"},
    ]


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Makes servers of a test's own, ready, with a small pool."""
    servers: list[Server] = []

    def make(*arguments: str) -> Server:
        servers.append(Server("--kv-cache-bytes", "32MiB", *arguments))
        servers[-1].wait_until_ready()
        return servers[-1]

    yield make
    for server in servers:
        server.stop()
