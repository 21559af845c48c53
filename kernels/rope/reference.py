"""Rotary position embedding in plain torch.

Knows tensors only: the frequencies (and every RoPE scaling) are in the cos and sin tables. Only products, sums and one
rounding per element, so a row's bits do not depend on the rows beside it. Called through `kvlite.ops`.
"""

import torch


def rope(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotates q [T, H, D] and k [T, KH, D] in place, half-split convention: pair i is (x[i], x[i + rot/2]).

    positions [T] int32, each in [0, P) · cos, sin [P, rot/2] fp32; dimensions from rot on stay as they are. Computed in
    fp32, rounded once. q and k may be strided views.
    """
    half = cos.shape[1]
    c = cos.index_select(0, positions).unsqueeze(1)
    s = sin.index_select(0, positions).unsqueeze(1)
    for x in (q, k):
        low, high = x[..., :half], x[..., half : 2 * half]
        low32, high32 = low.float(), high.float()
        rotated_low = low32 * c - high32 * s
        rotated_high = high32 * c + low32 * s
        low.copy_(rotated_low)
        high.copy_(rotated_high)
