"""Linear layers: the product is right in every mode, and with a row tile a row keeps its bits."""

from __future__ import annotations

import pytest
import torch

from kvlite.kernels.linear.reference import linear as multiply
from kvlite.layers.linear import ROW_TILE, Linear, choose_row_tile, padded_rows

SHAPES = [(64, 96), (704, 256), (256, 1394), (896, 1152), (100, 37), (3001, 36), (1447, 11)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("row_tile", [0, 1, ROW_TILE])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_is_the_product(row_tile: int, biased: bool) -> None:
    x, weight = numbers(2 * ROW_TILE, 40), numbers(24, 40, seed=1)
    bias = numbers(24, seed=2) if biased else None
    out = torch.full((2 * ROW_TILE, 24), float("nan"))
    Linear(weight, bias, multiply, row_tile=row_tile)(x, out)
    torch.testing.assert_close(out, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_a_row_keeps_its_bits_at_every_place_beside_any_neighbours(width: int, height: int, dtype: torch.dtype) -> None:
    weight, bias, row = numbers(height, width, dtype=dtype), numbers(height, dtype=dtype), numbers(width, dtype=dtype)
    linear = Linear(weight, bias, multiply, row_tile=choose_row_tile(weight, bias, multiply))
    seen = set[bytes]()
    for place in (0, 1, 7, 15, 16, 30, 47):
        num_rows = padded_rows(place + 1, tiled=True)
        x = numbers(num_rows, width, seed=place + 1, dtype=dtype) * (place + 1)
        x[place] = row
        out = torch.empty(num_rows, height, dtype=dtype)
        linear(x, out)
        seen.add(out[place].float().numpy().tobytes())
    assert len(seen) == 1


def test_a_shape_whose_rows_do_not_keep_their_bits_is_computed_row_by_row() -> None:
    def fickle(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        out.copy_(x @ weight.t() + torch.arange(len(x)).view(-1, 1))

    weight = numbers(8, 16)
    assert choose_row_tile(weight, None, multiply) == ROW_TILE
    assert choose_row_tile(weight, None, fickle) == 1


def test_rows_are_padded_to_whole_tiles_where_products_take_tiles_only() -> None:
    assert [padded_rows(n, tiled=True) for n in (1, 16, 17)] == [16, 16, 32]
    assert [padded_rows(n, tiled=False) for n in (1, 16, 17)] == [1, 16, 17]


def test_rows_that_are_no_whole_tiles_are_a_fault_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="padded by the caller"):
        Linear(numbers(8, 8), None, multiply, row_tile=ROW_TILE)(numbers(3, 8), torch.empty(3, 8))
