"""On a GPU: cuBLAS, which torch calls; there is no Triton kernel for this op (README.md says why).

Called through `kvlite.ops` (backend "triton").
"""

from kvlite.kernels.linear.reference import linear

__all__ = ["linear"]
