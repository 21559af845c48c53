"""RMSNorm, plain and with the residual added first, in torch.

Knows tensors only. Each row is reduced alone, in an order fixed by its width. Called through `kvlite.ops`.
"""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """out = weight * (x32 * rsqrt(mean(x32^2) + eps)) rounded to x's dtype before the weight (Hugging Face's order).

    x, out [..., W] (rank 2 or 3, last dimension contiguous, may be the same tensor) · weight [W], x's dtype.
    """
    x32 = x.float()
    inverse = torch.rsqrt((x32 * x32).mean(dim=-1, keepdim=True) + eps)
    torch.mul((x32 * inverse).to(x.dtype), weight, out=out)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """residual += x in place, then out = rms_norm(residual). x, residual, out [T, W] of one dtype."""
    residual.add_(x)
    rms_norm(residual, weight, eps, out)
