"""A fleet of real processes whose every link goes through a fault proxy, for tests of moves and crashes.

Owns the front-end (in the test's process), the workers (forked, see zygote.py; one that dies is started again), the
proxies and the traps in them: what a test wants to happen when a certain frame passes. `Client` reads one stream to its
end. The oracle is an embedded engine that computes each request alone. Every wait has a bound; none is a sleep.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from kvlite import RequestOptions, SamplingParams
from kvlite.config import EngineConfig
from kvlite.errors import CapacityError, EngineClosedError, EngineError
from kvlite.fleet.auth import FleetKey
from kvlite.fleet.dial import Listener, listen
from kvlite.fleet.effects import frame_name
from kvlite.fleet.frontend import FleetEngine
from kvlite.fleet.launcher import load_text_side, worker_settings
from kvlite.fleet.link_config import LinkConfig
from kvlite.fleet.members import EngineState, Member
from kvlite.fleet.messages import OWNER, FromWorker, Peers, Setup, Stats
from kvlite.fleet.moves import MoveConflictError, MoveHow, MoveReport, UnknownRequestError
from kvlite.fleet.wire import Channel
from kvlite.output import Collector
from kvlite.request import validate
from kvlite.types import RequestOutput
from tests.fleet.proxy import Fault, Proxy, Seen
from tests.fleet.zygote import Zygote

BOUND_S = 280.0
"""Of a whole test without KVLITE_MOVES; a hang becomes a TimeoutError."""
CONTROL = "control"
"""The name of a frame that is no frame of the movers."""
HEARTBEAT_S = 0.1


@dataclass(frozen=True)
class Passing:
    """A frame on its way from one process to another."""

    sender: int
    receiver: int
    name: str
    """In the words of the migration machines: move, prepare, ... done; or CONTROL."""
    seen: Seen


Action = Callable[[Passing], Fault | Awaitable[Fault]]


@dataclass(eq=False)
class Trap:
    """Springs once, when a frame of that name passes (from `sender`, if one is named)."""

    name: str
    action: Action
    sender: int | None = None
    sprung: asyncio.Event = field(default_factory=asyncio.Event)

    def catches(self, passing: Passing) -> bool:
        return passing.name == self.name and self.sender in (None, passing.sender)


class Watched(FleetEngine):
    """A front-end that tells engines addresses of proxies, and tests when statistics come."""

    route: Callable[[int, int, str], str]
    """(who calls, who is called, its address) -> where to call."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.reported = asyncio.Event()
        """Set by every report; who waits for one clears it."""
        self.num_reports: dict[int, int] = dict.fromkeys(self.states, 0)

    def _introduce(self) -> None:
        for member in self.members.values():
            others = [other for other in self.members.values() if other is not member]
            member.post(Peers({other.id: self.route(member.id, other.id, other.hello.address) for other in others}))

    def _hear(self, member: Member, message: FromWorker) -> None:
        super()._hear(member, message)
        if isinstance(message, Stats):
            self.num_reports[member.id] += 1
            self.reported.set()

    async def until_any_up(self) -> None:
        """Returns when some engine is up."""
        while not self.members:
            self._changed.clear()
            await self._changed.wait()

    async def until_gone(self, pid: int) -> None:
        """Returns when no engine that is up is that process."""
        while any(member.hello.pid == pid for member in self.members.values()):
            self._changed.clear()
            await self._changed.wait()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Returns when it holds, asked after every report."""
        while not holds():
            self.reported.clear()
            await self.reported.wait()


@dataclass(frozen=True)
class Ask:
    """One request; its seed is always set."""

    prompt: tuple[int, ...]
    params: SamplingParams
    options: RequestOptions = field(default_factory=RequestOptions)


class Client:
    """Reads one stream to its end."""

    def __init__(self, fleet: Watched, ask: Ask, name: str) -> None:
        self.ask = ask
        self.name = name
        self.num_tokens = 0
        self._fleet = fleet
        self._grown = asyncio.Event()
        self.task: asyncio.Task[RequestOutput] = asyncio.create_task(self._read(), name=name)

    async def reached(self, num_tokens: int) -> bool:
        """Returns when so many tokens came, over all choices, or the stream has ended: whether they came."""
        while self.num_tokens < num_tokens and not self.task.done():
            self._grown.clear()
            growth = asyncio.ensure_future(self._grown.wait())
            await asyncio.wait({growth, self.task}, return_when=asyncio.FIRST_COMPLETED)
            growth.cancel()
        return self.num_tokens >= num_tokens

    async def ended(self) -> None:
        """Returns when the stream has ended, in whatever way."""
        await asyncio.wait({self.task})

    async def _read(self) -> RequestOutput:
        request = validate(self._fleet.limits, list(self.ask.prompt), self.ask.params, self.ask.options)
        while True:
            collector = Collector(request)
            try:
                async for delta in self._fleet.stream_validated(request, self.name):
                    collector.push(delta)
                    self.num_tokens += len(delta.token_ids)
                    self._grown.set()
                return collector.output()
            except (EngineClosedError, CapacityError):
                if self.num_tokens:
                    raise
                await self._fleet.until_any_up()


class Yard:
    """The fleet, its processes and everything between them; made by `yard`."""

    def __init__(self, fleet: Watched, zygote: Zygote, config: EngineConfig, setup: dict[str, Any], kind: str) -> None:
        self.fleet = fleet
        self.traps: list[Trap] = []
        self.passed: dict[str, int] = {}
        """Frames of the movers by name."""
        self.num_deaths = 0
        self.num_played = 0
        self.faults: list[BaseException] = []
        """What the front-end raised where it must not; a test that ends with one fails."""
        self.jitter: Callable[[Passing], Fault | Awaitable[Fault]] = lambda passing: Fault.NONE
        """What becomes of frames that no trap catches."""
        self._zygote = zygote
        self._config = config
        self._setup = setup
        self._kind = kind
        self._key = FleetKey.generate()
        self._folder = tempfile.mkdtemp(prefix="kvlite-yard-")
        self._listener: Listener | None = None
        self._proxies: dict[tuple[int, int, str], Proxy] = {}
        self._num_names = 0
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._pids: dict[int, int] = {}
        fleet.route = self._route

    # Processes

    async def start(self) -> None:
        """Every engine is up."""
        config = LinkConfig(
            engine=OWNER, key=self._key, window_bytes=0, timeout_s=self._setup["silence_s"], heartbeat_s=HEARTBEAT_S
        )
        self._listener = await listen(
            f"unix:{self._folder}/owner", config, lambda link: self._spawn(self.fleet.serve(link)), lambda error: None
        )
        for engine in self.fleet.states:
            self._spawn(self._keep(engine))
        await self.all_up()

    async def all_up(self) -> None:
        """Every engine is up, and no link is frozen that somebody still waits on."""
        for proxy in list(self._proxies.values()):
            await proxy.thawed()
        for engine in self.fleet.states:
            await self.fleet.until_up(engine)

    def pid(self, engine: int) -> int:
        return self._pids[engine]

    def signal(self, engine: int, number: signal.Signals) -> int:
        """Sends it to the engine's process of now, whose id it returns."""
        os.kill(self._pids[engine], number)
        return self._pids[engine]

    async def exited(self, pid: int) -> int:
        return await self._zygote.exited(pid)

    async def reports(self, engine: int, count: int) -> None:
        """Returns when the engine has told its statistics so many times more."""
        wanted = self.fleet.num_reports[engine] + count
        await self.fleet.until(lambda: self.fleet.num_reports[engine] >= wanted)

    async def reports_of_all(self, count: int) -> None:
        """`reports` of every engine."""
        for engine in self.fleet.states:
            await self.reports(engine, count)

    async def any_reports(self, count: int) -> None:
        """Returns when engines have told their statistics so many times more, all together."""
        wanted = sum(self.fleet.num_reports.values()) + count
        await self.fleet.until(lambda: sum(self.fleet.num_reports.values()) >= wanted)

    async def quiet(self) -> None:
        """Returns when no engine has anything: no request, no move, and every block is free or cached."""
        await self.all_up()
        await self.reports_of_all(2)

        def is_quiet(member: Member) -> bool:
            if member.stats is None:
                return False
            stats, moves = member.stats.stats, member.stats.moves_in + member.stats.moves_out
            idle = stats.num_running == stats.num_waiting == stats.owned_blocks == moves == 0
            return idle and stats.free_blocks + stats.cached_blocks == stats.num_blocks

        await self.fleet.until(lambda: all(map(is_quiet, self.fleet.members.values())))

    async def _keep(self, engine: int) -> None:
        """Starts the engine's process, and again whenever its link has ended."""
        while True:
            self.fleet.states[engine] = EngineState.STARTING
            pid = self._pids[engine] = await self._zygote.fork(self._setup_of(engine), self._key)
            up = asyncio.ensure_future(self.fleet.until_up(engine))
            end = asyncio.ensure_future(self.exited(pid))
            await asyncio.wait({up, end}, return_when=asyncio.FIRST_COMPLETED)
            up.cancel()
            end.cancel()
            if engine in self.fleet.members:
                await self.fleet.until_down(engine)
            if self._closing:
                return
            self.num_deaths += 1

    def _setup_of(self, engine: int) -> Setup:
        owner = self._proxy((engine, OWNER, f"unix:{self._folder}/owner"), fresh=True)
        return Setup(
            engine=engine,
            owner=owner,
            listen="tcp:127.0.0.1:0" if self._kind == "tcp" else f"unix:{self._folder}/{self._name()}",
            config=worker_settings(self._config),
            heartbeat_s=HEARTBEAT_S,
            **self._setup,
        )

    # Links

    def trap(self, name: str, action: Action, sender: int | None = None) -> Trap:
        """From now on; springs once."""
        trap = Trap(name, action, sender)
        self.traps.append(trap)
        return trap

    def _route(self, caller: int, callee: int, address: str) -> str:
        return self._proxy((caller, callee, address))

    def _proxy(self, between: tuple[int, int, str], *, fresh: bool = False) -> str:
        """The address of the proxy between two processes; of a new one when `fresh`."""
        caller, callee, target = between
        if fresh or between not in self._proxies:
            unix = target.startswith("unix:")
            sock = socket.socket(socket.AF_UNIX if unix else socket.AF_INET, socket.SOCK_STREAM)
            sock.setblocking(False)
            sock.bind(f"{self._folder}/{self._name()}" if unix else ("127.0.0.1", 0))
            sock.listen(16)
            older = self._proxies.pop(between, None)
            if older is not None:
                older.close()
            self._proxies[between] = Proxy(sock, target, lambda seen: self._decide(caller, callee, seen))
        return self._proxies[between].address

    def _decide(self, caller: int, callee: int, seen: Seen) -> Fault | Awaitable[Fault]:
        sender, receiver = (caller, callee) if seen.upward else (callee, caller)
        name = frame_name(seen.frame) if seen.channel == Channel.MIGRATION else CONTROL
        passing = Passing(sender, receiver, name, seen)
        if name != CONTROL:
            self.passed[name] = self.passed.get(name, 0) + 1
        for trap in self.traps:
            if trap.catches(passing):
                self.traps.remove(trap)
                trap.sprung.set()
                return trap.action(passing)
        return self.jitter(passing)

    def _name(self) -> str:
        self._num_names += 1
        return f"{self._num_names}"

    # Requests

    def owner_of(self, name: str) -> int | None:
        """The engine that has the request; None: no engine, or it is over."""
        status = self.fleet.status()
        return next((engine.id for engine in status.engines for one in engine.requests if one.name == name), None)

    async def move(self, name: str, to: int, how: MoveHow = MoveHow.COPY) -> MoveReport | None:
        """None: it could not begin, because of where the request or the engine is now."""
        try:
            return await self.fleet.move(name, to, how)
        except (MoveConflictError, UnknownRequestError, EngineError):
            return None

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            task.get_loop().call_exception_handler(
                {"message": "a fault of the front-end", "exception": task.exception()}
            )

    async def close(self) -> None:
        self._closing = True
        await self.fleet.shut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        for proxy in self._proxies.values():
            proxy.close()
        await self._zygote.close()
        shutil.rmtree(self._folder, ignore_errors=True)


@asynccontextmanager
async def yard(config: EngineConfig, kind: str = "tcp", engines: int = 2, **setup: Any) -> AsyncIterator[Yard]:
    """`kind`: tcp or shm. `setup`: fields of messages.Setup."""
    _directory, tokenizer, defaults = load_text_side(config)
    fleet = Watched(config, tokenizer, defaults, engines)
    made = Yard(fleet, Zygote(), config, {"silence_s": 30.0} | setup, kind)
    try:
        async with asyncio.timeout(None if "KVLITE_MOVES" in os.environ else BOUND_S):
            await made.start()
            yield made
    finally:
        await made.close()
    assert not made.faults, made.faults
