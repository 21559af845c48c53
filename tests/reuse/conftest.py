"""Backends of the laws: torch references and Rust CPU kernels; under TRITON_INTERPRET=1 (or on a GPU) Triton.

Tests of this folder run on one thread.
"""

import os

import pytest
import torch

from tests.threads import one_thread

__all__ = ["one_thread"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
BACKENDS = ["triton"] if INTERPRETED else ["reference", "cpu", *(["triton"] if ON_GPU else [])]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Name of the ops."""
    return request.param
