"""Which backends the kernel tests run on.

Without TRITON_INTERPRET: the torch references and the Rust CPU kernels (and Triton where a GPU is present). With it:
Triton alone, interpreted on the CPU; test_triton_interpreter.py starts that run, because the variable must be set
before Triton is imported and other tests of the same process may have imported it.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kvlite.ops import Ops, select

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
TRITON = ["triton"] if INTERPRETED or ON_GPU else []
BACKENDS = TRITON if INTERPRETED else ["reference", "cpu", *TRITON]


def _select(backend: str) -> Ops:
    return select(torch.device("cuda" if backend == "triton" and ON_GPU else "cpu"), backend)


@pytest.fixture(autouse=INTERPRETED, scope="session")
def products_by_row() -> Iterator[None]:
    """Interpreted products make each row alone, as a matrix unit does.

    The interpreter takes NumPy's, whose library chooses by the number of rows how it adds (seen with AVX2).
    """
    whole = np.matmul

    def by_row(a: npt.NDArray[Any], b: npt.NDArray[Any], **options: Any) -> npt.NDArray[Any]:
        if a.ndim != 2:
            return whole(a, b, **options)
        return np.concatenate([whole(a[row : row + 1], b, **options) for row in range(len(a))])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "matmul", by_row)
        yield


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    """The ops of each backend."""
    return _select(request.param)


@pytest.fixture
def device() -> torch.device:
    """Where tensors live; the references run there too."""
    return torch.device("cuda" if ON_GPU else "cpu")
