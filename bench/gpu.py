"""`python -m bench gpu` (`make gpu`): the GPU side in one command, right first and then against its floors, one JSON.

Physics. A decode step reads every weight once, and the keys and values of every sequence: its floor is those bytes over
the rate of a copy, measured in this run and 4.3 TB/s as an H200 is known to reach. A prompt of T tokens needs 2 P T
operations in its linear layers and 2 H D L T^2 in causal attention: its floor is those over the rate of a large bf16
product, measured and 790 TFLOP/s. A kernel's floor is the larger of both for the bytes and operations that its op
cannot do without; its time is the device's own, with nothing in the cache. Host and device meet once a step, and a step
of a large model is some 300 launches: so decode is timed by graphs and without, from a plan in the arena to tokens on
the host. Weights are random, made on the device: no checkpoint, no network, no tokenizer.

Needs torch and triton, and transformers for its part: neither the compiled core nor a server. Parts run in processes of
their own, one after the other: one that hangs, fails or loses the device takes none of the others' figures. After each
figure the file is whole, so a run that is cut keeps what it had. The status is 1 when anything failed or had no time.
`--device cpu --shape tiny` takes the same way over torch references (Triton's interpreter with TRITON_INTERPRET=1), to
try the command; its times say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import gpu_groups, gpu_parts
from .errors import BenchError
from .gpu_report import Part, ResultFile, Scale
from .grouped import BATCHES, PREFIXES
from .kernel_cases import Case, Maker, attention, linear, row_ops, sample, timed_large
from .make_model import SHAPES, Shape
from .report import HERE, finish, origin

BUDGET_S = 570.0
"""Of the whole command: ten minutes with a reserve."""
LEAST_S = 10.0
"""A part with less is not begun."""
SAVED = HERE / "results" / "gpu.json"


def timed_tiny(make: Maker) -> Iterator[Case]:
    """A few cases, to try the command."""
    yield from (attention(make, 2, 40, 1), attention(make, 1, 20, 20), linear(make, 2))
    yield from (*row_ops(make, 3), sample(make, 2, 1.0, 0.9))


TINY = Shape("llama", 2, 64, 4, 2, 16, 96, 512, 256)
SCALES = {
    "llama3-8b": Scale(
        shape=SHAPES["llama3-8b"],
        points=((1, 1024), (32, 1024), (128, 1024), (256, 1024), (1, 8192)),
        lengths=(2048, 8192, 32_768),
        chunk=8192,
        num_steps=24,
        gate_shape=Shape("llama", 4, 512, 8, 2, 128, 1024, 4096, 2048),
        gate_lengths=(5, 70, 300),
        shared=tuple((batch, prefix) for batch in (1, *BATCHES) for prefix in PREFIXES),
        peer_points=((1, 1024), (32, 1024)),
        peer_length=2048,
        cases=timed_large,
    ),
    "tiny": Scale(
        shape=TINY,
        points=((1, 20), (3, 20), (1, 40)),
        lengths=(12, 24, 48),
        chunk=24,
        num_steps=2,
        gate_shape=TINY,
        gate_lengths=(5, 20, 33),
        shared=((3, 256),),
        peer_points=((1, 20), (2, 20)),
        peer_length=12,
        cases=timed_tiny,
        copied_bytes=1 << 24,
    ),
}


@dataclass(frozen=True)
class Stretch:
    """A part and the seconds it may take; together more than the command has, because few need all of theirs."""

    run: Callable[[Part], None]
    room_s: float


PARTS = {
    "checks": Stretch(gpu_parts.checks, 130),
    "gate": Stretch(gpu_parts.gate, 60),
    "kernels": Stretch(gpu_parts.kernels, 100),
    "groups": Stretch(gpu_groups.groups, 70),
    "decode": Stretch(gpu_parts.decode, 110),
    "prefill": Stretch(gpu_parts.prefill, 80),
    "transformers": Stretch(gpu_parts.transformers, 110),
    "profile": Stretch(gpu_parts.profile, 60),
}


def run_part(name: str, options: argparse.Namespace) -> int:
    """One part in this process; its figures go into the file."""
    file = ResultFile(options.output)
    part = Part(name, torch.device(options.device), SCALES[options.shape], file, options.until)
    try:
        PARTS[name].run(part)
    except Exception as error:  # what it is goes into the file; the other parts are processes of their own
        if not isinstance(error, BenchError):
            traceback.print_exc()
        part.fail(str(error) or repr(error))
        return 1
    return 0


def run_parts(names: list[str], options: argparse.Namespace, file: ResultFile) -> None:
    """Every part in its own process, as long as the budget lasts; the file says how each ended."""
    end = time.monotonic() + options.budget_s
    for name in names:
        start = time.monotonic()
        room = min(PARTS[name].room_s, end - start)
        if room < LEAST_S:
            file.add(name, {"status": "left out"})
            print(f"{name}: left out, no time", flush=True)
            continue
        print(f"{name}, {room:.0f} s at most:", flush=True)
        file.add(name, {"status": "running"})
        status = run_process(name, options, file, room)
        file.add(name, {"status": status, "wall_s": round(time.monotonic() - start, 1)})
        if options.save:
            SAVED.parent.mkdir(exist_ok=True)
            shutil.copyfile(file.path, SAVED)


def run_process(name: str, options: argparse.Namespace, file: ResultFile, room: float) -> str:
    """One part in a process that is ended after `room` seconds. Returns ok, skipped, failed, or cut: not all of it."""
    command = [sys.executable, "-m", str(__package__), "gpu", "--only", name, "--until", str(time.time() + room)]
    command += ["--device", options.device, "--shape", options.shape, "--output", str(file.path)]
    try:
        code = subprocess.run(command, timeout=room, check=False).returncode
    except subprocess.TimeoutExpired:
        file.add(name, {"left_out": [f"what came after {room:.0f} s"]})
        print(f"  {name} was ended after {room:.0f} s", flush=True)
        return "cut"
    found = file.read()["parts"][name]
    if code and not found.get("failures"):
        file.add(name, {"failures": [f"its process ended with status {code}"]})
        print(f"  FAILED: the process ended with status {code}", flush=True)
        return "failed"
    if found.get("failures"):
        return "failed"
    return "skipped" if "skipped" in found else "cut" if found.get("left_out") else "ok"


def versions() -> dict[str, str]:
    """Of the packages that make the figures."""
    found: dict[str, str] = {"python": sys.version.split()[0]}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def wanted_parts(text: str) -> list[str]:
    """Names out of `decode,prefill`, in the order of PARTS. Raises BenchError."""
    names = list(PARTS) if text == "all" else text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise BenchError(f"--parts {text}: {unknown[0]!r} is none; known are {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def main(arguments: list[str]) -> int:
    """Every part; the last line is one JSON object. 1 when anything failed."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description="the GPU side: right, and how fast")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command")
    parser.add_argument("--shape", choices=SCALES, default="llama3-8b")
    parser.add_argument("--parts", default="all", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for everything")
    parser.add_argument("--output", type=Path, help="the JSON file, whole after every figure")
    parser.add_argument("--save", action="store_true", help="also write bench/results/gpu.json")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only:
        return run_part(options.only, options)
    names = wanted_parts(options.parts)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("no CUDA device on this machine; to try the command: --device cpu --shape tiny")
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    figures: dict[str, Any] = origin() | {"device": device, "versions": versions(), "shape": options.shape}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        file = ResultFile(options.output or Path(scratch) / "gpu.json")
        file.path.parent.mkdir(parents=True, exist_ok=True)
        file.write(figures | {"parts": {}})
        run_parts(names, options, file)
        whole = file.read() | {"wall_s": round(time.monotonic() - start, 1)}
        file.write(whole)
    finish("gpu", whole, options.save)
    return int(any(part["status"] not in ("ok", "skipped") for part in whole["parts"].values()))
