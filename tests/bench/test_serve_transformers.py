"""transformers behind the wire format: kvlite's tokens, batches of one kind, and an error that reaches its clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvlite import Engine, SamplingParams
from kvlite.bench import make_model
from kvlite.bench.client import Address, RequestError
from kvlite.bench.make_model import Shape
from kvlite.bench.serve_transformers import MAX_BATCH, Batcher, Waiting, handler
from kvlite.bench.server import Server
from kvlite.bench.workloads import Job


@contextmanager
def serving(model: Any) -> Generator[Server]:
    batcher = Batcher(model)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(batcher, "m"))
    for run in (server.serve_forever, batcher.run):
        threading.Thread(target=run, daemon=True).start()
    try:
        yield Server(Address("127.0.0.1", server.server_address[1], "", False), "m", None, plain=False)
    finally:
        server.shutdown()
        server.server_close()


async def ask(server: Server, job: Job) -> list[int]:
    return [token async for piece in server.send(job) for token in piece.token_ids]


async def ask_all(server: Server, jobs: list[Job]) -> list[list[int]]:
    return await asyncio.gather(*(ask(server, job) for job in jobs))


def test_it_says_what_kvlite_says_to_several_clients_at_once(tmp_path: Path) -> None:
    make_model.make(Shape("qwen2", 2, 64, 4, 2, 16, 96, 512, 128), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    jobs = [Job(tuple(range(20 + idx, 36 + idx + idx % 2)), 6) for idx in range(5)]
    with serving(model) as server:
        answers = asyncio.run(ask_all(server, jobs))
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    with Engine(str(tmp_path), dtype="float32", num_threads=1, kv_cache_bytes=1 << 20, max_num_seqs=2) as engine:
        assert answers == [list(engine.generate(list(job.prompt), params).token_ids) for job in jobs]


def test_a_failure_of_the_model_reaches_the_client_and_the_server_goes_on() -> None:
    class Broken:
        def generate(self, *arguments: Any, **named: Any) -> None:
            raise MemoryError("no room")

    with serving(Broken()) as server:
        for _ in range(2):
            with pytest.raises(RequestError, match="MemoryError: no room"):
                asyncio.run(ask(server, Job((20, 21), 4)))


def test_a_batch_has_one_kind_at_most_eight_requests_and_keeps_the_order() -> None:
    batcher = Batcher(model=None)
    requests = [Waiting([1] * (3 if idx == 2 else 5), 4) for idx in range(11)]
    for request in requests:
        batcher.add(request)
    batches = [batcher._next() for _ in range(3)]
    assert batches[0] == [requests[idx] for idx in (0, 1, 3, 4, 5, 6, 7, 8)]
    assert len(batches[0]) == MAX_BATCH
    assert [batches[1], batches[2]] == [[requests[2]], requests[9:]]
