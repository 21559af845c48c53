"""Small host arrays to the device without waiting for it: indices and parameters. Called by `runner`'s modules.

A plain copy from pageable memory makes the host wait for everything that was launched before, a step's forward pass for
instance. From pinned memory the copy takes its place in the stream and the host goes on; torch keeps the pinned buffer
until the copy is done.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


def upload(values: NDArray[np.generic], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`values` on `device`, as `dtype` when one is given; on a CPU they may be the same memory, to be read at once."""
    host = torch.as_tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.contiguous().pin_memory().to(device, non_blocking=True)
