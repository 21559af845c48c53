"""Where a figure comes from: machine, load, commit, command. Every benchmark ends in `finish`, one JSON line.

Knows no benchmark. Results that are kept lie in bench/results/<name>.json, which documents may quote.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def origin() -> dict[str, Any]:
    """Machine, commit and command of this run. `load` is the one-minute load average before the run."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    machine = {"cpu": _cpu(), "threads": os.cpu_count(), "load": load, "system": platform.system()}
    return {"machine": machine, "commit": _commit(), "command": command(sys.argv[1:])}


def command(arguments: list[str]) -> str:
    """The command line of a run. Absolute paths keep their last part: a result is read on other machines."""
    parts = [Path(part).name if part.startswith("/") and Path(part).name else part for part in arguments]
    return shlex.join(["python", "-m", "bench", *parts])


def finish(name: str, figures: dict[str, Any], save: bool) -> None:
    """Prints `figures` as the last line, one JSON object; with `save` also writes bench/results/<name>.json."""
    if save:
        folder = HERE / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.stdout.flush()
    print(json.dumps({"bench": name, **figures}), flush=True)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """Short hash, with `+` when the tree differs from it; `unknown` outside a repository."""
    try:
        describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        done = subprocess.run(describe, cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
