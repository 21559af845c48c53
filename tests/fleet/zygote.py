"""Forks workers of a fleet out of a process that has imported everything: one is up in a tenth of the time.

Run as `python -m tests.fleet.zygote`: one JSON object per line of its input ({"setup": ..., "key": ...}) forks a worker
whose number comes back on standard output; so does every end ({"exited": ..., "status": ...}). At the end of the input
every worker is killed, stopped ones too. `Zygote` is the side that asks.
"""

from __future__ import annotations

import asyncio
import functools
import io
import json
import os
import select
import signal
import subprocess
import sys
from types import FrameType
from typing import Any

from kvlite.fleet.auth import FleetKey
from kvlite.fleet.messages import Setup, encode_setup

STATS_S = 0.05
"""Workers report so often, because tests wait for reports."""


class Zygote:
    """The process that forks, one for all tests; what is forked here belongs to this object and its event loop."""

    def __init__(self) -> None:
        self._process = _process()
        self._loop = asyncio.get_running_loop()
        self._answers: asyncio.Queue[int] = asyncio.Queue()
        self._ends: dict[int, asyncio.Future[int]] = {}
        self._rest = b""
        assert self._process.stdout is not None
        self._loop.add_reader(self._process.stdout.fileno(), self._read)

    async def fork(self, setup: Setup, key: FleetKey) -> int:
        """The process id of a new worker."""
        assert self._process.stdin is not None
        order = {"setup": encode_setup(setup).decode(), "key": key.to_env()}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return await self._answers.get()

    async def exited(self, pid: int) -> int:
        """Its status, as waitpid gives it, once it has ended."""
        return await asyncio.shield(self._end(pid))

    async def close(self) -> None:
        """Kills what still runs."""
        for pid, end in self._ends.items():
            if not end.done():
                os.kill(pid, signal.SIGKILL)
        await asyncio.gather(*self._ends.values())
        assert self._process.stdout is not None
        self._loop.remove_reader(self._process.stdout.fileno())

    def _end(self, pid: int) -> asyncio.Future[int]:
        if pid not in self._ends:
            self._ends[pid] = self._loop.create_future()
        return self._ends[pid]

    def _read(self) -> None:
        assert self._process.stdout is not None
        *lines, self._rest = (self._rest + os.read(self._process.stdout.fileno(), 1 << 16)).split(b"\n")
        for line in lines:
            said = json.loads(line)
            if "forked" in said:
                self._end(said["forked"])
                self._answers.put_nowait(said["forked"])
            else:
                self._end(said["exited"]).set_result(said["status"])


@functools.cache
def _process() -> subprocess.Popen[bytes]:
    """It ends when this process does, because its input does."""
    command = [sys.executable, "-m", "tests.fleet.zygote"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)


def _say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _work(order: dict[str, Any]) -> int:
    """A worker, in a process of its own."""
    from kvlite.fleet import worker

    worker.STATS_S = STATS_S
    os.environ.update(order["key"])
    sys.stdin = io.TextIOWrapper(io.BytesIO(order["setup"].encode()))
    return worker.main()


def _wake(_signal: int, _frame: FrameType | None) -> None:
    """The pipe of the wake-up says it all."""


def main() -> None:
    from kvlite.fleet import worker

    assert worker is not None, "imported before anything is forked"
    woken, wake = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, _wake)
    alive: set[int] = set()
    rest = b""
    while True:
        readable, _, _ = select.select([0, woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
            while alive and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                alive.discard(ended[0])
                _say(exited=ended[0], status=ended[1])
        if 0 not in readable:
            continue
        chunk = os.read(0, 1 << 20)
        if not chunk:
            break
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(2, 1)
                os._exit(_work(json.loads(line)))
            alive.add(pid)
            _say(forked=pid)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
