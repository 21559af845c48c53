"""The part `groups` of `bench gpu`: what is read once for sequences that share a prefix, right and then timed.

Physics in grouped.py. A decode graph has the tables of groups whether its batch has any or not, so what empty ones cost
is a figure of its own: `x_told_none` is the time of a call without tables over that of one with empty ones.
"""

from __future__ import annotations

import statistics

import torch

from kvlite.runner.grouping import SPLIT

from .errors import BenchError
from .gpu_parts import agree, ids_of, is_right
from .gpu_report import Part
from .gpu_stage import Chunk, RandomModel, Room, Stage
from .grouped import gains, pair, ratios

BUDGET_S = 0.05
"""Of every ratio."""


@torch.inference_mode()
def groups(part: Part) -> None:
    """Decode attention behind a shared prefix, the same bits together, apart and with empty tables, and the times of
    each; then replays of a small model with groups and without, which must have the same logits.
    """
    if not part.ops.shares_prefixes:
        part.skip(f"backend {part.ops.backend} reads each sequence's keys")
        return
    clock, make = part.clock(), part.maker()
    for batch, prefix in part.scale.shared:
        name = f"b{batch}_p{prefix}"
        if not part.has_time(name, 5):
            break
        each, want = pair(make, batch, prefix), pair(make, batch, prefix)
        if not is_right(part, want.ways.together, each.ways.together, make.dtype):
            continue
        try:
            found = gains(each, part.ops, clock, BUDGET_S)
        except BenchError as error:
            part.fail(str(error))
            continue
        found["x_told_none"] = statistics.median(ratios(each, each.ways.told_none, part.ops, clock, BUDGET_S))
        found["us"] = clock.seconds(lambda case=each.ways.together: case.run(part.ops)) * 1e6
        part.add(**{name: {key: round(value, 3) for key, value in found.items()}})
        part.say(
            f"{name:12} {found['us']:8.1f} us, {found['x']:.2f} x apart (at least {found['low']:.2f}), "
            f"{found['share']:.2f} of what memory allows; told of no group {found['x_told_none']:.2f} x"
        )
    if part.has_time("replays", 10):
        replays_share(part)


def replays_share(part: Part) -> None:
    """Two groups and one sequence of its own, by one graph with and without their tables filled."""
    batch, length = 9, 2 * SPLIT + 40
    model = RandomModel.of(part.scale.gate_shape, part.device, part.dtype)
    stage = Stage(model, part.ops, Room(batch, length, batch, batch * length))
    stage.record()
    stage.lay_out(batch, length)
    shared = (range(5), 2 * SPLIT), (range(5, 8), SPLIT)
    for rows, num_keys in shared:
        stage.share(rows, num_keys)
    ids = ids_of(part, batch, seed=0, vocab_size=part.scale.gate_shape.vocab_size)
    chunks: list[Chunk] = [(row, length - 1, [token]) for row, token in enumerate(ids)]
    apart, together = (stage.logits(stage.plan(chunks, groups=some)) for some in ((), shared))
    same = torch.equal(apart, together)
    part.add(replays_same_bits=same)
    part.say(f"replays with groups and without have {'the same' if same else 'other'} bits")
    if agree(part, "groups", together, apart) and not same:
        part.fail("a replay's logits depend on who shares a prefix")
