"""The choice of a backend: what it refuses, and that a CPU machine never pays for Triton."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvlite import ops
from tests.kernels.conftest import INTERPRETED

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing here depends on Triton")


def test_the_default_on_a_cpu_is_the_rust_backend() -> None:
    assert ops.select(CPU).backend == "cpu"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_backend_of_a_cpu_imports_triton(backend: str) -> None:
    code = (
        "import sys, torch, kvlite.ops as ops; "
        f"ops.select(torch.device('cpu'), {backend!r}); sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_a_backend_that_cannot_serve_the_device_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a CUDA device"):
        ops.select(CPU, "triton")
    with pytest.raises(ValueError, match="needs tensors on the CPU"):
        ops.select(torch.device("cuda"), "cpu")
    with pytest.raises(ValueError, match="one of 'reference', 'triton', 'cpu'"):
        ops.select(CPU, "numpy")  # pyright: ignore[reportArgumentType]


def test_a_missing_extension_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvlite._core", None)
    with pytest.raises(ImportError, match="run `make build`"):
        ops.select(CPU, "cpu")
