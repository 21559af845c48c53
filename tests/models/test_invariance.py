"""The law of the deterministic mode: a row's hidden state, logits and KV have the same bits whatever is beside it.

Attention is replaced by a twin that takes one row at a time, so that what is tried here is the decoder alone; one test
runs the compiled CPU ops.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvlite import ops
from kvlite.layers.linear import ROW_TILE
from kvlite.models import Decoder, load_model
from tests.models.alone import rows_alone
from tests.models.driver import Driver
from tests.models.make import make, prompt

CPU = torch.device("cpu")
TEXT_LEN = 48
NUM_TEXTS = 4


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n}-threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def load(folder: Path, chosen: ops.Ops, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_model(folder, device="cpu", dtype=dtype, max_model_len=128, ops=chosen, deterministic=True)


class Truth:
    """Each text computed alone, one token at a time, in a pool of its own."""

    def __init__(self, decoder: Decoder, texts: list[list[int]]) -> None:
        self.hidden, self.logits, self.kv = [], [], []
        for text in texts:
            driver = Driver(decoder)
            row = driver.row()
            self.hidden.append(driver.feed(row, text, chunk=1))
            self.logits.append(torch.cat([decoder.logits(hidden[None]).clone() for hidden in self.hidden[-1]]))
            self.kv.append(driver.kv(row).clone())


def check_random_batches(decoder: Decoder, texts: list[list[int]], truth: Truth, seed: int) -> None:
    """Feeds all texts in random chunks, random company and random order; every bit must match the truth."""
    choose = random.Random(seed)
    driver = Driver(decoder, seed=seed)
    rows = [driver.row() for _ in texts]
    while pending := [i for i, row in enumerate(rows) if len(row.tokens) < len(texts[i])]:
        batch = choose.sample(pending, choose.randint(1, len(pending)))
        chunks = [
            (rows[i], texts[i][len(rows[i].tokens) :][: choose.choice([1, 1, 2, 7, 15, 16, 17, 40, 64])]) for i in batch
        ]
        starts = [len(row.tokens) for row, _ in chunks]
        hidden = driver.run(chunks)
        logits = decoder.logits(torch.cat(hidden)).split([len(part) for part in hidden])
        for i, start, part, scores in zip(batch, starts, hidden, logits, strict=True):
            span = slice(start, start + len(part))
            assert torch.equal(part, truth.hidden[i][span]), f"seed {seed}: hidden of text {i} at {span}"
            assert torch.equal(scores, truth.logits[i][span]), f"seed {seed}: logits of text {i} at {span}"
    for i, row in enumerate(rows):
        assert torch.equal(driver.kv(row), truth.kv[i]), f"seed {seed}: KV of text {i}"


def texts_of(decoder: Decoder) -> list[list[int]]:
    return [prompt(TEXT_LEN - 9 * i, seed=i, vocab_size=decoder.config.vocab_size) for i in range(NUM_TEXTS)]


@pytest.mark.parametrize("name", ["qwen2-window", "qwen3"])
def test_random_batches_give_the_bits_of_single_tokens_alone(name: str, tmp_path: Path) -> None:
    make(name, tmp_path, num_hidden_layers=2)
    decoder = load(tmp_path, rows_alone())
    texts = texts_of(decoder)
    truth = Truth(decoder, texts)
    for seed in range(4):
        check_random_batches(decoder, texts, truth, seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_random_batches_give_the_same_bits_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    make("qwen2", tmp_path, num_hidden_layers=2)
    decoder = load(tmp_path, rows_alone(), dtype)
    texts = texts_of(decoder)[2:]
    check_random_batches(decoder, texts, Truth(decoder, texts), seed=0)


@pytest.mark.parametrize("intermediate_size", [2056, 3001])
def test_wide_rows_that_threads_split_and_odd_ones_that_no_vector_divides_keep_their_bits(
    intermediate_size: int, threads: int, tmp_path: Path
) -> None:
    shape = {"hidden_size": 36, "head_dim": 10, "vocab_size": 99, "intermediate_size": intermediate_size}
    make("llama-biased", tmp_path, num_hidden_layers=1, **shape)
    decoder = load(tmp_path, rows_alone())
    texts = [text[:20] for text in texts_of(decoder)[:2]]
    check_random_batches(decoder, texts, Truth(decoder, texts), seed=threads)


def test_the_compiled_cpu_ops_keep_the_bits_too(tmp_path: Path) -> None:
    make("qwen2-window", tmp_path)
    decoder = load(tmp_path, ops.select(CPU, "cpu"))
    texts = texts_of(decoder)
    truth = Truth(decoder, texts)
    for seed in range(6):
        check_random_batches(decoder, texts, truth, seed)


def test_the_shipped_model_keeps_its_bits(threads: int) -> None:
    decoder = load(Path(ops.__file__).parent / "model", ops.select(CPU, "cpu"))
    texts = [text[:24] for text in texts_of(decoder)[:3]]
    check_random_batches(decoder, texts, Truth(decoder, texts), seed=threads)


def test_a_neighbour_full_of_nan_changes_nothing(tmp_path: Path) -> None:
    make("llama3", tmp_path)
    decoder = load(tmp_path, rows_alone())
    hidden = torch.randn(ROW_TILE + 3, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    clean = decoder.logits(hidden).clone()
    hidden[5] = float("nan")
    dirty = decoder.logits(hidden)
    others = torch.arange(len(hidden)) != 5
    assert torch.equal(clean[others], dirty[others]) and bool(dirty[5].isnan().all())


def test_without_the_deterministic_mode_the_law_does_not_hold(tmp_path: Path) -> None:
    """The reason for the mode; should this fail, the machine's library is invariant and the mode may be free."""
    make("llama3", tmp_path, hidden_size=256, intermediate_size=1024, head_dim=64)
    decoder = load_model(tmp_path, device="cpu", dtype=torch.float32, max_model_len=128, ops=rows_alone())
    text = prompt(64)
    alone, together = Driver(decoder), Driver(decoder)
    assert not torch.equal(alone.feed(alone.row(), text, chunk=1), together.feed(together.row(), text))
