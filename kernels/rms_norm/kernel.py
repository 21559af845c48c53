"""RMSNorm in Triton, plain and with the residual added first: a program normalises whole rows.

Knows tensors only. Rows per program depend on the width alone and rows are reduced apart, so a row's bits do not depend
on the batch. Called through `kvlite.ops` (backend "triton").
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, num_rows, num_heads, eps, x_row_stride, x_head_stride,
    residual_row_stride, out_row_stride, out_head_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Rows r = t * num_heads + h of x [T, num_heads, WIDTH]; with ADD, num_heads is 1 and the residual is updated."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, head = (index // num_heads).to(tl.int64)[:, None], (index % num_heads)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (index < num_rows)[:, None] & (column < WIDTH)
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_row_stride + head * x_head_stride + column, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        residual_ptrs = residual_ptr + row * residual_row_stride + column
        summed = (x + tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(residual_ptrs, summed, mask=mask)
        x = summed.to(tl.float32)
    mean = tl.sum(x * x, 1) / WIDTH
    normal = (x * tl.rsqrt(mean + eps)[:, None]).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row_stride + head * out_head_stride + column, (normal * weight).to(dtype), mask=mask)


def rms_norm_config(width: int) -> dict[str, int]:
    """Rows per program and warps for rows of `width` elements."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "ROWS": max(1, 1024 // block), "num_warps": min(16, max(4, block // 512))}


def _launch(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, add: bool):
    assert x.stride(-1) == residual.stride(-1) == out.stride(-1) == weight.stride(-1) == 1
    num_heads = x.shape[1] if x.dim() == 3 else 1
    num_rows = x.shape[0] * num_heads
    if num_rows == 0:
        return
    config = rms_norm_config(x.shape[-1])
    rms_norm_kernel[(triton.cdiv(num_rows, config["ROWS"]),)](
        x, residual, weight, out, num_rows, num_heads, eps, x.stride(0), x.stride(1), residual.stride(0),
        out.stride(0), out.stride(1), WIDTH=x.shape[-1], ADD=add, **config,
    )  # fmt: skip


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """As `reference.rms_norm`."""
    _launch(x, x, weight, eps, out, add=False)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """As `reference.add_rms_norm`."""
    _launch(x, residual, weight, eps, out, add=True)
