"""From an EngineConfig to the parts of an engine: tokenizer, model, KV pool, core; with the budget and phase times.

Owns the resolution of every "auto" and nothing that lives on. Errors name what is wrong and where. Called by Engine.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvlite import _core
from kvlite.config import Device, DType, EngineConfig
from kvlite.errors import ConfigError, InvalidRequestError, ModelLoadError
from kvlite.model_files import load_generation_defaults
from kvlite.models import Decoder, ModelConfig, load_config, load_model
from kvlite.ops import Ops, select
from kvlite.request import RequestLimits, resolve_method
from kvlite.reuse_types import Reuse
from kvlite.runner.graphs import CudaRecorder, graph_sizes
from kvlite.runner.grouping import NEVER, SPLIT, measure_group_cost
from kvlite.runner.kv_pool import KVPool, KVShape, cache_budget_bytes, host_budget_bytes
from kvlite.runner.model_runner import LOGITS_ROWS, ModelRunner
from kvlite.runner.plan import Arena, Layout
from kvlite.runner.sampler import Sampler
from kvlite.runner.swapping import measure_swap_cost
from kvlite.tokenizer import Tokenizer

SHIPPED_MODEL = Path(__file__).parent / "model"
NUM_BLOCKS_MAX = (1 << 31) - 1
SAMPLES = 64
"""Of each file of weights, spread evenly: other weights of the same shape differ nearly everywhere."""
SAMPLE_BYTES = 4096

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Startup:
    """What a start cost and what fits: the rows of the table that is printed."""

    model: str
    device: str
    dtype: str
    deterministic: bool
    num_threads: int
    max_model_len: int
    weights_bytes: int
    kv_cache_bytes: int
    num_blocks: int
    block_size: int
    model_digest: int
    """64 bits of the model's shape, number format and weights: equal where KV means the same."""
    phase_s: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds of each phase, in order."""
    host_blocks: int = 0
    """Blocks of the host tier, as large as those of the pool."""
    swap_cost_tokens: int = 0
    """Tokens whose prefill takes as long as a block to the host and back."""

    @property
    def kv_tokens(self) -> int:
        """Tokens that the pool holds."""
        return self.num_blocks * self.block_size

    def concurrency(self, num_tokens: int) -> float:
        """Requests of `num_tokens` tokens each that fit at once."""
        return self.kv_tokens / num_tokens

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) in words."""
        length = min(4096, self.max_model_len)
        numbers = f"{self.dtype}, deterministic" if self.deterministic else self.dtype
        host_bytes = self.kv_cache_bytes // self.num_blocks * self.host_blocks
        host = f"{_mebibytes(host_bytes)}: {self.host_blocks} blocks, each worth {self.swap_cost_tokens} tokens to swap"
        return [
            ("model", self.model),
            ("device", f"{self.device}, {numbers}, {self.num_threads} threads"),
            ("weights", _mebibytes(self.weights_bytes)),
            ("KV cache", f"{_mebibytes(self.kv_cache_bytes)}: {self.num_blocks} blocks of {self.block_size} tokens"),
            *([("host cache", host)] if self.host_blocks else []),
            ("fits", f"{self.kv_tokens} tokens, {self.concurrency(length):.1f} requests of {length} tokens"),
            ("start", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.phase_s.items())),
        ]


@dataclass(frozen=True)
class Parts:
    """Everything an Engine is made of."""

    tokenizer: Tokenizer
    limits: RequestLimits
    runner: ModelRunner
    core: _core.Core
    arenas: tuple[Arena, Arena]
    startup: Startup


def build(config: EngineConfig, progress: Progress | None = None) -> Parts:
    """Loads everything. Raises ConfigError or ModelLoadError; `progress` gets (bytes loaded, bytes in all)."""
    phases: dict[str, float] = {}
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
        _core.cpu_set_num_threads(config.num_threads)
    directory = model_directory(config.model)
    device = _device(config.device)
    dtype = _dtype(config.dtype, device)
    ops = select(device)
    with _phase(phases, "tokenizer"):
        tokenizer = Tokenizer(directory)
        defaults = load_generation_defaults(directory, tokenizer.eos_token_id)
    model, _family = load_config(directory)
    if tokenizer.vocab_size > model.vocab_size:
        raise ModelLoadError(f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.vocab_size}")
    if outside := [id for id in defaults.eos_token_ids if id >= model.vocab_size]:
        raise ModelLoadError(f"{directory}: eos_token_id {outside[0]}, but the model has {model.vocab_size} ids")
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        raise ConfigError(
            "max_model_len", f"{max_model_len} is above the {model.max_position_embeddings} positions of the model"
        )
    with _phase(phases, "weights"):
        decoder = load_model(
            directory, device=device, dtype=dtype, max_model_len=max_model_len, ops=ops,
            deterministic=config.deterministic, progress=progress,
        )  # fmt: skip
        decoder.reserve(config.max_num_batched_tokens, min(LOGITS_ROWS, config.max_num_seqs))
    with _phase(phases, "KV cache"):
        pool = _pool(config, model, decoder, max_model_len)
    limits = RequestLimits(
        config, model.vocab_size, max_model_len, pool.num_blocks * config.block_size, defaults, model.num_layers
    )
    _check_method(limits)
    identity = _Identity(_canonical_prefix(config, tokenizer, limits), _digest(directory, model, dtype))
    # Groups share whole splits of cached prompts: where no request is so long, or nothing is cached, none can form.
    may_group = config.prefix_grouping and config.enable_prefix_caching and max_model_len > SPLIT
    group_cost = measure_group_cost(ops, model, dtype, device) if may_group else NEVER
    swap_cost = 0
    if pool.host_blocks:
        with _phase(phases, "host cache"):
            swap_cost = measure_swap_cost(decoder, pool, max_model_len)
    costs = {"group_cost_tokens": group_cost, "swap_cost_tokens": swap_cost, "host_blocks": pool.host_blocks}
    core, arenas = _core_and_arenas(config, model, limits, identity, device, costs)
    startup = Startup(
        model=str(directory),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        deterministic=config.deterministic,
        num_threads=torch.get_num_threads(),
        max_model_len=max_model_len,
        weights_bytes=decoder.weights_bytes,
        kv_cache_bytes=pool.data.nbytes,
        num_blocks=pool.num_blocks,
        block_size=config.block_size,
        model_digest=identity.model_digest,
        phase_s=phases,
        host_blocks=pool.host_blocks,
        swap_cost_tokens=swap_cost,
    )
    sampler, canonical_len = _sampler(config, model, device, ops), len(identity.canonical_prefix)
    runner = ModelRunner(decoder, pool, sampler, canonical_len=canonical_len)
    if not config.enforce_eager:
        with _phase(phases, "decode graphs"):
            _record_graphs(runner, ops, config.max_num_seqs, grouped=group_cost != NEVER)
    return Parts(tokenizer, limits, runner, core, arenas, startup)


def _record_graphs(runner: ModelRunner, ops: Ops, max_num_seqs: int, *, grouped: bool) -> None:
    decoder = runner.decoder
    if decoder.device.type == "cuda":
        runner.record_graphs(CudaRecorder(decoder.device).record, graph_sizes(max_num_seqs), grouped=grouped)
    elif ops.record is not None and ops.few_rows is not None:
        # A tape costs neither memory nor time to speak of, so each number of rows has its own, without padding.
        most = min(max_num_seqs, ops.few_rows(decoder.dtype, decoder.weight_dtype))
        runner.record_graphs(ops.record, range(1, most + 1), lazily=True, grouped=grouped)


def model_directory(model: str | None) -> Path:
    """The directory of the weights; the shipped model when none is named. Raises ModelLoadError."""
    directory = SHIPPED_MODEL if model is None else Path(model)
    if not directory.is_dir():
        raise ModelLoadError(f"{model}: no such directory; a model directory in Hugging Face layout is needed")
    return directory


@contextmanager
def _phase(phases: dict[str, float], name: str) -> Generator[None]:
    start = time.perf_counter()
    yield
    phases[name] = time.perf_counter() - start


def _device(wanted: Device) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if wanted is Device.CUDA and not has_cuda:
        raise ConfigError("device", "cuda is not available on this machine: use cpu or auto")
    return torch.device("cuda" if wanted is not Device.CPU and has_cuda else "cpu")


def _dtype(wanted: DType, device: torch.device) -> torch.dtype:
    if wanted is not DType.AUTO:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted.value]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    abilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if abilities.get("avx512_bf16") or abilities.get("amx_bf16") else torch.float32


def _pool(config: EngineConfig, model: ModelConfig, decoder: Decoder, max_model_len: int) -> KVPool:
    shape = KVShape(model.num_layers, config.block_size, model.num_kv_heads, model.head_dim, decoder.dtype)
    budget = cache_budget_bytes(config.kv_cache_bytes, decoder.device)
    num_blocks = min(budget // shape.bytes_per_block, NUM_BLOCKS_MAX // config.block_size)
    if num_blocks < 1:
        raise ConfigError(
            "kv_cache_bytes",
            f"{budget} bytes hold no block: one of {config.block_size} tokens needs {shape.bytes_per_block}",
        )
    host_bytes = host_budget_bytes(config.host_cache_bytes, num_blocks * shape.bytes_per_block, decoder.device)
    host_blocks = min(host_bytes // shape.bytes_per_block, NUM_BLOCKS_MAX // config.block_size)
    try:
        return KVPool(
            shape,
            num_blocks=num_blocks,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            device=decoder.device,
            host_blocks=host_blocks if config.enable_prefix_caching else 0,
        )
    except (OSError, MemoryError, RuntimeError):
        host = f" and {host_bytes} of host_cache_bytes" if host_blocks else ""
        what = f"{budget} bytes{host} cannot be had on this machine: ask for less"
        raise ConfigError("kv_cache_bytes", what) from None


def _sampler(config: EngineConfig, model: ModelConfig, device: torch.device, ops: Ops) -> Sampler:
    return Sampler(
        num_rows=config.max_num_seqs,
        vocab_size=model.vocab_size,
        max_logprobs=config.max_logprobs,
        device=device,
        ops=ops,
    )


@dataclass(frozen=True)
class _Identity:
    """What a segment's KV depends on beside its ids."""

    canonical_prefix: list[int]
    model_digest: int


def _canonical_prefix(config: EngineConfig, tokenizer: Tokenizer, limits: RequestLimits) -> list[int]:
    """Raises ConfigError for one that leaves no room for a segment."""
    try:
        ids = tokenizer.canonical_prefix(config.canonical_prefix)
    except InvalidRequestError as error:
        raise ConfigError("canonical_prefix", error.message) from None
    room = max(min(limits.max_model_len, limits.pool_tokens) - 2, 0)
    if len(ids) <= room:
        return ids
    if config.canonical_prefix is not None:
        raise ConfigError("canonical_prefix", f"has {len(ids)} tokens, at most {room} leave room for a segment")
    return ids[:room]


def _check_method(limits: RequestLimits) -> None:
    try:
        resolve_method(limits, Reuse.blend())
    except InvalidRequestError as error:
        raise ConfigError("reuse_method", error.message) from None


def _digest(directory: Path, model: ModelConfig, dtype: torch.dtype) -> int:
    """64 bits of the model's shape and RoPE, its number format, and the weights: names, sizes and samples."""
    digest = hashlib.sha256(repr((model, dtype)).encode())
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(repr((file.name, size)).encode())
        with file.open("rb") as weights:
            for n in range(SAMPLES):
                weights.seek(max(size - SAMPLE_BYTES, 0) * n // (SAMPLES - 1))
                digest.update(weights.read(SAMPLE_BYTES))
    return int.from_bytes(digest.digest()[:8], "little")


def _core_and_arenas(
    config: EngineConfig,
    model: ModelConfig,
    limits: RequestLimits,
    identity: _Identity,
    device: torch.device,
    costs: dict[str, int],
) -> tuple[_core.Core, tuple[Arena, Arena]]:
    values: dict[str, Any] = config.core_values() | {
        "max_model_len": limits.max_model_len,
        "policy": config.policy.value,
        "eviction": "reuse-weighted",  # The best on a trace of conversations: bench/results/hitrate.json.
        "num_blocks": limits.pool_tokens // config.block_size,
        "vocab_size": model.vocab_size,
        "attention_cost_tokens": attention_cost_tokens(model),
        "attention_split_tokens": SPLIT,
        "hash_seed": secrets.randbits(63),
        "canonical_prefix": identity.canonical_prefix,
        "model_digest": identity.model_digest,
        "max_segments": config.max_documents,
        **costs,
    }
    layout = Layout.of(
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=limits.max_model_len,
        block_size=config.block_size,
        max_num_waiting=config.max_num_waiting,
        max_segments=config.max_documents,
        host_blocks=costs["host_blocks"],
    )
    layout.check(_core.Core.layout(**values))
    arenas = (Arena(layout, device), Arena(layout, device))
    return _core.Core(arenas=(arenas[0].data, arenas[1].data), **values), arenas


def attention_cost_tokens(model: ModelConfig) -> int:
    """Context length at which attention costs a token as many multiply-adds as its linear layers do."""
    heads = model.num_heads * model.head_dim
    linear = model.hidden_size * (2 * heads + 2 * model.num_kv_heads * model.head_dim + 3 * model.intermediate_size)
    return max(linear // (2 * heads), 1)


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
