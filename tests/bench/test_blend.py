"""The blend bench on tiny engines: its gates stop what is wrong, its counts are right, the scenario gives its keys."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvlite import Engine
from kvlite.bench import blend, blend_serving, blending, make_model
from kvlite.bench.__main__ import main
from kvlite.bench.blend import check, check_counts, choices
from kvlite.bench.blending import Asked, Choice, documents, flat, prompts, token_layers, warm
from kvlite.bench.embedded import Setup, opened
from kvlite.bench.errors import BenchError
from kvlite.bench.limits import prompt_flops
from kvlite.bench.make_model import Shape
from kvlite.models import load_config
from kvlite.reuse_types import Reuse, ReuseMode, ReuseReport, Segment

TINY = Shape("llama", 3, 64, 4, 2, 16, 96, 512, 2048)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tiny")
    make_model.make(TINY, found, seed=0)
    return found


@pytest.fixture
def engine(folder: Path) -> Generator[Engine]:
    with opened(Setup(folder, "float32", 1, 8, 2048)) as engine:
        yield engine


def report(prefix: int = 0, blended: int = 85, recomputed: int = 15, computed: int = 64) -> ReuseReport:
    return ReuseReport(ReuseMode.BLEND, False, prefix, blended, recomputed, computed)


def asked(found: ReuseReport) -> Asked:
    return Asked(1.0, 20, found, found.cached_tokens)


def test_prompts_share_no_beginning_and_no_order_but_their_documents() -> None:
    library = documents(500, 6, 40, seed=1)
    stream = prompts(500, library, 6, seed=1)
    first, second = next(stream), next(stream)
    assert flat(first)[:16] != flat(second)[:16]
    assert [part for part in first if isinstance(part, Segment)] != [p for p in second if isinstance(p, Segment)]
    assert sorted(map(len, (flat(first), flat(second)))) == [6 * 40 + 64] * 2
    assert flat(next(prompts(500, library, 6, seed=1))) == flat(first)


def test_every_method_comes_with_every_ratio_and_none_once() -> None:
    found = choices("none,query", "0.05,0.3")
    assert [way.name for way in found] == ["none", "query_5", "query_30"]
    for methods, ratios in (("query,best", "0.1"), ("query", "0.1,x"), ("query", "1.1"), ("query", "nan")):
        with pytest.raises(BenchError):
            choices(methods, ratios)


def test_token_layers_count_selection_and_the_pass_over_new_text(folder: Path) -> None:
    config = load_config(folder)[0]
    query = token_layers(config, Choice("query", 0.15), asked(report()))
    assert query == {"recomputed": 0.15, "selection": 0.32, "computed": round((15 + 64 + 32) / 164, 4)}
    deviation = token_layers(config, Choice("deviation", 0.15), asked(report()))
    assert deviation["selection"] == round(1.2 / 3 * 164 / 100, 4)
    boundary = token_layers(config, Choice("boundary", 0.15), asked(report()))
    assert boundary == {"recomputed": 0.15, "selection": 0.0, "computed": round(79 / 164, 4)}


def test_the_plain_twins_of_a_blended_request_take_as_many_operations(folder: Path) -> None:
    config = load_config(folder)[0]
    weights = 3 * (64 * 128 + 64 * 64 + 3 * 64 * 96)
    wanted = blend_serving.operations(config, asked(report(blended=850, recomputed=150)))
    recomputed, new = 150 * 1064 / 2, 2 * 32 * 1064
    assert wanted == pytest.approx(2 * weights * (150 + 64 + 32) + 4 * 64 * 3 * (recomputed + new), rel=1e-4)
    length, behind = blend_serving.plain_len(config, wanted), blend_serving.plain_len(config, wanted, 800)
    assert prompt_flops(config, weights, length) == pytest.approx(wanted, rel=0.01)
    whole = prompt_flops(config, weights, 800 + behind) - prompt_flops(config, weights, 800)
    assert whole == pytest.approx(wanted, rel=0.01) and behind < length


@pytest.mark.parametrize(
    "wrong",
    [asked(report(prefix=16)), asked(report(blended=84, recomputed=16)), asked(report(computed=65)),
     replace(asked(report()), cached_tokens=100)],
)  # fmt: skip
def test_tokens_by_source_that_do_not_follow_from_lengths_stop_the_run(wrong: Asked) -> None:
    check_counts(asked(report()), 0.15, 100)
    with pytest.raises(BenchError, match=r"are right|the report"):
        check_counts(wrong, 0.15, 100)


def test_the_gate_passes_on_a_right_engine_and_stops_another_token(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = documents(TINY.vocab_size, 3, 50, seed=1)
    warm(engine, TINY.vocab_size, library)
    stream = prompts(TINY.vocab_size, library, 3, seed=1)
    check(engine, next(stream), 150)

    def off_by_one(engine: Engine, prompt: Any, reuse: Reuse) -> Asked:
        found = blending.ask(engine, prompt, reuse)
        return replace(found, token=found.token + (reuse.mode is ReuseMode.BLEND))

    monkeypatch.setattr(blend, "ask", off_by_one)
    with pytest.raises(BenchError, match="wrong before fast: ratio 1 says"):
        check(engine, next(stream), 150)


def test_a_store_too_small_for_the_documents_is_no_warm_store(folder: Path) -> None:
    with (
        opened(Setup(folder, "float32", 1, 8, 512)) as engine,
        pytest.raises(BenchError, match="did not stay in the store"),
    ):
        warm(engine, TINY.vocab_size, documents(TINY.vocab_size, 16, 64, seed=1))


def test_a_hit_rate_that_decays_stops_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = 0

    def forgetful(engine: Engine, prompt: Any, reuse: Reuse) -> Any:
        nonlocal served
        served += 1
        found = blending.ask(engine, prompt, reuse)
        return found if served < 20 else replace(found, report=replace(found.report, segments=()))

    monkeypatch.setattr(blend_serving, "STORE_MODEL", folder)
    monkeypatch.setattr(blend_serving, "ask", forgetful)
    monkeypatch.setattr(blend_serving, "HUNDRED", 10)
    options = blend.parse(["--queries", "30", "--dtype", "float32", "--threads", "1"])
    with pytest.raises(BenchError, match="decays over novel queries"):
        blend_serving.hit_rates(options)


def test_the_scenario_ends_in_its_keys(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(blend_serving, "STORE_MODEL", folder)
    monkeypatch.setattr(blend_serving, "HOT_LEN", 128)
    monkeypatch.setattr(blend_serving, "HUNDRED", 10)
    command = f"bench blend --model {folder} --dtype float32 --threads 1 --lengths 256,1024,9999 --rounds 1"
    command += " --methods none,boundary,deviation,query --ratios 0.15 --queries 30"
    monkeypatch.setattr(sys, "argv", command.split())
    assert main() == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    keys = {f"{what}_query_15_1k" for what in ("x_ttft", "ttft_ms", "computed", "selection")}
    keys |= {"ttft_ms_exact_256", "x_ttft_none_1k", "x_ttft_boundary_15_256", "x_neighbour_delay", "x_neighbour_step"}
    keys |= {"x_neighbour_delay_deep", "neighbour_steps_blend"}
    keys |= {"fit_exact", "fit_blend", "kv_bytes_per_request_blend", "kv_bytes_store", "store_hit_rates"}
    assert keys <= set(found)
    assert not any("9999" in key for key in found)
    assert found["fit_exact"] > found["fit_blend"] >= 1
    assert len(found["store_hit_rates"]) == 3
