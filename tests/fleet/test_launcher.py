"""The launcher: what a worker is given, what a failing start says, what is left behind; processes are small scripts."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from kvlite.config import EngineConfig
from kvlite.errors import ConfigError, KvliteError, ModelLoadError
from kvlite.fleet import launcher as launching
from kvlite.fleet.launcher import Launcher, divided
from kvlite.fleet.members import EngineState
from kvlite.fleet.settings import FleetSettings
from tests.fleet.fake_worker import Fleet
from tests.fleet.link_pairs import KEY, run

Script = Callable[[str], None]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Puts a shell script in the place of the interpreter that workers run in."""

    def write(text: str) -> None:
        path = tmp_path / "worker"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(path))

    return write


@asynccontextmanager
async def launcher(num_engines: int = 1, **settings: int) -> AsyncIterator[tuple[Launcher, Fleet]]:
    fleet = Fleet(num_engines, num_threads=4, kv_cache_bytes=1 << 20)
    made = Launcher(fleet.engine, FleetSettings(num_engines, **settings), key=KEY)
    try:
        yield made, fleet
    finally:
        await fleet.engine.shut()
        await made.stop()
        await made.stop()
        assert not Path(made._folder).exists()
        assert made.process_id(0) is None


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ("kvlite: model.safetensors: is cut short", ModelLoadError, "model.safetensors: is cut short"),
        ("kvlite: kv_cache_bytes: 1 bytes hold no block", ConfigError, "kv_cache_bytes: 1 bytes hold no block"),
        ("", ModelLoadError, "engine 0 ended with status 3 before it was up"),
    ],
)
def test_an_engine_that_does_not_come_up_says_why_in_one_error(
    script: Script, said: str, error: type[KvliteError], message: str
):
    script(f'echo noise >&2; echo "{said}" >&2; exit 3' if said else "exit 3")

    async def main() -> None:
        async with launcher(2) as (made, _):
            with pytest.raises(error) as caught:
                await made.start()
            assert str(caught.value) == message

    run(main())


def test_secrets_are_on_no_command_line_and_a_worker_gets_the_fleets_key_alone(
    script: Script, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KVLITE_API_KEY", "sesame")
    monkeypatch.setenv("KVLITE_ADMIN_KEY", "master")
    script('echo "$*, key ${#KVLITE_FLEET_KEY}, $KVLITE_API_KEY$KVLITE_ADMIN_KEY$(head -c 1)" >&2; exit 1')

    async def main() -> None:
        async with launcher() as (made, _):
            with pytest.raises(ModelLoadError) as caught:
                await made.start()
            assert str(caught.value) == "-m kvlite.fleet.worker, key 64, {"

    run(main())


def test_an_engine_that_dies_too_often_is_given_up(script: Script, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launching, "RESTART_PAUSE_S", 0.0)
    script("read setup; exec sleep 600")

    async def main() -> None:
        async with launcher(restarts=2) as (made, fleet):
            starting = asyncio.create_task(made.start())
            while made.process_id(0) is None:
                await asyncio.sleep(0)
            await fleet.join(0)
            await starting
            first = made.process_id(0)
            script("exit 1")
            await fleet.kill(0)
            while fleet.engine.states[0] is not EngineState.GIVEN_UP:
                fleet.engine._changed.clear()
                await fleet.engine._changed.wait()
            assert first is not None and made.process_id(0) is None
            assert not fleet.engine.healthy

    run(main())


def test_threads_and_memory_are_shared_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launching, "cache_budget_bytes", lambda wanted, device: 1000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert divided(EngineConfig(num_threads=5), 2).num_threads == 2
    assert divided(EngineConfig(num_threads=1), 2).num_threads == 1
    assert divided(EngineConfig(), 1).kv_cache_bytes is None
    assert divided(EngineConfig(), 2).kv_cache_bytes == 1000
    assert divided(EngineConfig(), 4).kv_cache_bytes == 500
    assert divided(EngineConfig(kv_cache_bytes=7), 4).kv_cache_bytes == 7
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert divided(EngineConfig(device="cpu"), 2).kv_cache_bytes == 1000
    with pytest.raises(ConfigError, match="kv_cache_bytes: must be given when 2 engines share a GPU"):
        divided(EngineConfig(), 2)
