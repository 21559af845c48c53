"""Safetensors: every way in which a file or an index can be wrong is one error that says which file and tensor."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvlite import ops
from kvlite.errors import ModelLoadError
from kvlite.models import Decoder, load_model, weights
from kvlite.models.weights import open_shard
from tests.models.driver import Driver
from tests.models.make import make, prompt

Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    make("llama3", folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    make("llama3", folder, shard_size="60KB")
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_model(
        folder, device="cpu", dtype=dtype, max_model_len=64, ops=ops.select(torch.device("cpu"), "reference")
    )


def refusal(folder: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> str:
    """The error that loading ends with; with a monkeypatch, it must come before any parameter is allocated."""
    if monkeypatch is not None:
        monkeypatch.setattr(weights.Checkpoint, "load", lambda *_, **__: pytest.fail("allocated before it was checked"))
    with pytest.raises(ModelLoadError) as caught:
        load(folder)
    return str(caught.value)


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    return target


def shard(header: Any, num_data_bytes: int = 0, header_len: int | None = None) -> bytes:
    """A safetensors file with any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if header_len is None else header_len) + raw + bytes(num_data_bytes)


def tensor(start: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, too short"),
        (b"\x01\x00\x00", "3 bytes, too short"),
        (shard({}, header_len=1 << 63), "header of 9223372036854775808 bytes, at most"),
        (shard({}, header_len=(16 << 20) + 1), "header of 16777217 bytes, at most"),
        (shard({}, header_len=100), "truncated: header of 100 bytes in a file of 10 bytes"),
        (shard(b"{\xff"), "not valid JSON"),
        (shard(b"[" * 200_000), "not valid JSON"),
        (shard([]), "not a JSON object"),
        (shard({"a": 1}), "tensor 'a': header entry"),
        (shard({"a": {"dtype": "F32", "shape": [1]}}), "tensor 'a': header entry"),
        (shard({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}), "tensor 'a': header entry"),
        (shard({"a": tensor(0, 4, dtype="F7")}, 4), "tensor 'a': unusable dtype 'F7'"),
        (shard({"a": tensor(0, 4, dtype=["F32"])}, 4), "tensor 'a': header entry"),  # type: ignore[arg-type]
        (shard({"a": tensor(0, 4, shape=[-1, -1])}, 4), "tensor 'a': unusable"),
        (shard({"a": tensor(0, 4, shape=[True])}, 4), "tensor 'a': unusable"),
        (shard({"a": tensor(0, 4, shape=[1.0])}, 4), "tensor 'a': unusable"),
        (shard({"a": tensor(0, 4, shape=[1] * 9)}, 4), "tensor 'a': unusable"),
        (shard({"a": tensor(0, 4, shape=[1 << 61, 1 << 61])}, 4), r"hold 4 bytes, F32 .* needs"),
        (shard({"a": tensor(8, 4, shape=[0])}, 8), "tensor 'a': offsets"),
        (shard({"a": tensor(0, 8, shape=[1])}, 8), r"offsets \[0, 8\) hold 8 bytes, F32 \[1\] needs 4"),
        (shard({"a": tensor(0, 8), "b": tensor(4, 12)}, 12), "tensor 'b': overlaps"),
        (shard({"a": tensor(0, 4), "b": tensor(8, 12)}, 12), "4 bytes before tensor 'b' belong to nothing"),
        (shard({"a": tensor(0, 4)}, 9), "5 bytes after the last tensor"),
        (shard({"a": tensor(0, 4 << 40)}, 8), "truncated: tensor 'a' ends at byte"),
    ],
)  # fmt: skip
def test_a_hostile_header_is_refused_with_the_file_and_tensor(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelLoadError, match=message) as caught:
        open_shard(file)
    assert str(file) in str(caught.value)


def test_a_truncated_file_is_refused_at_any_length(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(sound, tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:length])
        assert re.search(r"model\.safetensors: (truncated|.*too short)", refusal(folder, monkeypatch))


def changed(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    others = {key: old for key, old in tensors.items() if key != name}
    return others if value is None else others | {name: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: changed(t, Q0, None), f"tensor '{Q0}' .* is missing"),
        (lambda t: changed(t, Q0, t[Q0].t().contiguous()), rf"'{Q0}': shape \[64, 96\], .* asks for \[96, 64\]"),
        (lambda t: changed(t, Q0, t[Q0].flatten()), f"'{Q0}': shape"),
        (lambda t: changed(t, Q0, t[Q0].double()), f"'{Q0}': dtype F64, supported are"),
        (lambda t: changed(t, Q0, t[Q0].to(torch.int32)), f"'{Q0}': dtype I32"),
        (lambda t: changed(t, "model.layers.0.self_attn.q_proj.bias", torch.ones(96)), "q_proj.bias' is not part"),
        (lambda t: changed(t, "lm_head.weight", None), "tensor 'lm_head.weight' .* is missing"),
    ],
)  # fmt: skip
def test_a_wrong_set_of_tensors_is_refused_before_anything_is_allocated(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    message: str,
    sound: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copy(sound, tmp_path)
    save_file(change(load_file(sound / "model.safetensors")), folder / "model.safetensors")
    assert re.search(message, refusal(folder, monkeypatch))


def test_stored_frequencies_and_the_copy_of_a_tied_head_are_passed_over(sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path)
    tensors = load_file(sound / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(12)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    hidden = torch.eye(1, 64)
    assert torch.equal(load(folder).logits(hidden)[0], tensors["model.embed_tokens.weight"][:, 0])


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.pop("weight_map"), "weight_map is missing"),
        (lambda i: i["weight_map"].update({Q0: "none.safetensors"}), "shard none.safetensors does not exist"),
        (lambda i: i["weight_map"].update({Q0: "../model.safetensors"}), "not the name of a safetensors file"),
        (lambda i: i["weight_map"].update({Q0: 7}), "not the name of a safetensors file"),
        (lambda i: i["weight_map"].update({"lm_head.bias": i["weight_map"][Q0]}), "'lm_head.bias' is not in shard"),
        (lambda i: i["weight_map"].clear(), "weight_map is missing or empty"),
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit_its_shards_is_refused(
    change: Callable[[dict[str, Any]], Any],
    message: str,
    sharded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copy(sharded, tmp_path)
    edit_index(folder, change)
    assert re.search(rf"index\.json: .*{message}", refusal(folder, monkeypatch))


def test_a_corrupt_shard_and_a_tensor_in_two_shards_are_named(sharded: Path, tmp_path: Path) -> None:
    folder = copy(sharded, tmp_path)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    assert f"{second.name}: truncated" in refusal(folder)
    second.write_bytes(whole)
    save_file(load_file(second) | {next(iter(load_file(first))): torch.ones(1)}, second)
    assert "is also in" in refusal(folder)


def test_a_folder_without_weights_is_refused(sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path)
    (folder / "model.safetensors").unlink()
    assert "has neither model.safetensors nor" in refusal(folder)


def test_values_beyond_float16_are_an_error_and_not_an_infinity(sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path)
    tensors = load_file(sound / "model.safetensors")
    tensors[Q0][3, 3] = 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=f"'{Q0}': has values that float16 cannot hold"):
        load(folder, torch.float16)
    load(folder, torch.bfloat16)


def test_loaded_weights_outlive_the_file_and_never_change_it(sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    decoder = load(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    (folder / "model.safetensors").unlink()
    driver = Driver(decoder)
    assert bool(driver.feed(driver.row(), prompt(5)).isfinite().all())


def test_the_fingerprint_tells_weights_apart_and_is_the_same_for_the_same_files(sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path)
    assert load(folder).fingerprint == load(sound).fingerprint
    tensors = load_file(sound / "model.safetensors")
    tensors[Q0][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).fingerprint != load(sound).fingerprint
