"""`python -m bench migrate`: how long a client waits for its next token when its request moves to another engine.

Physics. A request of L tokens has L k bytes of KV (k: bytes per token). A blocking copy stops it for L k / B at B bytes
per second of the link; a replay for L / P at P tokens per second of prefill; both grow with L. A live copy decodes on
while all but the last blocks travel and stops for one block, a round of messages and the wait for a step boundary at
either side: about one step, whatever L. What the copies cost falls on the steps meanwhile, of the request itself and of
its neighbours, because digests and copies take processor time that decoding wants.

Setup. Two engine processes share two cores here: one computing thread each, pinned to a core of its own; the threads
that copy, the front-end and this client take what time they find on both. See fleet.py. A gap is the longest time
between two tokens that the client saw at the hand-over: from the step before the last one of the source until some
tokens of the destination, so as many steps for any length; `gap_steps` is it in median steps of the same stream outside
its moves, `gap_none` the longest of as many steps without a move. Copying before that takes the longer the longer the
request is, a hundred steps and more: `copying_slowdown_pct` is its median step over the stream's, `longest_ms` the
longest step from the order on, which is mostly the worst that the machine did in that time. Plain keys are live copies
over shared memory; `_tcp` and `_gbit` (TCP throttled to 1 Gbit/s) name the others. Correctness first: moved streams'
tokens are the unmoved one's.

Neighbours decode on both engines while a request of `neighbour_length` tokens leaves: see neighbours.py for what is
compared with what. `neighbour_delay_ms` is what a move added up to for each of them. Pools are written once before
anything is measured: what the system does at the first use of a page is no cost of a move.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from kvlite.config import EngineConfig
from kvlite.fleet.moves import MoveHow, MoveReport
from kvlite.models import ModelConfig, load_config

from .embedded import prompts
from .errors import BenchError
from .fleet import SOURCE, TRANSPORTS, MovingFleet, Reader, Transport, opened
from .limits import kv_bytes_per_token
from .neighbours import CALM, Slowed, Times, slow_down, slowed
from .options import add_model_options, integers, model_directory, torch_dtype
from .report import finish, origin

BEFORE = 6
"""Tokens before a move, after as many of the start; and behind it, after those that belong to it."""
WARM_BYTES = 64 << 20
"""That go over each link before anything is measured: every page of its memory was used."""
AFTER = 4
"""Tokens behind a move that still belong to it."""
ROOM = 512
"""Tokens that a stream may have beside its prompt."""
NEIGHBOURS = 2
"""Per engine."""
NEIGHBOUR_PROMPT = 64
NEIGHBOUR_TOKENS = 4096
NAMES = {1024: "1k", 2048: "2k", 4096: "4k", 8192: "8k", 16384: "16k", 32768: "32k"}


@dataclass(frozen=True)
class Move:
    """What one move was like for its client; seconds."""

    gap_s: float
    step_s: float
    none_s: float
    copying_s: float | None
    """Median step while it was copied; None: it was handed over at once."""
    longest_s: float
    report: MoveReport

    @property
    def steps(self) -> float:
        """The gap in median steps."""
        return self.gap_s / self.step_s


@dataclass
class Streams:
    """What clients got for one prompt, to be compared."""

    prompt: list[int]
    tokens: list[list[int]] = field(default_factory=list[list[int]])


class Bench:
    """One fleet, and what is done with it."""

    def __init__(self, fleet: MovingFleet, transports: Sequence[Transport], kv_bytes: int, prompt: list[int]) -> None:
        self.fleet = fleet
        self.transports = transports
        self._kv_bytes = kv_bytes
        self.prompt = prompt
        self._num_streams = 0

    def read(self, prompt: list[int], num_tokens: int = ROOM) -> Reader:
        """A new stream; on an idle fleet it begins at the source."""
        self._num_streams += 1
        return Reader(self.fleet.front, prompt, num_tokens, f"stream {self._num_streams}")

    async def fill(self) -> float:
        """Seconds to the first token of the whole prompt, of which all later ones are beginnings."""
        start = time.perf_counter()
        reader = self.read(self.prompt)
        await reader.reached(1)
        await reader.leave()
        return time.perf_counter() - start

    async def journey(self, length: int, transport: Transport, how: MoveHow, streams: Streams) -> Move:
        """One stream that moves once."""
        reader = self.read(self.prompt[:length])
        await reader.reached(2 * BEFORE)
        ordered, num_tokens = time.perf_counter(), len(reader.times)
        report = await self.order(reader, transport, how)
        await reader.reached(len(reader.times) + AFTER + BEFORE)
        await reader.leave()
        streams.tokens.append(reader.tokens)
        return _seen(reader.times, ordered, num_tokens, report)

    async def order(self, reader: Reader, transport: Transport, how: MoveHow) -> MoveReport:
        """Moves a stream. Raises BenchError when it did not move, or not all of its KV."""
        report = await self.fleet.front.move(reader.name, self.fleet.engine_of[transport.name], how)
        if not report.moved or report.source != SOURCE:
            raise BenchError(f"a move over {transport.text} ended with {report.result}: {report.reason}")
        num_tokens = reader.prompt_len + report.tokens
        least = (num_tokens - 1) * self._kv_bytes
        if how is MoveHow.COPY and report.bytes < least:
            raise BenchError(f"a move of {num_tokens} tokens took {report.bytes} bytes along, must be {least}")
        return report

    async def check(self, streams: Streams) -> int:
        """Every stream must be the beginning of what the source alone says; returns how many tokens were compared."""
        longest = max(map(len, streams.tokens))
        reader = self.read(streams.prompt)
        await reader.reached(longest)
        await reader.leave()
        for tokens in streams.tokens:
            if tokens != reader.tokens[: len(tokens)]:
                at = next(n for n, (one, other) in enumerate(zip(tokens, reader.tokens, strict=False)) if one != other)
                raise BenchError(f"wrong before fast: token {at} of a moved stream of {len(streams.prompt)} tokens")
        return sum(map(len, streams.tokens))


def _seen(times: Sequence[float], ordered: float, num_tokens: int, report: MoveReport) -> Move:
    """What the client saw, and the longest of as many steps without a move; the first tokens are left out."""
    steps = [after - before for before, after in pairwise(times)]
    first = next(n for n, at in enumerate(times) if n >= report.tokens and at > ordered) - 1
    landed = next((n for n in range(first, len(steps)) if times[n + 1] > ordered + report.seconds), len(steps) - 1)
    copying, window = steps[first : landed - 1], steps[max(first, landed - 1) : landed + AFTER]
    calm = steps[2 : num_tokens - 1] + steps[landed + AFTER :]
    return Move(
        gap_s=max(window),
        step_s=statistics.median(calm),
        none_s=max(calm[: len(window)]),
        copying_s=statistics.median(copying) if copying else None,
        longest_s=max(copying + window),
        report=report,
    )


async def gaps(bench: Bench, length: int, options: argparse.Namespace, *, replays: bool) -> dict[str, Any]:
    """Every way to move a request of `length` tokens: figures, after the gate."""
    streams = Streams(bench.prompt[:length])
    found: dict[tuple[str, str], list[Move]] = {}
    for turn in range(options.rounds):
        for transport in bench.transports:
            for way in ("live", "blocking") if turn % 2 == 0 else ("live",):
                bench.fleet.freeze_first(way == "blocking")
                move = await bench.journey(length, transport, MoveHow.COPY, streams)
                found.setdefault((way, transport.name), []).append(move)
    bench.fleet.freeze_first(False)
    if replays:
        first = bench.transports[0]
        found["replay", first.name] = [await bench.journey(length, first, MoveHow.REPLAY, streams)]
    compared = await bench.check(streams)
    return {f"gate_tokens_{_short(length)}": compared} | _figures(length, found)


def _figures(length: int, found: dict[tuple[str, str], list[Move]]) -> dict[str, Any]:
    name, figures = _short(length), dict[str, Any]()
    for (way, transport), moves in found.items():
        key = f"{name}{_suffix(transport)}" if way == "live" else f"{way}_{name}{_suffix(transport)}"
        gap = statistics.median(move.gap_s for move in moves)
        steps = statistics.median(move.steps for move in moves)
        spread = max(move.gap_s for move in moves) - min(move.gap_s for move in moves)
        last = moves[-1].report
        figures |= {
            f"gap_ms_{key}": round(gap * 1e3, 1),
            f"gap_ms_{key}_spread": round(spread * 1e3, 1),
            f"gap_steps_{key}": round(steps, 2),
            f"bytes_{key}": last.bytes,
            f"stages_{key}": last.stages,
        }
        if way == "live":
            none = statistics.median(move.none_s for move in moves)
            step = statistics.median(move.step_s for move in moves)
            figures |= {
                f"gap_none_ms_{key}": round(none * 1e3, 1),
                f"gap_none_steps_{key}": round(statistics.median(m.none_s / m.step_s for m in moves), 2),
                f"longest_ms_{key}": round(statistics.median(m.longest_s for m in moves) * 1e3, 1),
                f"step_ms_{key}": round(step * 1e3, 1),
                f"move_ms_{key}": round(statistics.median(m.report.seconds for m in moves) * 1e3, 1),
            }
            if copying := [move.copying_s / move.step_s - 1 for move in moves if move.copying_s is not None]:
                figures[f"copying_slowdown_pct_{key}"] = round(statistics.median(copying) * 100, 1)
        print(
            f"{name:>5} {way:8} {transport:5} gap {gap * 1e3:9.1f} ms = {steps:7.2f} steps; {last.bytes / 1e6:7.1f} MB "
            f"in {last.stages} stages, {last.seconds * 1e3:8.1f} ms", flush=True
        )  # fmt: skip
    for transport in {transport for way, transport in found if way == "live"}:
        live = statistics.median(move.gap_s for move in found["live", transport])
        for way in ("blocking", "replay"):
            if (way, transport) in found:
                other = statistics.median(move.gap_s for move in found[way, transport])
                figures[f"x_{way}_{name}{_suffix(transport)}"] = round(other / live, 2)
    return figures


async def neighbours(bench: Bench, config: ModelConfig, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Slow-down of requests that stay, on both engines, while one of `length` tokens moves over each transport."""
    figures: dict[str, Any] = {"neighbour_length": length, "neighbours": NEIGHBOURS, "neighbour_moves": options.moves}
    for transport in bench.transports:
        found = await _beside(bench, config, length, transport, options.moves)
        name = _suffix(transport.name)
        for where, some in (
            ("", found),
            ("_source", [move[::2] for move in found]),
            ("_destination", [move[1::2] for move in found]),
        ):
            slow, low, high = slow_down(some, random.Random(1))
            delay = statistics.mean(one.took_s - one.expected_s for move in some for one in move)
            figures |= {
                f"neighbour_slowdown_pct{where}{name}": round(slow * 100, 1),
                f"neighbour_slowdown_pct{where}{name}_low": round(low * 100, 1),
                f"neighbour_slowdown_pct{where}{name}_high": round(high * 100, 1),
                f"neighbour_delay_ms{where}{name}": round(delay * 1e3, 1),
            }
            print(
                f"neighbours{where.replace('_', ' at the ')} over {transport.text}: {slow * 100:.1f} % slower while it "
                f"moves [{low * 100:.1f}, {high * 100:.1f}], {delay * 1e3:.1f} ms per move in all", flush=True
            )  # fmt: skip
    return figures


async def _beside(
    bench: Bench, config: ModelConfig, length: int, transport: Transport, num_moves: int
) -> list[list[Slowed]]:
    """Per move, each neighbour; every other one is moved to the destination first. The first move is not counted: an
    engine prepares itself for a batch as large as it has not had."""
    staying: list[Reader] = []
    num_tokens = min(NEIGHBOUR_TOKENS, config.max_position_embeddings - NEIGHBOUR_PROMPT)
    try:
        for n, prompt in enumerate(prompts(config, 2 * NEIGHBOURS, NEIGHBOUR_PROMPT, seed=3)):
            reader = bench.read(prompt, num_tokens)
            staying.append(reader)
            await reader.reached(1)
            if n % 2:
                await bench.order(reader, transport, MoveHow.COPY)
        return [await _once(bench, length, transport, staying) for _ in range(1 + num_moves)][1:]
    finally:
        for reader in staying:
            await reader.leave()


async def _once(bench: Bench, length: int, transport: Transport, staying: Sequence[Reader]) -> list[Slowed]:
    subject = bench.read(bench.prompt[:length])
    await subject.reached(2)
    since = time.perf_counter()
    await subject.reached(2 + CALM)
    ordered = time.perf_counter()
    await bench.order(subject, transport, MoveHow.COPY)
    over = time.perf_counter()
    await subject.reached(len(subject.times) + CALM)
    until = time.perf_counter()
    for reader in staying:
        await reader.reached(len(reader.times) + 1)
    await subject.leave()
    landed = min(range(1, len(subject.times)), key=lambda n: abs(subject.times[n] - over))  # ends the move
    at = Times(since, ordered, subject.times[landed - 1], subject.times[landed], over, until)
    return [slowed(reader.times, at, stays_at_source=n % 2 == 0) for n, reader in enumerate(staying)]


def _short(length: int) -> str:
    return NAMES.get(length, str(length))


def _suffix(transport: str) -> str:
    return "" if transport == "shm" else f"_{transport}"


def ratios(lengths: Sequence[int], figures: dict[str, Any]) -> dict[str, Any]:
    """The longest over the shortest, per transport: 1 is flat."""
    low, high = _short(min(lengths)), _short(max(lengths))
    names = [transport for transport in TRANSPORTS if f"gap_ms_{high}{_suffix(transport)}" in figures]
    return {
        f"gap_{high}_over_{low}{_suffix(name)}": round(
            figures[f"gap_ms_{high}{_suffix(name)}"] / figures[f"gap_ms_{low}{_suffix(name)}"], 2
        )
        for name in names
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options. Raises BenchError."""
    parser = argparse.ArgumentParser(prog="python -m bench migrate", description="moves of requests between engines")
    add_model_options(parser)
    parser.add_argument("--lengths", default="256,512,1024,2048,4096,8192", help="tokens when it moves")
    parser.add_argument("--replays", default="256,8192", help="lengths that are also replayed; 0: none")
    parser.add_argument("--rounds", type=int, default=3, help="live moves of each kind; half as many blocking ones")
    parser.add_argument("--moves", type=int, default=16, help="moves beside neighbours, per transport; 0: none")
    parser.add_argument("--neighbour-length", type=int, default=2048, help="tokens of the request that leaves them")
    parser.add_argument("--transports", default=",".join(TRANSPORTS), help="separated by commas")
    options = parser.parse_args(arguments)
    options.transports = options.transports.split(",")
    if unknown := set(options.transports) - set(TRANSPORTS):
        raise BenchError(f"--transports {', '.join(unknown)}: some of {', '.join(TRANSPORTS)}")
    if options.threads != parser.get_default("threads"):
        raise BenchError("--threads: every engine has one here")
    if options.rounds < 1:
        raise BenchError(f"--rounds {options.rounds}: at least 1 is needed")
    options.lengths = sorted(set(integers("--lengths", options.lengths)))
    options.replays = [] if options.replays == "0" else integers("--replays", options.replays)
    return options


async def measure(options: argparse.Namespace, config: ModelConfig, kv_bytes: int) -> dict[str, Any]:
    """Everything, in one fleet."""
    transports = [TRANSPORTS[name] for name in options.transports]
    longest = max(*options.lengths, options.neighbour_length if options.moves else 0)
    settings = EngineConfig(
        model=str(model_directory(options.model)),
        dtype=str(torch_dtype(options.dtype)).removeprefix("torch."),  # pyright: ignore[reportArgumentType]
        max_num_seqs=16,
    )
    room = (longest + ROOM + 2 * NEIGHBOURS * (NEIGHBOUR_PROMPT + NEIGHBOUR_TOKENS)) * kv_bytes
    async with opened(settings, 2 * room, room, transports) as fleet:
        [prompt] = prompts(config, 1, longest, seed=1)
        bench = Bench(fleet, transports, kv_bytes, prompt)
        seconds = await bench.fill()
        print(f"{longest} tokens prefilled in {seconds:.1f} s; gaps between tokens at a move:", flush=True)
        figures: dict[str, Any] = {"prefill_s": round(seconds, 1)}
        warm = Streams(prompt)
        for transport in transports:
            for _ in range(-(-WARM_BYTES // (longest * kv_bytes))):
                await bench.journey(longest, transport, MoveHow.COPY, warm)
        for length in options.lengths:
            figures |= await gaps(bench, length, options, replays=length in options.replays)
        figures |= ratios(options.lengths, figures)
        if options.moves:
            figures |= await neighbours(bench, config, options.neighbour_length, options)
    return figures


def main(arguments: list[str]) -> int:
    """Every length, gate first; the last line is one JSON object."""
    options = parse(arguments)
    directory = model_directory(options.model)
    config, _family = load_config(directory)
    dtype = torch_dtype(options.dtype)
    room = config.max_position_embeddings - ROOM
    kept = [length for length in options.lengths if length <= room]
    if len(kept) < len(options.lengths):
        left_out = ", ".join(str(length) for length in options.lengths if length > room)
        print(
            f"left out: {left_out} tokens; the model has {config.max_position_embeddings} positions, {ROOM} for output"
        )
    if not kept:
        raise BenchError(f"--lengths: none fits the {config.max_position_embeddings} positions of the model")
    options.lengths, options.neighbour_length = kept, min(options.neighbour_length, max(kept))
    figures: dict[str, Any] = origin() | {"model": directory.name, "dtype": str(dtype).removeprefix("torch.")}
    figures |= {"engine_threads": 1, "rounds": options.rounds, "transports": options.transports}
    figures["kv_bytes_per_token"] = kv_bytes_per_token(config, dtype)
    start = time.perf_counter()
    figures |= asyncio.run(measure(options, config, figures["kv_bytes_per_token"]))
    figures["seconds"] = round(time.perf_counter() - start)
    finish("migrate", figures, options.save)
    return 0
