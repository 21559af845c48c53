"""Matrix products with weights, and the rule that makes them independent of the batch.

Libraries choose a GEMM kernel by the number of rows, so the bits of a row depend on how many rows are beside it.
Deterministic mode takes the backend's `invariant_linear` where there is one. Elsewhere every product with one weight is
called with one fixed number of rows, and longer inputs are looped over. Within such a call a row's bits must depend
neither on its place nor on its neighbours; that is tried on the machine at hand, shape by shape, when a model is loaded
(`choose_row_tile`). Called by `models.decoder`.
"""

from __future__ import annotations

import torch

from kvlite.ops import LinearOp

ROW_TILE = 16
"""Rows of a product that is made in tiles. Small, because a decode step of one row pays for all of them. Tried with 8,
16, 32 and 64 rows, 1 to 4 threads, AVX2: MKL (fp32) keeps a row's bits at every place for every shape whose sides are
multiples of 8, and for nearly all others; the bf16 and fp16 products of torch 2.15 kept them in every try."""


def padded_rows(num_rows: int, tiled: bool) -> int:
    """Rows a buffer must hold for `num_rows` rows of input: whole tiles where products take tiles."""
    return -(-num_rows // ROW_TILE) * ROW_TILE if tiled else num_rows


class Linear:
    """out = x W^T + b by `multiply`, with x [T, K], W [N, K], b [N] or none, out [T, N], on one device.

    `row_tile` 0: one call for all rows. Otherwise: calls of exactly that many rows (see `choose_row_tile`).
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, multiply: LinearOp, *, row_tile: int = 0
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.row_tile = row_tile
        self._multiply = multiply
        if row_tile == 1:
            self._x = torch.empty(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
            self._out = torch.empty(1, weight.shape[0], dtype=weight.dtype, device=weight.device)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Writes `out`. With a row tile, T must be a multiple of ROW_TILE (see `padded_rows`)."""
        tile = self.row_tile
        if not tile:
            self._multiply(x, self.weight, self.bias, out)
            return
        num_rows = x.shape[0]
        assert num_rows % ROW_TILE == 0, "rows are padded by the caller"
        for start in range(0, num_rows, tile):
            if tile == 1:
                # One row always lies at the same address: libraries also choose kernels by alignment.
                self._x.copy_(x[start : start + 1])
                self._multiply(self._x, self.weight, self.bias, self._out)
                out[start : start + 1].copy_(self._out)
            else:
                self._multiply(x[start : start + tile], self.weight, self.bias, out[start : start + tile])


@torch.inference_mode()
def choose_row_tile(weight: torch.Tensor, bias: torch.Tensor | None, multiply: LinearOp) -> int:
    """ROW_TILE when a row keeps its bits at every place of such a tile whatever is beside it, else 1: row by row.

    Holds for this weight shape, dtype, machine and thread count. Costs ROW_TILE products of ROW_TILE rows.
    """
    noise = torch.Generator().manual_seed(0)
    others = torch.randn(ROW_TILE, weight.shape[1], generator=noise)
    row = torch.randn(weight.shape[1], generator=noise).to(weight)
    out = torch.empty(ROW_TILE, weight.shape[0], dtype=weight.dtype, device=weight.device)
    linear = Linear(weight, bias, multiply, row_tile=ROW_TILE)
    first = torch.empty(0)
    for place in range(ROW_TILE):
        x = (others * (1 + place % 3)).to(weight)
        x[place] = row
        linear(x, out)
        if place == 0:
            first = out[0].clone()
        elif not torch.equal(out[place], first):
            return 1
    return ROW_TILE
