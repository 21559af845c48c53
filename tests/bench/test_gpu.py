"""`bench gpu` on this machine: its whole way at a tiny shape, without the packages that a GPU machine may lack.

Every part runs in this process over the torch references; the command itself in others, whose imports are blocked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlite.bench import gpu, gpu_parts, make_model
from kvlite.bench.errors import BenchError
from kvlite.bench.gpu import PARTS, SCALES, run_process, wanted_parts
from kvlite.bench.gpu_parts import PAPER_BYTES_PER_S, Point, agree, step_figures
from kvlite.bench.gpu_report import Part, ResultFile
from kvlite.bench.gpu_stage import RandomModel, Room, Stage
from kvlite.bench.kernel_cases import Case, Maker
from kvlite.bench.kernels import CUDA_CALLS, Clock
from kvlite.models.config import parse_config
from kvlite.models.llama import LLAMA
from kvlite.ops import select

REPOSITORY = Path(__file__).parents[2]
MISSING = (
    "kvlite._core", "fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "httpx", "openai", "tokenizers",
    "msgspec", "typer", "rich", "jinja2", "huggingface_hub", "transformers", "matplotlib",
)  # fmt: skip
BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if any(name == missing or name.startswith(missing + ".") for missing in {MISSING!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""
CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path: Path) -> ResultFile:
    made = ResultFile(tmp_path / "gpu.json")
    made.write({"parts": {}})
    return made


def part_of(file: ResultFile, name: str, seconds: float = 600) -> Part:
    return Part(name, CPU, SCALES["tiny"], file, time.time() + seconds)


def run(file: ResultFile, name: str, seconds: float = 600) -> dict[str, Any]:
    """Figures of a part that ran in this process."""
    PARTS[name].run(part_of(file, name, seconds))
    return file.read()["parts"][name]


def test_it_runs_without_the_core_the_server_and_transformers(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    output = tmp_path / "out" / "gpu.json"
    paths = [str(tmp_path), str(REPOSITORY / "python")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "bench", "gpu", "--device", "cpu", "--shape", "tiny", "--output", str(output)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "sitecustomize" not in done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last == {"bench": "gpu", **json.loads(output.read_text())}
    assert {name: part["status"] for name, part in last["parts"].items()} == {
        **dict.fromkeys(PARTS, "ok"), "transformers": "skipped", "groups": "skipped"
    }  # fmt: skip
    assert "transformers" in last["parts"]["transformers"]["skipped"]
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([sys.executable, "-c", "import kvlite._core"], env=environment, capture_output=True, check=True)


def test_without_a_gpu_it_says_so_and_how_to_try_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchError, match="no CUDA device on this machine; to try the command: --device cpu"):
        gpu.main([])


def test_kernels_are_checked_and_a_wrong_one_fails_alone(file: ResultFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
        def nothing(ops: object) -> None:
            return None

        right = Case("right", 8, 0, nothing, [torch.zeros(2)])
        return [right, replace(right, name="unwritten", outputs=[torch.full((2,), float("nan"))]), right]

    monkeypatch.setattr(gpu_parts, "odd", cases)
    found = run(file, "checks")
    assert found["right"] == 2
    (failure,) = found["failures"]
    assert failure.startswith("unwritten in float32: BenchError(") and "is not the reference's" in failure


def test_decode_gives_times_and_shares_of_both_floors_with_and_without_graphs(file: ResultFile) -> None:
    found = run(file, "decode")
    assert "failures" not in found and "left_out" not in found
    for batch, context in SCALES["tiny"].points:
        for way in ("eager", "graph"):
            figures = found[f"{way}_b{batch}_c{context}"]
            assert figures["share_copy"] == pytest.approx(figures["floor_ms_copy"] / figures["step_ms"], abs=1e-3)
            assert figures["tokens_per_s"] == pytest.approx(batch / figures["step_ms"] * 1e3, rel=1e-2)
        assert found[f"apart_graph_b{batch}_c{context}"] < 1e-3


def test_groups_give_the_same_bits_and_their_gain(file: ResultFile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "reads each sequence's keys" in run(file, "groups")["skipped"]
    monkeypatch.setattr(Part, "ops", property(lambda part: select(CPU, "cpu")))
    found = run(file, "groups")
    assert "failures" not in found and found["replays_same_bits"]
    assert {"x", "low", "share", "x_told_none", "us"} == found["b3_p256"].keys() and found["b3_p256"]["low"] > 0


def test_a_replay_that_reads_other_keys_for_a_group_fails(file: ResultFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Part, "ops", property(lambda part: select(CPU, "cpu")))
    monkeypatch.setattr(Stage, "share", lambda *_: None)  # they are told to share what they do not have in common
    with pytest.raises(BenchError, match="other blocks hold them"):
        run(file, "groups")


def test_prefill_gives_the_same_logits_in_any_chunks_and_a_time_for_each_length(file: ResultFile) -> None:
    found = run(file, "prefill")
    assert "failures" not in found and "left_out" not in found
    lengths = SCALES["tiny"].lengths
    assert {f"n{n}" for n in lengths} | {f"n{lengths[-2]}_chunk12"} <= found.keys()
    assert all(0 < found[f"n{n}"]["floor_ms_gemm"] < found[f"n{n}"]["ms"] for n in lengths)


def test_transformers_has_the_same_weights_and_greedy_tokens(file: ResultFile) -> None:
    found = run(file, "transformers")
    assert "failures" not in found
    assert found["gate_tokens"] == 36
    assert all(found[f"decode_b{b}_c{c}"]["x_transformers"] > 0 for b, c in SCALES["tiny"].peer_points)


def test_the_gate_stops_another_model(file: ResultFile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(file, "gate")["tokens_as_eager"]
    widened = RandomModel.widened
    other = RandomModel.of(SCALES["tiny"].gate_shape, CPU, torch.float32, seed=1)
    monkeypatch.setattr(RandomModel, "widened", lambda self: widened(other))
    with pytest.raises(BenchError, match="wrong before fast: token 0 is"):
        run(file, "gate")


def test_logits_that_rounding_does_not_explain_get_no_speed(file: ResultFile) -> None:
    part = part_of(file, "decode")
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    assert agree(part, "same", logits, logits + 1e-5)
    assert not agree(part, "other", logits, logits.roll(1))
    assert not agree(part, "none", logits, torch.full_like(logits, float("nan")))
    assert [text.split(":")[0] for text in file.read()["parts"]["decode"]["failures"]] == ["other", "none"]


def test_the_floor_of_a_step_is_that_of_the_plan_for_an_8b_model(file: ResultFile) -> None:
    scale = SCALES["llama3-8b"]
    config = parse_config(Path("config.json"), make_model.config(scale.shape), LLAMA)
    part = Part("decode", torch.device("cuda"), scale, file, time.time())
    floors = [Point(batch, 1024, 0).floor_s(part, config, PAPER_BYTES_PER_S) * 1e3 for batch in (1, 32, 128, 256)]
    assert floors == pytest.approx([3.5, 4.5, 7.5, 11.5], abs=0.1)


def test_a_step_faster_than_its_floor_is_a_failure(file: ResultFile) -> None:
    model = RandomModel.of(SCALES["tiny"].shape, CPU, torch.float32)
    step_figures(part_of(file, "decode"), "eager_b1_c20", Point(1, 20, 2), model, step=1e-9, copy_rate=1e9)
    found = file.read()["parts"]["decode"]
    assert found["eager_b1_c20"]["share_copy"] > 1 and "measured too low" in found["failures"][0]


def test_what_has_no_time_is_left_out_by_name(file: ResultFile) -> None:
    found = run(file, "decode", seconds=0)
    assert found["left_out"] == [f"{way} b{b}_c{c}" for way in ("eager", "graph") for b, c in SCALES["tiny"].points]
    assert not any(name.startswith(("eager_", "graph_")) for name in found)


def test_a_part_that_hangs_or_dies_keeps_what_it_had(file: ResultFile, monkeypatch: pytest.MonkeyPatch) -> None:
    options = gpu.argparse.Namespace(device="cpu", shape="tiny")
    whole = json.dumps({"parts": {"decode": {"a": 1}}})
    script = f"import pathlib, os, time; pathlib.Path({str(file.path)!r}).write_text({whole!r})"
    real = subprocess.run

    def started(ending: str) -> Any:
        return lambda command, **limits: real([sys.executable, "-c", f"{script}; {ending}"], **limits)

    monkeypatch.setattr(gpu.subprocess, "run", started("time.sleep(60)"))
    assert run_process("decode", options, file, 3) == "cut"
    assert file.read()["parts"]["decode"]["a"] == 1
    monkeypatch.setattr(gpu.subprocess, "run", started("os.abort()"))
    assert run_process("decode", options, file, 30) == "failed"
    assert file.read()["parts"]["decode"] == {"a": 1, "failures": ["its process ended with status -6"]}


def test_parts_run_in_their_order_and_an_unknown_one_is_refused() -> None:
    assert wanted_parts("prefill,decode") == ["decode", "prefill"] and wanted_parts("all") == list(PARTS)
    with pytest.raises(BenchError, match="'speed' is none; known are checks"):
        wanted_parts("speed")


def test_a_sampled_prompt_follows_its_own_tokens_whatever_runs_beside_it() -> None:
    model = RandomModel.of(SCALES["tiny"].gate_shape, CPU, torch.float32)
    prompts = [[20, 21, 22], [30] * 17, [40, 41]]

    def tokens(some: list[list[int]]) -> list[list[int]]:
        stage = Stage(model, select(CPU, "reference"), Room(len(some), 40, 40, 40 * len(some)))
        return stage.follow(some, 6)[0]

    assert tokens(prompts) == [tokens([prompt])[0] for prompt in prompts]


class DeviceEvent:
    """Stands for a CUDA event: the device's clock moves when a call runs."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        self.at = DeviceEvent.now

    def elapsed_time(self, end: DeviceEvent) -> float:
        return end.at - self.at


def test_a_call_on_a_gpu_is_timed_by_the_device_with_its_cache_full_of_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", DeviceEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    done: list[str] = []

    class Other:
        def sum(self) -> None:
            done.append("read")
            DeviceEvent.now += 500.0

    def call() -> None:
        done.append("call")
        DeviceEvent.now += 1000.0 if done.count("call") == 2 else 3.0

    clock = Clock.__new__(Clock)
    clock.device = torch.device("cuda")
    clock._evicting = Other()  # type: ignore[assignment]
    assert clock.seconds(call) == pytest.approx(3e-3)
    assert done == ["call", *["read", "call"] * CUDA_CALLS]


def test_every_scale_has_cases_of_every_op() -> None:
    make = Maker(CPU, torch.float32, SCALES["tiny"].shape)
    names = {case.name.rsplit("_", 1)[0] for case in SCALES["tiny"].cases(make)}
    assert {"attention_decode", "attention_prefill", "linear", "rope", "sample_top_p"} <= names
