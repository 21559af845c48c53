"""What blending means for others in the same engine: neighbours' steps, memory per request, the store over time.

`neighbours`: four requests decode while one more is served, in turns: a blended one, a plain prompt whose prefill takes
as many operations, and as many operations of a prompt as long as the blended one, whose beginning is cached (`deep`).
Operations are those of products and attention in every row that the blended request runs, the question's twice;
placing, scoring and choosing are overhead and count for nothing. The delay is what all steps until the first token took
beyond as many decode steps without that request: what a second step costs is in it. `x_neighbour_delay` is the blended
one's over the plain one's, `x_neighbour_delay_deep` over the deep one's, `x_neighbour_step` compares the longest step
with the plain one's: about 1 is fair.

`capacity`: requests on one hot document. Exact ones must begin alike and share its blocks; blended ones begin as they
like, and each owns a placed copy. `hit_rates`: novel queries, documents drawn by popularity (Zipf), a store for about
half of them; the share of document tokens found must not fall from one hundred queries to the next. Called by `blend`.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvlite import Delta, Engine, RequestOptions
from kvlite.models import ModelConfig, load_config
from kvlite.reuse_types import Reuse, Segment, SegmentHit
from kvlite.startup import SHIPPED_MODEL

from .blending import (
    DOCUMENT_LEN,
    QUESTION_LEN,
    Asked,
    Choice,
    Part,
    ask,
    documents,
    flat,
    prompts,
    round_,
    token_layers,
    vocabulary,
    warm,
)
from .embedded import Setup, drain, greedy, opened
from .errors import BenchError
from .limits import kv_bytes_per_token, products
from .options import torch_dtype
from .workloads import tokens

MAX_NUM_SEQS = 32
NEIGHBOURS = 4
NEIGHBOUR_LEN = 64
QUERY = Choice("query", 0.15)
HOT_LEN = 1024
HOT_POOL = 8
"""Hot documents that would fit into the KV cache."""
ANSWER_LEN = 64

STORE_MODEL = SHIPPED_MODEL
"""What a store keeps does not depend on what a row costs."""
STORE_DOCUMENTS = 48
STORE_DOCUMENT_LEN = 128
PER_QUERY = 4
HUNDRED = 100
MOST_DECAY = 0.1
"""Hit rates of a hundred queries differ by some 0.03 by chance."""


def neighbours(engine: Engine, config: ModelConfig, length: int, rounds: int) -> dict[str, Any]:
    """Steps of NEIGHBOURS decoding requests beside a blended request over `length` tokens, and beside plain ones."""
    vocab = vocabulary(config)
    library = documents(vocab, max(length // DOCUMENT_LEN, 1), DOCUMENT_LEN, seed=7)
    warm(engine, vocab, library)
    stream = prompts(vocab, library, len(library), seed=7)
    asked = ask(engine, next(stream), QUERY.reuse)
    prompt_len, wanted = asked.reused_tokens + asked.report.computed_tokens, operations(config, asked)
    effective = plain_len(config, wanted)
    block_size = engine.config.block_size
    cached = (prompt_len - plain_len(config, wanted, prompt_len)) // block_size * block_size
    deep = plain_len(config, wanted, cached)
    delays: dict[str, list[float]] = {"blend": [], "plain": [], "deep": []}
    longest: dict[str, list[float]] = {kind: [] for kind in delays}
    counts: dict[str, int] = {}
    bases: list[float] = []
    for turn in range(rounds):
        plain = list(tokens(f"plain {turn}", effective, vocab))
        long = list(tokens(f"deep {turn}", cached + deep, vocab))
        ask(engine, long[: cached + 1], Reuse.PREFIX)
        cases = (("blend", next(stream), QUERY.reuse), ("plain", plain, Reuse.OFF), ("deep", long, Reuse.PREFIX))
        for kind, prompt, reuse in cases:
            base, steps, hit = beside(engine, vocab, prompt, reuse)
            if kind == "deep" and hit != cached:
                raise BenchError(f"{hit} tokens of a prompt were cached, {cached} were put there")
            bases.append(base)
            delays[kind].append(sum(steps) - len(steps) * base)
            longest[kind].append(max(steps))
            counts[kind] = len(steps)
    delay, step = ({k: statistics.median(v) for k, v in found.items()} for found in (delays, longest))
    print(
        f"neighbours: a step takes {statistics.median(bases) * 1e3:.1f} ms alone; a blended request costs them "
        f"{delay['blend'] * 1e3:.0f} ms (longest step {step['blend'] * 1e3:.0f}), a plain one of its {effective} "
        f"effective tokens {delay['plain'] * 1e3:.0f} ms ({step['plain'] * 1e3:.0f}), {deep} tokens behind {cached} "
        f"cached ones {delay['deep'] * 1e3:.0f} ms ({step['deep'] * 1e3:.0f})", flush=True
    )  # fmt: skip
    return {
        "neighbour_base_ms": round(statistics.median(bases) * 1e3, 2),
        "neighbour_effective_tokens": effective,
        "neighbour_deep_tokens": deep,
        **{f"neighbour_steps_{kind}": count for kind, count in counts.items()},
        **{f"neighbour_delay_ms_{kind}": round(value * 1e3, 1) for kind, value in delay.items()},
        **{f"neighbour_step_ms_{kind}": round(value * 1e3, 1) for kind, value in step.items()},
        "x_neighbour_delay": round(delay["blend"] / delay["plain"], 2),
        "x_neighbour_delay_deep": round(delay["blend"] / delay["deep"], 2),
        "x_neighbour_step": round(step["blend"] / step["plain"], 2),
    }


def operations(config: ModelConfig, asked: Asked) -> float:
    """Floating-point operations of products and attention that the QUERY request `asked` took."""
    prompt_len = asked.reused_tokens + asked.report.computed_tokens
    rows = token_layers(config, QUERY, asked)["computed"] * prompt_len
    # Recomputed rows lie anywhere, the question's see everything, twice; the head's see next to nothing.
    keys = asked.report.recomputed_tokens * prompt_len / 2 + 2 * QUESTION_LEN * prompt_len
    per_row, per_key = costs(config)
    return per_row * rows + per_key * keys


def plain_len(config: ModelConfig, wanted: float, cached: int = 0) -> int:
    """Tokens behind `cached` ones whose prefill takes `wanted` operations."""
    per_row, per_key = costs(config)
    # n tokens take per_row n + per_key (n cached + n^2 / 2), as `prefill` counts them.
    linear = per_row + per_key * cached
    return max(round((math.sqrt(linear * linear + 2 * per_key * wanted) - linear) / per_key), 1)


def costs(config: ModelConfig) -> tuple[float, float]:
    """Operations of a row in all linear layers but the head, and of one row's attention to one key in all layers."""
    weights = sum(product.num_weights * product.count for product in products(config) if product.name != "head")
    return 2.0 * weights, 4.0 * config.num_heads * config.head_dim * config.num_layers


def beside(
    engine: Engine, vocab: int, prompt: Sequence[Part] | list[int], reuse: Reuse
) -> tuple[float, list[float], int]:
    """Seconds of a step before the request comes (median), of each until its first token; its cached tokens."""
    handles = [
        engine.add(list(tokens(f"neighbour {idx}", NEIGHBOUR_LEN, vocab)), greedy(256), RequestOptions(reuse=Reuse.OFF))
        for idx in range(NEIGHBOURS)
    ]
    started: set[int] = set()
    while len(started) < NEIGHBOURS:
        started |= {delta.handle for delta in engine.step() if delta.token_ids}
    engine.step()
    base = statistics.median(timed_step(engine)[0] for _ in range(8))
    asked = engine.add(prompt, greedy(1), RequestOptions(reuse=reuse))
    steps: list[float] = []
    end: Delta | None = None
    while end is None:
        seconds, deltas = timed_step(engine)
        steps.append(seconds)
        end = next((delta for delta in deltas if delta.handle == asked and delta.finish_reason is not None), None)
    drain(engine, [*handles, asked])
    if not end.token_ids or end.usage is None:
        raise BenchError(f"a request beside others ended without its token: {end.error}")
    return base, steps, end.usage.cached_tokens


def timed_step(engine: Engine) -> tuple[float, list[Delta]]:
    """Seconds of one step, and what came of it."""
    start = time.perf_counter()
    deltas = engine.step()
    return time.perf_counter() - start, deltas


def capacity(directory: Path, options: argparse.Namespace, config: ModelConfig) -> dict[str, Any]:
    """Requests on one hot document in a KV cache of HOT_POOL such documents, and what each takes."""
    vocab, length = vocabulary(config), min(HOT_LEN, config.max_position_embeddings // 2)
    hot = documents(vocab, 1, length, seed=11)
    bytes_per_token = kv_bytes_per_token(config, torch_dtype(options.dtype))
    setup = Setup(directory, options.dtype, options.threads, MAX_NUM_SEQS, HOT_POOL * length - 64 * (MAX_NUM_SEQS + 1))
    figures: dict[str, Any] = {"hot_document_tokens": length, "hot_pool_tokens": HOT_POOL * length}
    for kind in ("exact", "blend"):
        with opened(setup) as engine:
            stream = prompts(vocab, hot, 1, seed=11)
            block_bytes = engine.config.block_size * bytes_per_token
            if kind == "exact":
                head: Part = next(stream)[0]
                batch = [flat([head, *next(stream)[1:]]) for _ in range(MAX_NUM_SEQS)]
                ask(engine, batch[0], Reuse.PREFIX)
                reuse = Reuse.PREFIX
            else:
                warm(engine, vocab, hot)
                batch = [next(stream) for _ in range(MAX_NUM_SEQS)]
                reuse = Reuse.blend(0.0, "none")
            running, owned = most_running(engine, batch, reuse)
            stored = engine.stats().segment_blocks
        if not running:
            raise BenchError(f"no {kind} request on a hot document of {length} tokens ran")
        figures |= {f"fit_{kind}": running, f"kv_bytes_per_request_{kind}": round(owned * block_bytes / running)}
        if kind == "blend":
            figures["kv_bytes_store"] = stored * block_bytes
        print(f"one hot document of {length} tokens: {running} {kind} requests fit (of {MAX_NUM_SEQS})", flush=True)
    return figures


def most_running(engine: Engine, batch: Sequence[Sequence[Part] | list[int]], reuse: Reuse) -> tuple[int, int]:
    """The most requests that ran at once until one ended, and the blocks that they owned then."""
    options = RequestOptions(reuse=reuse)
    handles = [engine.add(prompt, greedy(ANSWER_LEN), options) for prompt in batch]
    best = (0, 0)
    ended = False
    while not ended and best[0] < len(batch):
        ended = any(delta.finish_reason is not None for delta in engine.step())
        stats = engine.stats()
        best = max(best, (stats.num_running, stats.owned_blocks))
    drain(engine, handles)
    return best


def hit_rates(options: argparse.Namespace) -> dict[str, Any]:
    """Share of document tokens found in the store, per hundred of `--queries` novel queries."""
    config, _family = load_config(STORE_MODEL)
    vocab = vocabulary(config)
    library = documents(vocab, STORE_DOCUMENTS, STORE_DOCUMENT_LEN, seed=3)
    draw = random.Random(3)
    popularity = [1 / (rank + 1) for rank in range(STORE_DOCUMENTS)]
    found: list[tuple[int, int]] = []
    # segment_cache_ratio is a half: as many tokens in the cache as there are in documents make a store for half.
    kv_tokens = STORE_DOCUMENTS * STORE_DOCUMENT_LEN
    with opened(Setup(STORE_MODEL, options.dtype, options.threads, 2, kv_tokens - 64 * 3)) as engine:
        for serial in range(options.queries):
            chosen: dict[int, None] = {}
            while len(chosen) < PER_QUERY:
                chosen[draw.choices(range(STORE_DOCUMENTS), popularity)[0]] = None
            head, question = (list(tokens(f"{part} {serial}", 16, vocab)) for part in ("novel", "asks"))
            parts: list[Part] = [head, *(Segment(library[idx], f"d{idx}") for idx in chosen), question]
            report = ask(engine, parts, Reuse.blend(0.05, "query")).report
            hits = sum(item.tokens for item in report.segments if item.hit is SegmentHit.DEVICE)
            found.append((hits, PER_QUERY * STORE_DOCUMENT_LEN))
        stats = engine.stats()
    rates = [
        round_(sum(hit for hit, _ in part) / sum(all for _, all in part))
        for part in (found[first : first + HUNDRED] for first in range(0, len(found), HUNDRED))
    ]
    print(f"store: {' '.join(f'{rate:.3f}' for rate in rates)} of document tokens found, per hundred queries")
    if len(rates) > 2 and rates[-1] < rates[1] - MOST_DECAY:
        raise BenchError(f"the store's hit rate decays over novel queries: {rates}")
    return {"store_hit_rates": rates, "store_segments": stats.num_segments, "store_documents": STORE_DOCUMENTS}
