"""`python -m bench prefill`: time to the first token of one cold prompt, against the least that it can cost.

Physics. A prompt of T tokens takes 2 P T floating-point operations in the linear layers (P weights without the head,
which sees one row) and 2 H D L T^2 in causal attention. The floor of both is the rate of the best matrix product loop
at the model's shapes with 512 or 1,024 rows, measured here in turns with the prompts (limits.py); `share_N` is floor
over time for a prompt of N tokens, attention, sampling and the engine's own work included. A share above 1 stops the
run. Correctness first: greedy tokens are transformers'.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from kvlite.models import load_config

from . import peer
from .embedded import Setup, gate, opened, prefill_s, prompts
from .errors import BenchError
from .limits import Limits, prompt_flops, share
from .options import add_model_options, integers, model_directory, torch_dtype
from .report import finish, origin

MANY_ROWS = (512, 1024)
"""Where a product is bound by arithmetic; the second is what an engine computes per step as it ships."""


def main(arguments: list[str]) -> int:
    """Gate, then every length in turns with the limit and with transformers; the last line is one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m bench prefill", description="prompts in an embedded engine")
    add_model_options(parser)
    parser.add_argument("--lengths", default="128,512,2048", help="tokens of a prompt, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget-s", type=float, default=0.1, help="seconds per loop of the limits")
    options = parser.parse_args(arguments)
    directory = model_directory(options.model)
    config, _family = load_config(directory)
    dtype = torch_dtype(options.dtype)
    room = config.max_position_embeddings
    lengths: list[int] = []
    for length in integers("--lengths", options.lengths):
        if length < room:
            lengths.append(length)
        else:
            print(f"{length} tokens are left out: the model has {room} positions")
    if not lengths:
        raise BenchError(f"--lengths {options.lengths}: none is below the {room} positions of the model")
    figures: dict[str, Any] = origin() | {"model": directory.name, "dtype": str(dtype).removeprefix("torch.")}
    limits = Limits(config, dtype, options.threads, options.budget_s)
    num_weights = sum(p.num_weights * p.count for p in limits.products if p.name != "head")
    with opened(Setup(directory, options.dtype, options.threads, 2, 2 * max(lengths))) as engine:
        transformers = peer.load(directory, dtype)
        figures |= {"threads": options.threads, "gate_tokens": gate(engine, transformers, config)}
        print(f"check: {figures['gate_tokens']} greedy tokens as transformers'")
        times: dict[int, list[float]] = {length: [] for length in lengths}
        peer_times: dict[int, list[float]] = {length: [] for length in lengths}
        rate = 0.0
        for turn in range(options.rounds):
            rate = max(rate, *(limits.flop_rate(rows) for rows in MANY_ROWS))
            for length in lengths:
                prompt = prompts(config, 1, length, seed=turn)[0]
                times[length].append(prefill_s(engine, prompt))
                peer_times[length].append(peer.prompt_s(transformers, prompt))
    figures |= {"gemm_gflops": round(rate / 1e9, 1)}
    for length in lengths:
        floor = prompt_flops(config, num_weights, length) / rate
        figures |= length_figures(length, floor, times[length], peer_times[length])
    finish("prefill", figures | {"loops": limits.loops}, options.save)
    return 0


def length_figures(length: int, floor_s: float, times: list[float], peer_times: list[float]) -> dict[str, float]:
    """Median, spread, share of the floor, and transformers' time over ours."""
    median = statistics.median(times)
    found = share(f"a prompt of {length} tokens", floor_s, median)
    ratio = statistics.median(peer_times) / median
    line = f"{length:6} tokens: {median * 1e3:9.1f} ms, {found:.2f} of the limit, {ratio:.2f} x transformers"
    print(line, flush=True)
    return {
        f"ttft_ms_{length}": round(median * 1e3, 2),
        f"ttft_ms_{length}_spread": round((max(times) - min(times)) * 1e3, 2),
        f"share_{length}": round(found, 3),
        f"x_transformers_{length}": round(ratio, 2),
    }
