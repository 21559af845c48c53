"""Every case that `bench gpu` checks on a GPU, here on every backend: the references' outputs, no NaN."""

import pytest
import torch

from kvlite.bench.kernel_cases import odd
from kvlite.bench.kernels import check
from kvlite.ops import Ops, select
from tests.kernels.conftest import INTERPRETED

# Other tests have the interpreter's other element types; here they would cost a quarter of a minute each.
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_odd_sizes_give_the_references_outputs(ops: Ops, device: torch.device, dtype: torch.dtype) -> None:
    reference = select(device, "reference")
    names: list[str] = []
    for want, have in zip(odd(device, dtype), odd(device, dtype), strict=True):
        want.run(reference)
        have.run(ops)
        check(want, have, ops.backend, dtype)
        assert not any(bool(out.float().isnan().any()) for out in have.outputs), have.name
        names.append(have.name)
    assert len(names) == len(set(names)) > 60
