"""Which backends the kernel tests run on.

Without TRITON_INTERPRET: the torch references and the Rust CPU kernels (and Triton where a GPU is present). With it:
Triton alone, interpreted on the CPU; test_triton_interpreter.py starts that run, because the variable must be set
before Triton is imported and other tests of the same process may have imported it.
"""

import os

import pytest
import torch

from kvlite.ops import Ops, select

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
TRITON = ["triton"] if INTERPRETED or ON_GPU else []
BACKENDS = TRITON if INTERPRETED else ["reference", "cpu", *TRITON]


def _select(backend: str) -> Ops:
    return select(torch.device("cuda" if backend == "triton" and ON_GPU else "cpu"), backend)


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    """The ops of each backend."""
    return _select(request.param)


@pytest.fixture
def device() -> torch.device:
    """Where tensors live; the references run there too."""
    return torch.device("cuda" if ON_GPU else "cpu")
