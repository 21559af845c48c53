"""`python -m bench blend`: what reusing documents saves, and what it costs the others.

Physics. A full prefill computes every row of a prompt in every layer: T * L token-layers. A blended request computes
the rows of new text, a share r of the reused rows, and whatever its method needs to choose them; the rest is copied and
rotated, at the rate of memory. So the time to the first token falls to r + 2q / T for `query` (q rows of new text, run
twice), to c / L + r for `deviation` with check layer c, and never below the share of rows that are new; attention keeps
that ratio, because a recomputed row sees as many keys as in a full prefill. `computed_*` is that share for the request
as it ran, selection included; `x_ttft_*` is the exact prefill's time over the blended one's.

Documents are in the store, in a new order every time, behind a head that no other prompt has; requests take turns
(exact, then every method and ratio, exact again ...) and medians are compared. Correctness first, at every length:
ratio 1 gives the first token of an exact prefill, and the tokens by source are what lengths and ratio say.

`store_*`: KV bytes of one request and how many requests on one hot document fit, against exact; hit rates over novel
queries on a pool of documents that the store cannot hold at once. `neighbour_*`: see blend_serving.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvlite import Engine
from kvlite.models import ModelConfig, load_config
from kvlite.reuse.registry import METHODS
from kvlite.reuse_types import Reuse

from . import blend_serving, peer
from .blending import (
    DOCUMENT_LEN,
    HEAD_LEN,
    QUESTION_LEN,
    Asked,
    Choice,
    Part,
    ask,
    documents,
    prompts,
    token_layers,
    vocabulary,
    warm,
)
from .embedded import Setup, gate, opened
from .errors import BenchError
from .options import add_model_options, integers, model_directory, torch_dtype
from .report import finish, origin

DEFAULT_METHODS = "none,boundary,deviation,query,hybrid"
PARTS = ("ttft", "store", "neighbours")


def choices(methods: str, ratios: str) -> list[Choice]:
    """Every method with every ratio; `none` once. Raises BenchError for unknown names and ratios outside 0 to 1."""
    found: list[Choice] = []
    try:
        shares = [float(text) for text in ratios.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise BenchError(f"--ratios {ratios}: numbers from 0 to 1 are wanted, separated by commas")
    for method in methods.split(","):
        if method not in METHODS:
            raise BenchError(f"--methods {method}: one of {', '.join(METHODS)}")
        found += [Choice(method, 0.0)] if method == "none" else [Choice(method, share) for share in shares]
    return found


def label(length: int) -> str:
    """As in the keys: 4096 is 4k."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def check(engine: Engine, prompt: Sequence[Part], num_reused: int) -> None:
    """Ratio 1 and an exact prefill agree, and a request's tokens by source are those of its lengths. BenchError."""
    # The blended one first: behind the exact one its prompt would be a prefix hit.
    whole = ask(engine, prompt, Reuse.blend(1.0, "query"))
    exact = ask(engine, prompt, Reuse.OFF)
    if whole.token != exact.token:
        raise BenchError(f"wrong before fast: ratio 1 says {whole.token}, an exact prefill {exact.token}")
    check_counts(whole, 1.0, num_reused)
    if exact.cached_tokens:
        raise BenchError(f"an exact prefill took {exact.cached_tokens} tokens from the cache")


def check_counts(asked: Asked, ratio: float, num_reused: int) -> None:
    """Raises BenchError unless tokens by source follow from lengths and ratio, and usage agrees with the report."""
    report = asked.report
    budget = math.ceil(ratio * num_reused - 1e-9)
    found = (report.prefix_tokens, report.blended_tokens, report.recomputed_tokens, report.computed_tokens)
    wanted = (0, num_reused - budget, budget, HEAD_LEN + QUESTION_LEN)
    if found != wanted:
        raise BenchError(f"tokens from prefix, blended, recomputed, computed are {found}, {wanted} are right")
    if asked.cached_tokens != report.cached_tokens:
        raise BenchError(f"usage says {asked.cached_tokens} cached tokens, the report {report.cached_tokens}")


def measure(engine: Engine, config: ModelConfig, ways: list[Choice], length: int, rounds: int) -> dict[str, Any]:
    """One length: gate, then exact and every choice in turns."""
    count = max(length // DOCUMENT_LEN, 1)
    library = documents(vocabulary(config), count, length // count, seed=length)
    num_reused = sum(map(len, library))
    warm(engine, vocabulary(config), library)
    stream = prompts(vocabulary(config), library, count, seed=length)
    check(engine, next(stream), num_reused)
    exact: list[float] = []
    blended: dict[Choice, list[Asked]] = {way: [] for way in ways}
    for _ in range(rounds):
        exact.append(timed(engine, stream, Reuse.OFF).ttft_s)
        for way in ways:
            asked = timed(engine, stream, way.reuse)
            check_counts(asked, way.ratio, num_reused)
            blended[way].append(asked)
    return length_figures(label(length), config, exact, blended)


def timed(engine: Engine, stream: Iterator[list[Part]], reuse: Reuse) -> Asked:
    """The next prompt, served alone."""
    return ask(engine, next(stream), reuse)


def length_figures(
    name: str, config: ModelConfig, exact: list[float], blended: dict[Choice, list[Asked]]
) -> dict[str, Any]:
    """Medians, ratios and token-layers of one length, also printed."""
    full = statistics.median(exact)
    figures: dict[str, Any] = {f"ttft_ms_exact_{name}": round(full * 1e3, 1)}
    figures[f"ttft_ms_exact_{name}_spread"] = round((max(exact) - min(exact)) * 1e3, 1)
    print(f"{name:>6} exact            {full * 1e3:10.1f} ms", flush=True)
    for way, asked in blended.items():
        times = [one.ttft_s for one in asked]
        median = statistics.median(times)
        layers = token_layers(config, way, asked[0])
        key = f"{way.name}_{name}"
        figures |= {
            f"ttft_ms_{key}": round(median * 1e3, 1),
            f"ttft_ms_{key}_spread": round((max(times) - min(times)) * 1e3, 1),
            f"x_ttft_{key}": round(full / median, 2),
            f"computed_{key}": layers["computed"],
            f"selection_{key}": layers["selection"],
        }
        print(
            f"{name:>6} {way.name:16} {median * 1e3:10.1f} ms  x {full / median:5.2f}  "
            f"computed {layers['computed']:.3f} of all token-layers, selection {layers['selection']:.3f}", flush=True
        )  # fmt: skip
    return figures


@contextmanager
def engine_of(directory: Path, options: argparse.Namespace, longest: int) -> Iterator[Engine]:
    """An engine that ships, with room for a store of `longest` tokens, a request as long, and as much again."""
    setup = Setup(directory, options.dtype, options.threads, blend_serving.MAX_NUM_SEQS, 4 * (longest + 512))
    with opened(setup) as engine:
        yield engine


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options. Raises BenchError."""
    parser = argparse.ArgumentParser(prog="python -m bench blend", description="blended requests over documents")
    add_model_options(parser)
    parser.add_argument("--lengths", default="1024,2048,4096,8192", help="tokens of documents, separated by commas")
    parser.add_argument("--methods", default=DEFAULT_METHODS, help="separated by commas")
    parser.add_argument("--ratios", default="0.05,0.15,0.3", help="recompute ratios, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default=",".join(PARTS), help="what is measured, separated by commas")
    parser.add_argument("--queries", type=int, default=500, help="novel queries on the store")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - set(PARTS):
        raise BenchError(f"--parts {', '.join(unknown)}: some of {', '.join(PARTS)}")
    return options


def main(arguments: list[str]) -> int:
    """Gate, then every part; the last line is one JSON object."""
    options = parse(arguments)
    directory = model_directory(options.model)
    config, _family = load_config(directory)
    dtype = torch_dtype(options.dtype)
    room = config.max_position_embeddings - HEAD_LEN - QUESTION_LEN - 1
    lengths = [length for length in integers("--lengths", options.lengths) if length <= room]
    if not lengths:
        raise BenchError(f"--lengths {options.lengths}: none fits the {config.max_position_embeddings} positions")
    ways = choices(options.methods, options.ratios)
    figures: dict[str, Any] = origin() | {"model": directory.name, "dtype": str(dtype).removeprefix("torch.")}
    figures |= {"threads": options.threads, "rounds": options.rounds, "document_len": DOCUMENT_LEN}
    with engine_of(directory, options, max(lengths)) as engine:
        figures["gate_tokens"] = gate(engine, peer.load(directory, dtype), config)
        print(f"check: {figures['gate_tokens']} greedy tokens as transformers'")
        for length in lengths if "ttft" in options.parts else []:
            figures |= measure(engine, config, ways, length, options.rounds)
        if "neighbours" in options.parts:
            figures |= blend_serving.neighbours(engine, config, min(2048, max(lengths)), options.rounds)
    if "store" in options.parts:
        figures |= blend_serving.capacity(directory, options, config)
        figures |= blend_serving.hit_rates(options)
    finish("blend", figures, options.save)
    return 0
