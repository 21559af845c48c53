"""The only decoder stack: pre-norm blocks of paged attention and gated MLP, for every family.

Owns the parameters and the scratch buffers of one model on one device; knows neither requests, blocks nor sampling. It
keeps no state between calls: all of it is in the batch and the KV pool. In deterministic mode a row's hidden state and
KV have the same bits whatever else is in the batch: products are those of layers/linear.py, every other op treats rows
alone. Called by `runner.model_runner`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvlite.errors import ModelLoadError
from kvlite.layers.attention import Attention
from kvlite.layers.embedding import Embedding
from kvlite.layers.linear import Linear, choose_row_tile, padded_rows
from kvlite.layers.norm import RmsNorm
from kvlite.layers.rope import RotaryEmbedding
from kvlite.models.config import Family, KeyMap, ModelConfig
from kvlite.models.registry import load_config
from kvlite.models.weights import Checkpoint, Param, Progress
from kvlite.ops import Ops

MAX_CACHED_VIEWS = 64
"""Row counts whose buffer views are kept: decode batches come back with the same few."""


@dataclass(frozen=True)
class ForwardBatch:
    """T rows of S sequences, on the model's device; int32 except where noted. Built by the runner from one plan."""

    token_ids: torch.Tensor
    """[T] int32 or int64, each in [0, vocab)."""
    positions: torch.Tensor
    """[T] RoPE positions, each in [0, max_model_len)."""
    last_key: torch.Tensor
    """[T] largest key index each row may see."""
    slot_mapping: torch.Tensor
    """[T] where each row's key and value go, -1 = nowhere."""
    query_start: torch.Tensor
    """[S+1] first row of each sequence."""
    context_len: torch.Tensor
    """[S] keys of each sequence, this batch's rows included."""
    seq_row: torch.Tensor
    """[S] row of each sequence in the block table."""
    block_table: torch.Tensor
    """[R, NB] blocks by position."""


@dataclass(frozen=True)
class _Layer:
    """One block of the stack."""

    input_norm: RmsNorm
    qkv: Linear
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    attention: Attention
    output: Linear
    mlp_norm: RmsNorm
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class _Views:
    """The scratch buffers cut to T rows; P = T, padded to whole tiles where products take tiles."""

    residual: torch.Tensor
    """[P, W]."""
    embedded: torch.Tensor
    """residual [T, W]."""
    unused: torch.Tensor
    """residual [P - T, W], kept at zero so that nothing overflows in rows that nobody reads."""
    hidden: torch.Tensor
    """[P, W]: normalised input of a projection."""
    update: torch.Tensor
    """[P, W]: what a projection adds to the residual."""
    qkv: torch.Tensor
    """[P, (H + 2 KH) D]."""
    q: torch.Tensor
    """qkv [T, H, D]."""
    k: torch.Tensor
    """qkv [T, KH, D]."""
    v: torch.Tensor
    """qkv [T, KH, D]."""
    heads: torch.Tensor
    """[T, H, D]: output of attention."""
    merged: torch.Tensor
    """[P, H D]: the same memory, padded."""
    lse: torch.Tensor
    """[T, H] fp32."""
    gate_up: torch.Tensor
    """[P, 2F]."""
    activation: torch.Tensor
    """[P, F]."""


class _Scratch:
    """Buffers for the largest T seen; growing them drops the old views."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, tiled: bool) -> None:
        self._config = config
        self._dtype = dtype
        self._device = device
        self._tiled = tiled
        self._capacity = 0
        self._views: dict[int, _Views] = {}
        self._logits = torch.empty(0)
        self.reserve(1)

    def reserve(self, num_rows: int) -> None:
        """Makes room for `num_rows`; addresses stay while the capacity suffices."""
        capacity = padded_rows(num_rows, self._tiled)
        if capacity <= self._capacity:
            return
        c = self._config
        # Normal tensors, not inference tensors: callers may change results in place outside inference mode.
        with torch.inference_mode(mode=False):
            self._residual, self._hidden, self._update = (self._zeros(capacity, c.hidden_size) for _ in range(3))
            self._qkv = self._zeros(capacity, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim)
            self._merged = self._zeros(capacity, c.num_heads * c.head_dim)
            self._lse = torch.zeros(capacity, c.num_heads, dtype=torch.float32, device=self._device)
            self._gate_up = self._zeros(capacity, 2 * c.intermediate_size)
            self._activation = self._zeros(capacity, c.intermediate_size)
        self._capacity = capacity
        self._views.clear()

    def views(self, num_rows: int) -> _Views:
        """Views for T = num_rows."""
        views = self._views.get(num_rows)
        if views is None:
            self.reserve(num_rows)
            if len(self._views) >= MAX_CACHED_VIEWS:
                self._views.pop(next(iter(self._views)))
            views = self._views[num_rows] = self._cut(num_rows, padded_rows(num_rows, self._tiled))
        return views

    def _cut(self, rows: int, padded: int) -> _Views:
        c = self._config
        qkv = self._qkv[:padded]
        sizes = [c.num_heads, c.num_kv_heads, c.num_kv_heads]
        q, k, v = torch.split(qkv[:rows].view(rows, sum(sizes), c.head_dim), sizes, dim=1)
        merged = self._merged[:padded]
        residual = self._residual[:padded]
        return _Views(
            residual=residual,
            embedded=residual[:rows],
            unused=residual[rows:],
            hidden=self._hidden[:padded],
            update=self._update[:padded],
            qkv=qkv,
            q=q,
            k=k,
            v=v,
            heads=merged[:rows].view(rows, c.num_heads, c.head_dim),
            merged=merged,
            lse=self._lse[:rows],
            gate_up=self._gate_up[:padded],
            activation=self._activation[:padded],
        )

    def logits(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows padded to whole tiles [P, W], logits [P, V] in the engine's dtype)."""
        padded = padded_rows(num_rows, self._tiled)
        if self._logits.shape[0] < padded:
            with torch.inference_mode(mode=False):
                self._logits = self._zeros(padded, self._config.vocab_size)
                self._logit_rows = self._zeros(padded, self._config.hidden_size)
        return self._logit_rows[:padded], self._logits[:padded]

    def _zeros(self, rows: int, width: int) -> torch.Tensor:
        return torch.zeros(rows, width, dtype=self._dtype, device=self._device)


class Decoder:
    """A loaded model. Not for several threads at once: the scratch buffers are shared by every call."""

    def __init__(
        self, config: ModelConfig, params: dict[str, torch.Tensor], *, max_model_len: int, ops: Ops, deterministic: bool
    ) -> None:
        self.config = config
        self.max_model_len = max_model_len
        self.deterministic = deterministic
        self.fingerprint = ""
        self.weights_bytes = sum(tensor.nbytes for tensor in params.values())
        weight = params["embedding.weight"]
        self.dtype, self.device = params["norm"].dtype, weight.device
        self._silu_mul = ops.silu_mul
        self._embedding = Embedding(weight)
        self._rope = RotaryEmbedding(config.rope, max_model_len, weight.device, ops)
        self._norm = RmsNorm(params["norm"], config.rms_norm_eps, ops)
        linear = _Linears(params, ops, deterministic)
        self._head = linear("head" if "head.weight" in params else "embedding")
        self._layers = [_build_layer(config, i, params, linear, ops) for i in range(config.num_layers)]
        self._scratch = _Scratch(config, self.dtype, weight.device, linear.tiled)
        self._tiled = linear.tiled
        self._kv_pool: torch.Tensor | None = None
        self._kv_views: list[tuple[torch.Tensor, torch.Tensor]] = []

    def reserve(self, num_tokens: int, num_samples: int) -> None:
        """Makes buffers for `num_tokens` rows and `num_samples` rows of logits; up to that their addresses stay."""
        self._scratch.reserve(num_tokens)
        self._scratch.logits(num_samples)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv_pool: torch.Tensor) -> torch.Tensor:
        """Runs all layers, stores every row's keys and values in `kv_pool`, returns normalised hidden states [T, W].

        kv_pool [num_blocks, layers, 2, block_size, KH, D] in the model's dtype. The result is a view of a buffer that
        the next call overwrites. T >= 1.
        """
        num_rows = batch.token_ids.shape[0]
        s = self._scratch.views(num_rows)
        self._embedding(batch.token_ids, s.embedded)
        s.unused.zero_()
        first = True
        for layer, cache in zip(self._layers, self._caches(kv_pool), strict=True):
            if first:
                layer.input_norm(s.residual, s.hidden)
                first = False
            else:
                layer.input_norm.add(s.update, s.residual, s.hidden)
            layer.qkv(s.hidden, s.qkv)
            if layer.q_norm is not None and layer.k_norm is not None:
                layer.q_norm(s.q, s.q)
                layer.k_norm(s.k, s.k)
            self._rope(s.q, s.k, batch.positions)
            layer.attention((s.q, s.k, s.v), cache, batch, s.heads, s.lse)
            layer.output(s.merged, s.update)
            layer.mlp_norm.add(s.update, s.residual, s.hidden)
            layer.gate_up(s.hidden, s.gate_up)
            self._silu_mul(s.gate_up, s.activation)
            layer.down(s.activation, s.update)
        self._norm.add(s.update, s.residual, s.hidden)
        return s.hidden[:num_rows]

    @torch.inference_mode()
    def logits(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] fp32 of hidden rows [N, W]. The next call may overwrite the result; N >= 1."""
        num_rows = hidden_rows.shape[0]
        padded, logits = self._scratch.logits(num_rows)
        if self._tiled:
            padded[:num_rows].copy_(hidden_rows)
            self._head(padded, logits)
        else:
            self._head(hidden_rows, logits)
        return logits[:num_rows].float()

    def _caches(self, kv_pool: torch.Tensor) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Key and value cache of each layer, [num_blocks, block_size, KH, D]; cut once per pool."""
        if self._kv_pool is not kv_pool:
            c = self.config
            expected = (kv_pool.shape[0], c.num_layers, 2, kv_pool.shape[3], c.num_kv_heads, c.head_dim)
            assert kv_pool.shape == expected and kv_pool.dtype == self.dtype, "the pool is made from the model's config"
            self._kv_views = [(kv_pool[:, i, 0], kv_pool[:, i, 1]) for i in range(c.num_layers)]
            self._kv_pool = kv_pool
        return self._kv_views


class _Linears:
    """Makes the stack's linear layers; where they take tiles of rows, tries each weight shape once."""

    def __init__(self, params: dict[str, torch.Tensor], ops: Ops, deterministic: bool) -> None:
        self._params = params
        self._multiply = ops.invariant_linear if deterministic and ops.invariant_linear else ops.linear
        self.tiled = deterministic and ops.invariant_linear is None
        self._row_tiles: dict[tuple[torch.Size, bool], int] = {}

    def __call__(self, name: str) -> Linear:
        weight, bias = self._params[f"{name}.weight"], self._params.get(f"{name}.bias")
        if not self.tiled:
            return Linear(weight, bias, self._multiply)
        kind = (weight.shape, bias is None)
        if kind not in self._row_tiles:
            self._row_tiles[kind] = choose_row_tile(weight, bias, self._multiply)
        return Linear(weight, bias, self._multiply, row_tile=self._row_tiles[kind])


def _build_layer(
    config: ModelConfig, index: int, params: dict[str, torch.Tensor], linear: _Linears, ops: Ops
) -> _Layer:
    def norm(name: str) -> RmsNorm:
        return RmsNorm(params[f"{index}.{name}"], config.rms_norm_eps, ops)

    return _Layer(
        input_norm=norm("input_norm"),
        qkv=linear(f"{index}.qkv"),
        q_norm=norm("q_norm") if config.traits.qk_norm else None,
        k_norm=norm("k_norm") if config.traits.qk_norm else None,
        attention=Attention(config.head_dim**-0.5, config.window(index), ops),
        output=linear(f"{index}.output"),
        mlp_norm=norm("mlp_norm"),
        gate_up=linear(f"{index}.gate_up"),
        down=linear(f"{index}.down"),
    )


def parameters(config: ModelConfig, keys: KeyMap) -> list[Param]:
    """Every parameter of the stack with the checkpoint tensors it is made of: q, k, v fused, gate and up fused."""
    c, traits = config, config.traits
    q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    params = [
        Param("embedding.weight", ((keys.embedding, (c.vocab_size, c.hidden_size)),)),
        Param("norm", ((keys.norm, (c.hidden_size,)),)),
    ]
    if not c.tie_word_embeddings:
        params.append(Param("head.weight", ((keys.head, (c.vocab_size, c.hidden_size)),)))

    def linear(name: str, prefix: str, rows: dict[str, int], width: int, bias: bool) -> None:
        params.append(Param(f"{name}.weight", tuple((f"{prefix}{k}.weight", (n, width)) for k, n in rows.items())))
        if bias:
            params.append(Param(f"{name}.bias", tuple((f"{prefix}{k}.bias", (n,)) for k, n in rows.items())))

    for i in range(c.num_layers):
        prefix = keys.layer.format(i=i)
        norms = {"input_norm": (keys.input_norm, c.hidden_size), "mlp_norm": (keys.mlp_norm, c.hidden_size)}
        if traits.qk_norm:
            norms |= {"q_norm": (keys.q_norm, c.head_dim), "k_norm": (keys.k_norm, c.head_dim)}
        params.extend(Param(f"{i}.{name}", ((prefix + key, (width,)),)) for name, (key, width) in norms.items())
        qkv = {keys.q: q_width, keys.k: kv_width, keys.v: kv_width}
        gate_up = {keys.gate: c.intermediate_size, keys.up: c.intermediate_size}
        linear(f"{i}.qkv", prefix, qkv, c.hidden_size, traits.qkv_bias)
        linear(f"{i}.output", prefix, {keys.output: c.hidden_size}, q_width, traits.output_bias)
        linear(f"{i}.gate_up", prefix, gate_up, c.hidden_size, traits.mlp_bias)
        linear(f"{i}.down", prefix, {keys.down: c.hidden_size}, c.intermediate_size, traits.mlp_bias)
    return params


def load_model(
    path: Path | str,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    max_model_len: int | None,
    ops: Ops,
    deterministic: bool = False,
    progress: Progress | None = None,
) -> Decoder:
    """Reads a Hugging Face model folder. dtype None = the checkpoint's, max_model_len None = the model's own.

    `dtype` is that of rows and KV; under fp32 weights of 16 bits may stay as they are (`_dtypes`).

    Everything is checked before anything is allocated; ModelLoadError says which file, field or tensor is wrong.
    `progress` is called with (bytes done, bytes in all).
    """
    folder = Path(path)
    config, family = load_config(folder)
    length = config.max_position_embeddings if max_model_len is None else max_model_len
    if length < 1:
        raise ModelLoadError(f"max_model_len is {length}, at least 1 is needed")
    checkpoint = Checkpoint(folder)
    params = parameters(config, family.keys)
    checkpoint.check(params, ignored=lambda name: _is_ignored(name, config, family))
    dtype = dtype or config.dtype
    dtypes = _dtypes(checkpoint, params, dtype, ops)
    loaded = checkpoint.load(params, dtypes=dtypes, device=torch.device(device), progress=progress)
    decoder = Decoder(config, loaded, max_model_len=length, ops=ops, deterministic=deterministic)
    decoder.fingerprint = config.fingerprint(dtype=dtype, max_model_len=length, weights_digest=checkpoint.digest())
    return decoder


def _dtypes(checkpoint: Checkpoint, params: list[Param], dtype: torch.dtype, ops: Ops) -> dict[str, torch.dtype]:
    """The format of each parameter: `dtype`; matrices stay in 16 bits under fp32 where the ops multiply them so.

    Nothing is lost, every 16-bit number is an fp32 one, and a decode step reads half of the bytes.
    """
    matrices = [param for param in params if param.name.endswith((".weight", ".bias"))]
    stored = {found for param in matrices for found in checkpoint.stored_dtypes(param)}
    keeps = ops.widens_weights and dtype == torch.float32 and len(stored) == 1
    kept = dict.fromkeys((param.name for param in matrices), stored.pop()) if keeps else {}
    return {param.name: dtype for param in params} | kept


def _is_ignored(name: str, config: ModelConfig, family: Family) -> bool:
    """Tensors that some checkpoints carry and no engine needs: stored frequencies, the copy of a tied head."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == family.keys.head)
