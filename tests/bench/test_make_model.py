"""A checkpoint of a tiny shape loads in transformers and in kvlite, and both say the same; bad shapes are refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvlite import Engine, SamplingParams
from kvlite.bench import make_model
from kvlite.bench.__main__ import main
from kvlite.bench.errors import BenchError
from kvlite.bench.make_model import SHAPES, Shape, changed, check_fits, tensors, weights_bytes
from kvlite.startup import SHIPPED_MODEL
from kvlite.tokenizer import Tokenizer

TINY = Shape("qwen2", 2, 64, 4, 2, 16, 96, 512, 128)


SHAPE_OF = {"qwen2": TINY, "llama": changed(TINY, ["family=llama", "tied=false"])}


@pytest.fixture(scope="module", params=list(SHAPE_OF))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(family)
    make_model.make(SHAPE_OF[family], path)
    return path


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_kvlite_and_transformers_load_it_and_say_the_same(family: str, folder: Path) -> None:
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert sum(p.numel() for p in peer.parameters()) * 2 == weights_bytes(SHAPE_OF[family])
    prompt = list(range(20, 40))
    expected = peer.generate(torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    with Engine(str(folder), dtype="float32", num_threads=1, kv_cache_bytes=1 << 20, max_num_seqs=2) as engine:
        output = engine.generate(prompt, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    assert list(output.token_ids) == expected[0, len(prompt) :].tolist()
    assert len(set(output.token_ids)) > 2, "an answer that repeats one token would prove little"


def test_its_tokenizer_gives_text_back_in_both(folder: Path) -> None:
    text = "Dai kour 1207 zum, naïve ü\n"
    peer = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer(folder)
    ids = ours.encode(text)
    assert ids == peer.encode(text, add_special_tokens=False)
    assert max(ids) < TINY.vocab_size == ours.vocab_size
    assert ours.decode(ids) == text
    assert len(ids) < len(text.encode()), "merges were learned"


def test_the_same_shape_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_model.make(TINY, tmp_path / name, seed=seed)
    first, second, other = (digests(tmp_path / name) for name in "abc")
    assert first == second
    assert first["model.safetensors"] != other["model.safetensors"]
    assert first["tokenizer.json"] != other["tokenizer.json"]


def test_shards_hold_every_tensor_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_model, "SHARD_BYTES", 50_000)
    make_model.make(TINY, tmp_path)
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert list(where) == list(tensors(TINY))
    assert len(list(tmp_path.glob("*.safetensors"))) == len(set(where.values())) > 2
    with Engine(str(tmp_path), dtype="bfloat16", num_threads=1, kv_cache_bytes=1 << 20, max_num_seqs=2) as engine:
        assert engine.startup.weights_bytes == weights_bytes(TINY)


def test_named_shapes_have_the_sizes_that_they_stand_for() -> None:
    assert 380e6 < weights_bytes(SHAPES["qwen2-0.5b"]) / 2 < 395e6
    assert 8.0e9 < weights_bytes(SHAPES["llama3-8b"]) / 2 < 8.1e9
    assert SHAPES["mha"].num_heads == SHAPES["mha"].num_kv_heads
    shipped = json.loads((SHIPPED_MODEL / "config.json").read_text())
    ours = make_model.config(SHAPES["small-long"])
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert [ours[name] for name in names] == [shipped[name] for name in names]
    assert ours["max_position_embeddings"] == 16_384


@pytest.mark.parametrize(("memory", "disk", "word"), [(10**6, 10**12, "memory"), (10**12, 10**6, "disk")])
def test_a_shape_that_does_not_fit_is_refused_before_anything_is_written(memory: int, disk: int, word: str) -> None:
    with pytest.raises(BenchError, match=f"0.8 GB in bf16, 0.0 GB of {word} are free"):
        check_fits(SHAPES["qwen2-0.5b"], Path("model"), memory, disk)


def test_a_model_that_is_refused_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_model, "available_bytes", lambda: 1000)
    with pytest.raises(BenchError, match="of memory"):
        make_model.make(TINY, tmp_path / "deep" / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("num_layers=0", "num_layers is 0"),
        ("num_kv_heads=3", "multiple of num_kv_heads, 3"),
        ("family=gpt", "llama or qwen2"),
        ("vocab_size=100", "vocab_size is 100"),
        ("depth=3", "unknown field"),
        ("num_layers=many", "'many' is no int"),
    ],
)
def test_a_bad_shape_is_one_clear_line(
    change: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "make-model", str(tmp_path / "m"), "--set", change])
    assert main() == 1
    printed = capsys.readouterr().err
    assert complaint in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.glob("m/*.safetensors"))


def test_no_engine_finds_an_id_past_the_vocabulary(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make_model.make(TINY, tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) <= TINY.vocab_size
