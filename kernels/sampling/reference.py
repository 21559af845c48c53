"""Sampling: counter-based Gumbel-max over filtered logits, in plain torch; the CPU engine runs this.

Knows tensors only: penalties, bias and bans are in the logits already. Every row is picked alone, from its own logits,
seed and position, so its token does not depend on the batch. The hash is integer arithmetic, equal to the kernel's bit
for bit. Called through `kvlite.ops`.
"""

import torch

# One stream constant per key word: fractional bits of the golden ratio and of pi.
_STREAMS = (0x9E3779B9, 0x243F6A88)
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
_FIRST_WIDTH = 256


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit finaliser on int32 tensors (products wrap, shifts are made logical by the mask)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * (_MULTIPLIERS[0])
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (_MULTIPLIERS[1] - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def _low_word(x: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of int64 values as int32 with the same bits."""
    low = x & 0xFFFFFFFF
    return (low - ((low >> 31) << 32)).to(torch.int32)


def noise_keys(seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """[N, 2] int32 keys from seed [N] and position [N] int64; every bit of both counts."""
    words = (_low_word(seed), _low_word(seed >> 32), _low_word(position), _low_word(position >> 32))
    keys = []
    for constant in _STREAMS:
        state = torch.full_like(words[0], constant - ((constant >> 31) << 32))
        for word in words:
            state = _mix(state ^ word)
        keys.append(state)
    return torch.stack(keys, dim=1)


def gumbel(ids: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, fp32, for int32 ids [n] under one row's keys [2].

    E = -log(1 - v) is exponential for v uniform in (0, 1), and -log(E) is Gumbel. Small v decide the largest noise, so
    they keep full relative precision: below 1/64 the series replaces the logarithm.
    """
    h = _mix(_mix(ids ^ keys[0]) ^ keys[1])
    v = ((((h >> 1) & 0x7FFFFFFF).float() + 0.5) * 2.0**-31).clamp_(max=1.0 - 2.0**-24)
    series = v * (1.0 + v * (0.5 + v * (1.0 / 3.0 + v * 0.25)))
    return -torch.log(torch.where(v < 1.0 / 64.0, series, -torch.log(1.0 - v)))


def _top_p_threshold(x: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest value of x [n] (scaled logits, max 0) kept by top-p; widens a top-k instead of sorting all of x."""
    goal = x.exp().sum(dtype=torch.float64) * top_p
    width = min(_FIRST_WIDTH, x.shape[0])
    while True:
        largest = torch.topk(x, width).values
        mass = largest.exp().cumsum(0, dtype=torch.float64)
        if width == x.shape[0] or mass[-1] >= goal:
            return largest[min(int(torch.searchsorted(mass, goal)), width - 1)]
        width = min(width * 16, x.shape[0])


def _pick(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, keys: torch.Tensor) -> int:
    """One sampled id from logits [V] whose maximum is finite."""
    ids = None
    if 0 < top_k < logits.shape[0]:
        ids = (logits >= torch.topk(logits, top_k).values[-1]).nonzero().squeeze(1)
        logits = logits[ids]
    x = (logits - logits.max()) / torch.tensor(temperature, dtype=torch.float32, device=logits.device)
    keep = torch.ones_like(x, dtype=torch.bool)
    if top_p < 1.0:
        keep &= x >= _top_p_threshold(x, top_p)
    if min_p > 0.0:
        keep &= x >= torch.log(torch.tensor(min_p, dtype=torch.float32, device=x.device))
    if top_p < 1.0 or min_p > 0.0:
        kept = keep.nonzero().squeeze(1)
        ids, x = kept if ids is None else ids[kept], x[kept]
    if ids is None:
        ids = torch.arange(x.shape[0], device=x.device)
    return int(ids[torch.argmax(x + gumbel(ids.to(torch.int32), keys))])


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """One token per row: argmax where temperature is 0, else a Gumbel-max draw from the filtered softmax.

    logits [N, V], read as fp32 · temperature [N] fp32 >= 0 · top_k [N] int32 (0 = off) · top_p [N] fp32 (>= 1 = off) ·
    min_p [N] fp32 (0 = off) · seed, position [N] int64. Returns [N] int32. Ties go to the lowest id. top-k keeps
    every logit equal to the k-th; top-p keeps the smallest set of most likely ids whose share of what top-k left is
    at least top_p, ties kept; min-p keeps p >= min_p * max p. -1 for a row with a NaN or without a finite maximum.
    """
    logits = logits.float()
    best = logits.max(dim=1)
    token = torch.where(torch.isfinite(best.values), torch.argmax(logits, dim=1), -1).to(torch.int32)
    temperatures, picks = temperature.tolist(), token.tolist()
    if not any(t > 0.0 and pick >= 0 for t, pick in zip(temperatures, picks, strict=True)):
        return token
    keys = noise_keys(seed, position)
    rows = zip(temperatures, top_k.tolist(), top_p.tolist(), min_p.tolist(), strict=True)
    for i, (row_temperature, row_top_k, row_top_p, row_min_p) in enumerate(rows):
        if row_temperature > 0.0 and picks[i] >= 0:
            picks[i] = _pick(logits[i], row_temperature, row_top_k, row_top_p, row_min_p, keys[i])
    return torch.tensor(picks, dtype=torch.int32, device=logits.device)
