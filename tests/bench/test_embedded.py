"""The correctness gate, timed steps and the kernel clock on tiny engines; the whole scenarios once each."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlite import Engine
from kvlite.bench import decode, embedded, make_model, peer
from kvlite.bench.__main__ import main
from kvlite.bench.embedded import (
    GATE_TOKENS,
    KernelClock,
    Setup,
    decode_steps,
    gate,
    kernel_clock,
    opened,
    prefill_s,
    prompts,
)
from kvlite.bench.errors import BenchError
from kvlite.bench.make_model import Shape
from kvlite.models import load_config
from kvlite.startup import SHIPPED_MODEL

TINY = Shape("llama", 2, 64, 4, 2, 16, 96, 512, 256)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same shape twice, with different weights."""
    found = [tmp_path_factory.mktemp(f"seed{seed}") for seed in range(2)]
    for seed, folder in enumerate(found):
        make_model.make(TINY, folder, seed=seed)
    return found


@pytest.fixture
def engine(folders: list[Path]) -> Generator[Engine]:
    with opened(Setup(folders[0], "float32", 1, 4, 400)) as engine:
        yield engine


def test_the_gate_lets_the_right_model_pass_and_stops_another(engine: Engine, folders: list[Path]) -> None:
    config = load_config(folders[0])[0]
    right, wrong = (peer.load(folder, torch.float32) for folder in folders)
    assert gate(engine, right, config) == GATE_TOKENS
    with pytest.raises(BenchError, match=r"wrong before fast: token 0 is \d+, transformers says \d+"):
        gate(engine, wrong, config)


def test_the_gate_stops_a_single_wrong_token(
    engine: Engine, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OneOff:
        def __init__(self, output: Any) -> None:
            self.token_ids = (*output.token_ids[:-1], (output.token_ids[-1] + 1) % TINY.vocab_size)

    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda *arguments: OneOff(generate(*arguments)))
    with pytest.raises(BenchError, match="wrong before fast: token 15 is"):
        gate(engine, peer.load(folders[0], torch.float32), load_config(folders[0])[0])


def test_decode_steps_are_as_many_as_asked_and_leave_nothing_running(engine: Engine, folders: list[Path]) -> None:
    batch = prompts(load_config(folders[0])[0], 3, 20, seed=1)
    assert len(decode_steps(engine, batch, 5, KernelClock())) == 5
    assert engine.num_unfinished == 0
    assert engine.stats().owned_blocks == 0


def test_a_prompt_is_cold_every_time(engine: Engine, folders: list[Path]) -> None:
    prompt = prompts(load_config(folders[0])[0], 1, 64, seed=1)[0]
    assert prefill_s(engine, prompt) > 0
    assert prefill_s(engine, prompt) > 0
    assert engine.stats().cached_tokens == 0


def test_prompts_share_no_first_block() -> None:
    config = load_config(SHIPPED_MODEL)[0]
    found = prompts(config, 8, 32, seed=0)
    assert len({tuple(prompt[:16]) for prompt in found}) == 8
    assert found == prompts(config, 8, 32, seed=0)


def test_the_kernel_clock_counts_products_and_ops_and_leaves_no_trace(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvlite import startup

    before = startup.select
    times = iter(range(100_000))
    with kernel_clock() as clock, opened(Setup(folders[0], "float32", 1, 2, 100)) as engine:
        monkeypatch.setattr(embedded.time, "perf_counter", lambda: float(next(times)))
        decode_steps(engine, prompts(load_config(folders[0])[0], 1, 8, seed=0), 3, clock)
    assert clock.seconds == 3 * 3, "one replay, the head and the sampling"
    assert startup.select is before


def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", command.split())
    assert main() == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_scenarios_end_in_their_keys(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # No claim about speed in a test: limits are taken as met, whatever neighbours do.
    monkeypatch.setattr("kvlite.bench.decode.share", lambda what, limit_s, measured_s: limit_s / measured_s)
    monkeypatch.setattr("kvlite.bench.prefill.share", lambda what, limit_s, measured_s: limit_s / measured_s)
    monkeypatch.setattr(decode, "ROUNDS", 1)
    common = f"--model {folders[0]} --dtype float32 --threads 1 --budget-s 0"
    found = bench(monkeypatch, capsys, f"bench decode {common} --points 1x8,4x8,1x100 --steps 2 --peer-batches 4")
    assert {"share_b1", "share_b4", "x_transformers_b4", "context_cost_100", "outside_b1", "gate_tokens"} <= set(found)
    assert {"machine", "commit", "command", "threads", "model", "dtype"} <= set(found)
    assert "x_transformers_b1" not in found
    found = bench(monkeypatch, capsys, f"bench prefill {common} --lengths 16,64,9999 --rounds 1")
    assert {"share_16", "share_64", "x_transformers_64", "ttft_ms_64", "gemm_gflops"} <= set(found)
    assert "share_9999" not in found
    found = bench(monkeypatch, capsys, f"bench limits {common} --rows 1,3")
    assert {"read_gbs_1", "weights_gbs_1_1", "gemm_gflops_3_1", "loops_1"} <= set(found)
