"""How a worker process begins and ends: settings from standard input, key from the environment, one line of blame."""

from __future__ import annotations

import asyncio
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from kvlite.fleet import worker
from kvlite.fleet.auth import KEY_VARIABLE, FleetKey
from kvlite.fleet.messages import Setup, encode_setup
from kvlite.fleet.speed import PROMPT_TOKENS, measure
from kvlite.types import EngineStats
from tests.engines import SMALL, engine, essence, ids, tiny
from tests.fleet.small_fleet import KEY, SEEDED, alone, fleet, run


def start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: bytes, key: FleetKey | None = KEY
) -> tuple[int, str]:
    """(exit status, what it said) of a worker that reads `line`."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line)))
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    for name, value in ({} if key is None else key.to_env()).items():
        monkeypatch.setenv(name, value)
    return worker.main(), capsys.readouterr().err


def setup(folder: Path, **config: Any) -> bytes:
    values = {"model": str(tiny())} | SMALL | config
    return encode_setup(Setup(engine=0, owner=f"unix:{folder}/owner", listen=f"unix:{folder}/0", config=values))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "no-such-model"}, "no-such-model"),
        ({"block_size": 0}, "block_size: 0 is out of range"),
        ({"no_such_setting": 1}, "no_such_setting"),
        ({}, "owner cannot be reached"),
    ],
)
def test_what_keeps_a_worker_from_starting_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    change: dict[str, Any],
    said: str,
) -> None:
    status, text = start(monkeypatch, capsys, setup(tmp_path, **change))
    assert status == 1 and said in text
    assert text.startswith("kvlite: ") and text.count("\n") == 1


def test_a_worker_without_a_key_or_settings_does_not_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, text = start(monkeypatch, capsys, setup(tmp_path), key=None)
    assert status == 1 and KEY_VARIABLE in text
    status, text = start(monkeypatch, capsys, b"")
    assert status == 1 and "the setup of a worker cannot be read" in text


def test_a_worker_ends_with_the_front_end() -> None:
    async def main() -> None:
        async with fleet() as made:
            made.kill(0)
            await asyncio.wait_for(asyncio.shield(made.tasks[0]), 30.0)
            assert made.tasks[0].exception() is None
            assert not made.workers[0].engine.healthy and made.workers[1].engine.healthy

    run(main())


def test_an_engine_that_breaks_ends_its_worker_and_its_requests_go_on_elsewhere() -> None:
    (expected,) = alone(ids(50, 3), SEEDED)

    async def main() -> None:
        async with fleet() as made:
            reader = await made.stream(ids(50, 3), SEEDED)
            made.engines[0]._dead = "a test says so"
            assert essence(await reader.finish()) == essence(expected)
            await asyncio.wait({made.tasks[0]})
            assert "does not work any more" in str(made.tasks[0].exception())
            made.tasks.pop(0)

    run(main())


def test_the_trial_at_start_measures_and_leaves_no_trace() -> None:
    with engine() as fresh:
        speed = measure(fresh)
        assert speed.prefill_tokens_per_s > 0 and speed.step_s > 0
        stats = fresh.stats()
        assert stats.prompt_tokens >= min(PROMPT_TOKENS, fresh.limits.max_model_len) // 2 and stats.cached_blocks == 0
        shown = speed.without(stats)
        assert (shown.prompt_tokens, shown.generated_tokens, shown.num_steps) == (0, 0, 0)
        assert set(shown.finished.values()) == set(EngineStats().finished.values()) | {0}


def test_a_pool_without_room_for_a_trial_is_not_measured() -> None:
    with engine(max_model_len=4) as small:
        assert measure(small).prefill_tokens_per_s == 0
