"""What a swap costs is measured before the first plan and leaves nothing behind but numbers in free blocks."""

from __future__ import annotations

import pytest
import torch

from kvlite.runner import swapping
from tests.engines import engine


@pytest.mark.parametrize("max_model_len", [8, 256])
def test_the_price_of_a_swap_is_known_at_start_and_the_padding_row_is_clean(max_model_len: int) -> None:
    with engine(host_cache_bytes=1 << 20, max_model_len=max_model_len) as made:
        assert made.startup.host_blocks > 0 and made.startup.swap_cost_tokens > 0
        assert not made._runner.pool.block_table.any()  # pyright: ignore[reportPrivateUsage]
        assert any(name == "host cache" for name, _ in made.startup.rows())


def test_a_slower_copy_costs_more_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([2.0, 0.5, 2.0, 1.0])
    monkeypatch.setattr(swapping, "_best", lambda _run, _device: next(seconds))
    with engine(host_cache_bytes=1 << 20, max_num_batched_tokens=64) as slow:
        assert slow.startup.swap_cost_tokens == 64 * 0.5 / 2
    with engine(host_cache_bytes=1 << 20, max_num_batched_tokens=64) as slower:
        assert slower.startup.swap_cost_tokens == 64 * 1.0 / 2


def test_without_a_host_tier_or_prefix_caching_nothing_is_measured() -> None:
    with engine() as without, engine(host_cache_bytes=1 << 20, enable_prefix_caching=False) as uncached:
        assert [made.startup.host_blocks for made in (without, uncached)] == [0, 0]
        assert torch.numel(without._runner.pool.host) == 0  # pyright: ignore[reportPrivateUsage]
