"""The copier: blocks leave one pool and arrive in another bit for bit, and nothing else is touched."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvlite.errors import EngineError
from kvlite.fleet.copier import Blocks, KVCopier
from kvlite.fleet.wire import Channel
from kvlite.runner.kv_pool import KVPool, KVShape
from tests.fleet.link_pairs import KINDS, pair, run

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pool(dtype: torch.dtype = torch.float32, num_blocks: int = 12, seed: int | None = None) -> KVPool:
    shape = KVShape(num_layers=2, block_size=4, num_kv_heads=3, head_dim=8, dtype=dtype)
    made = KVPool(shape, num_blocks=num_blocks, max_num_seqs=2, max_model_len=17, device=torch.device("cpu"))
    if seed is not None:
        made.data.copy_(torch.randn(made.data.shape, generator=torch.Generator().manual_seed(seed)))
    return made


def blocks(*numbers: int) -> Blocks:
    return np.array(numbers, np.int32)


def joined(pieces: Any) -> memoryview:
    return memoryview(b"".join(pieces))


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_arrive_bit_for_bit_in_the_places_named_and_nowhere_else(dtype: torch.dtype) -> None:
    source, target = pool(dtype, seed=1), pool(dtype, num_blocks=7, seed=2)
    before = target.data.clone()
    out, into = KVCopier(source), KVCopier(target)
    assert out.block_bytes == into.block_bytes == source.shape.bytes_per_block
    into.store(blocks(6, 0, 3, 2), joined(out.payload(blocks(3, 4, 5, 11))))
    for there, here in ((6, 3), (0, 4), (3, 5), (2, 11)):
        assert torch.equal(target.data[there].view(torch.uint8), source.data[here].view(torch.uint8))
    rest = [1, 4, 5]
    assert torch.equal(target.data[rest], before[rest])


def test_neighbours_are_one_piece_of_the_pools_own_memory() -> None:
    made = pool(seed=1)
    copier = KVCopier(made)
    size = copier.block_bytes
    pieces = copier.payload(blocks(3, 4, 5, 2, 3, 9))
    assert [len(piece) for piece in pieces] == [3 * size, 2 * size, size]
    made.data[9] = 7
    assert bytes(pieces[2]) == made.data[9].numpy().tobytes()
    assert list(copier.payload(blocks())) == []
    assert np.array_equal(copier.pool_rows()[4], np.frombuffer(pieces[0], np.uint8)[size : 2 * size])


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    made = pool(seed=1)
    copier = KVCopier(made)
    before = made.data.clone()
    one = joined(copier.payload(blocks(1)))
    for named, payload, text in (
        (blocks(12), one, "not all below 12"),
        (blocks(-1), one, "not all below 12"),
        (blocks(0, 2), one, "for 2 blocks"),
        (blocks(0), one[:-1], "must have"),
        (blocks(), one, "for 0 blocks"),
        (blocks(2, 2), joined([one, one]), "named twice"),
    ):
        with pytest.raises(EngineError, match=text):
            copier.store(named, payload)
    for named in (blocks(12), blocks(0, -1)):
        with pytest.raises(EngineError, match="not all below"):
            copier.payload(named)
    assert torch.equal(made.data, before)
    with pytest.raises(EngineError, match="must be contiguous"):
        KVCopier(SimpleNamespace(data=made.data.transpose(0, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_cross_a_link_from_pool_to_pool(kind: str, tmp_path: Path) -> None:
    source, target = pool(num_blocks=64, seed=3), pool(num_blocks=64)
    out, into = KVCopier(source), KVCopier(target)
    order = np.random.default_rng(4).permutation(64).astype(np.int32)

    async def main() -> None:
        async with pair(kind, tmp_path) as (one, two):

            async def send() -> None:
                for part in np.split(order, 8):
                    await one.send(Channel.MIGRATION, part.tobytes(), out.payload(part))

            async def store() -> None:
                for _ in range(8):
                    _, frame, payload = await anext(two)
                    release = two.keep()
                    assert payload is not None
                    await asyncio.to_thread(into.store, np.frombuffer(frame, np.int32), payload)
                    release()

            await asyncio.gather(send(), store())

    run(main())
    assert torch.equal(source.data, target.data)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_leave_and_enter_a_gpu_bit_for_bit(dtype: torch.dtype) -> None:
    source = pool(dtype, seed=1)
    moved = SimpleNamespace(data=source.data.cuda())
    target = SimpleNamespace(data=torch.zeros_like(moved.data))
    into = KVCopier(target)
    into.store(blocks(5, 1, 2), joined(KVCopier(moved).payload(blocks(9, 3, 4))))
    assert torch.equal(target.data[[5, 1, 2]].cpu(), source.data[[9, 3, 4]])
    assert not target.data[[0, 3, 4]].any()
