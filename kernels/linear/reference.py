"""Rows times a weight matrix through torch's library (MKL, oneDNN, cuBLAS).

Knows tensors only. Which kernel the library takes depends on the number of rows, and with it a row's last bits. Called
through `kvlite.ops`.
"""

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = x W^T + b. x [T, K] · weight [N, K] · bias [N] or none · out [T, N].

    x and out are of one dtype, weight and bias of one: the same, or 16 bits beside fp32.
    """
    columns = weight.to(x.dtype).t()
    if bias is None:
        torch.mm(x, columns, out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, columns, out=out)
