"""Every Triton kernel compiles for sm_90 without a spill and within shared memory, as kernels/sm90.json records it."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.conftest import INTERPRETED

REPOSITORY = Path(__file__).parents[2]
RENEW = "renew with: python -m kvlite.kernels.aot --write"
MAX_SHARED_BYTES = 227 * 1024


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """The table of this machine, made in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kvlite.kernels.aot"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiling needs the compiler, not the interpreter")


def test_no_kernel_spills_or_exceeds_shared_memory(compiled: dict[str, Any]) -> None:
    rows = compiled["kernels"].items()
    assert len(rows) > 30
    assert not [name for name, row in rows if row["spill_bytes"]]
    assert not [name for name, row in rows if row["shared_bytes"] > MAX_SHARED_BYTES]


def test_the_committed_table_is_what_this_compiler_makes(compiled: dict[str, Any]) -> None:
    committed = json.loads((REPOSITORY / "kernels" / "sm90.json").read_text())
    assert committed["kernels"].keys() == compiled["kernels"].keys(), RENEW
    changed = {
        name: (committed["kernels"][name], row)
        for name, row in compiled["kernels"].items()
        if committed["kernels"][name] != row
    }
    if committed["triton"] == compiled["triton"]:
        assert not changed, f"{RENEW}: {changed}"
    elif changed:
        warnings.warn(
            f"Triton {compiled['triton']} differs from the table's {committed['triton']}: {changed}", stacklevel=1
        )
