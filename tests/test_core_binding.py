"""kvlite._core: stub and module agree, arenas are filled in place, every error arrives as the right exception."""

from __future__ import annotations

import ast
import inspect
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvlite import _core
from kvlite.runner.plan import Layout
from tests.core_driver import CONFIG, REQUEST, Driver

# -- the stub ---------------------------------------------------------------------------------------------------------


def stub_signature(function: ast.FunctionDef) -> str:
    """As `inspect` prints the parameters, annotations left out."""
    function = ast.parse(ast.unparse(function)).body[0]  # type: ignore[assignment]
    for node in ast.walk(function.args):
        if isinstance(node, ast.arg):
            node.annotation = None
    names = [a.arg for a in function.args.args]
    parts = ast.unparse(function.args)
    return f"({parts})" if not names or names[0] not in {"self", "cls"} else f"({parts.partition(', ')[2]})"


def module_signature(function: Any) -> str:
    signature = inspect.signature(function)
    kept = [
        p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) if p.kind is inspect.Parameter.POSITIONAL_ONLY else p
        for p in signature.parameters.values()
        if p.name not in {"self", "cls"}
    ]
    return str(signature.replace(parameters=kept)).replace('"', "'")


def stub_names(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    named = {n.name: n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return {name: node for name, node in named.items() if not name.startswith("_") or name == "__new__"}


def test_stub_and_module_name_the_same_things_with_the_same_signatures():
    tree = ast.parse(Path(str(_core.__file__)).with_name("_core.pyi").read_text(encoding="utf-8"))
    stub = stub_names(tree.body)
    assert sorted(stub) == sorted(name for name in dir(_core) if not name.startswith("_"))
    for name, node in stub.items():
        if isinstance(node, ast.FunctionDef):
            assert module_signature(getattr(_core, name)) == stub_signature(node), name
    core_class = stub["Core"]
    assert isinstance(core_class, ast.ClassDef)
    methods = stub_names(core_class.body)
    assert sorted(methods.keys() - {"__new__"}) == sorted(n for n in dir(_core.Core) if not n.startswith("_"))
    for name, node in methods.items():
        assert isinstance(node, ast.FunctionDef)
        target = _core.Core if name == "__new__" else getattr(_core.Core, name)
        assert module_signature(target) == stub_signature(node), name


def test_exceptions_have_the_parents_that_the_stub_states():
    assert _core.InvalidArgument.__bases__ == (ValueError,)
    assert _core.CapacityError.__bases__ == (Exception,)
    assert _core.Fault.__bases__ == (RuntimeError,)


# -- layout and plans -------------------------------------------------------------------------------------------------


def test_the_python_mirror_of_the_layout_equals_the_cores():
    sizes = ("max_num_batched_tokens", "max_num_seqs", "max_model_len", "block_size", "max_num_waiting", "max_segments")
    for changes in ({}, {"block_size": 3, "max_model_len": 61, "max_num_seqs": 1, "max_num_waiting": 77}):
        config = CONFIG | changes
        mirror = Layout.of(**{name: config[name] for name in sizes})
        layout = _core.Core.layout(**config)
        assert list(layout) == list(mirror.offsets)
        assert {name: offset for name, (offset, _) in layout.items()} == dict(mirror.offsets)
        assert {name: shape for name, (_, shape) in layout.items()} == dict(mirror.shapes)
        assert _core.Core.arena_len(**config) == mirror.size


def test_a_request_runs_to_its_length_through_the_arenas():
    driver = Driver()
    handle = driver.add([1, 2, 3, 4, 5])
    driver.step()
    header = driver.region("header")
    assert (header[0], header[1], header[2], header[3]) == (1, 5, 1, 1)
    assert driver.region("token_ids")[:5].tolist() == [1, 2, 3, 4, 5]
    assert driver.region("positions")[:5].tolist() == [0, 1, 2, 3, 4]
    assert driver.region("admitted")[0].tolist()[:2] == [handle, 0]
    driver.complete()
    committed, finished = driver.run()
    assert [row[1:] for row in committed] == [[0, 7], [1, 7], [2, 7]]
    assert finished == [[handle, 0, 1]]
    stats = driver.core.stats()
    assert stats["finished_total"] == (0, 1, 0, 0, 0)
    assert (stats["generated_tokens_total"], stats["num_requests"], stats["owned_blocks"]) == (3, 0, 0)
    driver.core.audit()


def test_abort_and_finish_end_once_and_say_so():
    driver = Driver()
    first, second = driver.add([1, 2, 3]), driver.add([4, 5, 6], max_tokens=50)
    driver.step()
    driver.complete()
    assert driver.core.abort(first) is True
    assert driver.core.finish(second, 0, 1, 0) is True
    _, finished = driver.run(4)
    assert sorted(finished) == sorted([[first, 0, 2], [second, 0, 0]])
    assert driver.core.abort(first) is False
    assert driver.core.finish(second, 0, 1, 0) is False
    assert driver.core.abort(12345) is False


def test_clearing_the_cache_frees_what_ended_requests_left():
    driver = Driver()
    driver.add(list(range(20)))
    driver.run()
    assert driver.core.stats()["cached_blocks"] > 0
    driver.core.clear_cache()
    assert driver.core.stats()["free_blocks"] == 64


def test_a_deadline_on_the_callers_clock_ends_a_request():
    driver = Driver()
    handle = driver.add([1, 2, 3], max_tokens=50, deadline_ms=500)
    driver.step()
    assert driver.region("header")[13] == 500
    driver.complete()
    driver.now_ms = 500
    assert driver.run(3)[1] == [[handle, 0, 4]]


def test_two_threads_may_call_at_once():
    driver = Driver(max_num_waiting=5000)
    done = threading.Event()

    def add() -> None:
        for _ in range(2000):
            driver.add([1, 2, 3])
        done.set()

    thread = threading.Thread(target=add)
    thread.start()
    finished, give_up = 0, time.monotonic() + 30
    while finished < 2000 and time.monotonic() < give_up:
        driver.step()
        finished += int(driver.region("header")[12])
        driver.complete()
    thread.join()
    assert done.is_set() and finished == 2000
    driver.core.audit()


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "prompt", "param"),
    [
        ({}, [], "prompt"),
        ({}, [1, 100], "prompt"),
        ({}, [-1], "prompt"),
        ({}, [1] * 64, "prompt"),
        ({"max_tokens": 0}, [1], "max_tokens"),
        ({"max_tokens": -5}, [1], "max_tokens"),
        ({"max_tokens": 64}, [1], "max_tokens"),
        ({"min_tokens": 4}, [1], "min_tokens"),
        ({"n": 0}, [1], "n"),
        ({"n": 5}, [1], "n"),
        ({"n": 2**40}, [1], "n"),
        ({"tenant": 2**31}, [1], "tenant"),
        ({"stop_token_ids": list(range(65))}, [1], "stop_token_ids"),
    ],
)
def test_a_bad_request_names_its_parameter_and_changes_nothing(changes: dict[str, Any], prompt: list[int], param: str):
    driver = Driver()
    with pytest.raises(_core.InvalidArgument) as caught:
        driver.add(prompt, **changes)
    assert caught.value.param == param
    assert driver.core.stats()["num_requests"] == 0


def test_a_full_queue_is_capacity_and_not_the_callers_fault():
    driver = Driver()
    driver.add([1])
    driver.add([2])
    with pytest.raises(_core.CapacityError, match="retry later"):
        driver.add([3])


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"num_blocks": 0}, "num_blocks"),
        ({"num_blocks": -1}, "num_blocks"),
        ({"watermark_ratio": float("nan")}, "watermark_ratio"),
        ({"policy": "lottery"}, "policy"),
        ({"max_passes": (1 << 20) + 1}, "max_passes"),
        ({"max_num_batched_tokens": 3}, "max_num_batched_tokens"),
        ({"num_bloks": 1}, "num_bloks"),
        ({"segment_cache_ratio": 1.5}, "segment_cache_ratio"),
        ({"max_segments": 0}, "max_segments"),
        ({"canonical_prefix": [100]}, "canonical_prefix"),
        ({"canonical_prefix": [1] * 63}, "canonical_prefix"),
    ],
)
def test_a_bad_setting_is_named_by_constructor_and_layout_alike(changes: dict[str, Any], param: str):
    arenas = (np.zeros(1, np.int32), np.zeros(1, np.int32))
    for call in (lambda **c: _core.Core(arenas=arenas, **c), _core.Core.layout, _core.Core.arena_len):
        with pytest.raises(_core.InvalidArgument) as caught:
            call(**(CONFIG | changes))
        assert caught.value.param == param


def test_a_missing_setting_is_named():
    with pytest.raises(_core.InvalidArgument, match="vocab_size is missing"):
        _core.Core.layout(**{k: v for k, v in CONFIG.items() if k != "vocab_size"})


def test_arenas_must_be_two_separate_writable_int32_arrays_of_the_right_length():
    size = _core.Core.arena_len(**CONFIG)
    good = np.zeros(size, np.int32)
    frozen = np.zeros(size, np.int32)
    frozen.flags.writeable = False
    for bad in (
        np.zeros(size - 1, np.int32),
        np.zeros(size, np.int64),
        np.zeros(size, np.float32),
        np.zeros((size, 1), np.int32),
        np.zeros(2 * size, np.int32)[::2],
        frozen,
        good,
    ):
        with pytest.raises(_core.InvalidArgument) as caught:
            _core.Core(arenas=(good, bad), **CONFIG)
        assert caught.value.param.startswith("arenas")
    with pytest.raises((TypeError, BufferError)):
        _core.Core(arenas=(good, [0] * size), **CONFIG)  # type: ignore[arg-type]


def test_prompts_must_be_contiguous_int32():
    driver = Driver()
    for bad in (np.zeros(4, np.int64), np.zeros((2, 2), np.int32), np.zeros(8, np.int32)[::2]):
        with pytest.raises(_core.InvalidArgument) as caught:
            driver.core.add(bad, **REQUEST)
        assert caught.value.param == "prompt_ids"


def test_a_step_over_an_incomplete_plan_is_refused():
    driver = Driver()
    driver.add([1, 2, 3])
    driver.step()
    with pytest.raises(_core.InvalidArgument, match="is not complete"):
        driver.core.step(driver.idx, 0)
    for idx in (2, -1):
        with pytest.raises(_core.InvalidArgument) as caught:
            driver.core.step(idx, 0)
        assert caught.value.param == "arena_idx"
