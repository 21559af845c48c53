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
from kvlite.layers.linear import Linear, choose_row_tile
from kvlite.layers.norm import RmsNorm
from kvlite.layers.rope import RotaryEmbedding
from kvlite.models.batch import ForwardBatch
from kvlite.models.config import Family, KeyMap, ModelConfig
from kvlite.models.probe import LayerState, Probe, Watch
from kvlite.models.registry import load_config
from kvlite.models.scratch import Scratch
from kvlite.models.weights import Checkpoint, Param, Progress
from kvlite.ops import Ops


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
        self.weight_dtype = weight.dtype
        """Of the matrices; 16 bits may stand under fp32 rows (`load_model`)."""
        self._silu_mul = ops.silu_mul
        self.key_mass = ops.key_mass
        """The op that probes need over this decoder's rows and keys."""
        self._place_kv = ops.place_kv
        self._embedding = Embedding(weight)
        self._rope = RotaryEmbedding(config.rope, max_model_len, weight.device, ops)
        self._norm = RmsNorm(params["norm"], config.rms_norm_eps, ops)
        linear = _Linears(params, ops, deterministic)
        self._head = linear("head" if "head.weight" in params else "embedding")
        self._layers = [_build_layer(config, i, params, linear, ops) for i in range(config.num_layers)]
        self._scratch = Scratch(config, self.dtype, weight.device, linear.tiled)
        self._tiled = linear.tiled
        self._kv_pool: torch.Tensor | None = None
        self._kv_views: list[tuple[torch.Tensor, torch.Tensor]] = []

    def reserve(self, num_tokens: int, num_samples: int) -> None:
        """Makes buffers for `num_tokens` rows and `num_samples` rows of logits; up to that their addresses stay."""
        self._scratch.reserve(num_tokens)
        self._scratch.logits(num_samples)

    @property
    def reserved_tokens(self) -> int:
        """Rows that the buffers hold; a longer batch moves them."""
        return self._scratch.capacity

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv_pool: torch.Tensor, probes: Sequence[Probe] = ()) -> torch.Tensor:
        """Runs all layers, stores every row's keys and values in `kv_pool`, returns normalised hidden states [T', W].

        kv_pool [num_blocks, layers, 2, KH, block_size, D] in the model's dtype. T' are the rows that no probe lets
        leave (`probe.rows_to_the_end`), without probes all T. The result is a view of a buffer that the next call
        overwrites. T >= 1.
        """
        self.embed(batch.token_ids)
        return self.forward_embedded(batch, kv_pool, probes)

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> None:
        """Puts the embeddings of token_ids [T] where `forward_embedded` finds them."""
        s = self._scratch.views(token_ids.shape[0])
        self._embedding(token_ids, s.embedded)
        s.unused.zero_()

    @torch.inference_mode()
    def forward_embedded(
        self, batch: ForwardBatch, kv_pool: torch.Tensor, probes: Sequence[Probe] = ()
    ) -> torch.Tensor:
        """`forward` without its first part: ops of the backend alone, which a graph or a tape can hold."""
        s = self._scratch.views(batch.token_ids.shape[0])
        watch = Watch(probes, batch.token_ids.shape[0]) if probes else None
        for index, (layer, cache) in enumerate(zip(self._layers, self._caches(kv_pool), strict=True)):
            if index == 0:
                layer.input_norm(s.residual, s.hidden)
            else:
                layer.input_norm.add(s.update, s.residual, s.hidden)
            layer.qkv(s.hidden, s.qkv)
            if watch is not None:
                watch.before_store(LayerState(index, s, batch, cache, layer.attention))
                staying = watch.leave(index)
                if staying is not None:
                    if not len(staying):
                        return s.embedded[:0]
                    batch, s = batch.keep(staying), self._scratch.compact(s, staying)
            if layer.q_norm is not None and layer.k_norm is not None:
                layer.q_norm(s.q, s.q)
                layer.k_norm(s.k, s.k)
            if batch.segment_slot is not None:
                layer.attention.store(s.k, s.v, cache, batch.segment_slot)
            self._rope(s.q, s.k, batch.positions)
            layer.attention((s.q, s.k, s.v), cache, batch, s.heads, s.lse)
            if watch is not None:
                watch.after_attention(LayerState(index, s, batch, cache, layer.attention))
            layer.output(s.merged, s.update)
            layer.mlp_norm.add(s.update, s.residual, s.hidden)
            layer.gate_up(s.hidden, s.gate_up)
            self._silu_mul(s.gate_up, s.activation)
            layer.down(s.activation, s.update)
        self._norm.add(s.update, s.residual, s.hidden)
        return s.hidden[: batch.token_ids.shape[0]]

    @torch.inference_mode()
    def place_kv(
        self, kv_pool: torch.Tensor, source_slot: torch.Tensor, target_slot: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Copies keys that were stored before RoPE, and their values, in all layers to where they are used, rotated.

        source_slot, target_slot [P] int32 · positions [P] int32 of the copies, each in [0, max_model_len).
        """
        self._place_kv(kv_pool, source_slot, target_slot, positions, self._rope.cos, self._rope.sin)

    @torch.inference_mode()
    def logits(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """Logits [N, V], in the model's dtype, of hidden rows [N, W]. The next call overwrites the result; N >= 1."""
        num_rows = hidden_rows.shape[0]
        padded, logits = self._scratch.logits(num_rows)
        if self._tiled:
            padded[:num_rows].copy_(hidden_rows)
            self._head(padded, logits)
        else:
            self._head(hidden_rows, logits)
        return logits[:num_rows]

    def _caches(self, kv_pool: torch.Tensor) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Key and value cache of each layer, [num_blocks, block_size, KH, D]; cut once per pool."""
        if self._kv_pool is not kv_pool:
            c = self.config
            expected = (kv_pool.shape[0], c.num_layers, 2, c.num_kv_heads, kv_pool.shape[4], c.head_dim)
            assert kv_pool.shape == expected and kv_pool.dtype == self.dtype, "the pool is made from the model's config"
            by_slot = kv_pool.transpose(3, 4)
            self._kv_views = [(by_slot[:, i, 0], by_slot[:, i, 1]) for i in range(c.num_layers)]
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
