"""Matrix products with weights, and the one rule that makes them independent of the batch.

Libraries choose a GEMM kernel by the number of rows, so the bits of a row depend on how many rows are beside it. In
deterministic mode every product is therefore called with exactly ROW_TILE rows, and longer inputs are looped over.
Within one such call a row's bits must depend neither on its place nor on its neighbours; `check_row_invariance` tries
that on the machine at hand when a model is loaded. Called by `models.decoder`.
"""

from __future__ import annotations

import torch

from kvlite.errors import ModelLoadError

ROW_TILE = 16
"""Rows of every product in deterministic mode. Small, because a decode step of one row pays for all of them; 16 rows of
any width also keep every tile on a 32-byte boundary. 8, 16, 32 and 64 were tried over 12 shapes on AVX2 with MKL (fp32)
and oneDNN (bf16, fp16), 1 to 3 threads: a row kept its bits at every place in all of them."""


def padded_rows(num_rows: int, deterministic: bool) -> int:
    """Rows a buffer must hold for `num_rows` rows of input: whole tiles in deterministic mode."""
    return -(-num_rows // ROW_TILE) * ROW_TILE if deterministic else num_rows


class Linear:
    """out = x W^T + b, with x [T, K], W [N, K], b [N] or none, out [T, N], all of one dtype on one device."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, deterministic: bool = False) -> None:
        self.weight = weight
        self.bias = bias
        self.deterministic = deterministic
        self._columns = weight.t()

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Writes `out`. In deterministic mode T must be a multiple of ROW_TILE (see `padded_rows`)."""
        if not self.deterministic:
            self._multiply(x, out)
            return
        num_rows = x.shape[0]
        assert num_rows % ROW_TILE == 0, "rows are padded by the caller"
        for start in range(0, num_rows, ROW_TILE):
            self._multiply(x[start : start + ROW_TILE], out[start : start + ROW_TILE])

    def _multiply(self, x: torch.Tensor, out: torch.Tensor) -> None:
        if self.bias is None:
            torch.mm(x, self._columns, out=out)
        else:
            torch.addmm(self.bias, x, self._columns, out=out)


@torch.inference_mode()
def check_row_invariance(linear: Linear, name: str) -> None:
    """Raises ModelLoadError unless one row gives the same bits at every place of a tile, whatever is beside it.

    Costs ROW_TILE products of ROW_TILE rows; call it once per weight shape.
    """
    weight = linear.weight
    width = weight.shape[1]
    noise = torch.Generator().manual_seed(0)
    tile = torch.randn(ROW_TILE, width, generator=noise)
    row = torch.randn(width, generator=noise).to(weight)
    out = torch.empty(ROW_TILE, weight.shape[0], dtype=weight.dtype, device=weight.device)
    probe = Linear(weight, linear.bias, deterministic=True)
    first: torch.Tensor | None = None
    for place in range(ROW_TILE):
        x = (tile * (1 + place % 3)).to(weight)
        x[place] = row
        probe(x, out)
        first = out[place].clone() if first is None else first
        if not torch.equal(out[place], first):
            raise ModelLoadError(
                f"deterministic mode is not available here: the {weight.dtype} product of {name} "
                f"{list(weight.shape)} on {weight.device} gives a row other bits at place {place} of {ROW_TILE}; "
                "use another dtype or switch deterministic off"
            )
