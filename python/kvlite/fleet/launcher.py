"""`Launcher`: the worker processes of a fleet on this machine: started, watched, started again, stopped.

Owns processes, the socket that they connect to, and its folder (owner-only, removed at the end). A worker's settings go
to its standard input and the fleet key to its environment, neither to a command line. A worker that dies is started
again, RESTARTS_MAX times per RESTART_WINDOW_S; what it had is the front-end's matter. Called by server/fleet.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from kvlite.config import Device, EngineConfig, Scope, setting_of
from kvlite.errors import ConfigError, KvliteError, ModelLoadError
from kvlite.fleet.auth import FleetKey
from kvlite.fleet.dial import Listener, listen
from kvlite.fleet.frontend import FleetEngine
from kvlite.fleet.link_config import LinkConfig
from kvlite.fleet.links import Link
from kvlite.fleet.members import EngineState
from kvlite.fleet.messages import OWNER, Setup, encode_setup
from kvlite.fleet.settings import RESTART_WINDOW_S, FleetSettings
from kvlite.fleet.wire import LinkError
from kvlite.model_files import load_generation_defaults
from kvlite.runner.kv_pool import cache_budget_bytes
from kvlite.startup import model_directory
from kvlite.tokenizer import Tokenizer
from kvlite.types import GenerationDefaults

START_S = 1800.0
"""How long an engine may load."""
RESTART_PAUSE_S = 0.2
"""Doubles with every restart in the window."""
RESTART_PAUSE_MAX_S = 5.0
LET_GO_S = 1.0
"""How long a process whose link has ended may take to exit by itself; one that hangs is killed then."""
STOP_S = 10.0
"""How long workers may take to exit once they were told to."""
LINES_KEPT = 100
LINE_BYTES = 1 << 16
SECRETS = ("KVLITE_API_KEY", "KVLITE_ADMIN_KEY")

log = logging.getLogger("kvlite.fleet")


class Launcher:
    """Use `start` once, `stop` at the end, from the event loop of the front-end."""

    def __init__(self, fleet: FleetEngine, settings: FleetSettings, *, key: FleetKey | None = None) -> None:
        self._fleet = fleet
        self._settings = settings
        self._key = key or FleetKey.from_env() or FleetKey.generate()
        self._config = divided(fleet.config, settings.engines)
        self._folder = tempfile.mkdtemp(prefix="kvlite-fleet-")
        self._listener: Listener | None = None
        self._links: set[asyncio.Task[None]] = set()
        self._keepers: list[asyncio.Task[None]] = []
        self._workers: dict[int, _Worker] = {}

    def process_id(self, engine: int) -> int | None:
        """Of the engine's process now; None while there is none."""
        worker = self._workers.get(engine)
        return None if worker is None or worker.process.returncode is not None else worker.process.pid

    async def start(self) -> None:
        """Starts every engine and returns when all are up.

        Raises ConfigError or ModelLoadError with what the first engine said that did not come up.
        """
        silence_s = self._settings.silence_s
        config = LinkConfig(
            engine=OWNER, key=self._key, window_bytes=0, timeout_s=silence_s, heartbeat_s=min(0.5, silence_s / 4)
        )
        self._listener = await listen(f"unix:{self._folder}/owner", config, self._on_link, self._on_refused)
        engines = range(self._settings.engines)
        starting = [asyncio.create_task(self._start(engine)) for engine in engines]
        try:
            await asyncio.gather(*starting)
        finally:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
        self._keepers = [asyncio.create_task(self._keep(engine)) for engine in engines]

    async def stop(self) -> None:
        """Ends what still runs: workers that were told to exit have STOP_S for it. Twice is fine."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        await asyncio.gather(*(worker.stop(STOP_S if worker.was_up else 0) for worker in self._workers.values()))
        for task in self._links:
            task.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _start(self, engine: int) -> None:
        """A new process of `engine`, until it is up. Raises ConfigError or ModelLoadError when that does not happen."""
        self._fleet.states[engine] = EngineState.STARTING
        worker = self._workers[engine] = await _Worker.spawn(self._setup(engine), self._key)
        up = asyncio.create_task(self._fleet.until_up(engine))
        exited = asyncio.create_task(worker.process.wait())
        try:
            await asyncio.wait({up, exited}, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
            exited.cancel()
        if engine not in self._fleet.members:
            await worker.stop(0)
            raise _failure(engine, worker)
        worker.speak()

    async def _keep(self, engine: int) -> None:
        """Watches one engine, and starts it again when it dies, as often as it may."""
        restarts: deque[float] = deque()
        while True:
            worker = self._workers[engine]
            await self._fleet.until_down(engine)
            if self._settings.restarts:
                await worker.stop(LET_GO_S)
            status = worker.process.returncode
            log.warning("engine %d: process %d %s", engine, worker.process.pid, _fate(status))
            while restarts and time.monotonic() - restarts[0] > RESTART_WINDOW_S:
                restarts.popleft()
            while True:
                if len(restarts) >= self._settings.restarts:
                    log.error("engine %d is given up after %d restarts", engine, len(restarts))
                    self._fleet.give_up(engine)
                    return
                restarts.append(time.monotonic())
                await asyncio.sleep(min(RESTART_PAUSE_S * 2 ** (len(restarts) - 1), RESTART_PAUSE_MAX_S))
                log.warning("engine %d is started again, restart %d", engine, len(restarts))
                try:
                    await self._start(engine)
                    break
                except (ConfigError, ModelLoadError) as error:
                    log.error("engine %d did not come up: %s", engine, error)

    def _setup(self, engine: int) -> Setup:
        address = f"unix:{self._folder}/{engine}-{time.monotonic_ns():x}"
        config = worker_settings(self._config)
        known = self._fleet.pool_bytes(engine)
        if known is not None:
            config["kv_cache_bytes"] = known
        values: dict[str, Any] = {
            "engine": engine,
            "owner": f"unix:{self._folder}/owner",
            "listen": "tcp:127.0.0.1:0" if self._settings.transport == "tcp" else address,
            "config": config,
            "silence_s": self._settings.silence_s,
            "heartbeat_s": min(0.5, self._settings.silence_s / 4),
        }
        return Setup(**(values | dict(self._settings.setup)))

    def _on_link(self, link: Link) -> None:
        task = asyncio.create_task(self._fleet.serve(link), name=f"engine {link.peer}")
        self._links.add(task)
        task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._links.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a fault of the front-end ended the link of %s", task.get_name(), exc_info=task.exception())

    def _on_refused(self, error: LinkError) -> None:
        log.warning("somebody who called was sent away: %s", error)


class _Worker:
    """One process, and what it says on stderr: kept until it is up, then passed on to the log line by line."""

    def __init__(self, engine: int, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._engine = engine
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self.was_up = False
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def spawn(cls, setup: Setup, key: FleetKey) -> _Worker:
        """Starts it in a session of its own, so that the terminal's Ctrl-C reaches the front-end alone."""
        environ = {name: value for name, value in os.environ.items() if name not in SECRETS}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kvlite.fleet.worker",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
            env=environ | key.to_env(), start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        worker = cls(setup.engine, process)
        try:
            process.stdin.write(encode_setup(setup))
            await process.stdin.drain()
            process.stdin.close()
        except ConnectionError:
            await process.wait()
        return worker

    @property
    def last_line(self) -> str:
        """The last thing that it said, without the name of the program in front."""
        return self._lines[-1].removeprefix("kvlite: ") if self._lines else ""

    def speak(self) -> None:
        """It is up: what it said and will say goes to the log."""
        self.was_up = True
        for line in self._lines:
            self._pass_on(line)

    async def stop(self, patience_s: float) -> None:
        """Returns when the process is gone: by itself within the time, else killed. Twice is fine."""
        try:
            async with asyncio.timeout(patience_s):
                await self.process.wait()
        except TimeoutError:
            if self.process.returncode is None:
                self.process.kill()
            await self.process.wait()
        await asyncio.wait({self._reading}, timeout=1.0)
        self._reading.cancel()

    async def _read(self) -> None:
        assert self.process.stderr is not None
        rest = b""
        while chunk := await self.process.stderr.read(LINE_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._hear(line)
            if len(rest) > LINE_BYTES:
                self._hear(rest)
                rest = b""
        self._hear(rest)

    def _hear(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip()
        if text:
            self._lines.append(text)
            if self.was_up:
                self._pass_on(text)

    def _pass_on(self, line: str) -> None:
        log.info("[engine %d] %s", self._engine, line)


def load_text_side(config: EngineConfig) -> tuple[Path, Tokenizer, GenerationDefaults]:
    """What the front-end itself needs of a model: its directory, tokenizer and defaults. Raises ModelLoadError."""
    directory = model_directory(config.model)
    tokenizer = Tokenizer(directory)
    tokenizer.compile_templates()
    return directory, tokenizer, load_generation_defaults(directory, tokenizer.eos_token_id)


def divided(config: EngineConfig, num_engines: int) -> EngineConfig:
    """The settings of one of several engines on this machine: threads and, where it is auto, KV memory are shared out.

    Raises ConfigError when several engines shall share a GPU and nobody says what each gets.
    """
    values = {item.name: getattr(config, item.name) for item in fields(EngineConfig)}
    threads = config.num_threads or torch.get_num_threads()
    values["num_threads"] = max(1, threads // num_engines)
    if config.kv_cache_bytes is None and num_engines > 1:
        if config.device is not Device.CPU and torch.cuda.is_available():
            raise ConfigError("kv_cache_bytes", f"must be given when {num_engines} engines share a GPU: what each gets")
        values["kv_cache_bytes"] = max(2 * cache_budget_bytes(None, torch.device("cpu")) // max(num_engines, 2), 1)
    return EngineConfig(**values)


def _failure(engine: int, worker: _Worker) -> KvliteError:
    """Why an engine did not come up: what it said last, as the error that it is when it names a setting."""
    said = worker.last_line
    field, _, message = said.partition(": ")
    if message and field in {item.name for item in fields(EngineConfig)}:
        return ConfigError(field, message)
    return ModelLoadError(said or f"engine {engine} ended with status {worker.process.returncode} before it was up")


def _fate(status: int | None) -> str:
    if status is None:
        return "does not answer"
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def worker_settings(config: EngineConfig) -> dict[str, Any]:
    """The settings that a worker's engine takes from the fleet's: nothing of the API or the server, no secret."""
    return {
        item.name: getattr(config, item.name)
        for item in fields(EngineConfig)
        if setting_of(item).scope in (Scope.ENGINE, Scope.ONLINE) and not setting_of(item).secret
    }
