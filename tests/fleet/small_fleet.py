"""A whole fleet in one process: the real front-end and real workers over unix sockets, engines over tiny models.

`Fleet.slow` makes every step of every engine take a few milliseconds until `hurry`, so that a request is still running
when it is moved; copies have no pace, because it may be short. `Fleet.at` calls back at a chosen frame of the protocol.
"""

from __future__ import annotations

import asyncio
import socket
import tempfile
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from kvlite import Delta, Engine, RequestOutput, Reuse, SamplingParams
from kvlite.fleet.auth import FleetKey
from kvlite.fleet.dial import listen
from kvlite.fleet.effects import frame_name
from kvlite.fleet.frontend import FleetEngine
from kvlite.fleet.link_config import LinkConfig
from kvlite.fleet.links import Link
from kvlite.fleet.messages import OWNER, Setup
from kvlite.fleet.speed import Speed
from kvlite.fleet.worker import Worker
from kvlite.output import Collector
from kvlite.prompts import Prompt
from tests.engines import engine
from tests.fleet.link_pairs import free_address

TIMEOUT_S = 60.0
STEP_S = 0.004
KEY = FleetKey.generate()
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=7, max_tokens=60, ignore_eos=True)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, TIMEOUT_S))


class Fleet:
    """The parts, for a test to look at and to break."""

    def __init__(self, front: FleetEngine, workers: list[Worker], engines: list[Engine]) -> None:
        self.front = front
        self.workers = workers
        self.engines = engines
        self.tasks: list[asyncio.Task[None]] = []
        self._hurry = threading.Event()
        for each in engines:
            _slow_down(each, self._hurry)

    def hurry(self) -> None:
        """Engines are as fast as they can be from now on."""
        self._hurry.set()

    def slow(self) -> None:
        """Engines are slow again."""
        self._hurry.clear()

    @property
    def is_hurried(self) -> bool:
        return self._hurry.is_set()

    def wait_a_step(self) -> None:
        """For an engine's thread."""
        self._hurry.wait(STEP_S)

    async def stream(
        self, prompt: Prompt, params: SamplingParams, name: str = "r", *, reuse: Reuse | None = None
    ) -> Reader:
        """A request that has produced its first delta."""
        request = self.engines[0].validate(prompt, params, reuse=reuse)
        reader = Reader(self.front.stream_validated(request, name), Collector(request))
        await reader.until(1)
        return reader

    def where(self, name: str = "r") -> tuple[int, int] | None:
        """(engine, epoch) of a request that runs."""
        found = [stream.id for stream in self.front._requests.streams.values() if stream.name == name]
        return self.front._requests.owner.owner(found[0]) if found else None

    def at(self, kind: str, what: Callable[[], None] | None = None, *, lose: bool = False) -> asyncio.Event:
        """Calls `what` before the next frame of that kind goes out, whoever sends it; `lose`: it does not go out.

        The event is set then.
        """
        spy = _Spy(kind, what, lose)
        for worker in self.workers:
            spy.wrap(worker._peers, "post")
            spy.wrap(worker._peers, "send")
            spy.wrap(worker._uplink, "post_frame")
        for member in self.front.members.values():
            spy.wrap(member, "post_frame")
        return spy.seen

    def cut(self) -> None:
        """Breaks every link between workers."""
        for worker in self.workers:
            for peer in worker._peers._peers.values():
                for link in peer.links:
                    break_off(link)

    def kill(self, engine: int) -> None:
        """The process of an engine is gone, as far as others can see."""
        worker = self.workers[engine]
        break_off(worker._link)
        for peer in worker._peers._peers.values():
            for link in peer.links:
                break_off(link)

    async def settled(self) -> None:
        """Waits until no engine has a request or a move, then checks that nothing is left behind."""
        async with asyncio.timeout(TIMEOUT_S):
            for worker, each in zip(self.workers, self.engines, strict=True):
                while not _is_clean(worker, each):
                    await asyncio.sleep(0.005)
        for each in self.engines:
            each._core.audit()


class Reader:
    """Reads one stream."""

    def __init__(self, deltas: AsyncGenerator[Delta], collector: Collector) -> None:
        self.deltas = deltas
        self.tokens: list[int] = []
        self.ended = False
        self.num_ended = 0
        self._collector = collector

    async def until(self, num_tokens: int) -> None:
        """Until choice 0 has so many tokens, or the request ends."""
        while len(self.tokens) < num_tokens and not self.ended:
            self._take(await anext(self.deltas))

    async def until_one_ends(self) -> None:
        """Until a choice has ended, and the request has not."""
        while not self.num_ended:
            self._take(await anext(self.deltas))
        assert not self.ended

    async def finish(self) -> RequestOutput:
        while not self.ended:
            self._take(await anext(self.deltas))
        return self._collector.output()

    def _take(self, delta: Delta) -> None:
        if delta.index == 0:
            self.tokens += delta.token_ids
        self.num_ended += delta.finish_reason is not None
        self.ended = self._collector.push(delta)


@asynccontextmanager
async def fleet(
    num: int = 2, *, kind: str = "unix", setup: dict[str, Any] | None = None, **overrides: Any
) -> AsyncIterator[Fleet]:
    """Up: every worker has said hello. Links between engines are of `kind`."""
    engines = [engine(**({"deterministic": True} | overrides)) for _ in range(num)]
    front = FleetEngine(engines[0].config, engines[0].tokenizer, engines[0].limits.defaults, num)
    with tempfile.TemporaryDirectory() as folder:
        serving: list[asyncio.Task[None]] = []

        def on_link(link: Link) -> None:
            serving.append(asyncio.create_task(front.serve(link)))

        config = LinkConfig(engine=OWNER, key=KEY, window_bytes=0)
        listener = await listen(f"unix:{folder}/owner", config, on_link, lambda error: None)
        common = {"owner": listener.address, "config": {}, "copy_share": 1.0} | (setup or {})
        setups = [Setup(engine=n, listen=free_address(kind, folder, str(n)), **common) for n in range(num)]
        workers = [Worker(one, KEY, each, Speed()) for one, each in zip(setups, engines, strict=True)]
        made = Fleet(front, workers, engines)
        made.tasks = [asyncio.create_task(worker.serve()) for worker in workers]
        try:
            async with asyncio.timeout(TIMEOUT_S):
                for n in range(num):
                    await front.until_up(n)
            yield made
        finally:
            made.hurry()
            await front.shut()
            await asyncio.gather(*made.tasks, *serving, return_exceptions=True)
            for task in (*made.tasks, *serving):
                assert task.exception() is None, task.exception()
            listener.close()


def alone(prompt: list[int], *params: SamplingParams, **overrides: Any) -> list[RequestOutput]:
    """What one engine gives that nothing moves to or from."""
    with engine(**({"deterministic": True} | overrides)) as plain:
        return [plain.generate(prompt, one) for one in params]


def together(prompts: list[list[int]], params: SamplingParams) -> list[RequestOutput]:
    """The same for several prompts."""
    with engine(deterministic=True) as plain:
        return plain.generate(prompts, params)


def _slow_down(each: Engine, hurry: threading.Event) -> None:
    run_plan = each.run_plan

    def slowly() -> None:
        if not each.is_idle:
            hurry.wait(STEP_S)
        run_plan()

    each.run_plan = slowly  # type: ignore[method-assign]


class _Spy:
    """Stands where frames leave; acts once."""

    def __init__(self, kind: str, what: Callable[[], None] | None, lose: bool) -> None:
        self.kind, self.what, self.lose = kind, what, lose
        self.seen = asyncio.Event()

    def wrap(self, owner: Any, name: str) -> None:
        send = getattr(owner, name)

        def spied(*given: Any) -> Any:
            frame = next(each for each in given if isinstance(each, bytes))
            if not self.seen.is_set() and frame_name(frame) == self.kind:
                self.seen.set()
                if self.what is not None:
                    self.what()
                if self.lose:
                    return nothing() if asyncio.iscoroutinefunction(send) else None
            return send(*given)

        async def nothing() -> None:
            return

        setattr(owner, name, spied)


def break_off(link: Link) -> None:
    """The link ends without a goodbye."""
    link._wire._sock.shutdown(socket.SHUT_RDWR)


def _is_clean(worker: Worker, each: Engine) -> bool:
    stats: Any = each._core.stats()
    busy = stats["num_requests"] or stats["owned_blocks"] or stats["in_transfer_blocks"]
    moving = worker._mover.num_leaving or worker._mover.num_arriving or len(worker._live)
    return not busy and not moving and not each.num_unfinished
