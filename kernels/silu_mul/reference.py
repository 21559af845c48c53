"""SiLU of the gate times the up projection, in plain torch.

Knows tensors only. Written with `exp` and not with torch's `silu` or `sigmoid`: those take another code path for the
last elements of each thread's share, so that a row's bits would depend on how many rows there are. Called through
`kvlite.ops`.
"""

import torch


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out = silu(gate) * up in fp32, rounded once. gate_up [T, 2F], the gate in its first half · out [T, F]."""
    width = out.shape[-1]
    gate, up = gate_up[..., :width].float(), gate_up[..., width:].float()
    denominator = torch.neg(gate).exp_().add_(1.0)
    torch.mul(torch.div(gate, denominator, out=denominator), up, out=out)
