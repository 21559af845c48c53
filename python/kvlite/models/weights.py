"""Weights: single or sharded safetensors, checked before anything is allocated, mapped, fused while they load.

Owns the file format and the copying; knows neither layers nor families: a caller names parameters as rows of checkpoint
tensors laid on top of each other. Every size in a file is hostile until checked; nothing here executes what it reads.
Each fault is a ModelLoadError with file and tensor. Called by `models.decoder`.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from kvlite.errors import ModelLoadError
from kvlite.memory import allocate
from kvlite.models.config import read_json

MAX_HEADER_BYTES = 16 << 20
"""Far above any real shard (100 bytes per tensor), far below what would hurt to parse."""
MAX_SHARDS = 4096
SAMPLE_BYTES = 64
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1} | {
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
}

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after each tensor."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies; start and end are absolute in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file whose header has been checked."""

    path: Path
    num_bytes: int
    header_digest: bytes
    entries: dict[str, TensorEntry]


@dataclass(frozen=True)
class Param:
    """One parameter of the engine: checkpoint tensors stacked along their first dimension, in order."""

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    """(checkpoint name, expected shape)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stacked tensor."""
        return (sum(shape[0] for _, shape in self.parts), *self.parts[0][1][1:])


def open_shard(path: Path) -> Shard:
    """Reads and checks one header. Sizes are compared before they are used; the data is not touched."""
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_len = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise ModelLoadError(f"{path}: {num_bytes} bytes, too short for a safetensors header")
            if header_len > MAX_HEADER_BYTES:
                raise ModelLoadError(f"{path}: header of {header_len} bytes, at most {MAX_HEADER_BYTES} are read")
            if 8 + header_len > num_bytes:
                raise ModelLoadError(f"{path}: truncated: header of {header_len} bytes in a file of {num_bytes} bytes")
            raw = file.read(header_len)
    except FileNotFoundError:
        raise ModelLoadError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise ModelLoadError(f"{path}: the header is not a JSON object")
    described = cast("dict[str, Any]", header)
    described.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + header_len) for name, value in described.items()}
    _check_layout(path, entries.values(), 8 + header_len, num_bytes)
    return Shard(path, num_bytes, hashlib.sha256(raw).digest(), entries)


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    """One header entry: dtype known, shape of non-negative integers, offsets that hold exactly that many bytes."""
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        sizes = (*shape, start, end)
        sound = dtype in ITEM_BYTES and len(shape) <= 8
    except (TypeError, KeyError, ValueError):
        raise ModelLoadError(f"{path}: tensor {name!r}: header entry is not dtype, shape and data_offsets") from None
    if not sound or any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 1 << 62 for n in sizes):
        raise ModelLoadError(f"{path}: tensor {name!r}: unusable dtype {dtype!r}, shape {shape} or offsets")
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if end - start != needed:
        raise ModelLoadError(
            f"{path}: tensor {name!r}: offsets [{start}, {end}) hold {end - start} bytes, "
            f"{dtype} {list(shape)} needs {needed}"
        )
    return TensorEntry(name, dtype, shape, data_start + start, data_start + end)


def _check_layout(path: Path, entries: Iterable[TensorEntry], data_start: int, num_bytes: int) -> None:
    """The tensors must tile the data exactly: no overlap, no hole, nothing beyond the end of the file."""
    reached = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start < reached:
            raise ModelLoadError(f"{path}: tensor {entry.name!r}: overlaps the tensor before it")
        if entry.start > reached:
            raise ModelLoadError(
                f"{path}: {entry.start - reached} bytes before tensor {entry.name!r} belong to nothing"
            )
        if entry.end > num_bytes:
            raise ModelLoadError(
                f"{path}: truncated: tensor {entry.name!r} ends at byte {entry.end}, the file at {num_bytes}"
            )
        reached = entry.end
    if reached != num_bytes:
        raise ModelLoadError(f"{path}: {num_bytes - reached} bytes after the last tensor belong to nothing")


class Checkpoint:
    """The tensors of a model folder by name. Opening reads headers only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = _open_shards(folder)
        self.entries: dict[str, tuple[Shard, TensorEntry]] = {}
        for shard in self.shards:
            for name, entry in shard.entries.items():
                if name in self.entries:
                    raise ModelLoadError(f"{shard.path}: tensor {name!r} is also in {self.entries[name][0].path.name}")
                self.entries[name] = (shard, entry)

    def check(self, params: Iterable[Param], ignored: Callable[[str], bool]) -> None:
        """Every tensor that is needed exists with its shape in a float format, and no other one is left over."""
        needed: set[str] = set()
        for param in params:
            for name, shape in param.parts:
                needed.add(name)
                if name not in self.entries:
                    raise ModelLoadError(f"{self.folder}: tensor {name!r} {list(shape)} is missing")
                shard, entry = self.entries[name]
                if entry.shape != shape:
                    raise ModelLoadError(
                        f"{shard.path}: tensor {name!r}: shape {list(entry.shape)}, config.json asks for {list(shape)}"
                    )
                if entry.dtype not in FLOATS:
                    raise ModelLoadError(
                        f"{shard.path}: tensor {name!r}: dtype {entry.dtype}, supported are {', '.join(FLOATS)}"
                    )
        for name, (shard, _) in self.entries.items():
            if name not in needed and not ignored(name):
                raise ModelLoadError(f"{shard.path}: tensor {name!r} is not part of this architecture")

    def stored_dtypes(self, param: Param) -> set[torch.dtype]:
        """The number formats of a parameter's parts; call `check` first."""
        return {FLOATS[self.entries[name][1].dtype] for name, _ in param.parts}

    def load(
        self,
        params: Iterable[Param],
        *,
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
        progress: Progress | None,
    ) -> dict[str, torch.Tensor]:
        """Allocates and fills the parameters, shard by shard in file order; call `check` first.

        Peak memory beside the result is one tensor; the mapped pages belong to the page cache.
        """
        loaded: dict[str, torch.Tensor] = {}
        targets: dict[str, torch.Tensor] = {}
        params = list(params)
        wanted = [(param.shape, dtypes[param.name]) for param in params]
        if device.type == "cpu":
            made = allocate(wanted)
        else:
            made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in wanted]
        for param, whole in zip(params, made, strict=True):
            loaded[param.name] = whole
            sizes = [shape[0] for _, shape in param.parts]
            targets.update(zip((name for name, _ in param.parts), torch.split(whole, sizes), strict=True))
        total = sum(self.entries[name][1].end - self.entries[name][1].start for name in targets)
        done = 0
        for shard in self.shards:
            with _Map(shard) as source:
                for entry in sorted(shard.entries.values(), key=lambda entry: entry.start):
                    if entry.name in targets:
                        _cast(source.tensor(entry), targets[entry.name], shard, entry)
                        done += entry.end - entry.start
                        if progress is not None:
                            progress(done, total)
        return loaded

    def digest(self) -> str:
        """Identity of the weights without reading them all: headers, sizes and three samples of each tensor."""
        whole = hashlib.sha256()
        for shard in self.shards:
            whole.update(shard.header_digest + shard.num_bytes.to_bytes(8, "little"))
            with _Map(shard) as source:
                for entry in sorted(shard.entries.values(), key=lambda entry: entry.start):
                    middle = (entry.start + entry.end) // 2
                    for start in (entry.start, middle, max(entry.start, entry.end - SAMPLE_BYTES)):
                        whole.update(source.sample(start, min(start + SAMPLE_BYTES, entry.end)))
        return whole.hexdigest()


def _open_shards(folder: Path) -> list[Shard]:
    """The shards of the index when there is one, else the single file; every tensor must be where the index says."""
    index = folder / INDEX_FILE
    single = folder / SINGLE_FILE
    if not index.exists():
        if not single.exists():
            raise ModelLoadError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}")
        return [open_shard(single)]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index}: weight_map is missing or empty")
    places = cast("dict[str, Any]", weight_map)
    names = list(dict.fromkeys(str(name) for name in places.values()))
    if len(names) > MAX_SHARDS:
        raise ModelLoadError(f"{index}: names {len(names)} shards, at most {MAX_SHARDS}")
    shards: dict[str, Shard] = {}
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelLoadError(f"{index}: shard {name!r} is not the name of a safetensors file in this folder")
        if not (folder / name).exists():
            raise ModelLoadError(f"{index}: shard {name} does not exist")
        shards[name] = open_shard(folder / name)
    for tensor, place in places.items():
        if tensor not in shards[str(place)].entries:
            raise ModelLoadError(f"{index}: tensor {tensor!r} is not in shard {place}")
    return list(shards.values())


class _Map:
    """A shard's bytes, mapped privately (nothing that is written reaches the file)."""

    def __init__(self, shard: Shard) -> None:
        with shard.path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if len(self._bytes) != shard.num_bytes:
            raise ModelLoadError(f"{shard.path}: changed its size while it was read")

    def __enter__(self) -> _Map:
        return self

    def __exit__(self, *_: object) -> None:
        # No close(): tensors over the map may still be alive; the map goes with the last of them.
        return None

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """A view on the mapped bytes; no copy."""
        count = math.prod(entry.shape)
        flat = torch.frombuffer(self._bytes, dtype=FLOATS[entry.dtype], count=count, offset=entry.start)
        return flat.view(entry.shape)

    def sample(self, start: int, end: int) -> bytes:
        """A few raw bytes."""
        return self._bytes[start:end]


def _cast(source: torch.Tensor, target: torch.Tensor, shard: Shard, entry: TensorEntry) -> None:
    """Copies into the engine's dtype and device; a value beyond float16's range is an error, not an infinity."""
    target.copy_(source)
    if target.dtype == torch.float16 and source.dtype != torch.float16 and not bool(torch.isfinite(target).all()):
        raise ModelLoadError(f"{shard.path}: tensor {entry.name!r}: has values that float16 cannot hold")
