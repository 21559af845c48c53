"""Decode graphs, with a recorder that runs the function again where a GPU would replay it, and with tapes of CPU ops:
bits, padding, who gets one.

What a recorder cannot show, reads of the device by the host and tensors made from host values, a dispatch mode refuses.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvlite import ops as ops_module
from kvlite.models import ForwardBatch
from kvlite.runner.graphs import MAX_GRAPH_ROWS, graph_sizes
from kvlite.runner.model_runner import ModelRunner
from tests.reuse.stage import NUM_ROWS, Rows, Stage, decoder
from tests.threads import one_thread

__all__ = ["one_thread"]

BACKENDS = ["reference", "cpu"]
PROMPTS = [[5, 9, 11, 3, 8][: 2 + row % 4] for row in range(NUM_ROWS)]


class Rerun:
    """A recorder whose replays call the function."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replays = 0

    def record(self, run: Callable[[], object]) -> Callable[[], None]:
        self.num_recorded += 1
        run()

        def replay() -> None:
            self.num_replays += 1
            run()

        return replay


def staged(backend: str, recorder: Rerun | None, name: str = "qwen3") -> Stage:
    """A stage whose pool is NaN but for the prompts of all rows; with a recorder: decodes by graphs."""
    made = decoder(name, backend)
    made.reserve(64, NUM_ROWS)
    stage = Stage(made)
    if recorder is not None:
        stage.runner.record_graphs(recorder.record, graph_sizes(NUM_ROWS))
    for row, prompt in enumerate(PROMPTS):
        stage.prefill(row, prompt)
    return stage


def decode(rows: list[int], step: int = 0) -> list[Rows]:
    return [Rows(row, [len(PROMPTS[row]) + step], [20 + row + step], sample=True) for row in rows]


def logits_of(stage: Stage, plan: list[Rows]) -> list[torch.Tensor]:
    """Raw logits of every sampled row, in the order of the plan."""
    stage.runner.captured |= {one.row for one in plan}
    found = stage.run(plan).result.logits
    return [found[one.row] for one in plan]


def check_step(eager: Stage, other: Stage, step: int, count: int) -> None:
    """The last `count` rows decode: logits and KV of both have the same bits. The others get their key before."""
    rows = list(range(NUM_ROWS))[::-1][:count]
    plan = [Rows(row, [len(PROMPTS[row]) + step], [20 + row], sample=True) for row in rows]
    resting = [Rows(row, [len(PROMPTS[row]) + step], [20 + row]) for row in range(NUM_ROWS - count)]
    for stage in (eager, other):
        if resting:  # the next plan reads it
            stage.run(resting)
    for want, have in zip(logits_of(eager, plan), logits_of(other, plan), strict=True):
        assert torch.equal(want, have) and not have.isnan().any()
    for row in rows:
        keys = range(len(PROMPTS[row]) + step + 1)
        assert torch.equal(eager.kv(row, keys), other.kv(row, keys))


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_replay_gives_the_bits_of_the_eager_way_at_every_batch_size(backend: str, name: str) -> None:
    recorder = Rerun()
    eager, graphs = staged(backend, None, name), staged(backend, recorder, name)
    for step, count in enumerate([*range(NUM_ROWS, 0, -1), NUM_ROWS]):
        check_step(eager, graphs, step, count)
    assert recorder.num_recorded == len(graph_sizes(NUM_ROWS)) and recorder.num_replays == 2 * NUM_ROWS


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_a_tape_is_recorded_by_the_first_batch_of_its_size_and_gives_the_bits_of_the_eager_way(name: str) -> None:
    eager, taped = staged("cpu", None, name), staged("cpu", None, name)
    record, recorded = ops_module.select(torch.device("cpu")).record, 0
    assert record is not None

    def counted(run: Callable[[], object]) -> Callable[[], None]:
        nonlocal recorded
        recorded += 1
        return record(run)

    taped.runner.record_graphs(counted, range(1, 5), lazily=True)
    assert recorded == 0
    for step, (count, seen) in enumerate([(5, 1), (2, 3), (2, 3), (6, 3)]):  # beside 1, 4, 4 and 0 rows that rest
        check_step(eager, taped, step, count)
        assert recorded == seen


def test_padding_writes_nothing_and_nothing_of_an_earlier_batch_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Rerun()
    graphs = staged("reference", recorder)
    graphs.run(decode([0, 1, 2, 3, 4, 5]))
    before = graphs.pool.data.clone()
    seen: list[ForwardBatch] = []
    forward = graphs.runner.decoder.forward_embedded

    def watched(batch: ForwardBatch, *others: Any) -> torch.Tensor:
        seen.append(batch)
        return forward(batch, *others)

    monkeypatch.setattr(graphs.runner.decoder, "forward_embedded", watched)
    graphs.run(decode([4, 1, 0, 2, 5], step=1))
    (batch,) = seen
    assert batch.token_ids.tolist() == [25, 22, 21, 23, 26, 0] and batch.query_start.tolist() == list(range(7))
    assert (batch.slot_mapping[-1], batch.last_key[-1], batch.context_len[-1]) == (-1, -1, 0)
    assert batch.seq_row.tolist() == [4, 1, 0, 2, 5, NUM_ROWS], "padding has the reserved row of the block table"
    changed = (before.view(torch.int32) != graphs.pool.data.view(torch.int32)).flatten(3).any(3).any(2).any(1)
    touched = {int(graphs.pool.block_table[row, (len(PROMPTS[row]) + 1) // 4]) for row in (4, 1, 0, 2, 5)}
    assert set(changed.nonzero().flatten().tolist()) == touched


def test_a_token_that_is_still_on_the_device_is_read_before_the_replay() -> None:
    graphs, eager = staged("reference", Rerun()), staged("reference", None)
    first = graphs.run(decode([0, 3, 5])).tokens
    assert eager.run(decode([0, 3, 5])).tokens == first
    known = [Rows(row, [len(PROMPTS[row]) + 1], [id], sample=True) for row, id in zip((0, 3, 5), first, strict=True)]
    ahead = [replace(one, ids=[-1]) for one in known]
    for want, have in zip(logits_of(eager, known), logits_of(graphs, ahead), strict=True):
        assert torch.equal(want, have)


def test_plans_with_more_than_decodes_go_the_eager_way() -> None:
    recorder = Rerun()
    graphs = staged("reference", recorder)
    assert recorder.num_replays == 0, "prefills"
    segment = graphs.segment([7])
    for plan in (
        [*decode([0]), Rows(1, [5, 6], [9, 9])],
        [Rows(1, [7], [9], into=segment), *decode([2])],
    ):
        graphs.run(plan)
    assert recorder.num_replays == 0
    graphs.run(decode([3]))
    assert recorder.num_replays == 1


def test_every_batch_gets_the_smallest_graph_that_holds_it() -> None:
    assert graph_sizes(1) == [1] and graph_sizes(6) == [1, 2, 4, 6]
    assert graph_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert graph_sizes(5000)[-1] == MAX_GRAPH_ROWS
    graphs = staged("reference", Rerun()).runner._graphs
    assert graphs is not None
    chosen: dict[int, int | None] = {}
    stage = staged("reference", None)
    stage.runner.run = lambda arena, plan: chosen.update({plan.num_seqs: graphs.size_for(plan)}) or _refuse()
    for count in range(1, NUM_ROWS + 1):
        with pytest.raises(InterruptedError):
            stage.run(decode(list(range(count))))
    assert chosen == {1: 1, 2: 2, 3: 4, 4: 4, 5: 6, 6: 6}


def _refuse() -> Any:
    raise InterruptedError


def test_buffers_that_moved_are_noticed() -> None:
    graphs = staged("reference", Rerun())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(graphs.runner.decoder), "reserved_tokens", property(lambda _: 10**6))
        plan = decode([0])
        with pytest.raises(AssertionError, match="stay where they were recorded"):
            graphs.run(plan)


class NoHost(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: values read by the host, shapes and tensors that depend on them."""

    REFUSED = ("_local_scalar_dense", "nonzero", "lift_fresh", "_to_copy", "unique", "item", "equal", "masked_select")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        assert name not in self.REFUSED, f"{name} inside of a decode step"
        return func(*args, **(kwargs or {}))


class Launches:
    """Stands for a Triton kernel: keeps the grid of every launch."""

    def __init__(self, found: list[Any], name: str) -> None:
        self._found, self._name = found, name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: self._found.append((self._name, grid))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every launch of every Triton kernel, none of which runs."""
    found: list[Any] = []
    for name in ("attention", "store_kv", "rope", "rms_norm", "silu_mul"):
        module = importlib.import_module(f"kvlite.kernels.{name}.kernel")
        for kernel in [each for each in vars(module) if each.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Launches(found, kernel))
    yield found


def test_a_decode_step_neither_reads_the_device_nor_launches_by_its_values(launched: list[Any]) -> None:
    stage = staged("reference", None)
    triton = ops_module._triton()
    assert set(triton.__dataclass_fields__) == {field.name for field in fields(ops_module.Ops)}
    made = stage.runner.decoder
    device_side = type(made)(
        made.config, _random_params(made.config), max_model_len=made.max_model_len, ops=triton, deterministic=False
    )
    runner = ModelRunner(device_side, stage.pool, stage.runner.sampler)
    device_side.reserve(16, 1)
    int32 = {"dtype": torch.int32}
    grids: list[list[Any]] = []
    for context in (1, 90):
        batch = ForwardBatch(
            token_ids=torch.full((4,), 3, **int32), positions=torch.full((4,), context - 1, **int32),
            last_key=torch.full((4,), context - 1, **int32), slot_mapping=torch.full((4,), -1, **int32),
            query_start=torch.arange(5, **int32), context_len=torch.full((4,), context, **int32),
            seq_row=torch.arange(4, **int32), block_table=runner.pool.block_table,
        )  # fmt: skip
        launched.clear()
        with NoHost(), torch.inference_mode():
            device_side.forward(batch, runner.pool.data)
        grids.append(list(launched))
    assert grids[0] == grids[1] and {name for name, _ in grids[0]} >= {"decode_kernel", "store_kv_kernel"}


def _random_params(config: Any) -> dict[str, torch.Tensor]:
    from kvlite.models.decoder import parameters
    from kvlite.models.qwen3 import QWEN3

    return {param.name: torch.ones(param.shape) for param in parameters(config, QWEN3.keys)}


def test_a_read_of_the_device_is_caught() -> None:
    with pytest.raises(AssertionError, match="inside of a decode step"), NoHost():
        torch.ones(3).sum().item()
