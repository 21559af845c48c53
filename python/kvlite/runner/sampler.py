"""`Sampler`: from logits to token ids, with per-row parameters, penalties and log-probabilities.

Owns tables indexed by seq_row, filled when a row is given to a choice. Every row is treated alone, so its token does
not depend on the batch; noise is a function of (seed of the choice, output position). Knows neither text nor blocks.
Called by model_runner.py; the engine fills the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvlite.ops import Ops
from kvlite.runner.plan import Int32, SampleKind
from kvlite.runner.upload import upload
from kvlite.types import SamplingParams

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class RowSampling:
    """What the sampler must know of the choice that a row now serves."""

    params: SamplingParams
    """Resolved: no None where the sampler reads."""
    seed: int
    prompt: Int32
    outputs: Sequence[int]
    """Ids generated before (a resumed choice has some)."""
    banned_ids: tuple[int, ...]
    """Ids that end the choice; impossible while fewer than min_tokens are out."""


@dataclass(frozen=True, slots=True)
class RawLogprobs:
    """Log-probabilities of one sample row under the unmodified distribution; ids best first, ties by id."""

    token_id: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Sampled:
    """Answer to N sample rows."""

    tokens: Int32
    """[N]; for a prompt_logprob row 0; below 0 where the row's logits are unusable."""
    logprobs: dict[int, RawLogprobs]
    """By index of the sample row, where asked."""


class Sampler:
    """Samples for one engine; `num_rows` is max_num_seqs."""

    def __init__(self, *, num_rows: int, vocab_size: int, max_logprobs: int, device: torch.device, ops: Ops) -> None:
        self._ops = ops
        self._device = device
        self._vocab_size = vocab_size
        # A fixed k, so that the set of best ids does not depend on what batch mates ask.
        self._top_width = min(max_logprobs, vocab_size)
        self._temperature = np.zeros(num_rows, np.float32)
        self._top_k = np.zeros(num_rows, np.int32)
        self._top_p = np.ones(num_rows, np.float32)
        self._min_p = np.zeros(num_rows, np.float32)
        self._seed = np.zeros(num_rows, np.int64)
        self._prompt_len = np.zeros(num_rows, np.int64)
        self._num_logprobs = np.full(num_rows, -1, np.int32)
        self._num_prompt_logprobs = np.full(num_rows, -1, np.int32)
        self._edited = np.zeros(num_rows, np.bool_)
        self._rows: list[RowSampling | None] = [None] * num_rows
        self._penalties = _PenaltyTable(num_rows, vocab_size, device)

    def admit(self, row: int, state: RowSampling) -> None:
        """Gives `row` to a choice; whatever it held before is gone."""
        params = state.params
        assert params.temperature is not None and params.top_p is not None and params.top_k is not None
        assert params.min_p is not None, "params are resolved"
        self._temperature[row] = params.temperature
        self._top_k[row] = min(params.top_k, self._vocab_size)
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seed[row] = state.seed
        self._prompt_len[row] = len(state.prompt)
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._num_prompt_logprobs[row] = -1 if params.prompt_logprobs is None else params.prompt_logprobs
        self._rows[row] = state
        self._penalties.release(row)
        penalised = _has_penalty(params)
        if penalised:
            self._penalties.admit(row, state)
        self._edited[row] = penalised or bool(params.logit_bias) or params.min_tokens > 0

    def sample(self, logits: torch.Tensor, rows: Int32, kinds: Int32, last_key: Int32) -> Sampled:
        """One answer per row of `logits` [N, V], which may be overwritten; 16-bit ones are read as fp32.

        rows, kinds, last_key [N]: seq_row, SampleKind, and the key index of the token whose logits these are.
        """
        positions = last_key.astype(np.int64) + 1 - self._prompt_len[rows]
        sampling = kinds == SampleKind.SAMPLE
        asked = np.where(sampling, self._num_logprobs[rows], self._num_prompt_logprobs[rows])
        wanted = np.flatnonzero(asked >= 0)
        raw = torch.log_softmax(logits[self._index(wanted)].float(), dim=-1) if len(wanted) else None
        edited = np.flatnonzero(self._edited[rows] & sampling)
        if len(edited):
            logits = logits.float()
            self._edit(logits, edited, rows, positions)
        tokens = self._draw(logits, rows, positions, greedy=~sampling)
        targets = tokens.copy()
        for n in np.flatnonzero(~sampling):
            targets[n] = self._state(int(rows[n])).prompt[last_key[n] + 1]
            tokens[n] = min(int(tokens[n]), 0)
        if len(edited):
            self._penalties.count(rows[edited], tokens[edited])
        logprobs = {} if raw is None else self._logprobs(raw, wanted, targets, tokens, asked)
        return Sampled(tokens, logprobs)

    def _draw(
        self, logits: torch.Tensor, rows: Int32, positions: NDArray[np.int64], greedy: NDArray[np.bool_]
    ) -> Int32:
        def table(values: NDArray[np.generic]) -> torch.Tensor:
            return upload(values, self._device)

        temperature = self._temperature[rows]
        temperature[greedy] = 0
        tokens = self._ops.sample(
            logits,
            table(temperature),
            table(self._top_k[rows]),
            table(self._top_p[rows]),
            table(self._min_p[rows]),
            table(self._seed[rows]),
            table(positions),
        )
        return np.asarray(tokens.cpu().numpy(), np.int32)

    def _edit(self, logits: torch.Tensor, edited: NDArray[np.intp], rows: Int32, positions: NDArray[np.int64]) -> None:
        """Penalties, then bias, then the ban of ending ids below min_tokens; in place."""
        self._penalties.apply(logits, edited, rows[edited])
        line: list[int] = []
        ids: list[int] = []
        values: list[float] = []
        for n in edited.tolist():
            state = self._state(int(rows[n]))
            bias = state.params.logit_bias
            banned = state.banned_ids if positions[n] < state.params.min_tokens else ()
            line += [n] * (len(bias) + len(banned))
            ids += [*bias.keys(), *banned]
            values += [*bias.values(), *([-float("inf")] * len(banned))]
        if line:
            where = (self._index(line), self._index(ids))
            logits.index_put_(where, upload(np.asarray(values, np.float32), self._device), accumulate=True)

    def _logprobs(
        self, raw: torch.Tensor, wanted: NDArray[np.intp], targets: Int32, tokens: Int32, asked: Int32
    ) -> dict[int, RawLogprobs]:
        """Chosen, rank and best ids of the wanted rows. `raw` [len(wanted), V]."""
        chosen = raw.gather(1, self._index(np.maximum(targets[wanted], 0))[:, None])
        ranks: list[int] = ((raw > chosen).sum(dim=1) + 1).cpu().numpy().tolist()
        values: list[float] = chosen[:, 0].cpu().numpy().tolist()
        best = torch.topk(raw, self._top_width, dim=1)
        best_ids: list[list[int]] = best.indices.cpu().numpy().tolist()
        best_values: list[list[float]] = best.values.cpu().numpy().tolist()
        found: dict[int, RawLogprobs] = {}
        for at, n in enumerate(wanted.tolist()):
            if tokens[n] < 0:
                continue
            pairs = sorted(zip(best_values[at], best_ids[at], strict=True), key=lambda pair: (-pair[0], pair[1]))
            pairs = pairs[: asked[n]]
            top_ids, top_values = tuple(id for _, id in pairs), tuple(value for value, _ in pairs)
            found[n] = RawLogprobs(int(targets[n]), values[at], ranks[at], top_ids, top_values)
        return found

    def _state(self, row: int) -> RowSampling:
        state = self._rows[row]
        assert state is not None, "a sampled row was admitted"
        return state

    def _index(self, values: Sequence[int] | NDArray[np.generic]) -> torch.Tensor:
        return upload(np.asarray(values), self._device, torch.int64)


class _PenaltyTable:
    """Counts of prompt and output ids, for rows that pay penalties only: [slots, V], grown by doubling."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._slot = np.full(num_rows, -1, np.int64)
        self._free: list[int] = []
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._factors = torch.zeros((0, 3), dtype=torch.float32, device=device)
        """Repetition, frequency, presence."""

    def admit(self, row: int, state: RowSampling) -> None:
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._slot[row] = slot
        params = state.params
        prompt = torch.tensor(state.prompt, dtype=torch.int64, device=self._device)
        outputs = torch.tensor(state.outputs, dtype=torch.int64, device=self._device)
        self._in_prompt[slot] = False
        self._in_prompt[slot, prompt] = True
        self._counts[slot] = torch.bincount(outputs, minlength=self._vocab_size).int()
        factors = [params.repetition_penalty or 1.0, params.frequency_penalty, params.presence_penalty]
        self._factors[slot] = torch.tensor(factors, device=self._device)

    def release(self, row: int) -> None:
        if self._slot[row] >= 0:
            self._free.append(int(self._slot[row]))
            self._slot[row] = -1

    def _grow(self) -> None:
        old = self._counts.shape[0]
        more = max(old, 4)
        self._counts = torch.cat([self._counts, self._counts.new_zeros(more, self._vocab_size)])
        self._in_prompt = torch.cat([self._in_prompt, self._in_prompt.new_zeros(more, self._vocab_size)])
        self._factors = torch.cat([self._factors, self._factors.new_zeros(more, 3)])
        self._free += range(old, old + more)

    def apply(self, logits: torch.Tensor, lines: NDArray[np.intp], rows: Int32) -> None:
        """Changes logits[lines], whose rows are `rows`, where those pay penalties."""
        paying = self._slot[rows] >= 0
        if not paying.any():
            return
        line = upload(lines[paying], self._device)
        slot = upload(self._slot[rows[paying]], self._device)
        counts, factors = self._counts[slot], self._factors[slot]
        changed = logits[line]
        repetition = factors[:, :1]
        seen = self._in_prompt[slot] | (counts > 0)
        repeated = torch.where(changed > 0, changed / repetition, changed * repetition)
        changed = torch.where(seen, repeated, changed)
        logits[line] = changed - factors[:, 1:2] * counts - factors[:, 2:3] * (counts > 0)

    def count(self, rows: Int32, tokens: Int32) -> None:
        """Adds the sampled ids to the counts of paying rows."""
        paying = (self._slot[rows] >= 0) & (tokens >= 0)
        slot = upload(self._slot[rows[paying]], self._device)
        token = upload(tokens[paying], self._device, torch.int64)
        self._counts.index_put_((slot, token), torch.ones_like(token, dtype=torch.int32), accumulate=True)


def choice_seed(seed: int, choice: int) -> int:
    """Seed of one choice, as int64: the request's own for choice 0, a splitmix64 step away for the others."""
    mixed = (seed + choice * 0x9E3779B97F4A7C15) & _MASK64
    if choice:
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK64
        mixed ^= mixed >> 31
    return mixed - (1 << 64) if mixed >> 63 else mixed


def _has_penalty(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)
