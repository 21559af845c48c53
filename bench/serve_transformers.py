"""transformers behind OpenAI's wire format, for `compare`: `python -m bench.serve_transformers DIR --port P`.

Requests of one length that wait at the same time form a batch (at most 8) for `generate` with a static cache, which is
how transformers is fastest without an engine; tokens are streamed as they come. Greedy, ids in and ids out, end-of-text
ignored. Standard library HTTP; one thread computes. Knows just the fields that the load generator sends.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from .options import torch_dtype

MAX_BATCH = 8
GATHER_S = 0.02
"""How long a batch waits for companions."""


@dataclass
class Waiting:
    """One request; `out` gets its ids, then None, or the exception that ended it."""

    prompt: list[int]
    max_tokens: int
    out: queue.SimpleQueue[int | Exception | None] = field(default_factory=queue.SimpleQueue)

    @property
    def kind(self) -> tuple[int, int]:
        """Requests of one kind can share a batch."""
        return len(self.prompt), self.max_tokens


class Streamer(BaseStreamer):
    """Hands the ids of each step to the requests of a batch; the first call brings the prompts."""

    def __init__(self, batch: list[Waiting]) -> None:
        self._batch = batch
        self._started = False

    def put(self, value: torch.Tensor) -> None:
        """One id per request."""
        if self._started:
            for request, token in zip(self._batch, value.view(-1).tolist(), strict=True):
                request.out.put(token)
        self._started = True

    def end(self) -> None:
        """The batch is done."""
        for request in self._batch:
            request.out.put(None)


class Batcher:
    """Takes requests in order of arrival, with those of the same kind that wait beside them."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._arrived: queue.SimpleQueue[Waiting] = queue.SimpleQueue()
        self._waiting: list[Waiting] = []

    def add(self, request: Waiting) -> None:
        """Queues a request."""
        self._arrived.put(request)

    def run(self) -> None:
        """For ever: a batch at a time. A failed batch ends its requests with the error."""
        while True:
            batch = self._next()
            try:
                self._generate(batch)
            except Exception as error:  # the server goes on, its clients are told
                for request in batch:
                    request.out.put(error)

    def _next(self) -> list[Waiting]:
        if not self._waiting:
            self._waiting.append(self._arrived.get())
        deadline = time.monotonic() + GATHER_S
        while True:
            # What has arrived is taken even when the time is over.
            try:
                self._waiting.append(self._arrived.get(timeout=max(deadline - time.monotonic(), 0)))
            except queue.Empty:
                break
        kind = self._waiting[0].kind
        batch = [request for request in self._waiting if request.kind == kind][:MAX_BATCH]
        self._waiting = [request for request in self._waiting if request not in batch]
        return batch

    def _generate(self, batch: list[Waiting]) -> None:
        prompts = torch.tensor([request.prompt for request in batch])
        self._model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=batch[0].max_tokens, do_sample=False,
            cache_implementation="static", disable_compile=True, pad_token_id=0, streamer=Streamer(batch),
        )  # fmt: skip


def handler(batcher: Batcher, name: str) -> type[BaseHTTPRequestHandler]:
    """The two routes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """/v1/models."""
            self._reply({"object": "list", "data": [{"id": name, "object": "model"}]})

        def do_POST(self) -> None:
            """/v1/completions, streamed."""
            fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = Waiting(fields["prompt"], fields["max_tokens"])
            batcher.add(request)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            count = 0
            while (token := request.out.get()) is not None:
                if isinstance(token, Exception):
                    self._event({"error": {"message": f"{type(token).__name__}: {token}"}})
                    return
                count += 1
                self._event({"choices": [{"index": 0, "text": "", "token_ids": [token]}]})
            usage = {"prompt_tokens": len(request.prompt), "completion_tokens": count}
            self._event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, fields: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(fields).encode() + b"\n\n")

        def _reply(self, fields: dict[str, Any]) -> None:
            body = json.dumps(fields).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    return Handler


def main(arguments: list[str]) -> int:
    """Loads, listens, computes until it is ended."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve_transformers")
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch_dtype(options.dtype)).eval()
    model.generation_config.eos_token_id = None
    batcher = Batcher(model)
    server = ThreadingHTTPServer(("127.0.0.1", options.port), handler(batcher, options.model.resolve().name))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    batcher.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
