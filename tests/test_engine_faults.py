"""Bad input is a clear error that changes nothing; a fault ends what it touched and the engine goes on."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlite import (
    CapacityError,
    ConfigError,
    Engine,
    EngineClosedError,
    EngineConfig,
    FinishReason,
    InvalidRequestError,
    ModelLoadError,
    RequestOptions,
    SamplingParams,
)
from tests.engines import MAX_LEN, SMALL, VOCAB, engine, essence, ids, pool_of, tiny

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def one() -> Any:
    with engine(deterministic=True) as made:
        yield made


@pytest.mark.parametrize(
    ("prompt", "params", "param", "said"),
    [
        ([], {}, "prompt", "empty"),
        ("", {}, "prompt", "empty"),
        ([5] * MAX_LEN, {}, "prompt", f"at most {MAX_LEN - 1}"),
        ([5, VOCAB], {}, "prompt", f"id {VOCAB} at index 1 .* 0 to {VOCAB - 1}"),
        ([5, -1], {}, "prompt", "id -1 at index 1"),
        ([5, 1.5], {}, "prompt", "integer token ids"),
        ([5, True], {}, None, ""),
        ([5, 1 << 40], {}, "prompt", "out of range"),
        (None, {}, "prompt", "must be text or a flat list"),
        (5, {}, "prompt", "must be text or a flat list"),
        ({"a": 1}, {}, "prompt", "must be text or a flat list"),
        ("half a character: \ud800", {}, "prompt", "cannot be tokenised"),
        ([5, 1 << 80], {}, "prompt", "integer token ids"),
        ([5] * 250, {"max_tokens": 7}, "max_tokens", "1 to 6"),
        ([5], {"n": 9}, "n", "limit of 8"),
        ([5], {"logprobs": 21}, "logprobs", "limit of 20"),
        ([5], {"stop": ["a"] * 5}, "stop", "limit of 4"),
        ([5], {"stop": "x" * 65}, "stop", "at most 64"),
        ([5], {"stop_token_ids": [VOCAB]}, "stop_token_ids", "out of range"),
        ([5], {"logit_bias": {VOCAB: 1.0}}, "logit_bias", "out of range"),
        ([5], {"min_tokens": 300}, "min_tokens", "300"),
    ],
)
def test_bad_requests_name_their_field_and_change_nothing(
    one: Engine, prompt: Any, params: dict[str, Any], param: str | None, said: str
) -> None:
    neighbour = one.stream(ids(20, 5), GREEDY)
    first = next(neighbour)
    if param is not None:
        with pytest.raises(InvalidRequestError, match=said) as caught:
            one.generate([ids(5), prompt], SamplingParams(**params))
        if param == "prompt":
            assert caught.value.param == "prompts[1]"
        else:  # Some parameters suit no prompt, so that the first one is named.
            assert caught.value.message.startswith(f"{param}: ")
    assert one.num_unfinished == 1, "no prompt of the list has started"
    rest = list(neighbour)
    tokens = tuple(id for delta in [first, *rest] for id in delta.token_ids)
    assert tokens == one.generate(ids(20, 5), GREEDY).token_ids


@pytest.mark.parametrize(
    ("options", "param"),
    [
        (RequestOptions(priority=1.5), "priority"),  # pyright: ignore[reportArgumentType]
        (RequestOptions(priority=None), "priority"),  # pyright: ignore[reportArgumentType]
        (RequestOptions(priority=1 << 40), "priority"),
        (RequestOptions(priority=1), "priority"),
        (RequestOptions(tenant=-1), "tenant"),
        (RequestOptions(reuse="of"), "reuse"),  # pyright: ignore[reportArgumentType]
        (RequestOptions(timeout_s="soon"), "timeout_s"),  # pyright: ignore[reportArgumentType]
        (RequestOptions(timeout_s=0), "timeout_s"),
        (RequestOptions(timeout_s=10**400), "timeout_s"),
    ],
)
def test_bad_options_never_reach_the_core(one: Engine, options: RequestOptions, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        one.validate(ids(5), GREEDY, options)
    assert caught.value.param == param


@pytest.mark.parametrize("messages", [None, "hello", [5], [{"role": "user", "content": "\ud800"}]])
def test_what_is_no_conversation_is_a_clear_error(one: Engine, messages: Any) -> None:
    with pytest.raises(InvalidRequestError):
        one.chat(messages)


def test_a_bias_in_whole_numbers_fails_no_step(one: Engine) -> None:
    assert one.generate(ids(5), replace(GREEDY, logit_bias={9: 100})).token_ids == (9,) * 12


def test_a_request_larger_than_the_pool_is_refused_at_the_door() -> None:
    with engine(kv_cache_bytes=pool_of(4)) as small:
        with pytest.raises(InvalidRequestError, match="pool holds 64"):
            small.generate(ids(40), replace(GREEDY, max_tokens=30))
        with pytest.raises(InvalidRequestError, match="pool holds 64"):
            small.generate(ids(80), GREEDY)
        assert len(small.generate(ids(40), replace(GREEDY, max_tokens=24)).token_ids) == 24


def test_a_full_queue_is_a_capacity_error(one: Engine) -> None:
    with engine(max_num_waiting=1) as narrow:
        narrow.add(ids(4), GREEDY)
        with pytest.raises(CapacityError, match="1 requests are waiting"):
            narrow.add(ids(4), GREEDY)


def test_aborting_twice_or_an_unknown_handle_is_fine(one: Engine) -> None:
    handle = one.add(ids(4), GREEDY)
    assert one.abort(handle)
    assert [delta.finish_reason for delta in one.step()] == [FinishReason.CANCELLED]
    assert not one.abort(handle) and not one.abort(12345)


def test_a_closed_engine_says_so_and_ends_its_streams() -> None:
    made = engine()
    stream = made.stream(ids(5), GREEDY)
    next(stream)
    made.add(ids(5), GREEDY)
    assert {delta.finish_reason for delta in made.close()} == {FinishReason.CANCELLED}
    with pytest.raises(EngineClosedError):
        list(stream)
    for call in (lambda: made.generate(ids(5)), lambda: made.add(ids(5)), made.step, made.clear_cache):
        with pytest.raises(EngineClosedError):
            call()
    assert made.close() == [] and not made.abort(0)


def test_wrong_models_and_settings_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no such directory"):
        Engine(tmp_path / "nothing")
    bare = tmp_path / "bare"
    shutil.copytree(tiny(), bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json"):
        Engine(bare, **SMALL)
    torn = tmp_path / "torn"
    shutil.copytree(tiny(), torn)
    shard = torn / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
        Engine(torn, **SMALL)
    endless = tmp_path / "endless"
    shutil.copytree(tiny(), endless)
    (endless / "generation_config.json").write_text(json.dumps({"eos_token_id": VOCAB}))
    with pytest.raises(ModelLoadError, match=f"eos_token_id {VOCAB}, but the model has {VOCAB} ids"):
        Engine(endless, **SMALL)
    with pytest.raises(ConfigError, match=f"{MAX_LEN} positions"):
        engine(max_model_len=MAX_LEN + 1)
    with pytest.raises(ConfigError, match="hold no block"):
        engine(kv_cache_bytes=100)
    with pytest.raises(ConfigError, match=r"kv_cache_bytes: .* cannot be had"):
        engine(kv_cache_bytes=1 << 46)
    with pytest.raises(ConfigError, match="unknown setting"):
        engine(max_seqs=3)


def test_a_step_that_fails_ends_its_requests_with_an_error_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with engine(deterministic=True) as made:
        expected = made.generate(ids(20), GREEDY)
        victims = [made.add(ids(10, seed), GREEDY) for seed in range(3)]
        made.step()
        with monkeypatch.context() as patch:
            patch.setattr(made._runner.decoder, "embed", lambda *_: 1 / 0)
            deltas = made.step()
        assert sorted(delta.handle for delta in deltas) == victims
        assert {delta.finish_reason for delta in deltas} == {FinishReason.ERROR}
        assert all(delta.error and "ZeroDivisionError" in delta.error and delta.usage for delta in deltas)
        assert essence(made.generate(ids(20), GREEDY)) == essence(expected)
        assert made.stats().num_failed_steps == 1 and made.stats().owned_blocks == 0


def test_a_row_without_usable_logits_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(deterministic=True) as made:
        expected = made.generate([ids(10, 1), ids(10, 2)], GREEDY)
        handles = [made.add(ids(10, 1), GREEDY), made.add(ids(10, 2), GREEDY)]
        collected = {handle: list[int]() for handle in handles}
        ends: dict[int, Any] = {}
        logits = made._runner.decoder.logits

        def poisoned(hidden: torch.Tensor) -> torch.Tensor:
            out = logits(hidden)
            out[0] = torch.nan
            return out

        for step in range(14):
            with monkeypatch.context() as patch:
                if step == 3:
                    patch.setattr(made._runner.decoder, "logits", poisoned)
                for delta in made.step():
                    collected[delta.handle] += delta.token_ids
                    ends[delta.handle] = delta.finish_reason
        assert ends == {handles[0]: FinishReason.ERROR, handles[1]: FinishReason.LENGTH}
        assert tuple(collected[handles[1]]) == expected[1].token_ids
        assert tuple(collected[handles[0]]) == expected[0].token_ids[:3]


class Interrupting:
    """A core during whose next step Ctrl-C is pressed."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.armed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)

    def step(self, *args: Any) -> None:
        self.core.step(*args)
        if self.armed:
            self.armed = False
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("where", ["core", "forward"])
def test_ctrl_c_in_a_step_loses_nothing_of_the_others(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A shell starts what it puts into the background with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with engine(deterministic=True) as made:
        expected = made.generate([ids(10, 1), ids(10, 2)], GREEDY)
        stopped, other = made.stream(ids(10, 1), GREEDY), made.stream(ids(10, 2), GREEDY)
        shown = [next(other), next(stopped)]
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if where == "core":
                patch.setattr(made, "_core", Interrupting(made._core))
            else:
                patch.setattr(made._runner.decoder, "embed", lambda *_: signal.raise_signal(signal.SIGINT))
            list(stopped)
        rest = list(other)
        assert tuple(id for delta in [shown[0], *rest] for id in delta.token_ids) == expected[1].token_ids
        assert essence(made.generate(ids(10, 1), GREEDY)) == essence(expected[0])
        assert made.step() == [] and made.num_unfinished == 0
        made._core.audit()


@pytest.mark.parametrize("where", ["core", "forward"])
def test_ctrl_c_in_a_list_ends_it_and_leaves_the_engine_usable(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with engine(deterministic=True, max_num_waiting=2, max_num_seqs=2) as made:
        prompts = [ids(5 + n, n) for n in range(9)]
        expected = made.generate(prompts, GREEDY)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if where == "core":
                patch.setattr(made, "_core", Interrupting(made._core))
            else:
                patch.setattr(made._runner.decoder, "embed", lambda *_: signal.raise_signal(signal.SIGINT))
            made.generate(prompts, GREEDY)
        assert [essence(output) for output in made.generate(prompts, GREEDY)] == [essence(each) for each in expected]
        assert made.step() == [] and made.num_unfinished == 0 and made._boxes == {}
        made._core.audit()


def test_a_core_that_plans_nothing_for_ever_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(deterministic=True) as made:
        made.add(ids(5), GREEDY)
        monkeypatch.setattr(made, "make_plan", list)
        with pytest.raises(Exception, match="nothing is planned"):
            for _ in range(2000):
                made.step()


def test_the_start_says_what_fits_and_how_long_each_phase_took(one: Engine) -> None:
    rows = dict(one.startup.rows())
    assert "tokens" in rows["fits"] and "blocks of 16 tokens" in rows["KV cache"]
    assert list(one.startup.phase_s) == ["tokenizer", "weights", "KV cache", "decode graphs"]
    assert one.startup.kv_tokens == one.limits.pool_tokens
    assert isinstance(one.config, EngineConfig)
