"""The decoder against transformers: every family and RoPE type, chunked prefill over scattered blocks, then decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvlite import ops
from kvlite.errors import ModelLoadError
from kvlite.models import Decoder, load_model
from tests.models import oracle
from tests.models.driver import Driver
from tests.models.make import FAMILIES, ROPES, edit_config, make, prompt

TOLERANCE = 1e-4
CPU = torch.device("cpu")
SHIPPED = Path(ops.__file__).parent / "model"


def load(folder: Path, **changes: Any) -> Decoder:
    settings: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "max_model_len": 128}
    return load_model(folder, **({"ops": ops.select(CPU, "reference")} | settings | changes))


def assert_agrees(decoder: Decoder, model: Any, tokens: list[int], num_tokens: int = 16) -> None:
    driver = Driver(decoder)
    ours = decoder.logits(driver.feed(driver.row(), tokens, chunk=7))
    assert oracle.distance(ours, oracle.logits(model, tokens)) <= TOLERANCE
    assert driver.greedy(tokens, num_tokens, chunk=13) == oracle.greedy(model, tokens, num_tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_gives_the_logits_and_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path)
    assert_agrees(load(tmp_path), model, prompt(45))


@pytest.mark.parametrize("rope", [name for name in ROPES if name != "dynamic"])
def test_a_rope_type_gives_the_logits_and_tokens_of_transformers(rope: str, tmp_path: Path) -> None:
    model = make("llama2", tmp_path, rope_parameters=ROPES[rope])
    assert_agrees(load(tmp_path), model, prompt(45))


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
def test_the_config_spelling_of_transformers_4_means_the_same(rope: str, tmp_path: Path) -> None:
    model = make("llama2", tmp_path, rope_parameters=ROPES[rope] | {"rope_theta": 700.0})
    scaling = {key: value for key, value in ROPES[rope].items() if key not in ("rope_theta", "rope_type")}
    edit_config(tmp_path, rope_parameters=..., rope_theta=700.0, rope_scaling=scaling | {"type": rope})
    assert_agrees(load(tmp_path), model, prompt(30), num_tokens=4)


@pytest.mark.parametrize(("rope", "trained"), [("dynamic", 32), ("longrope", 64)])
@pytest.mark.parametrize("length", [20, 50])
def test_length_dependent_frequencies_agree_when_max_model_len_is_the_length(
    rope: str, trained: int, length: int, tmp_path: Path
) -> None:
    model = make("llama2", tmp_path, rope_parameters=ROPES[rope], max_position_embeddings=trained)
    decoder = load(tmp_path, max_model_len=length)
    driver = Driver(decoder)
    tokens = prompt(length)
    ours = decoder.logits(driver.feed(driver.row(), tokens, chunk=16))
    assert oracle.distance(ours, oracle.logits(model, tokens)) <= TOLERANCE


def test_dynamic_rope_below_the_trained_length_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    model = make("llama2", tmp_path, rope_parameters=ROPES["dynamic"])
    assert_agrees(load(tmp_path), model, prompt(45))


def test_the_shipped_model_gives_the_logits_and_tokens_of_transformers() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    vocab_size = json.loads((SHIPPED / "config.json").read_text())["vocab_size"]
    assert_agrees(load(SHIPPED), model, prompt(60, vocab_size=vocab_size))
    assert_agrees(load(SHIPPED, ops=ops.select(CPU, "cpu")), model, prompt(60, vocab_size=vocab_size))


def assert_same(ours: Decoder, theirs: Decoder) -> None:
    """Logits of the same text in other chunks, fewer and more rows than `ops.FEW_ROWS`, then greedy tokens."""
    tokens = prompt(100)
    drivers = Driver(ours), Driver(theirs)
    expected = theirs.logits(drivers[1].feed(drivers[1].row(), tokens, chunk=7)).clone()
    for chunk in (100, 9):
        assert oracle.distance(ours.logits(drivers[0].feed(drivers[0].row(), tokens, chunk=chunk)), expected) <= 1e-5
    assert drivers[0].greedy(tokens[:40], 16, chunk=13) == drivers[1].greedy(tokens[:40], 16, chunk=13)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama-biased", "qwen3"])
def test_the_compiled_ops_keep_16_bit_weights_under_fp32_and_compute_what_the_references_do(
    name: str, stored: torch.dtype, deterministic: bool, tmp_path: Path
) -> None:
    make(name, tmp_path, dtype=stored)
    reference, decoder = load(tmp_path), load(tmp_path, ops=ops.select(CPU, "cpu"), deterministic=deterministic)
    assert decoder.dtype == torch.float32
    assert decoder.weights_bytes == pytest.approx(reference.weights_bytes * stored.itemsize / 4, rel=0.01)
    assert_same(decoder, reference)


def test_weights_of_several_stored_formats_all_become_fp32(tmp_path: Path) -> None:
    make("llama3", tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].float()
    save_file(tensors, tmp_path / "model.safetensors")
    reference, decoder = load(tmp_path), load(tmp_path, ops=ops.select(CPU, "cpu"))
    assert decoder.weights_bytes == reference.weights_bytes
    assert_same(decoder, reference)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_the_deterministic_mode_gives_the_logits_and_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path)
    assert_agrees(load(tmp_path, deterministic=True), model, prompt(45))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loads_from_any_stored_format_and_stays_close(
    dtype: torch.dtype, stored: torch.dtype, tmp_path: Path
) -> None:
    model = make("qwen3", tmp_path, dtype=stored)
    decoder = load(tmp_path, dtype=dtype)
    assert decoder.dtype == dtype
    driver = Driver(decoder)
    tokens = prompt(40)
    ours = decoder.logits(driver.feed(driver.row(), tokens, chunk=9))
    assert ours.dtype == dtype
    assert oracle.distance(ours, oracle.logits(model, tokens)) < (0.06 if dtype == torch.bfloat16 else 0.01)


def test_without_a_dtype_the_checkpoint_decides(tmp_path: Path) -> None:
    make("llama3", tmp_path, dtype=torch.bfloat16)
    decoder = load(tmp_path, dtype=None, max_model_len=None)
    assert (decoder.dtype, decoder.max_model_len) == (torch.bfloat16, 128)


def test_shards_load_as_the_single_file_does(tmp_path: Path) -> None:
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    make("qwen2", single)
    make("qwen2", sharded, shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    tokens = prompt(30)
    hidden = [driver.feed(driver.row(), tokens) for driver in (Driver(load(single)), Driver(load(sharded)))]
    assert torch.equal(*hidden)


def test_interleaved_sequences_do_not_see_each_other(tmp_path: Path) -> None:
    model = make("mistral", tmp_path)
    decoder = load(tmp_path)
    driver = Driver(decoder)
    texts = [prompt(40, seed) for seed in range(3)]
    rows = [driver.row() for _ in texts]
    steps = [(0, 0, 25), (2, 0, 3), (1, 0, 40), (0, 25, 40), (2, 3, 40)]
    pieces: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    for batch in (steps[:2], steps[2:]):
        chunks = [(rows[i], texts[i][first:end]) for i, first, end in batch]
        for (i, _, _), hidden in zip(batch, driver.run(chunks), strict=True):
            pieces[i].append(hidden)
    for i, text in enumerate(texts):
        assert oracle.distance(decoder.logits(torch.cat(pieces[i])), oracle.logits(model, text)) <= TOLERANCE


def test_a_small_batch_after_a_large_one_sees_nothing_of_it(tmp_path: Path) -> None:
    make("llama3", tmp_path)
    fresh, used = load(tmp_path), load(tmp_path)
    large = Driver(used)
    large.feed(large.row(), prompt(100, seed=1))
    small = [driver.feed(driver.row(), prompt(20)) for driver in (Driver(fresh), Driver(used))]
    assert torch.equal(*small)


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    make("qwen2", tmp_path, shard_size="60KB")
    calls: list[tuple[int, int]] = []
    load(tmp_path, progress=lambda done, total: calls.append((done, total)))
    done = [call[0] for call in calls]
    assert done == sorted(done) and len(set(done)) == len(done)
    assert calls[-1][0] == calls[-1][1] == calls[0][1]


def test_a_max_model_len_of_zero_is_refused(tmp_path: Path) -> None:
    make("llama3", tmp_path)
    with pytest.raises(ModelLoadError, match="max_model_len is 0"):
        load(tmp_path, max_model_len=0)


def test_reserved_buffers_keep_their_addresses(tmp_path: Path) -> None:
    make("llama3", tmp_path)
    decoder = load(tmp_path)
    decoder.reserve(num_tokens=40, num_samples=3)
    driver = Driver(decoder)
    row = driver.row()
    places = set[tuple[int, int]]()
    for num_tokens in (40, 1, 19):
        hidden = decoder.forward(driver.batch([(row, prompt(num_tokens))]), driver.pool)
        places.add((hidden.data_ptr(), decoder.logits(hidden[:3]).data_ptr()))
    assert len(places) == 1
