"""A fleet to measure moves with: engine 0 is the source, each other one is reached over a transport of its own.

Every engine is a process (`python -m bench.fleet`) with one computing thread, pinned to a core: the source's to the
first, all others' to the last, so that source and destination have a core each. Threads that copy, and the front-end
in the benchmark's process, run where the system puts them. Every request begins at the source, which keeps finished KV:
a prompt is computed once. Destinations keep none, so that every move takes all of it along. SIGUSR1 makes a source
freeze a request before it copies the first block (SIGUSR2: no longer): a blocking copy. Called by `migrate`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from kvlite import Engine, SamplingParams
from kvlite.config import EngineConfig
from kvlite.errors import KvliteError
from kvlite.fleet import dial, exporter, peers
from kvlite.fleet.auth import FleetKey
from kvlite.fleet.frontend import FleetEngine
from kvlite.fleet.launcher import load_text_side
from kvlite.fleet.link_config import LinkConfig
from kvlite.fleet.links import Link
from kvlite.fleet.messages import OWNER, Setup, decode_setup, encode_setup
from kvlite.fleet.speed import Speed
from kvlite.fleet.worker import Worker
from kvlite.request import validate

from .errors import BenchError

SOURCE = 0
GIGABIT = 125e6
PATIENCE_S = 300.0
"""No protocol step of a measurement is given up earlier."""
START_S = 120.0


@dataclass(frozen=True)
class Transport:
    """A way to a destination."""

    name: str
    """Suffix of its keys."""
    text: str
    listen: str
    bytes_per_s: float | None = None


TRANSPORTS = {
    each.name: each
    for each in (
        Transport("shm", "shared memory", "unix"),
        Transport("tcp", "TCP", "tcp"),
        Transport("gbit", "TCP at 1 Gbit/s", "tcp", GIGABIT),
    )
}


class Reader:
    """Reads one stream, and notes when each token came."""

    def __init__(self, fleet: FleetEngine, prompt: list[int], num_tokens: int, name: str) -> None:
        self.name = name
        self.prompt_len = len(prompt)
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._grown = asyncio.Event()
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        self._deltas = fleet.stream_validated(validate(fleet.limits, prompt, params), name)
        self._task = asyncio.create_task(self._read())

    async def reached(self, num_tokens: int) -> None:
        """Returns when so many tokens came. Raises BenchError when the stream ends before."""
        while len(self.tokens) < num_tokens:
            if self._task.done():
                self._task.result()
                raise BenchError(f"{self.name} ended after {len(self.tokens)} of {num_tokens} tokens")
            self._grown.clear()
            await self._grown.wait()

    async def leave(self) -> None:
        """Wants no more."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._deltas.aclose()

    async def _read(self) -> None:
        try:
            async for delta in self._deltas:
                now = time.perf_counter()
                self.tokens += delta.token_ids
                self.times += [now] * len(delta.token_ids)
                self._grown.set()
        finally:
            self._grown.set()


class MovingFleet:
    """The front-end, and the engines' processes by number."""

    def __init__(self, front: FleetEngine, transports: list[Transport]) -> None:
        self.front = front
        requests = front._requests
        requests._choose = lambda preferred=-1: front.members.get(SOURCE)  # type: ignore[method-assign]
        self.engine_of = {transport.name: 1 + n for n, transport in enumerate(transports)}
        self.processes: list[asyncio.subprocess.Process] = []

    def freeze_first(self, on: bool) -> None:
        """Whether engines freeze a request before they copy from now on."""
        for process in self.processes:
            process.send_signal(signal.SIGUSR1 if on else signal.SIGUSR2)


@asynccontextmanager
async def opened(
    config: EngineConfig, source_kv_bytes: int, kv_bytes: int, transports: list[Transport]
) -> AsyncGenerator[MovingFleet]:
    """A source and a destination per transport. Raises BenchError when one does not come up."""
    _directory, tokenizer, defaults = load_text_side(config)
    fleet = MovingFleet(FleetEngine(config, tokenizer, defaults, 1 + len(transports)), transports)
    folder, key = tempfile.mkdtemp(prefix="kvlite-bench-"), FleetKey.generate()
    links: set[asyncio.Task[None]] = set()

    def on_link(link: Link) -> None:
        links.add(asyncio.create_task(fleet.front.serve(link)))

    at = f"unix:{folder}/owner"
    listener = await dial.listen(at, LinkConfig(engine=OWNER, key=key, window_bytes=0), on_link, lambda error: None)
    try:
        for engine, kind in enumerate(["unix", *(transport.listen for transport in transports)]):
            setup = Setup(
                engine=engine,
                owner=at,
                listen=f"unix:{folder}/{engine}" if kind == "unix" else "tcp:127.0.0.1:0",
                config={
                    "model": config.model,
                    "dtype": str(config.dtype),
                    "device": "cpu",
                    "kv_cache_bytes": kv_bytes if engine else source_kv_bytes,
                    "enable_prefix_caching": engine == SOURCE,
                    "max_num_seqs": config.max_num_seqs,
                    "num_threads": 1,
                    "deterministic": True,
                },
                max_inflight_bytes=1 << 40,
                **dict.fromkeys(("reserve_s", "ack_s", "freeze_s", "silence_s"), PATIENCE_S),
            )
            limits = {1 + n: transport.bytes_per_s for n, transport in enumerate(transports)}
            fleet.processes.append(await _spawn(setup, key, engine, limits))
        await _all_up(fleet)
        yield fleet
    finally:
        await fleet.front.shut()
        for process in fleet.processes:
            try:
                await asyncio.wait_for(process.wait(), 10)
            except TimeoutError:
                process.kill()
                await process.wait()
        await asyncio.gather(*links, return_exceptions=True)
        listener.close()
        shutil.rmtree(folder, ignore_errors=True)


async def _spawn(
    setup: Setup, key: FleetKey, engine: int, limits: dict[int, float | None]
) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, stdin=asyncio.subprocess.PIPE, env=os.environ | key.to_env()
    )
    assert process.stdin is not None
    more = {"last_core": engine != SOURCE, "bytes_per_s": {to: limit for to, limit in limits.items() if limit}}
    process.stdin.write(encode_setup(setup) + json.dumps(more).encode() + b"\n")
    process.stdin.close()
    return process


async def _all_up(fleet: MovingFleet) -> None:
    up = asyncio.gather(*(fleet.front.until_up(engine) for engine in range(len(fleet.processes))))
    ends = [asyncio.ensure_future(process.wait()) for process in fleet.processes]
    done, _ = await asyncio.wait({up, *ends}, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    if up not in done:
        up.cancel()
        raise BenchError(f"the engines did not come up within {START_S:g} s, or one ended: see its last words above")


# The process of one engine


async def _freeze_before(source: exporter.Exporter, request: int, attempt: int) -> None:
    leaving, live = source._exported(request, attempt)
    handle = live.handle

    def is_frozen(engine: Engine) -> bool:
        engine.migration.freeze(handle)
        return engine.migration.is_frozen(handle)

    await source._engine.call(lambda engine: None, when=is_frozen)
    leaving.frozen_at = time.monotonic()


def _change_worker(bytes_per_s: dict[str, float]) -> None:
    """Throttles links by destination, and listens to the signals of `freeze_first`."""
    freezes = False
    stage, connect = exporter.Exporter.stage, dial.connect

    async def stage_frozen(self: exporter.Exporter, request: int, attempt: int, *more: Any) -> Any:
        if freezes:
            await _freeze_before(self, request, attempt)
        return await stage(self, request, attempt, *more)

    async def connect_throttled(address: str, config: LinkConfig, peer: int) -> Link:
        return await connect(address, replace(config, bytes_per_s_limit=bytes_per_s.get(str(peer))), peer)

    def switch(number: int, _frame: object) -> None:
        nonlocal freezes
        freezes = number == signal.SIGUSR1

    exporter.Exporter.stage = stage_frozen  # type: ignore[method-assign, assignment]
    peers.connect = connect_throttled  # type: ignore[assignment]
    signal.signal(signal.SIGUSR1, switch)
    signal.signal(signal.SIGUSR2, switch)


async def _serve(setup: Setup, key: FleetKey, engine: Engine, core: int | None) -> None:
    worker = Worker(setup, key, engine, Speed())
    if core is not None:
        await worker.engine.call(lambda engine: os.sched_setaffinity(0, {core}))
    await worker.serve()


def main() -> int:
    """One engine; its settings come on standard input."""
    setup = decode_setup(sys.stdin.buffer.readline())
    more = json.loads(sys.stdin.buffer.readline())
    key = FleetKey.from_env()
    assert key is not None, "given by who started this"
    _change_worker(more["bytes_per_s"])
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    core = cores[-1 if more["last_core"] else 0] if cores else None
    try:
        engine = Engine(EngineConfig(**setup.config), progress=False)  # type: ignore[arg-type]
        engine.migration.pool.data.zero_()
        asyncio.run(_serve(setup, key, engine, core))
    except KvliteError as error:
        print(f"engine {setup.engine}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
