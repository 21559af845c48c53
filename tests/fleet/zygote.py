"""Forks workers of a fleet out of a process that has imported everything: one is up in a tenth of the time.

Run as `python -m tests.fleet.zygote`: one JSON object per line of its input ({"setup": ..., "key": ...}) forks a worker
whose number comes back on standard output; so does every end ({"exited": ..., "status": ...}). At the end of the input
every worker is killed, stopped ones too. `Zygote` is the side that asks.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import select
import signal
import sys
from types import FrameType
from typing import Any, Self

from kvlite.fleet.auth import FleetKey
from kvlite.fleet.messages import Setup, encode_setup

STATS_S = 0.05
"""Workers report so often, because tests wait for reports."""


class Zygote:
    """The process that forks, and what it has forked."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._answers: asyncio.Queue[int] = asyncio.Queue()
        self._ends: dict[int, asyncio.Future[int]] = {}
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls) -> Self:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.fleet.zygote", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        return cls(process)

    async def fork(self, setup: Setup, key: FleetKey) -> int:
        """The process id of a new worker."""
        assert self._process.stdin is not None
        order = {"setup": encode_setup(setup).decode(), "key": key.to_env()}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        return await self._answers.get()

    async def exited(self, pid: int) -> int:
        """Its status, as waitpid gives it, once it has ended."""
        return await asyncio.shield(self._end(pid))

    def is_alive(self, pid: int) -> bool:
        return not self._end(pid).done()

    async def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        await self._reading

    def _end(self, pid: int) -> asyncio.Future[int]:
        if pid not in self._ends:
            self._ends[pid] = asyncio.get_running_loop().create_future()
        return self._ends[pid]

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            said = json.loads(line)
            if "forked" in said:
                self._answers.put_nowait(said["forked"])
            else:
                self._end(said["exited"]).set_result(said["status"])


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
