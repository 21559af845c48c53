"""SiLU of the gate times the up projection in Triton: one program per row and tile of columns.

Knows tensors only. Called through `kvlite.ops` (backend "triton").
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, width, gate_up_stride, out_stride, BLOCK: tl.constexpr):
    """Columns program_id(1) * BLOCK and on of row program_id(0)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate_ptrs = gate_up_ptr + row * gate_up_stride + column
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + width, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * out_stride + column, value.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """As `reference.silu_mul`."""
    assert gate_up.stride(-1) == out.stride(-1) == 1
    num_rows, width = out.shape
    if num_rows == 0:
        return
    grid = (num_rows, triton.cdiv(width, BLOCK))
    silu_mul_kernel[grid](gate_up, out, width, gate_up.stride(0), out.stride(0), BLOCK=BLOCK, num_warps=4)
