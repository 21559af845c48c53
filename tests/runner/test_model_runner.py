"""One plan carried out: what lands in the arena, and what a fault leaves behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvlite import SamplingParams
from kvlite.runner import model_runner
from kvlite.runner.plan import Status
from tests.engines import engine, essence, ids

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def test_many_logit_rows_are_computed_in_slices_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3, logprobs=3, ignore_eos=True)
    with engine(deterministic=True) as made:
        whole = made.generate([ids(70, 1), ids(50, 2)], params)
        monkeypatch.setattr(model_runner, "LOGITS_ROWS", 7)
        sliced = made.generate([ids(70, 1), ids(50, 2)], params)
    assert [essence(output) for output in sliced] == [essence(output) for output in whole]


def test_a_token_that_is_still_on_the_device_is_read_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan made ahead of the samples says -1; the runner then takes the row's last token."""
    with engine(deterministic=True) as made:
        prompts = [ids(9, 1), ids(12, 2)]
        expected = [essence(output) for output in made.generate(prompts, GREEDY)]
        run = made._runner.run
        replaced = 0

        def ahead(arena: Any, plan: Any) -> Any:
            nonlocal replaced
            alone = np.diff(plan.query_start) == 1
            decodes = plan.query_start[:-1][alone & (plan.context_len > 12)]
            replaced += len(decodes)
            plan.token_ids[decodes] = -1
            return run(arena, plan)

        monkeypatch.setattr(made._runner, "run", ahead)
        assert [essence(output) for output in made.generate(prompts, GREEDY)] == expected
        assert replaced == 4 + 7


def test_a_fault_marks_the_plan_and_leaves_its_samples_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine() as made:
        made.add(ids(5), GREEDY)
        made.make_plan()
        plan = made._plan
        assert plan is not None
        arena = made._arenas[made._arena_idx]
        with monkeypatch.context() as patch:
            patch.setattr(made._runner.decoder, "logits", lambda _: torch.zeros(0)[5])
            result = made._runner.run(arena, plan)
        assert isinstance(result.fault, IndexError) and not result.logprobs
        status, done = (int(arena.tensors[name][0]) for name in ("status", "done_plan_id"))
        assert (status, done) == (Status.FAILED, plan.plan_id) and plan.sampled.tolist() == [-1]


def test_a_captured_row_hands_out_its_next_raw_logits_once() -> None:
    with engine(deterministic=True) as made:
        made.add(ids(5), replace(GREEDY, logit_bias={9: -50.0}))
        made.make_plan()
        plan = made._plan
        assert plan is not None
        seq_row = int(plan.sample[0, 1])
        made._runner.captured |= {seq_row, seq_row + 1}
        arena = made._arenas[made._arena_idx]
        first, second = made._runner.run(arena, plan), made._runner.run(arena, plan)
        assert list(first.logits) == [seq_row] and not second.logits
        assert made._runner.captured == {seq_row + 1}
        logits = first.logits[seq_row]
        assert logits.shape == (made._runner.decoder.config.vocab_size,) and logits.dtype == torch.float32
        assert int(logits.argmax()) == int(plan.sampled[0])
