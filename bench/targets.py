"""Engines that `compare` can start: kvlite and its peers, each a command that serves an HTTP API.

Owns how each is told the same model, port, threads and element type, and how a server's life is watched; knows nothing
of workloads. A peer that is not installed, does not start, or dies is a `TargetError` that says which and why.

`auto` is each engine's own number format for a 16-bit checkpoint on this CPU. Without bf16 instructions kvlite
keeps the weights in 16 bits and computes in float32, transformers and vLLM hold and compute float32, llama.cpp takes
float16.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import llamacpp
from .client import Address, find_model
from .errors import BenchError, TargetError
from .load import Send
from .options import DTYPES, torch_dtype
from .server import Server

PEERS = Path(__file__).resolve().parent.parent / ".peers"
POLL_S = 0.05
LOG_BYTES = 1 << 20
STOP_S = 20.0
DYING_S = 2.0
"""A process that dies closes its connections a moment before it is gone."""


@dataclass(frozen=True)
class Launch:
    """What every engine is told alike."""

    model: Path
    port: int
    threads: int
    dtype: str
    max_len: int
    max_num_seqs: int
    kv_bytes: int


def _openai(address: Address, model: str) -> Send:
    return Server(address, model, None, plain=False).send


@dataclass(frozen=True)
class Target:
    """One engine; `command` makes its arguments, `needs` must exist before it is tried."""

    name: str
    command: Callable[[Launch], list[str]]
    start_s: float = 60.0
    environment: Callable[[Launch], dict[str, str]] = field(default=lambda launch: {})
    needs: Path | None = None
    best_dtype: Callable[[], str] = field(default=lambda: "bfloat16")
    """What `auto` means."""
    sender: Callable[[Address, str], Send] = _openai
    """How the engine at an address is asked for a job by a model's name."""

    def dtype(self, wanted: str) -> str:
        """The format that the engine is told."""
        return self.best_dtype() if wanted == "auto" else wanted


def _native() -> str:
    """bfloat16 where the CPU multiplies it, else float32: libraries emulate bfloat16 there.

    A product of 512 rows by torch on two Zen 3 cores: 16 GFLOP/s in bfloat16, 85 in float32.
    """
    return next(name for name, dtype in DTYPES.items() if dtype == torch_dtype("auto"))


def _llamacpp_dtype() -> str:
    # Two Zen 3 cores, 0.5B shape, not quiet: float16 and bfloat16 read a prompt at 167 and 122 tokens/s, decode at 21.6
    # and 20.4.
    return "bfloat16" if _native() == "bfloat16" else "float16"


def _kvlite(launch: Launch) -> list[str]:
    # float32 is what it computes in; a 16-bit checkpoint keeps its 16 bits in memory.
    return [
        sys.executable, "-m", "kvlite.cli", "serve", str(launch.model), "--port", str(launch.port),
        "--dtype", launch.dtype, "--num-threads", str(launch.threads), "--max-model-len", str(launch.max_len),
        "--max-num-seqs", str(launch.max_num_seqs), "--kv-cache-bytes", str(launch.kv_bytes),
    ]  # fmt: skip


def _transformers(launch: Launch) -> list[str]:
    return [
        sys.executable, "-m", f"{__package__}.serve_transformers", str(launch.model), "--port", str(launch.port),
        "--dtype", launch.dtype, "--threads", str(launch.threads),
    ]  # fmt: skip


def _vllm(launch: Launch) -> list[str]:
    return [
        str(PEERS / "vllm/bin/python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(launch.model),
        "--host", "127.0.0.1", "--port", str(launch.port), "--dtype", launch.dtype,
        "--max-model-len", str(launch.max_len), "--max-num-seqs", str(launch.max_num_seqs),
        # A share of all memory that must be free at its start, though the pool below is all that it takes.
        "--gpu-memory-utilization", "0.3",
    ]  # fmt: skip


def _vllm_environment(launch: Launch) -> dict[str, str]:
    # It pins its own threads; the pool is given in whole GiB.
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(-(-launch.kv_bytes >> 30) or 1),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{launch.threads - 1}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _llamacpp(launch: Launch) -> list[str]:
    # Its context is divided among the slots, one per sequence; prefixes beyond them it keeps in memory of its own.
    return [
        str(PEERS / "llamacpp/build/bin/llama-server"),
        "--model", str(llamacpp.gguf(PEERS / "llamacpp", launch.model, launch.dtype)),
        "--host", "127.0.0.1", "--port", str(launch.port), "--threads", str(launch.threads), "--no-webui",
        "--parallel", str(launch.max_num_seqs), "--ctx-size", str(launch.max_num_seqs * launch.max_len),
        "--cont-batching", "--flash-attn", "on",
    ]  # fmt: skip


TARGETS = {
    target.name: target
    for target in (
        Target("kvlite", _kvlite, best_dtype=_native),
        Target("transformers", _transformers, best_dtype=_native),
        Target("vllm", _vllm, 240.0, _vllm_environment, PEERS / "vllm/complete", best_dtype=_native),
        Target(
            "llamacpp",
            _llamacpp,
            needs=PEERS / "llamacpp/complete",
            best_dtype=_llamacpp_dtype,
            sender=llamacpp.sender,
        ),
    )
}


@dataclass(frozen=True)
class Started:
    """An engine that answers."""

    address: Address
    ready_s: float
    """From its start to its first answer, the model loaded."""


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(target: Target, launch: Launch) -> Generator[Started]:
    """The engine, started and answering; ended afterwards. Raises TargetError when it does not start."""
    if target.needs is not None and not target.needs.exists():
        raise TargetError("not installed: run `make peers`")
    command = target.command(replace(launch, dtype=target.dtype(launch.dtype)))
    environment = {**os.environ, "OMP_NUM_THREADS": str(launch.threads), **target.environment(launch)}
    with tempfile.TemporaryFile("w+") as log:
        start = time.monotonic()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            address = Address.of(f"http://127.0.0.1:{launch.port}")
            _wait(target, process, address, lambda: reason(log.fileno()))
            try:
                yield Started(address, time.monotonic() - start)
            except TargetError:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(DYING_S)
                if process.poll() is None:
                    raise
            if process.poll() is not None:
                raise TargetError(f"died with status {process.returncode}: {reason(log.fileno())}")
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a server and whatever it started, so that nothing computes beside the next engine."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(target: Target, process: subprocess.Popen[bytes], address: Address, said: Callable[[], str]) -> None:
    """Until it answers /v1/models."""
    deadline = time.monotonic() + target.start_s
    while True:
        if process.poll() is not None:
            raise TargetError(f"ended with status {process.returncode} before it answered: {said()}")
        try:
            asyncio.run(find_model(address, None, timeout_s=5.0))
            return
        except BenchError:
            if time.monotonic() > deadline:
                raise TargetError(f"no answer within {target.start_s:g} s; it says: {said()}") from None
        time.sleep(POLL_S)


def reason(log: int) -> str:
    """The first error in what a server wrote, which is the cause of the others; else its last line."""
    text = os.pread(log, LOG_BYTES, 0).decode("utf-8", "replace")
    found = re.search(r"\b[A-Z]\w*(?:Error|Exception): .*", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (found[0] if found else lines[-1] if lines else "it said nothing")[:300]
